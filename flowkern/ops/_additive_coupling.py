"""Additive coupling: y = x + t on the transformed elements, y = x on the others; log|det dy/dx| = 0.

Source: Dinh, Krueger and Bengio, "NICE: Non-linear Independent Components Estimation" (2015), eq. 4. The gradient of
x is the gradient of y itself; that of t is its transformed part, negated for the inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._core.checks import accumulation_dtype, check_floating, check_same_device, empty_as, flatten_batch
from .._core.op import Law, Output, Sample, accumulated, define, normal, recording, reference_runs, register
from .._core.reference import outside_autocast
from .._core.split import SPLITS, FeatureMask, Split, from_code, moved_channels, put, resolve, restrict, take

__all__ = ["additive_coupling"]

Pair = tuple[torch.Tensor, torch.Tensor]


@outside_autocast
def reference(x: torch.Tensor, shift: torch.Tensor, *, split: Split = "channel", inverse: bool = False) -> Pair:
    """The definition in plain torch, for x of shape (B, C) or (B, C, H, W)."""
    accumulate = accumulation_dtype(x, shift)
    moved, step = take(x, split).to(accumulate), restrict(shift.to(accumulate), split)
    moved = moved - step if inverse else moved + step
    return put(x, moved.to(x.dtype), split), x.new_zeros(x.shape[0], dtype=accumulate)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    randn = normal(device, dtype)
    for inverse in (False, True):
        kwargs = {"inverse": inverse}
        suffix = "-inverse" if inverse else ""
        yield Sample(f"vector{suffix}", (randn(5, 6), randn(5, 3)), kwargs)
        yield Sample(f"odd-channels{suffix}", (randn(3, 7), randn(3, 3)), kwargs)
        yield Sample(f"image{suffix}", (randn(2, 5, 3, 7), randn(2, 2, 3, 7)), kwargs)
        yield Sample(f"checkerboard{suffix}", (randn(2, 3, 5, 7), randn(2, 3, 5, 7)), {**kwargs, "split": "checkerboard"})
        mask = FeatureMask(torch.tensor([True, False, True, True, False])).to(device)
        yield Sample(f"feature-mask{suffix}", (randn(4, 5), randn(4, 3)), {**kwargs, "split": mask})
    yield Sample("one-element", (randn(1, 2), randn(1, 1)))
    yield Sample("swap-odd", (randn(3, 7), randn(3, 4)), {"split": "channel_swap"})
    yield Sample("nothing-moved", (randn(3, 1), randn(3, 0)))
    yield Sample("empty-batch", (randn(0, 6), randn(0, 3)))
    yield Sample("empty-space", (randn(2, 4, 0, 3), randn(2, 2, 0, 3)))
    yield Sample("wide-vector", (randn(2, 6001), randn(2, 3000)))
    channels_last = randn(2, 6, 4, 5).to(memory_format=torch.channels_last)
    yield Sample("channels-last", (channels_last, randn(2, 3, 4, 5).to(memory_format=torch.channels_last)))
    yield Sample("checkerboard-swap", (channels_last, randn(2, 6, 4, 5)), {"split": "checkerboard_swap"})
    yield Sample("strided", (randn(4, 12)[:, ::2], randn(3, 4).t()))
    yield Sample("strided-image", (randn(2, 4, 6, 5)[..., ::2], randn(2, 2, 6, 3).transpose(0, 1)))
    yield Sample("expanded", (randn(1, 4).expand(3, 4), randn(3, 1).expand(3, 2)))
    yield Sample("mixed-dtypes", (randn(3, 6), randn(3, 3, dtype=torch.bfloat16)))
    yield Sample("half-state", (randn(3, 6, dtype=torch.float16), randn(3, 3)))


_forward = define(
    "additive_coupling(Tensor x, Tensor shift, Tensor? place, int split, bool inverse) -> Tensor",
    outputs=lambda x, *_: empty_as(x),
    torch_=lambda x, shift, place, split, inverse: reference(x, shift, split=from_code(split, place), inverse=inverse)[0],
    triton="additive_coupling.forward",
)


class _AdditiveCoupling(torch.autograd.Function):
    """Saves no tensor but a mask's indices. Its backward needs no kernel: both gradients are (parts of) the given one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shift: torch.Tensor, place: torch.Tensor | None, *configuration: Any) -> torch.Tensor:
        ctx.split, ctx.inverse, moved = configuration
        ctx.dtype = shift.dtype
        if moved is not None:
            ctx.save_for_backward(moved)
        return _forward(x, shift, place, ctx.split, ctx.inverse)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        named = ctx.split < len(SPLITS)
        dshift = take(grad, SPLITS[ctx.split]) if named else grad.index_select(1, *ctx.saved_tensors)
        return grad, (-dshift if ctx.inverse else dshift).to(ctx.dtype), None, None, None, None


def additive_coupling(x: torch.Tensor, shift: torch.Tensor, *, split: Split = "channel", inverse: bool = False) -> Pair:
    """Additive coupling transform, in one pass.

    y = x + t on the elements that ``split`` transforms, y = x on the others; logabsdet = 0.

    Args:
        x: (B, C), (B, C, H, W), or either with more leading batch dimensions; any strides; float64, float32,
            bfloat16 or float16.
        shift: the conditioner's output t: (B, M) or (B, M, H, W), where M is the number of transformed channels,
            and C for a checkerboard (which ignores the values at kept places). May differ from x in floating dtype.
        split: as in ``affine_coupling``.
        inverse: subtract instead.

    Returns:
        (y, logabsdet): y as x in shape and dtype; logabsdet zeros of shape (B,), float64 if an input is, else float32.

    Raises:
        TypeError: an input that is not a floating tensor.
        ValueError: a wrong shape, device or split; the message says what was expected.

    Source: Dinh et al., "NICE: Non-linear Independent Components Estimation" (2015), eq. 4.
    """
    check_floating("x", x)
    check_floating("shift", shift)
    check_same_device("shift", shift, x)
    if x.ndim not in (2, 4):
        leading, x, shift = flatten_batch(x, shift)
        y, logabsdet = additive_coupling(x, shift, split=split, inverse=inverse)
        return y.unflatten(0, leading), logabsdet.unflatten(0, leading)
    code = resolve(split, x)
    expected = (x.shape[0], moved_channels(split, x.shape[1]), *x.shape[2:])
    if shift.shape != expected:
        raise ValueError(
            f"shift: expected shape {tuple(expected)} for x of shape {tuple(x.shape)} and split {split!r}, "
            f"got {tuple(shift.shape)}"
        )
    if reference_runs(x):
        return reference(x, shift, split=split, inverse=inverse)
    place, moved = (split.place, split.moved) if isinstance(split, FeatureMask) else (None, None)
    if recording(x, shift):
        y = _AdditiveCoupling.apply(x, shift, place, code, inverse, moved)
    else:
        y = _forward(x, shift, place, code, inverse)
    return y, x.new_zeros(x.shape[0], dtype=accumulation_dtype(x, shift))


register(
    additive_coupling,
    reference,
    _samples,
    (_forward,),
    outputs=(Output("y"), Output("logabsdet", accumulated, differentiable=False)),
    laws=Law.INVERTIBLE | Law.LOG_DET,
)
