"""Uniform dequantization, the logit and the log-determinant. The formulas are at the top of flowkern/ops/_dequantize.py."""

# mypy: allow-untyped-defs
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from flowkern._core.checks import accumulation_dtype
from flowkern._core.op import KERNELS

from ._coupling import Launch, example
from ._philox import elements, noise_grid, words
from .lang import divide, log, narrow

__all__ = ["forward"]

#: The kernel computes random numbers while it streams.
STREAMING = False


@triton.jit
def round_down(x, dtype: tl.constexpr):
    # Positive x in the dtype, and never above x: the nearest number could lie in the next bin, or be 1.
    if dtype == tl.float64 or dtype == tl.float32:
        result = x.to(dtype)
    else:
        nearest = x.to(dtype)
        above = (nearest.to(tl.float32) > x).to(tl.int16)
        result = (nearest.to(tl.int16, bitcast=True) - above).to(dtype, bitcast=True)  # the number before has the bits before
    return result


@triton.jit
def spread(p_v, p_x, mask, bits, LEVELS: tl.constexpr, POWER: tl.constexpr, ALPHA: tl.constexpr, ACC: tl.constexpr):
    # Writes x, and returns log(a) + log(1 - a).
    BELOW_ONE: tl.constexpr = 1.0 - 2.0**-53 if tl.float64 == ACC else 1.0 - 2.0**-24
    bin = tl.load(p_v, mask=mask, other=0).to(ACC)
    w = bin + ((bits >> 8).to(ACC) * 5.960464477539063e-08 + 2.9802322387695312e-08)
    w = tl.where(w < bin + 1.0, w, (bin + 1.0) * BELOW_ONE)
    if ALPHA is None:
        x, logarithms = round_down(divide(w, LEVELS, POWER), p_x.dtype.element_ty), tl.zeros_like(w)
    else:
        STEP: tl.constexpr = (1.0 - 2.0 * ALPHA) / LEVELS
        low, high = log(ALPHA + STEP * w), log(ALPHA + STEP * (LEVELS - w))
        x, logarithms = narrow(low - high, p_x.dtype.element_ty), tl.where(mask, low + high, 0.0)
    tl.store(p_x, x, mask=mask)
    return logarithms


@triton.jit(do_not_specialize=["offset"])
def kernel(
    p_v, p_seed, p_x, p_partial,
    N, n_tiles, offset, v_b, v_n,
    LEVELS: tl.constexpr, POWER: tl.constexpr, ALPHA: tl.constexpr, GROUPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b, i_tile = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    c0, c1, c2, c3 = words(p_seed, offset, i_b, i_tile, GROUPS)
    n = elements(i_tile, GROUPS)
    p_v += i_b.to(tl.int64) * v_b
    p_x += i_b.to(tl.int64) * N
    total = spread(p_v + n * v_n, p_x + n, n < N, c0, LEVELS, POWER, ALPHA, ACC)
    n += 16
    total += spread(p_v + n * v_n, p_x + n, n < N, c1, LEVELS, POWER, ALPHA, ACC)
    n += 16
    total += spread(p_v + n * v_n, p_x + n, n < N, c2, LEVELS, POWER, ALPHA, ACC)
    n += 16
    total += spread(p_v + n * v_n, p_x + n, n < N, c3, LEVELS, POWER, ALPHA, ACC)
    tl.store(p_partial + tl.program_id(0), tl.sum(total))


def _launch(v: torch.Tensor, seed: torch.Tensor, offset: int, levels: int, alpha: float, x: torch.Tensor) -> Launch:
    """The launch; of its tensors the last has each program's sum of logarithms: (B, tiles)."""
    accumulate, chosen = accumulation_dtype(x), None if alpha < 0 else alpha
    bins = {"LEVELS": float(levels), "POWER": levels & (levels - 1) == 0, "ALPHA": chosen}
    how = noise_grid(v.shape, accumulate is torch.float64, offset, *v.stride(), **bins)
    return Launch(kernel, (v, seed, x, v.new_empty((v.shape[0], how.tiles), dtype=accumulate)), how)


def forward(v: torch.Tensor, seed: torch.Tensor, offset: int, levels: int, alpha: float, *rest: Any) -> None:
    """``flowkern::dequantize``: fills x and logabsdet."""
    _, x, logabsdet = rest
    if not v.numel():
        logabsdet.zero_()
        return
    launch = _launch(v, seed, offset, levels, alpha, x)
    launch.run()
    each = (0.0 if alpha < 0 else math.log1p(-2.0 * alpha)) - math.log(levels)
    torch.sum(launch.tensors[-1], 1, out=logabsdet)
    logabsdet.neg_().add_(v.shape[1] * each)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
FACTORS: dict[str, Any] = {
    "length": (3072, 37),
    "form": ("vector", "strided"),
    "integers": (torch.uint8, torch.int32),
    "alpha": (0.05, -1.0),
    "dtypes": tuple(_DTYPES),
}

#: The logit takes most of the time where it is wanted.
COUNTED = ({"dtypes": "float32"}, {"dtypes": "bfloat16"}, {"alpha": -1.0})


def compile_cases(length: int, form: str, integers: torch.dtype, alpha: float, dtypes: str) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS."""
    v = example((64, length), integers, form)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    x, _ = KERNELS["dequantize"].outputs(v, seed, 0, 256, alpha, _DTYPES[dtypes])
    yield "forward", _launch(v, seed, 0, 256, alpha, x)
