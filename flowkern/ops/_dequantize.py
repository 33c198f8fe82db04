"""Integers to continuous values: uniform noise, scaling, the logit if wanted, and the log-determinant, in one pass.

Source: Theis, van den Oord and Bethge, "A note on the evaluation of generative models" (2016), section 3.1; the logit: Dinh,
Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017), section 4.1. With w = v + u and
a = alpha + (1 - 2 alpha) w / levels:

================= ============================================================================
without alpha     x = w / levels, logabsdet = -D log(levels)
with alpha        x = log(a) - log(1 - a),
                  logabsdet = sum of log(1 - 2 alpha) - log(levels) - log(a) - log(1 - a)
================= ============================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .._core import philox as _philox
from .._core.checks import FLOATING, accumulation_dtype
from .._core.op import Law, Output, Sample, accumulated, define, reference_runs, register

__all__ = ["dequantize"]

Pair = tuple[torch.Tensor, torch.Tensor]


def _noisy(v: torch.Tensor, seed: torch.Tensor, offset: int, dtype: torch.dtype) -> torch.Tensor:
    """v + u with 0 < u < 1, also after rounding: the value stays in its bin, and off the lowest and the highest end."""
    bits = _philox.bits(seed, offset, v.shape[0], v.shape[1:].numel()).view(v.shape)
    bin_, u = v.to(dtype), (bits >> 8).to(dtype) * 2.0**-24 + 2.0**-25
    below = (bin_ + 1.0) * (1.0 - 2.0 ** (-53 if dtype is torch.float64 else -24))  # the last number before v + 1
    return torch.where(bin_ + u < bin_ + 1.0, bin_ + u, below)


def _rounded_down(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Positive x in the dtype, and never above x: the nearest number could lie in the next bin, or be 1."""
    rounded = x.to(dtype)
    if dtype.itemsize > 2:
        return rounded
    return (rounded.view(torch.int16) - (rounded > x).to(torch.int16)).view(dtype)  # the number before has the bits before


def reference(
    v: torch.Tensor,
    seed: _philox.Seed = None,
    *,
    levels: int = 256,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    offset: int = 0,
) -> Pair:
    """The definition in plain torch."""
    w = _noisy(v, _philox.as_seed(seed, v.device), offset, torch.float64 if dtype is torch.float64 else torch.float32)
    if alpha is None:
        constant = -v.shape[1:].numel() * math.log(levels)
        return _rounded_down(w / levels, dtype), w.new_full((v.shape[0],), constant)
    step = (1.0 - 2.0 * alpha) / levels
    low, high = torch.log(alpha + step * w), torch.log(alpha + step * (levels - w))
    each = math.log1p(-2.0 * alpha) - math.log(levels)
    return (low - high).to(dtype), (each - low - high).flatten(1).sum(1)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def integers(*shape: int, levels: int = 256) -> torch.Tensor:
        return torch.randint(levels, shape, device=device)

    kwargs = {"seed": 7, "dtype": dtype}
    yield Sample("bytes", (integers(3, 3, 4, 5).to(torch.uint8),), kwargs)
    yield Sample("logit", (integers(3, 3, 4, 5).to(torch.uint8),), {**kwargs, "alpha": 0.05, "offset": 2**33})
    yield Sample("few-levels", (integers(4, 7, levels=17),), {**kwargs, "levels": 17, "alpha": 0.0})
    yield Sample("wide", (integers(2, 20001).int(),), kwargs)
    yield Sample("one-element", (integers(1, 1),), kwargs)
    yield Sample("empty-batch", (integers(0, 6),), kwargs)
    yield Sample("strided", (integers(6, 4).t(),), kwargs)
    yield Sample("many-levels", (integers(2, 3, levels=65536).int(),), {**kwargs, "levels": 65536, "alpha": 0.05})
    yield Sample("nothing", (integers(2, 0),), kwargs)
    yield Sample("seed", (integers(3, 4),), {**kwargs, "seed": torch.tensor([5], device=device)})


