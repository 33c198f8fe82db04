"""Fixtures for all tests: fixed seeds, and outputs that start as NaN between canaries."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparison import NEEDS_GPU, WAYS, running

from flowkern._core import backend as _backend

#: Whether Triton's own interpreter runs the kernels, and not their PTX as in ``ptx/``.
INTERPRETER = os.environ.get("TRITON_INTERPRET", "0") == "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _interpreter_at_its_fastest() -> None:
    """Spares Triton's interpreter what changes no result and takes half of its time."""
    if not INTERPRETER:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    # Sums and products of integers are computed twice, for an assertion that is off.
    builder, patch = interpreter.interpreter_builder, interpreter._patch_lang
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    # A launch replaces the language of its kernel's module until it ends; a device function replaces that of its own
    # module at each call and for good, of which one call is enough.
    seen: set[str] = set()

    def patched_once(fn: Any) -> Any:
        if not tl.core.is_builtin(tl.load) and fn.__module__ in seen:
            return None
        seen.add(fn.__module__)
        return patch(fn)

    interpreter._patch_lang = patched_once


@pytest.fixture(autouse=True)
def _in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where Triton kernels run on CPU tensors, in its interpreter (see ``test_triton.py``) or from PTX, every op runs them."""
    if not _backend.interpreting():
        yield
        return
    if INTERPRETER:
        from flowkern.kernels import nearest_code

        # The definition for many codes at once: the interpreter takes its time for each operation, whatever its size.
        monkeypatch.setattr(nearest_code, "_PER_WARP", 2**14)
    with _backend.backend("triton"):
        yield


@pytest.fixture(params=WAYS)
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    """The torch code, the C++ kernels on every instruction set, and in Triton's interpreter its kernels."""
    with running(request.param):
        yield request.param


@pytest.fixture(params=[*WAYS, pytest.param("cuda", marks=NEEDS_GPU)])
def anywhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """``where``, and on a GPU, for tests that make their tensors on the default device."""
    on_gpu = request.param == "cuda"
    with running("auto" if on_gpu else request.param), torch.device("cuda") if on_gpu else contextlib.nullcontext():
        yield request.param


@pytest.fixture(params=_backend.native.isas() if _backend.native else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ kernels on every instruction set that this machine runs."""
    with running(request.param):
        yield request.param


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What runs wherever there are kernels also runs in Triton's interpreter, which chooses by this mark.

    Slow tests come first, so that no core waits for another's last one. ``FLOWKERN_TESTS_SHARE=I/N`` keeps one of N shares.
    """
    for item in items:
        if {"where", "anywhere"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker("everywhere")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    share, shares = map(int, os.environ.get("FLOWKERN_TESTS_SHARE", "0/1").split("/"))
    if shares > 1:  # those that take most of a GPU's memory are not run side by side
        vast = [item for item in items if item.get_closest_marker("vast")]
        mine = [*[item for item in items if item not in vast][share::shares], *(vast if share == 0 else [])]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine


class Canaries:
    """Stands in for ``torch.empty_like`` and ``Tensor.new_empty``: NaN inside, a known pattern on both sides."""

    margin = 32
    pattern = 77.0

    def __init__(self) -> None:
        self.buffers: list[tuple[torch.Tensor, int]] = []

    def allocate(self, like: torch.Tensor) -> torch.Tensor:
        if not like.is_floating_point():
            return like  # not an output of an op: Triton's interpreter makes some for itself
        n = like.numel()
        buffer = torch.full((n + 2 * self.margin,), self.pattern, dtype=like.dtype, device=like.device)
        buffer[self.margin : self.margin + n] = float("nan")
        self.buffers.append((buffer, n))
        return buffer.as_strided(like.shape, like.stride(), self.margin)

    def assert_alive(self) -> None:
        assert self.buffers, "nothing was allocated through the patched functions"
        for buffer, n in self.buffers:
            assert (buffer[: self.margin] == self.pattern).all(), "written before the start of an output"
            assert (buffer[self.margin + n :] == self.pattern).all(), "written past the end of an output"


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> Canaries:
    """Poisons every allocation of an op's outputs; ``assert_alive`` checks what lies around them."""
    watch, empty_like, new_empty = Canaries(), torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: watch.allocate(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: watch.allocate(new_empty(self, *a, **k)))
    return watch
