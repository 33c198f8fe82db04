"""Invertible linear map of the channels, the same at every pixel: y = W x + b, and log|det dy/dx|.

Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (2018), section 3.2 and table 1.
With V = W^-1, n pixels in a sample, g and l the gradients of the output and of logabsdet, and sums over all pixels (of
l over all samples):

========= ============= ================ ============ ================================= ===========================
direction output        logabsdet        gradient of x of b                             of W
========= ============= ================ ============ ================================= ===========================
forward   y = W x + b   n log|det W|     W^T g        sum g                             sum g x^T + n sum(l) V^T
inverse   y = V (x - b) -n log|det W|    V^T g        -V^T sum g                        -V^T sum g (x - b)^T V^T
                                                                                        - n sum(l) V^T
========= ============= ================ ============ ================================= ===========================

Where log|det W| is given, its gradient is n sum(l), negated for the inverse, and the terms with l leave that of W.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .._core.checks import accumulation_dtype, check_floating, check_tensor, empty_as, flatten_batch
from .._core.op import LOGABSDET, Law, Output, Sample, define, normal, recording, reference_runs, register, transformed
from .._core.reference import differentiate, outside_autocast, reference_differentiates

__all__ = ["invertible_linear"]

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Quadruple = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Optional = torch.Tensor | None


def _product(matrix: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """matrix x + bias at every pixel of x, all of one dtype."""
    if x.ndim == 2:
        return F.linear(x, matrix, bias)
    if x.numel() == 0 or x.is_cuda:  # conv2d refuses the first, and multiplies in TF32 on a GPU
        y = (matrix @ x.flatten(2)).view(x.shape)
        return y if bias is None else y + bias[:, None, None]
    return F.conv2d(x, matrix[:, :, None, None], bias)


@outside_autocast
def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    inverse: bool = False,
    weight_inverse: torch.Tensor | None = None,
    logabsdet: torch.Tensor | None = None,
) -> Pair:
    """The definition in plain torch, for x of shape (B, C) or (B, C, H, W).

    While gradients are recorded ``weight_inverse`` is not used: the inverse is computed anew, to be differentiable.
    """
    accumulate = accumulation_dtype(x, weight, bias)
    exact, moved = weight.double(), x.to(accumulate)
    shift = None if bias is None else bias.to(accumulate)
    if logabsdet is None:
        logabsdet = torch.linalg.slogdet(exact)[1]
    if inverse:
        # Where someone may differentiate, a given inverse would be taken as constant.
        known = weight_inverse is not None and not (torch.is_grad_enabled() or transformed())
        matrix = weight_inverse if known else torch.linalg.inv_ex(exact)[0]
        assert matrix is not None
        if shift is not None:
            moved = moved - shift.view(-1, *[1] * (x.ndim - 2))
        y = _product(matrix.to(accumulate), moved, None)
    else:
        y = _product(weight.to(accumulate), moved, shift)
    pixels = x.shape[2:].numel()
    per_sample = x.new_full((x.shape[0],), -pixels if inverse else pixels, dtype=accumulate)
    return y.to(x.dtype), per_sample * logabsdet.to(accumulate)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    randn = normal(device, dtype)

    def weight(channels: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        """Well conditioned, a determinant away from 1, and rows that a factorization has to exchange."""
        rows = 1.5 * torch.eye(channels, device=device, dtype=torch.float64).roll(1, 0)
        return (rows + 0.5 / channels**0.5 * randn(channels, channels, dtype=torch.float64).clamp(-1, 1)).to(dtype)

    for inverse in (False, True):
        kwargs, suffix = {"inverse": inverse}, "-inverse" if inverse else ""
        yield Sample(f"vector{suffix}", (randn(5, 4), weight(4), randn(4)), kwargs)
        yield Sample(f"image{suffix}", (randn(2, 5, 3, 7), weight(5), randn(5)), kwargs)
        yield Sample(f"no-bias{suffix}", (randn(2, 3, 2, 3), weight(3)), kwargs)
        yield Sample(f"one-channel{suffix}", (randn(3, 1, 2, 2), 1.5 + randn(1, 1).abs(), randn(1)), kwargs)
        last = randn(2, 6, 4, 5).to(memory_format=torch.channels_last)
        yield Sample(f"channels-last{suffix}", (last, weight(6), randn(6)), kwargs)
        yield Sample(f"many-channels{suffix}", (randn(3, 35, 8, 8), weight(35), randn(35)), kwargs)
        yield Sample(f"whole-vectors{suffix}", (randn(2, 16, 8, 16), weight(16), randn(16)), kwargs)
    yield Sample("one-element", (randn(1, 1), 1.5 + randn(1, 1).abs(), randn(1)))
    yield Sample("one-pixel", (randn(4, 3, 1, 1), weight(3), randn(3)))
    yield Sample("one-column", (randn(2, 3, 5, 1), weight(3), randn(3)))
    yield Sample("wide-vector", (randn(3, 70), weight(70), randn(70)))
    yield Sample("large-image", (randn(2, 12, 33, 35), weight(12), randn(12)))
    yield Sample("empty-batch", (randn(0, 6), weight(6), randn(6)))
    yield Sample("empty-space", (randn(2, 4, 0, 3), weight(4), randn(4)))
    wide = randn(2, 32, 5, 8).to(memory_format=torch.channels_last)
    yield Sample("channels-last-whole", (wide, weight(32), randn(32)))
    yield Sample("strided", (randn(4, 12)[:, ::2], weight(6).t(), randn(12)[::2]))
    yield Sample("strided-image", (randn(2, 4, 6, 5)[..., ::2], weight(8)[::2, ::2] + weight(4), randn(4)))
    yield Sample("cropped-image", (randn(2, 4, 6, 37)[:, :, 1:5, 2:34], weight(4), randn(4)), {"inverse": True})
    yield Sample("expanded", (randn(1, 4).expand(3, 4), weight(4), randn(1).expand(4)))
    yield Sample("mixed-dtypes", (randn(3, 6), weight(6, torch.float32), randn(6, dtype=torch.bfloat16)))
    yield Sample("mixed-half", (randn(3, 6, 2, 2, dtype=torch.float32), weight(6, torch.float16)), {"inverse": True})
    yield Sample("half-state", (randn(3, 6, dtype=torch.float16), weight(6), randn(6)))
    known = weight(4, torch.float64)
    values = {"weight_inverse": known.inverse().to(dtype), "logabsdet": torch.linalg.slogdet(known)[1].to(dtype)}
    for inverse in (False, True):
        suffix = "-inverse" if inverse else ""
        yield Sample(f"known{suffix}", (randn(3, 4), known.to(dtype), randn(4)), {**values, "inverse": inverse})


# What follows x, weight and bias is weight_inverse, logabsdet (here ``known``), and then as in ``define`` below.


def _outputs(x: torch.Tensor, weight: torch.Tensor, bias: Optional, *rest: Any) -> Triple:
    dtype, invert = accumulation_dtype(x, weight, bias), rest[-1]
    found = x.new_empty((x.shape[1], x.shape[1]) if invert else (0,), dtype=dtype)
    return empty_as(x), x.new_empty((x.shape[0],), dtype=dtype), found


def _gradients(x: torch.Tensor, weight: torch.Tensor, bias: Optional, *rest: Any) -> Quadruple:
    _, known, _, needs_x, needs_weight, _, _ = rest
    nothing = (0,)
    return (
        empty_as(x) if needs_x else x.new_empty(nothing),
        weight.new_empty(weight.shape if needs_weight else nothing),
        weight.new_empty(nothing) if bias is None else bias.new_empty(bias.shape if needs_weight else nothing),
        weight.new_empty(nothing) if known is None else known.new_empty(()),
    )


def _torch_forward(x: torch.Tensor, weight: torch.Tensor, bias: Optional, *rest: Any) -> tuple[Optional, ...]:
    weight_inverse, known, inverse, invert = rest
    found = None
    if invert:
        found = torch.linalg.inv_ex(weight.double())[0].to(accumulation_dtype(x, weight, bias))
        weight_inverse = found
    return *reference(x, weight, bias, inverse=inverse, weight_inverse=weight_inverse, logabsdet=known), found


def _differentiate(x: torch.Tensor, weight: torch.Tensor, bias: Optional, *rest: Any) -> tuple[Optional, ...]:
    """Those of x, weight, bias and logabsdet by autograd of the reference; None where there is nothing, or no need."""
    _, known, inverse, needs_x, needs_weight, *output_grads = rest

    def function(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> Pair:
        given = iter(rest)
        shift = None if bias is None else next(given)
        return reference(x, weight, shift, inverse=inverse, logabsdet=None if known is None else next(given))

    optional = [t for t in (bias, known) if t is not None]
    dx, dweight, *grads = differentiate(function, (x, weight, *optional), {}, output_grads)
    dbias = None if bias is None or not needs_weight else grads[0]
    return dx if needs_x else None, dweight if needs_weight else None, dbias, None if known is None else grads[-1]


def _differentiate_logabsdet(x: torch.Tensor, weight: torch.Tensor, bias: Optional, *rest: Any) -> tuple[Optional, ...]:
    """The gradients where y has none, which is not taken for zero: an infinite x or W^-1 would make it NaN."""
    weight_inverse, known, inverse, needs_x, needs_weight, grad_logabsdet = rest
    pixels = x.shape[2:].numel()
    total = (-pixels if inverse else pixels) * grad_logabsdet.sum(dtype=torch.float64)
    dweight = torch.zeros_like(weight) if needs_weight else None
    if known is None and dweight is not None:
        dweight.copy_(total * weight_inverse.double().t())
    dbias = torch.zeros_like(bias) if needs_weight and bias is not None else None
    return torch.zeros_like(x) if needs_x else None, dweight, dbias, None if known is None else total.to(known.dtype)


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? weight_inverse, Tensor? logabsdet, bool inverse"

_forward = define(
    f"invertible_linear({_INPUTS}, bool invert) -> (Tensor, Tensor, Tensor)",
    outputs=_outputs,
    torch_=_torch_forward,
    triton="invertible_linear.forward",
)
_backward = define(
    f"invertible_linear_backward({_INPUTS}, bool needs_x, bool needs_weight, Tensor grad, Tensor? grad_logabsdet)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    outputs=_gradients,
    torch_=_differentiate,
    triton="invertible_linear.backward",
)


class _InvertibleLinear(torch.autograd.Function):
    """Saves the input in both directions: the gradient of W for the inverse follows from sum g x^T too.

    ``outputs`` are the results, if they are known already; W^-1 must then be given where the backward needs it. An absent
    gradient stays absent but under a compiler, as in ``affine_coupling``.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Optional, *rest: Any) -> Pair:
        weight_inverse, known, inverse, outputs = rest
        ctx.set_materialize_grads(False)
        needs_x, *needs = ctx.needs_input_grad[:3]
        ctx.flags = inverse, needs_x, any(needs)
        if outputs is not None:
            ctx.save_for_backward(x, weight, bias, weight_inverse, known)
            return outputs
        invert = weight_inverse is None and (inverse or (known is None and any(needs)))
        y, logabsdet, found = _forward(x, weight, bias, weight_inverse, known, inverse, invert)
        ctx.save_for_backward(x, weight, bias, found if invert else weight_inverse, known)
        return y, logabsdet

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, grad_logabsdet: torch.Tensor | None) -> Any:
        _, _, bias, _, known = saved = ctx.saved_tensors
        _, needs_x, needs_weight = ctx.flags
        arguments: tuple[Any, ...] = (*saved, *ctx.flags)
        if reference_differentiates(grad, grad_logabsdet):
            grads = _differentiate(*(*arguments, grad, grad_logabsdet))
        elif grad is None:
            grads = (None,) * 4 if grad_logabsdet is None else _differentiate_logabsdet(*(*arguments, grad_logabsdet))
        else:
            grads = _backward(*arguments, grad, grad_logabsdet)
        wanted = needs_x, needs_weight, needs_weight and bias is not None, known is not None
        dx, dweight, dbias, dknown = (g if there else None for g, there in zip(grads, wanted, strict=True))
        return dx, dweight, dbias, None, dknown, None, None


