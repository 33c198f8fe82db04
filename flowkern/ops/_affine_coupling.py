"""Affine coupling: y = x * s(u) + t on the transformed elements, y = x on the others, and log|det dy/dx|.

Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017), eq. 7 and 8. With the scale's
logarithm L = log s(u) and its slope L' = dL/du, and g, l the gradients of the output and of logabsdet:

====================== ================= ======================= ============== ==================
direction              output            gradient of u           of t           of x
====================== ================= ======================= ============== ==================
forward                y = x s + t       L' (g x s + l)          g              g s
forward, shift first   y = (x + t) s     L' (g (x + t) s + l)    g s            g s
inverse                x = (y - t) / s   -L' (g x + l)           -g / s         g / s
inverse, shift first   x = y / s - t     -L' (g y / s + l)       -g             g / s
====================== ================= ======================= ============== ==================

logabsdet is the sum of L over a sample's transformed elements, negated for the inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._core.checks import accumulation_dtype, check_floating, check_same_device, empty_as, flatten_batch
from .._core.op import LOGABSDET, Law, Output, Sample, define, normal, recording, reference_runs, register
from .._core.reference import differentiate, outside_autocast, reference_differentiates
from .._core.scale_map import LAYOUTS, ScaleMap, check_scale, named_layout
from .._core.split import FeatureMask, Split, from_code, moved_channels, put, resolve, restrict, take

__all__ = ["affine_coupling"]

_SIGMOID = ScaleMap.sigmoid()

# What a kernel needs to know besides its tensors: ``place`` is that of the FeatureMask.
_SCHEMA = "Tensor? place, int split, int scale, float a, float b, int layout, bool shift_first, bool inverse"

Pair = tuple[torch.Tensor, torch.Tensor]


@outside_autocast
def reference(
    x: torch.Tensor,
    params: torch.Tensor,
    *,
    split: Split = "channel",
    scale: ScaleMap = _SIGMOID,
    layout: str = "scale_shift",
    shift_first: bool = False,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in plain torch, for x of shape (B, C) or (B, C, H, W)."""
    accumulate = accumulation_dtype(x, params)
    raw, shift = (restrict(p.to(accumulate), split) for p in named_layout(layout).split(params))
    s, log_s = scale.reciprocal(raw) if inverse else scale(raw)
    moved = take(x, split).to(accumulate)
    if inverse:
        moved = moved * s - shift if shift_first else (moved - shift) * s
    else:
        moved = (moved + shift) * s if shift_first else moved * s + shift
    logabsdet = restrict(log_s, split).flatten(1).sum(1)
    return put(x, moved.to(x.dtype), split), -logabsdet if inverse else logabsdet


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    randn = normal(device, dtype)
    yield Sample("vector", (randn(5, 6), randn(5, 6)))
    yield Sample("one-element", (randn(1, 2), randn(1, 2)))
    yield Sample("odd-channels", (randn(3, 7), randn(3, 6)))
    yield Sample("swap-odd", (randn(3, 7), randn(3, 8)), {"split": "channel_swap"})
    yield Sample("nothing-moved", (randn(3, 1), randn(3, 0)))
    yield Sample("empty-batch", (randn(0, 6), randn(0, 6)))
    yield Sample("empty-space", (randn(2, 4, 0, 3), randn(2, 4, 0, 3)))
    yield Sample("wide-vector", (randn(2, 3001), randn(2, 3000)), {"inverse": True})
    yield Sample("image", (randn(2, 5, 3, 7), randn(2, 4, 3, 7)))
    yield Sample("large-image", (randn(2, 6, 33, 35), randn(2, 6, 33, 35)))
    yield Sample("checkerboard", (randn(2, 3, 5, 7), randn(2, 6, 5, 7)), {"split": "checkerboard"})
    swapped = {"split": "checkerboard_swap", "inverse": True}
    yield Sample("checkerboard-swap-inverse", (randn(2, 3, 4, 6), randn(2, 6, 4, 6)), swapped)
    yield Sample("checkerboard-one-pixel", (randn(2, 3, 1, 1), randn(2, 6, 1, 1)), {"split": "checkerboard"})
    mask = FeatureMask(torch.tensor([True, False, True, True, False])).to(device)
    yield Sample("feature-mask", (randn(4, 5), randn(4, 6)), {"split": mask})
    yield Sample("feature-mask-image", (randn(2, 5, 3, 4), randn(2, 6, 3, 4)), {"split": mask, "inverse": True})
    nothing = FeatureMask(torch.zeros(4, dtype=torch.bool)).to(device)
    yield Sample("feature-mask-nothing", (randn(2, 4), randn(2, 0)), {"split": nothing})
    channels_last = randn(2, 6, 4, 5).to(memory_format=torch.channels_last)
    yield Sample("channels-last", (channels_last, randn(2, 6, 4, 5).to(memory_format=torch.channels_last)))
    yield Sample("channels-last-mixed", (channels_last, randn(2, 6, 4, 5)), {"split": "channel_swap", "inverse": True})
    whole = randn(2, 12, 4, 5).to(memory_format=torch.channels_last)
    yield Sample("channels-last-checkerboard", (channels_last, whole), {"split": "checkerboard"})
    yield Sample("strided", (randn(4, 12)[:, ::2], randn(6, 4).t()))
    yield Sample("strided-image", (randn(2, 4, 6, 5)[..., ::2], randn(4, 2, 6, 3).transpose(0, 1)), {"shift_first": True})
    yield Sample("expanded", (randn(1, 4).expand(3, 4), randn(3, 1).expand(3, 4)))
    yield Sample("mixed-dtypes", (randn(3, 6), randn(3, 6, dtype=torch.bfloat16)))
    yield Sample("mixed-half", (randn(3, 6, dtype=torch.float32), randn(3, 6, dtype=torch.float16)), {"inverse": True})
    yield Sample("half-state", (randn(3, 6, dtype=torch.float16), randn(3, 6)), {"shift_first": True})
    for layout in LAYOUTS:
        shape = named_layout(layout).shape((2, 6, 3, 5), 3)
        yield Sample(f"layout-{layout}", (randn(2, 6, 3, 5), randn(*shape)), {"layout": layout})
        yield Sample(f"layout-{layout}-inverse", (randn(2, 6, 3, 5), randn(*shape)), {"layout": layout, "inverse": True})
    maps = {
        "exp": ScaleMap.exp(),
        "sigmoid-eps": ScaleMap.sigmoid(1.5, 1e-2),
        "softplus": ScaleMap.softplus(),
        "tanh": ScaleMap.tanh(1.5),
        "atan": ScaleMap.atan(2.0),
        "soft-clip": ScaleMap.soft_clip(1e-3),
    }
    for name, scale in maps.items():
        for shift_first in (False, True):
            for inverse in (False, True):
                kwargs = {"scale": scale, "shift_first": shift_first, "inverse": inverse}
                label = f"{name}{'-shift-first' if shift_first else ''}{'-inverse' if inverse else ''}"
                yield Sample(label, (randn(3, 8), 2 * randn(3, 8)), kwargs)
    yield Sample("sigmoid-shift-first-inverse", (randn(3, 8), randn(3, 8)), {"shift_first": True, "inverse": True})


