"""Linear map whose weights are masked by degrees: y = x (W * M)^T + b with M[o, i] = out_degrees[o] >= in_degrees[i].

Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation" (2015), eq. 12 and 13. With the units of
both sides sorted by degree, M is lower triangular in blocks: output r sees the first reach[r] inputs, and reach never
falls. So nothing is multiplied by a mask: every product ends where the mask does.

============== ======================================================================
y              row r: x[:, :reach[r]] W[r, :reach[r]]^T + b[r]
gradient of x  column c: g[:, first[c]:] W[first[c]:, c], where first[c] is the first row that sees c
of W           row r: g[:, r]^T x[:, :reach[r]], then zeros
of b           sum g
============== ======================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .._core.checks import accumulation_dtype, check_floating, check_tensor, has_values
from .._core.op import Law, Output, Sample, define, normal, observed, recording, reference_runs, register, transformed
from .._core.reference import differentiate, outside_autocast, reference_differentiates
from .autoregressive.degrees import DegreeMask, dense_mask

__all__ = ["DegreeMask", "masked_linear"]

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

#: Where autocast lowers the dtype as it does that of ``F.linear``. A CPU multiplies float32 faster than half precision.
_LOWERED_ON = {"cuda"}


@outside_autocast
def _reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *mask: Any) -> torch.Tensor:
    reach, _, rows, columns, _ = mask
    dtype = accumulation_dtype(x, weight, bias)
    masked = torch.where(dense_mask(reach, rows, columns, weight.shape[1]), weight.to(dtype), 0.0)
    return F.linear(x.to(dtype), masked, None if bias is None else bias.to(dtype)).to(x.dtype)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_degrees: torch.Tensor | DegreeMask,
    in_degrees: torch.Tensor | None = None,
    *,
    strict: bool = False,
) -> torch.Tensor:
    """The definition in plain torch: the weights that are masked are replaced by zeros, whatever they are."""
    x, weight = _lowered(x, weight, bias)
    return _reference(x, weight, bias, *_as_mask(out_degrees, in_degrees, strict).indices)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    randn = normal(device, dtype)

    def sample(name: str, batch: int, out_degrees: torch.Tensor, in_degrees: torch.Tensor, **kwargs: Any) -> Sample:
        mask = DegreeMask(out_degrees.to(device), in_degrees.to(device), **kwargs)
        rows, columns = mask.out_features, mask.in_features
        return Sample(name, (randn(batch, columns), randn(rows, columns), randn(rows), mask))

    for strict in (False, True):
        suffix = "-strict" if strict else ""
        yield sample(f"sorted{suffix}", 5, torch.arange(7), torch.arange(7), strict=strict)
        yield sample(f"shuffled{suffix}", 4, torch.tensor([3, 1, 2, 0, 3]), torch.tensor([2, 0, 1, 3]), strict=strict)
    yield sample("one-element", 1, torch.tensor([1]), torch.tensor([1]))
    yield sample("nothing-seen", 3, torch.tensor([0, 0]), torch.tensor([1, 2, 3]))
    yield sample("wide", 9, torch.arange(70) % 30, torch.arange(33), strict=True)
    yield sample("long", 130, torch.arange(20), torch.arange(17))
    yield sample("empty-batch", 0, torch.arange(4), torch.arange(3))
    x, weight, bias, mask = sample("", 4, torch.arange(6), torch.arange(5)).args
    yield Sample("no-bias", (x, weight, None, mask))
    yield Sample("strided", (randn(5, 4).t(), randn(5, 6).t(), randn(12)[::2], mask))
    yield Sample("degrees", (x, weight, bias, mask.out_degrees, mask.in_degrees), {"strict": True})
    yield Sample("mixed-dtypes", (x, weight.to(torch.bfloat16), bias.float(), mask))


def _output(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _gradients(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> Triple:
    _, _, _, _, _, needs_x, needs_weight, needs_bias = rest
    nothing = (0,)
    like = weight if bias is None else bias
    return (
        x.new_empty(x.shape if needs_x else nothing),
        weight.new_empty(weight.shape if needs_weight else nothing),
        like.new_empty((weight.shape[0],) if needs_bias else nothing),
    )


def _each_panel(panels: tuple[int, ...], reach: torch.Tensor) -> Any:
    """(rows, columns that all of them see, the others that some see, the mask there) of one panel after the other."""
    start = 0
    for end, whole, seen in zip(panels[::3], panels[1::3], panels[2::3], strict=True):
        rows, some = slice(start, end), slice(whole, seen)
        numbers = torch.arange(whole, seen, device=reach.device)
        yield rows, slice(0, whole), some, numbers < reach[rows, None]
        start = end


def _torch_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> None:
    *mask, y = rest
    reach, *_, panels = mask
    dtype = accumulation_dtype(x, weight, bias)
    if not panels:
        y.copy_(_reference(x, weight, bias, *mask))
        return
    result = y if y.dtype is dtype else y.to(dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    shift = x.new_zeros(len(weight)) if bias is None else bias.to(dtype)
    for rows, whole, some, seen in _each_panel(panels, reach):
        part = result[:, rows]
        torch.addmm(shift[rows], x[:, whole], weight[rows, whole].t(), out=part)
        part.addmm_(x[:, some], torch.where(seen, weight[rows, some], 0.0).t())
    if result is not y:
        y.copy_(result)


def _torch_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor | None, ...]:
    reach, _, rows, columns, panels, needs_x, needs_weight, needs_bias = rest
    dtype = accumulation_dtype(x, weight, bias)
    dbias = grad.sum(0, dtype=dtype) if needs_bias else None
    grad, x, weight = grad.to(dtype), x.to(dtype), weight.to(dtype)
    if not panels:
        seen = dense_mask(reach, rows, columns, weight.shape[1])
        dx = grad @ torch.where(seen, weight, 0.0) if needs_x else None
        return dx, torch.where(seen, grad.t() @ x, 0.0) if needs_weight else None, dbias
    dx = torch.zeros_like(x) if needs_x else None
    dweight = torch.zeros_like(weight) if needs_weight else None
    for own, whole, some, visible in _each_panel(panels, reach):
        g = grad[:, own]
        if dx is not None:
            dx[:, whole].addmm_(g, weight[own, whole])
            dx[:, some].addmm_(g, torch.where(visible, weight[own, some], 0.0))
        if dweight is not None:
            dweight[own, whole].addmm_(g.t(), x[:, whole], beta=0)
            dweight[own, some] = torch.where(visible, g.t() @ x[:, some], 0.0)
    return dx, dweight, dbias


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor reach, Tensor first, Tensor? rows, Tensor? columns, int[] panels"

_forward = define(
    f"masked_linear({_INPUTS}) -> Tensor", outputs=_output, torch_=_torch_forward, fills=True, triton="masked_linear.forward"
)
_backward = define(
    f"masked_linear_backward(Tensor grad, {_INPUTS}, bool needs_x, bool needs_weight, bool needs_bias)"
    " -> (Tensor, Tensor, Tensor)",
    outputs=_gradients,
    torch_=_torch_backward,
    triton="masked_linear.backward",
)


class _MaskedLinear(torch.autograd.Function):
    """The mask is one argument, and no saved tensor: it has no gradient, and each that autograd looks at takes time."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, mask: tuple[Any, ...]
    ) -> torch.Tensor:
        ctx.mask = mask
        ctx.save_for_backward(x, weight, bias)
        return _forward(x, weight, bias, *mask)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = needs = ctx.needs_input_grad
        if reference_differentiates(grad):
            dx, dweight, dbias = _differentiate(grad, x, weight, bias, *ctx.mask)
        else:
            dx, dweight, dbias = _backward(grad, x, weight, bias, *ctx.mask, *needs[:3])
        return dx if needs_x else None, dweight if needs_weight else None, dbias if needs_bias else None, None