def _outputs(v: torch.Tensor, seed: torch.Tensor, offset: int, levels: int, alpha: float, dtype: torch.dtype) -> Pair:
    x = v.new_empty(v.shape, dtype=dtype)
    return x, v.new_empty((v.shape[0],), dtype=accumulation_dtype(x))


def _torch_forward(v: torch.Tensor, seed: torch.Tensor, offset: int, levels: int, alpha: float, dtype: torch.dtype) -> Pair:
    return reference(v, seed, levels=levels, alpha=None if alpha < 0 else alpha, dtype=dtype, offset=offset)


# v is (B, N), uint8 or int32; a negative alpha stands for none.
_forward = define(
    "dequantize(Tensor v, Tensor seed, int offset, int levels, float alpha, ScalarType dtype) -> (Tensor, Tensor)",
    outputs=_outputs,
    torch_=_torch_forward,
    triton="dequantize.forward",
)


def dequantize(
    v: torch.Tensor,
    *,
    levels: int = 256,
    alpha: float | None = None,
    seed: _philox.Seed = None,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """Uniform dequantization: x = (v + u) / levels with u uniform in (0, 1), or its logit, and log|det dx / d(v + u)|.

    For a density p of x and D values per sample, -log P(v) <= E[-log p(x) - logabsdet].

    Args:
        v: (B, ...), at least two dimensions, integers from 0 to levels - 1: uint8, or any other integer dtype. They are not
            looked at: the data's loader does that.
        levels: how many there are: 256 for 8 bits.
        alpha: None gives x in (0, 1), in bfloat16 and float16 rounded towards zero, so that it stays under 1, and in its bin
            [v, v + 1) / levels if levels is a power of two, at most 256 in bfloat16 and 2048 in float16. There noise is coarse:
            the last of 256 bins holds 1 number of bfloat16 and 8 of float16. Otherwise the result is
            logit(alpha + (1 - 2 alpha) x), as ``nn.Logit`` has it, rounded to the nearest number.
        seed: of the noise: an int, or an int64 tensor of one element on the device of v. None takes one number from torch's
            generator, so that ``torch.manual_seed`` decides.
        offset: a number of 64 bits that tells draws of one seed apart.
        dtype: of x: float64, float32, bfloat16 or float16.

    Returns:
        (x, logabsdet): x of v's shape; logabsdet (B,) in nats, float64 if dtype is, else float32.

    Raises:
        TypeError: v that does not hold integers, a dtype that is not floating, or a seed or an offset that is no integer.
        ValueError: a wrong shape, device, number of levels or alpha.

    Source: Theis et al., "A note on the evaluation of generative models" (2016), section 3.1.
    """
    if not isinstance(v, torch.Tensor) or v.is_floating_point() or v.is_complex() or v.dtype is torch.bool:
        raise TypeError(f"v: expected a tensor of integers, got {getattr(v, 'dtype', type(v).__name__)}")
    if v.ndim < 2:
        raise ValueError(f"v: expected (B, ...) of at least two dimensions, got shape {tuple(v.shape)}")
    if not 2 <= levels <= 2**20:
        raise ValueError(f"levels: expected 2 to 2**20, got {levels}")
    if alpha is not None and not 0.0 <= alpha < 0.5:
        raise ValueError(f"alpha: expected a number in [0, 0.5), got {alpha}")
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected a floating dtype (float64, float32, bfloat16 or float16), got {dtype}")
    key, offset = _philox.as_seed(seed, v.device), _philox.as_offset(offset)
    if reference_runs(v):
        return reference(v, key, levels=levels, alpha=alpha, dtype=dtype, offset=offset)
    integers = v if v.dtype is torch.uint8 else v.to(torch.int32)
    rest = key, offset, levels, -1.0 if alpha is None else alpha, dtype
    if v.ndim == 2:  # a view takes longer than the kernel of a few numbers
        return _forward(integers, *rest)
    x, logabsdet = _forward(integers.flatten(1), *rest)
    return x.view(v.shape), logabsdet


register(
    dequantize,
    reference,
    _samples,
    (_forward,),
    outputs=(Output("x", differentiable=False), Output("logabsdet", accumulated, differentiable=False)),
    laws=Law.SEEDED,
)