def _outputs(x: torch.Tensor, params: torch.Tensor, *_: Any) -> Pair:
    return empty_as(x), x.new_empty((x.shape[0],), dtype=accumulation_dtype(x, params))


def _settings(
    place: torch.Tensor | None, split: int, scale: int, a: float, b: float, layout: int, shift_first: bool, inverse: bool
) -> dict[str, Any]:
    """The arguments of the reference that say what ``_SCHEMA`` says to kernels."""
    return {
        "split": from_code(split, place),
        "scale": ScaleMap.from_code(scale, a, b),
        "layout": LAYOUTS[layout],
        "shift_first": shift_first,
        "inverse": inverse,
    }


def _differentiate(x: torch.Tensor, params: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    grad, grad_logabsdet, *configuration = rest
    return differentiate(reference, (x, params), _settings(*configuration), (grad, grad_logabsdet))


_forward = define(
    f"affine_coupling(Tensor x, Tensor params, {_SCHEMA}) -> (Tensor, Tensor)",
    outputs=_outputs,
    torch_=lambda x, params, *configuration: reference(x, params, **_settings(*configuration)),
    triton="affine_coupling.forward",
)
_backward = define(
    f"affine_coupling_backward(Tensor x, Tensor params, Tensor? grad, Tensor? grad_logabsdet, {_SCHEMA}) -> (Tensor, Tensor)",
    outputs=lambda x, params, *_: (empty_as(x), empty_as(params)),
    torch_=_differentiate,
    triton="affine_coupling.backward",
)


class _AffineCoupling(torch.autograd.Function):
    """Saves the inputs: x is kept alive anyway by the conditioner that read a part of it.

    ``settings`` are what ``_SCHEMA`` says after ``place``; ``outputs`` are the results, if they are known already. An output's
    gradient that is absent stays so: zeros in its place would meet the infinity of a scale or an x that overflows, and become
    NaN. Only a compiled graph has zeros there, because its backward is traced before anyone knows which of its outputs have a
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, params: torch.Tensor, place: torch.Tensor | None, settings: Any, outputs: Pair | None
    ) -> Pair:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, params, place)
        ctx.settings = settings
        return _forward(x, params, place, *settings) if outputs is None else outputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, grad_logabsdet: torch.Tensor | None) -> Any:
        x, params, place = ctx.saved_tensors
        differentiated = _differentiate if reference_differentiates(grad, grad_logabsdet) else _backward
        dx, dparams = differentiated(x, params, grad, grad_logabsdet, place, *ctx.settings)
        return dx, dparams, None, None, None


def affine_coupling(
    x: torch.Tensor,
    params: torch.Tensor,
    *,
    split: Split = "channel",
    scale: ScaleMap = _SIGMOID,
    layout: str = "scale_shift",
    shift_first: bool = False,
    inverse: bool = False,
) -> Pair:
    """Affine coupling transform with its log-determinant, in one pass.

    y = x * s(u) + t on the elements that ``split`` transforms, y = x on the others;
    logabsdet = sum of log s(u) over a sample's transformed elements.

    Args:
        x: (B, C), (B, C, H, W), or either with more leading batch dimensions; any strides; float64, float32,
            bfloat16 or float16.
        params: the conditioner's output, holding u and t where ``layout`` says: (B, 2M) or (B, 2M, H, W), or with a
            trailing axis of 2 for the pair layouts, where M is the number of transformed channels, and C for a
            checkerboard (which ignores the values at kept places). May differ from x in floating dtype.
        split: ``"channel"`` transforms the last C // 2 channels, ``"channel_swap"`` exactly those that ``"channel"``
            keeps, ``"checkerboard"`` the pixels with h + w odd, ``"checkerboard_swap"`` those with h + w even, and a
            ``FeatureMask`` the channels where it is True.
        scale: the ``ScaleMap`` from u to s. The default is Glow's, which only contracts; that of ``nn.AffineCoupling`` does both.
        layout: one of ``LAYOUTS``.
        shift_first: y = (x + t) * s(u) instead.
        inverse: the inverse transform, and its logabsdet.

    Returns:
        (y, logabsdet): y as x in shape and dtype; logabsdet of shape (B,) in nats, float64 if an input is, else float32.

    Raises:
        TypeError: an input that is not a floating tensor, and a scale that is no ``ScaleMap``.
        ValueError: a wrong shape, device, split or layout; the message says what was expected.

    Source: Dinh et al., "Density estimation using Real NVP" (2017), eq. 7 and 8; shift first: Glow's code.
    """
    check_floating("x", x)
    check_floating("params", params)
    check_same_device("params", params, x)
    kwargs: dict[str, Any] = {"scale": scale, "layout": layout, "shift_first": shift_first, "inverse": inverse}
    if x.ndim not in (2, 4):
        leading, x, params = flatten_batch(x, params)
        y, logabsdet = affine_coupling(x, params, split=split, **kwargs)
        return y.unflatten(0, leading), logabsdet.unflatten(0, leading)
    place, *settings = _configuration(x, params, split, **kwargs)
    if reference_runs(x):
        return reference(x, params, split=split, **kwargs)
    if recording(x, params):
        return _AffineCoupling.apply(x, params, place, settings, None)
    return _forward(x, params, place, *settings)


def _configuration(
    x: torch.Tensor, params: torch.Tensor, split: Split, *, scale: ScaleMap, layout: str, shift_first: bool, inverse: bool
) -> tuple[Any, ...]:
    """The arguments as kernels take them. Raises ValueError if params does not fit x of shape (B, C) or (B, C, H, W)."""
    check_scale(scale)
    split_code, param_layout = resolve(split, x), named_layout(layout)
    expected = param_layout.shape(x.shape, moved_channels(split, x.shape[1]))
    if params.shape != expected:
        raise ValueError(
            f"params: expected shape {tuple(expected)} for x of shape {tuple(x.shape)}, split {split!r} and layout {layout!r}, "
            f"got {tuple(params.shape)}"
        )
    place = split.place if isinstance(split, FeatureMask) else None
    return place, split_code, scale.code, *scale.constants, param_layout.code, shift_first, inverse


def undo(y: torch.Tensor, params: torch.Tensor, *, split: Split, inverse: bool, **kwargs: Any) -> tuple[torch.Tensor, Pair]:
    """The x, a leaf, with affine_coupling(x, params) = (y, logabsdet), and this pair as a function of both.

    For a backward pass that starts at y: the pair has a graph, but nothing was computed for it besides x. Arguments as for
    ``affine_coupling``.
    """
    with torch.no_grad():
        x, negated = affine_coupling(y, params, split=split, inverse=not inverse, **kwargs)
    x.requires_grad_()
    with torch.enable_grad():
        if reference_runs(y) or y.ndim not in (2, 4):
            return x, affine_coupling(x, params, split=split, inverse=inverse, **kwargs)
        place, *settings = _configuration(x, params, split, inverse=inverse, **kwargs)
        return x, _AffineCoupling.apply(x, params, place, settings, (y.detach(), -negated))


register(
    affine_coupling,
    reference,
    _samples,
    (_forward, _backward),
    outputs=(Output("y"), LOGABSDET),
    laws=Law.INVERTIBLE | Law.LOG_DET,
)