def _differentiate(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *mask: Any
) -> tuple[torch.Tensor | None, ...]:
    """The gradients by autograd of the reference, differentiable themselves."""
    variables = (x, weight) if bias is None else (x, weight, bias)
    dx, dweight, *dbias = differentiate(lambda x, w, b=None: _reference(x, w, b, *mask), variables, {}, (grad,))
    return dx, dweight, dbias[0] if dbias else None


def _lowered(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x and W in the dtype that autocast has products in. It leaves float64 alone; and b, which is only added, is kept."""
    kind = x.device.type
    if kind not in _LOWERED_ON or not torch.is_autocast_enabled(kind) or accumulation_dtype(x, weight, bias) is torch.float64:
        return x, weight
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype)


#: The masks made last of degrees that came as tensors, each with these tensors: then no others can have their place in memory.
_masks: dict[Any, tuple[DegreeMask, torch.Tensor, torch.Tensor]] = {}


def _version(degrees: torch.Tensor) -> Any:
    """What tells whether degrees are others than before: their values, or where reading them waits, their own version."""
    return tuple(degrees.tolist()) if degrees.is_cpu else (id(degrees), degrees._version)


def _mask_of(out_degrees: torch.Tensor, in_degrees: torch.Tensor, strict: bool) -> DegreeMask:
    """The mask of these degrees. Only the first of many calls with the same tensors has a GPU waited for."""
    given = (out_degrees, in_degrees)
    if any(not isinstance(t, torch.Tensor) or t.ndim != 1 or t.is_floating_point() or t.is_inference() for t in given):
        return DegreeMask(*given, strict=strict)
    if observed(given) or transformed() or not all(map(has_values, given)):
        return DegreeMask(*given, strict=strict)
    key = (out_degrees.device, *map(_version, given), strict)
    if key not in _masks:
        mask = DegreeMask(*given, strict=strict)
        while len(_masks) >= 8:
            _masks.pop(next(iter(_masks)), None)
        _masks[key] = mask, *given
    return _masks[key][0]


def _as_mask(out_degrees: torch.Tensor | DegreeMask, in_degrees: torch.Tensor | None, strict: bool) -> DegreeMask:
    if not isinstance(out_degrees, DegreeMask):
        if in_degrees is None:
            raise TypeError("in_degrees: expected an integer tensor, got NoneType")
        return _mask_of(out_degrees, in_degrees, strict)
    if in_degrees is not None or strict:
        raise ValueError("in_degrees, strict: expected neither beside a DegreeMask, which holds them")
    return out_degrees


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_degrees: torch.Tensor | DegreeMask,
    in_degrees: torch.Tensor | None = None,
    *,
    strict: bool = False,
) -> torch.Tensor:
    """y = x (W * M)^T + b with M[o, i] = 1 where out_degrees[o] >= in_degrees[i] (``strict``: >), else 0.

    Weights that are masked are never read: they may be NaN, and their gradient is zero. Units that come sorted by degree
    are computed in place; others are gathered on the way. About half of the dense product's work is left.

    Args:
        x: (..., I), any strides; float64, float32, bfloat16 or float16.
        weight: W, (O, I). May differ from x in floating dtype, as may bias.
        bias: b, (O,), or None.
        out_degrees: (O,) integers, or a ``DegreeMask`` that was prepared once, for which ``torch.compile`` needs no graph
            break. Of the same tensors it is prepared once too: the first call waits for a GPU, and a CUDA graph takes others.
        in_degrees: (I,) integers; not given with a ``DegreeMask``.
        strict: > instead of >=, for the last layer of a MADE.

    Returns:
        y, (..., O), in the dtype of x; under autocast on a GPU in that of autocast, as ``F.linear`` has it. Sums are in
        float64 if any input is, else in float32. A NaN in x reaches the outputs of its sample that see it, and on a CPU no
        others; on a GPU it may reach more of its sample, and of the torch backend all.

    Raises:
        TypeError: an input that is not a floating tensor, degrees that are not integer tensors.
        ValueError: a wrong shape or device; degrees that are not 1-D, or given beside a ``DegreeMask``.

    Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation" (2015), eq. 12 and 13.
    """
    mask = _as_mask(out_degrees, in_degrees, strict)
    check_floating("x", x)
    if x.ndim < 1 or x.shape[-1] != mask.in_features:
        raise ValueError(f"x: expected shape (..., {mask.in_features}), one value per in_degree, got {tuple(x.shape)}")
    check_tensor("weight", weight, (mask.out_features, mask.in_features), x, "x", " for these degrees")
    if bias is not None:
        check_tensor("bias", bias, (mask.out_features,), x, "x", " for these degrees")
    if (device := mask.indices[0].device) != x.device:
        raise ValueError(f"out_degrees: the DegreeMask is on {device}, x on {x.device}; move it with .to()")
    if x.ndim != 2:
        y = masked_linear(x.reshape(-1, x.shape[-1]), weight, bias, mask)
        return y.view(*x.shape[:-1], mask.out_features)
    x, weight = _lowered(x, weight, bias)
    # A compiler would rather see one product than panels.
    if reference_runs(x, own_torch=bool(mask.panels) and not torch.compiler.is_compiling()):
        return _reference(x, weight, bias, *mask.indices)
    if recording(x, weight, bias):
        return _MaskedLinear.apply(x, weight, bias, mask.indices)
    return _forward(x, weight, bias, *mask.indices)


register(masked_linear, reference, _samples, (_forward, _backward), outputs=(Output("y"),), per_sample=1, laws=Law.MASKED)