def invertible_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    inverse: bool = False,
    weight_inverse: torch.Tensor | None = None,
    logabsdet: torch.Tensor | None = None,
) -> Pair:
    """Invertible linear map of the channels (on images an invertible 1x1 convolution), with its log-determinant.

    y = W x + b at every pixel; logabsdet = H W log|det W| for every sample (log|det W| for vectors). A singular W
    gives a log-determinant that is not finite, and no exception.

    Args:
        x: (B, C), (B, C, H, W), or either with more leading batch dimensions; any strides; float64, float32,
            bfloat16 or float16.
        weight: W, (C, C). May differ from x in floating dtype, as may all that follows.
        bias: b, (C,).
        inverse: y = W^-1 (x - b) instead, and its logabsdet = -H W log|det W|.
        weight_inverse: W^-1, (C, C), if it is known. A value and no variable of its own: the gradient of the inverse
            goes to ``weight``, and none to it.
        logabsdet: log|det W|, 0-d, if it is known: a sum over the diagonal where W is a product of triangular factors.
            A variable of its own: the log-determinant's gradient goes to it, and not to ``weight``. Where it is
            absent, one float64 factorization of W gives it, and W^-1 where that is needed.

    Returns:
        (y, logabsdet): y as x in shape and dtype; logabsdet of shape (B,) in nats, float64 if x, weight or bias is,
        else float32.

    Raises:
        TypeError: an input that is not a floating tensor.
        ValueError: a wrong shape or device; the message says what was expected.

    Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (2018), section 3.2.
    """
    check_floating("x", x)
    if x.ndim not in (2, 4):
        leading, x, _ = flatten_batch(x, x)
        kwargs: dict[str, Any] = {"inverse": inverse, "weight_inverse": weight_inverse, "logabsdet": logabsdet}
        y, total = invertible_linear(x, weight, bias, **kwargs)
        return y.unflatten(0, leading), total.unflatten(0, leading)
    channels = x.shape[1]
    square = (channels, channels)
    check_tensor("weight", weight, square, x)
    if bias is not None:
        check_tensor("bias", bias, (channels,), x)
    if weight_inverse is not None:
        check_tensor("weight_inverse", weight_inverse, square, x)
    if logabsdet is not None:
        check_tensor("logabsdet", logabsdet, (), x)
    if reference_runs(x) or channels == 0:
        return reference(x, weight, bias, inverse=inverse, weight_inverse=weight_inverse, logabsdet=logabsdet)
    weight_inverse = None if weight_inverse is None else weight_inverse.detach()
    if recording(x, weight, bias, logabsdet):
        return _InvertibleLinear.apply(x, weight, bias, weight_inverse, logabsdet, inverse, None)
    invert = inverse and weight_inverse is None
    return _forward(x, weight, bias, weight_inverse, logabsdet, inverse, invert)[:2]


def undo(
    y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, logabsdet: torch.Tensor | None
) -> tuple[torch.Tensor, Pair]:
    """The x, a leaf, with invertible_linear(x, weight, bias) = (y, l), and this pair as a function of x and the arguments.

    For a backward pass that starts at y: the pair has a graph, but nothing was computed for it besides x and W^-1.
    """
    kernel = not reference_runs(y) and y.ndim in (2, 4) and y.shape[1] > 0
    found: torch.Tensor | None = None
    with torch.no_grad():
        if kernel:
            x, negated, found = _forward(y, weight, bias, None, logabsdet, True, True)
        else:
            x, negated = invertible_linear(y, weight, bias, inverse=True, logabsdet=logabsdet)
    x.requires_grad_()
    with torch.enable_grad():
        if not kernel:
            return x, invertible_linear(x, weight, bias, logabsdet=logabsdet)
        return x, _InvertibleLinear.apply(x, weight, bias, found, logabsdet, False, (y.detach(), -negated))


_KERNELS = _forward, _backward
register(
    invertible_linear,
    reference,
    _samples,
    _KERNELS,
    outputs=(Output("y"), LOGABSDET),
    per_sample=1,
    laws=Law.INVERTIBLE | Law.LOG_DET,
)
