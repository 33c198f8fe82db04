"""Barriers, waits and fences of compiled kernels left out one at a time: the executor must notice. ``on_ptx`` runs this file.

A statement counts as noticed if a launch without it has a note, ends with a fault, or writes other bits.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import comparison
import on_ptx
import pytest
import test_cuda
import torch
from executor import ExecutionError, Module, Options

import flowkern
from flowkern import OPS
from flowkern._core import nvrtc
from flowkern.ops.autoregressive import cuda

#: What orders one access after another. Without ``tcgen05.wait``: the executor loads and stores tensor memory at once.
ORDERING = re.compile(
    r"(?:@!?%\w+\s+)?\b(?:bar\.sync|barrier\.sync|bar\.warp\.sync|cp\.async\.wait_group|wgmma\.fence|wgmma\.wait_group|"
    r"fence\.proxy)\b[^;]*;"
)
#: A kernel without a wait may never end.
OPTIONS = Options(limit=10**7)


class Launch(NamedTuple):
    """A launch, and what its storages held before it."""

    run: on_ptx.Run
    before: list[tuple[torch.UntypedStorage, torch.UntypedStorage]]

    def results(self, text: str) -> tuple[str, list[bytes]]:
        """What the launch of a changed kernel says, and what all storages hold then."""
        for storage, held in self.before:
            storage.copy_(held)
        try:
            said = "".join(note.split(",")[0] for note in self.run.execute(Module(text), OPTIONS).notes[:1])
        except ExecutionError as error:
            said = str(error).splitlines()[0]
        return said, [bytes(storage) for storage, _ in self.before]


def launches(call: Callable[[], Any], kernel: str) -> list[Launch]:
    """Those of a kernel that a call makes."""
    found: list[Launch] = []

    def before(run: on_ptx.Run) -> None:
        if kernel in run.name:
            storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in run.tensors) if s.nbytes()}
            found.append(Launch(run, [(s, s.clone()) for s in storages.values()]))

    on_ptx.LOG.before = before
    try:
        call()
    finally:
        on_ptx.LOG.before = lambda run: None
    assert found
    return found


def outcomes(found: list[Launch]) -> Iterator[tuple[str, str, str]]:
    """Each ordering statement of the kernels, what follows it, and how it is noticed: "" for the same bits without a note."""
    by_text: dict[str, list[Launch]] = collections.defaultdict(list)
    for launch in found:
        by_text[launch.run.text].append(launch)
    for text, of_text in by_text.items():
        told, expected = zip(*(launch.results(text) for launch in of_text), strict=True)
        assert not any(told)
        for match in ORDERING.finditer(text):
            shorter = text[: match.start()] + " " * len(match[0]) + text[match.end() :]
            how = next(
                filter(None, (_noticed(launch.results(shorter), held) for launch, held in zip(of_text, expected, strict=True))),
                "",
            )
            line = text.count("\n", 0, match.start()) + 1
            yield f"{found[0].run.name}, line {line}: {' '.join(match[0].split())}", text[match.end() :], how


def _noticed(found: tuple[str, list[bytes]], expected: list[bytes]) -> str:
    said, held = found
    return said or ("other bits" if held != expected else "")


#: Accesses of what ordering statements order; of global memory alone where nothing is shared.
SHARED = re.compile(
    r"\b(?:ld|st|atom)\.(?:shared|[fubsv]\d)|\b(?:ldmatrix|stmatrix|wgmma\.mma|cp\.async\.c[ag]|tcgen05\.(?:mma|ld|st)\b)"
)


def assert_noticed(found: list[Launch], share: float = 1.0) -> None:
    """Such a share of them is, and every fence and wait, but for those behind the last access to what they order.

    On sm_80 Triton waits twice for the same copies: there the share is of waits, too.

    All are printed, with those that nothing shows to be missing.
    """
    unnoticed, noticed = [], 0
    for statement, rest, how in outcomes(found):
        print(f"{statement:<90} {how or 'the same bits, no note'}")
        noticed += bool(how)
        if not how and SHARED.search(rest):
            unnoticed.append(statement)
    assert noticed
    may = r": (@\S+ )?(bar|cp\.async)" if on_ptx.TARGET == "sm_80" else r": (@\S+ )?bar"
    assert all(re.search(may, statement) for statement in unnoticed), "\n".join(unnoticed)
    assert noticed >= share * (noticed + len(unnoticed)), "\n".join(unnoticed)


def results_of(name: str) -> None:
    """The op on some of its samples, with gradients."""
    for sample in comparison.samples(OPS[name], limit=30000)[:2]:
        comparison.results(OPS[name].function, sample)


@pytest.mark.parametrize("kernel", ["map_kernel", "product_kernel"])
def test_the_linear_map(kernel: str) -> None:
    assert_noticed(launches(lambda: results_of("invertible_linear"), kernel))


def test_the_screen_of_nearest_code() -> None:
    codebook = torch.randn(140, 130)
    x = codebook[torch.randint(0, 140, (66,))] + 0.3 * torch.randn(66, 130)
    # On sm_100 barriers stand on both sides of fences and of waits for tensor cores, of which one is enough.
    share = {"sm_80": 0.9, "sm_90": 1.0, "sm_100": 0.4}[on_ptx.TARGET]
    assert_noticed(launches(lambda: flowkern.ops.nearest_code(x, codebook), "screen"), share)


#: Samples of csrc/cuda: several panels, staged weights, products longer than a warp.
NAMES = ("shuffled", "chain", "few-steps")


@pytest.mark.parametrize("kernel", ["autoregressive_inverse", "autoregressive_inverse_backward"])
def test_the_cuda_kernels(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if nvrtc.missing():
        pytest.skip(nvrtc.missing())
    monkeypatch.setattr(cuda, "limits_of", lambda device: (1, 232448))
    test_cuda.use_tile(monkeypatch, 16)
    chosen = [s for s in test_cuda.samples(torch.float32) if s.name in NAMES]

    def call() -> None:
        for sample in chosen:
            test_cuda.run(sample)
            test_cuda.pulled_back(sample)

    # A barrier follows every phase, also where the next one reads nothing of it.
    assert_noticed(launches(call, f"{kernel}."), 0.75)
