"""The nearest code by all distances in float64, written anew, and inputs made to mislead a search for it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
Case = tuple[str, torch.Tensor, torch.Tensor]


def halving_sum(s: torch.Tensor) -> torch.Tensor:
    """As defined, one level after the other."""
    terms = [*s.unbind(-1)]
    terms += [torch.zeros_like(terms[0])] * (2 ** math.ceil(math.log2(len(terms))) - len(terms))
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [a + b for a, b in zip(terms[:half], terms[half:], strict=True)]
    return terms[0]


def normalized(x: torch.Tensor) -> torch.Tensor:
    """By the norm as IEEE 754 rounds it; zeros stay."""
    norms = [math.sqrt(v) if v == v else v for v in halving_sum(x * x).tolist()]
    return x / torch.tensor([v or 1.0 for v in norms], dtype=torch.float64)[:, None]


def oracle(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All distances in float64, written anew: the lowest index of the least, and the distance."""
    bad, nan, missing = ~x.isfinite().all(1), x.isnan().any(1), ~codebook.isfinite().all(1)
    dtype = torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32
    x, codebook = x.double(), codebook.double()
    if metric == "cosine":
        x, codebook = normalized(x), normalized(codebook)
    d = halving_sum((x[:, None] - codebook[None]) ** 2)
    d[:, missing] = math.inf
    d[bad] = math.inf
    least = d.amin(1, keepdim=True)
    index = torch.where(d == least, torch.arange(d.shape[1]), d.shape[1]).amin(1)
    sqdist = least[:, 0]
    sqdist[nan] = math.nan
    return index, sqdist.to(dtype)


def neighbour(x: torch.Tensor, steps: int | torch.Tensor) -> torch.Tensor:
    """Numbers whose last place differs by so many units."""
    return (x.contiguous().view(BITS[x.dtype]) + steps).view(x.dtype)


def finite(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    return x.double().clamp(-limit, limit).to(dtype)


def random(dtype: torch.dtype) -> Iterator[Case]:
    for rows, codes, depth in (
        (1, 1, 1),
        (0, 5, 3),
        (9, 1, 4),
        (70, 33, 7),
        (260, 140, 16),
        (13, 300, 65),
        (40, 17, 1),
        (97, 130, 33),
    ):
        yield f"random {rows} {codes} {depth}", torch.randn(rows, depth).to(dtype), torch.randn(codes, depth).to(dtype)
    for offset in (3, 100, 1e4):
        moved = (offset + torch.randn(170, 20, dtype=torch.float64)).to(dtype)
        yield "far from 0", moved[:60], moved[60:]
        yield "but for some codes", moved[:60], torch.cat([finite(1e30 * moved[60:61], dtype), moved[60:], 0 * moved[:1]])
    yield "near the codes", *near(torch.randn(64, 24).to(dtype), dtype)
    strided = torch.randn(24, 40, dtype=torch.float64).to(dtype)
    yield "strided", strided.t()[::2, ::3], torch.randn(50, 16).to(dtype)[:, ::2]


def near(codebook: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (codebook.repeat(2, 1).double() + 0.01 * torch.randn(2 * len(codebook), codebook.shape[1])).to(dtype), codebook


def ties(dtype: torch.dtype) -> Iterator[Case]:
    for depth in (1, 3, 32, 100):
        base = (1 + torch.rand(1, depth)).to(dtype)
        # Codes that differ in the last place of one entry or of some, and rows between them.
        codes = neighbour(base.repeat(80, 1), torch.randint(-1, 2, (80, depth)).to(BITS[dtype]))
        yield "last places", neighbour(base.repeat(60, 1), torch.randint(-1, 2, (60, depth)).to(BITS[dtype])), codes
        left, right = torch.randn(40, depth).to(dtype), torch.randn(40, depth).to(dtype)
        middle = ((left.double() + right.double()) / 2).to(dtype)
        shifted = torch.cat([middle, neighbour(middle, 1), neighbour(middle, -1)])
        yield "midpoints", shifted, torch.stack([left, right], 1).flatten(0, 1)
        some = torch.randn(20, depth).to(dtype)
        yield "duplicates", torch.randn(30, depth).to(dtype), some.repeat(7, 1)[torch.randperm(140)]
        # Equal sums of other orders: only the definition's own order says which is less in float64.
        orders = torch.stack([base[0][torch.randperm(depth)] for _ in range(90)])
        yield "permuted", torch.full((5, depth), 0.3, dtype=dtype), orders
        yield "zeros", torch.zeros(3, depth, dtype=dtype), torch.zeros(40, depth, dtype=dtype)
        sphere = torch.eye(depth, dtype=dtype).repeat(3, 1)
        yield "equidistant", torch.cat([torch.ones(2, depth, dtype=dtype), torch.zeros(1, depth, dtype=dtype)]), sphere


def scales(dtype: torch.dtype) -> Iterator[Case]:
    def drawn(count: int, depth: int, low: float, high: float) -> torch.Tensor:
        exponents = torch.empty(count, 1, dtype=torch.float64).uniform_(low, high)
        return finite(torch.randn(count, depth, dtype=torch.float64) * 10**exponents, dtype)

    for depth in (2, 19):
        yield "mixed", drawn(50, depth, -30, 30), drawn(70, depth, -30, 30)
        yield "huge", drawn(40, depth, 30, 30), drawn(70, depth, 30, 30)
        yield "tiny", drawn(40, depth, -30, -30), drawn(70, depth, -30, -30)
        yield "subnormal", drawn(40, depth, -45, -37), drawn(70, depth, -45, -37)
        yield "one huge code", drawn(40, depth, 0, 0), torch.cat([drawn(70, depth, 0, 0), drawn(1, depth, 38, 38)])
        for exponent in (12, 14, 16, 20):  # float64 itself rounds the distances to few values
            yield f"far away {exponent}", drawn(40, depth, exponent, exponent), drawn(70, depth, 0, 0)
        for exponent in (-18, -20, -21, -22):  # products are subnormal in float32, where the first code sets the scale
            close = drawn(1, depth, exponent, exponent).double() * (1 + 1e-3 * torch.randn(90, depth))
            yield (
                f"subnormal products {exponent}",
                finite(close[:30], dtype),
                torch.cat([drawn(384, depth, 0, 0), finite(close[30:], dtype)]),
            )
        yield "in one entry", torch.cat([drawn(40, depth, 0, 0), drawn(40, 1, 25, 25)], 1), drawn(60, depth + 1, 0, 0)
        if dtype is torch.float64:
            yield "overflow", drawn(40, depth, 150, 300), drawn(40, depth, 150, 300)
            for exponent in (-155, -158, -160, -170):  # squares are subnormal, or zeros
                close = drawn(1, depth, exponent, exponent) * (1 + 1e-2 * torch.randn(90, depth))
                yield f"underflow {exponent}", close[:40], close[40:]
            yield "underflow", drawn(40, depth, -310, -150), drawn(40, depth, -310, -150)


def not_finite(dtype: torch.dtype) -> Iterator[Case]:
    for value in (math.nan, math.inf, -math.inf):
        x, codebook = torch.randn(30, 6).to(dtype), torch.randn(150, 6).to(dtype)
        x[3, 2] = x[7] = codebook[0, 5] = codebook[77] = value
        x[7, 0] = math.inf
        yield "entries", x, codebook
        yield "all codes", x, torch.full((35, 6), value, dtype=dtype)
        codebook[:-1, 1] = value
        yield "all codes but the last", x, codebook
