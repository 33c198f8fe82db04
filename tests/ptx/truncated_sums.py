"""The certified index of nearest_code on tensor cores that truncate: ``on_ptx`` runs this file."""

from __future__ import annotations

from collections.abc import Iterator

import nearest
import on_ptx
import pytest
import torch
from executor import Options
from flowkern.kernels import nearest_code

import flowkern
from flowkern._core.op import KERNELS

#: Entries of a row: more than one chunk of a product.
DEPTH = 128


def cancelling(spread: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Rows and codes in bfloat16, whose scores tell them apart by terms far below others that cancel.

    While the sum holds a large term, tensor cores may drop the small ones. Where that term comes first and last, they drop all;
    by their signs the losses add up.
    """
    small = 2.0**-spread * (1 + torch.rand(40, DEPTH))
    signs = torch.randint(0, 2, (200, DEPTH)) * 2 - 1
    for name, first, last in (("ends", 0, DEPTH - 1), ("chunk", 3, 40), ("neighbours", 16, 17)):
        x, codes = small.clone(), 2.0**-8 * signs
        x[:, [first, last]] = 1.0
        codes[:, first], codes[:, last] = 1.5, -1.5
        yield name, x.bfloat16(), codes.bfloat16()
    exponents = torch.randint(-spread, 1, (DEPTH,))
    x = torch.randn(40, DEPTH) * 2.0**exponents
    yield "random", x.bfloat16(), (x[torch.arange(200) % 40] * (1 + 2.0**-5 * torch.randn(200, DEPTH))).bfloat16()


def scores(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return x.double() @ codebook.double().t() - codebook.double().square().sum(1) / 2


def bounds(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row: what its best score is at least, and what any score of a code is at most, as the screen says."""
    sizes = nearest_code._sizes(len(x), *codebook.shape, nearest_code.generation(x.device))
    work, outputs = nearest_code._Work.empty(x, codebook, sizes), KERNELS["nearest_code"].outputs(x, codebook, False)
    launches = nearest_code._launches(x, codebook, False, outputs, work, sizes)
    for name in ("begin", "prepare", "screen"):
        launches[name].run()
    upper, lower, dropped = (work.kept[: len(x), part].flatten(1) for part in (slice(4), slice(8, 9), slice(9, 10)))
    return lower.amax(1), torch.cat([upper, dropped], 1).amax(1)


@pytest.mark.parametrize("spread", [10, 15, 20, 24])
def test_the_index_is_certified_where_sums_are_truncated(spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for truncate in (0, 1):
        monkeypatch.setattr(on_ptx, "OPTIONS", Options(truncate=truncate))
        torch.manual_seed(spread)
        for name, x, codebook in cancelling(spread):
            index, distance = flowkern.ops.nearest_code(x, codebook)
            expected = nearest.oracle(x, codebook, "euclidean")
            assert torch.equal(index, expected[0]), name
            assert torch.equal(distance, expected[1]), name
            lower, upper = bounds(x, codebook)
            best = scores(x, codebook).amax(1)
            assert (lower <= best).all(), name
            assert (upper >= best).all(), name
            found[name, truncate] = torch.stack([lower, upper])
    # The truncation reaches the scores: else this would show nothing.
    assert any(not torch.equal(found[name, 0], found[name, 1]) for name, _ in found)
