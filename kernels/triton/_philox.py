"""Random numbers from counters inside kernels; flowkern/_core/philox.py says which number belongs to which element.

A program makes the numbers of GROUPS times 64 neighbours of one sample: four words for each of [GROUPS, 16] counters, where
word w belongs to the elements 64 g + 16 w + i.
"""

# mypy: allow-untyped-defs
from typing import Any

import triton
import triton.language as tl

from ._coupling import Grid, constants
from .lang import log1p

__all__ = ["elements", "noise_grid", "normal_noise", "words"]

#: Elements that 16 counters serve.
GROUP = 64


@triton.jit
def elements(i_tile, GROUPS: tl.constexpr):
    # Those of word 0 [GROUPS, 16]; those of word w lie 16 w further on.
    g = i_tile.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    return 64 * g[:, None] + tl.arange(0, 16)[None, :]


@triton.jit
def words(p_seed, offset, i_b, i_tile, GROUPS: tl.constexpr):
    # Four words of 32 bits for each counter [GROUPS, 16].
    counter = (16 * (i_tile * GROUPS + tl.arange(0, GROUPS))[:, None] + tl.arange(0, 16)[None, :]).to(tl.uint32)
    zero = tl.zeros_like(counter)
    low, high = offset.to(tl.int64).to(tl.uint32), (offset.to(tl.int64) >> 32).to(tl.uint32)
    return tl.philox(tl.load(p_seed), counter, zero + i_b.to(tl.uint32), zero + low, zero + high, n_rounds=10)


@triton.jit
def cos_sin_pi(a):
    # Of pi a for |a| <= 1: the next quarter of a turn, and Taylor's series for what is left, to 2e-9 and 1e-17.
    TERMS: tl.constexpr = 10 if a.dtype == tl.float64 else 5
    turns = tl.floor(2.0 * a + 0.5)
    quarter = turns.to(tl.int32)
    x = (a - 0.5 * turns) * 3.141592653589793
    z = x * x
    sine, cosine = tl.zeros_like(x) + 1.0, tl.zeros_like(x) + 1.0
    for i in tl.static_range(0, TERMS):
        sine = 1.0 - sine * z * (1.0 / (2 * (TERMS - i) * (2 * (TERMS - i) + 1)))
        cosine = 1.0 - cosine * z * (1.0 / (2 * (TERMS - i) * (2 * (TERMS - i) - 1)))
    sine *= x
    odd = (quarter & 1) == 1
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) == 2, -first, first), tl.where((quarter & 2) == 2, -second, second)


@triton.jit
def box_muller(first, second, ACC: tl.constexpr):
    u = first.to(ACC) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    # 1 - u is exact near 1, where a GPU's logarithm is not, and may even have the wrong sign.
    near = u > 0.5
    logarithm = tl.where(near, -log1p(tl.where(near, (1.0 - u) / u, 0.0)), tl.log(u))
    radius = tl.sqrt(-2.0 * logarithm)
    cosine, sine = cos_sin_pi(second.to(tl.int32, bitcast=True).to(ACC) * 4.656612873077393e-10)
    return radius * cosine, radius * sine


@triton.jit
def normal_noise(p_seed, offset, i_b, i_tile, GROUPS: tl.constexpr, ACC: tl.constexpr):
    # Standard normal numbers, four for each counter.
    a, b, c, d = words(p_seed, offset, i_b, i_tile, GROUPS)
    n0, n1 = box_muller(a, b, ACC)
    n2, n3 = box_muller(c, d, ACC)
    return n0, n1, n2, n3


def noise_grid(shape: tuple[int, ...], double: bool, offset: int, *strides: int, **others: Any) -> Grid:
    """For tensors (B, N): a program has up to 16 groups of elements of one sample."""
    batch, length = shape
    groups = min(16, triton.next_power_of_2(triton.cdiv(length, GROUP)))
    tiles = triton.cdiv(length, GROUP * groups)
    return Grid(batch * tiles, tiles, (length, tiles, offset, *strides), constants(double, 4, GROUPS=groups, **others))
