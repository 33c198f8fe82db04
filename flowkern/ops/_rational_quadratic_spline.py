"""Monotone rational-quadratic spline of every value, and log|det dy/dx|.

Source: Durkan et al., "Neural Spline Flows" (2019), eq. 4 to 8. In units of the interval, a bin [left, left + w] goes to
[bottom, bottom + h] with slope s = h / w and the slopes d_0 and d_1 at its ends. With t the place in the bin, q = t (1 - t):

=============== ==========================================================================
N               s t^2 + d_0 q
D               s + (d_0 + d_1 - 2 s) q
M               d_1 t^2 + 2 s q + d_0 (1 - t)^2
y               bottom + h N / D
L = log dy/dx   2 log s + log M - 2 log D
dy/ds           h (t^2 - N (1 - 2 q) / D) / D                with h apart from s
dy/dd_0, dd_1   h q (D - N) / D^2, -h q N / D^2
dL/dt           (2 d_1 t + 2 s (1 - 2 t) - 2 d_0 (1 - t)) / M - 2 (d_0 + d_1 - 2 s) (1 - 2 t) / D
dL/ds           2 / s + 2 q / M - 2 (1 - 2 q) / D
dL/dd_0, dd_1   (1 - t)^2 / M - 2 q / D, t^2 / M - 2 q / D
=============== ==========================================================================

The inverse has, with e = (y - bottom) / h, r = d_0 - e (d_0 + d_1) and R^2 = r^2 + 4 s^2 e (1 - e), a sum of squares,

    t = 2 s e / (2 s e + r + R),  where r < 0: r + R = 4 s^2 e (1 - e) / (R - r),

and the gradients of the implicit function: with g and l those of x and of the inverse's logabsdet, those of the forward
direction for -(g - l dL/dx) / (dy/dx) and -l, and (g - l dL/dx) / (dy/dx) for its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._core import backend
from .._core.checks import accumulation_dtype, check_floating, check_same_device, check_tensor, empty_as, flatten_batch
from .._core.op import LOGABSDET, Law, Output, Sample, define, normal, recording, reference_runs, register
from .._core.reference import differentiate, outside_autocast, reference_differentiates
from .._core.spline_map import PARAM_LAYOUTS, SplineMap, check_spline, trailing
from .._core.split import FeatureMask, Split, moved_channels, put, resolve, restrict, take

__all__ = ["rational_quadratic_spline"]

_SPLINE = SplineMap(8)

# What a kernel needs to know besides its tensors: ``parity`` is that of h + w at the pixels that change, or -1 for all pixels.
_SCHEMA = "Tensor? bounds, str spline, int layout, int parity, bool inverse"

Pair = tuple[torch.Tensor, torch.Tensor]


def _elements(
    x: torch.Tensor, params: torch.Tensor, bounds: torch.Tensor | None, spline: SplineMap, layout: str, inverse: bool
) -> Pair:
    """y and log|dy / dx| of every element."""
    accumulate = accumulation_dtype(x, params)
    if bounds is not None:
        bounds = bounds.detach().to(accumulate).reshape(-1, *[1] * (x.ndim - 2), 2)
    params = trailing(params, layout, spline.params_per_feature)
    y, log_slope = spline(x.to(accumulate), params.to(accumulate), bounds, inverse)
    return y.to(x.dtype), log_slope


@outside_autocast
def reference(
    x: torch.Tensor,
    params: torch.Tensor,
    *,
    spline: SplineMap = _SPLINE,
    split: Split | None = None,
    layout: str = "trailing",
    bounds: torch.Tensor | None = None,
    inverse: bool = False,
) -> Pair:
    """The definition in plain torch, for x of shape (B, C) or (B, C, H, W)."""
    moved = x if split is None else take(x, split)
    y, log_slope = _elements(moved, params, bounds, spline, layout, inverse)
    if split is None:
        return y, log_slope.flatten(1).sum(1)
    return put(x, y, split), restrict(log_slope, split).flatten(1).sum(1)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    randn = normal(device, dtype)

    def params(spline: SplineMap, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return 0.5 * randn(*shape, spline.params_per_feature, dtype=dtype)  # steeper splines magnify the rounding of x

    for kind in ("zuko", "nflows"):
        for tails in ("linear", "circular"):
            spline = SplineMap(5, 1.5, tails, kind)
            for inverse in (False, True):
                label = f"{kind}-{tails}{'-inverse' if inverse else ''}"
                yield Sample(label, (randn(7, 3), params(spline, 7, 3)), {"spline": spline, "inverse": inverse})
        box = SplineMap(4, (0.0, 1.0), "box", kind, divisor=2.0)
        for inverse in (False, True):
            values = randn(7, 3).sigmoid()
            label = f"{kind}-box{'-inverse' if inverse else ''}"
            yield Sample(label, (values, params(box, 7, 3)), {"spline": box, "inverse": inverse})
    spline = SplineMap(3, 2.0)
    yield Sample("one-element", (randn(1, 1), params(spline, 1, 1)), {"spline": spline})
    yield Sample("empty-batch", (randn(0, 3), params(spline, 0, 3)), {"spline": spline})
    yield Sample("empty-space", (randn(2, 3, 0, 2), params(spline, 2, 3, 0, 2)), {"spline": spline})
    yield Sample("one-column", (randn(300, 1), params(spline, 300, 1)), {"spline": spline, "inverse": True})
    yield Sample("wide-vector", (randn(2, 1200), params(spline, 2, 1200)), {"spline": spline})
    many = SplineMap(19, 3.0, kind="nflows")
    yield Sample("many-bins", (randn(5, 6), params(many, 5, 6)), {"spline": many})
    yield Sample("image", (randn(2, 3, 5, 7), params(spline, 2, 3, 5, 7)), {"spline": spline})
    yield Sample("split", (randn(4, 7), params(spline, 4, 3)), {"spline": spline, "split": "channel"})
    swapped = {"spline": spline, "split": "channel_swap", "layout": "blocks", "inverse": True}
    count = spline.params_per_feature
    yield Sample("blocks-swap-inverse", (randn(2, 5, 3, 4), 0.5 * randn(2, 3 * count, 3, 4)), swapped)
    checkered = {"spline": spline, "layout": "blocks", "split": "checkerboard"}
    yield Sample("checkerboard", (randn(2, 3, 3, 5), 0.5 * randn(2, 3 * count, 3, 5)), checkered)
    checkered = {"spline": spline, "layout": "interleaved", "split": "checkerboard_swap", "inverse": True}
    yield Sample("checkerboard-swap-inverse", (randn(2, 3, 4, 4), 0.5 * randn(2, 3 * count, 4, 4)), checkered)
    mask = FeatureMask(torch.tensor([True, False, True, True, False])).to(device)
    yield Sample(
        "feature-mask", (randn(4, 5), 0.5 * randn(4, 3 * count)), {"spline": spline, "split": mask, "layout": "interleaved"}
    )
    channels_last = randn(2, 4, 3, 5).to(memory_format=torch.channels_last)
    whole = 0.5 * randn(2, 4 * count, 3, 5).to(memory_format=torch.channels_last)
    yield Sample("channels-last", (channels_last, whole), {"spline": spline, "layout": "interleaved"})
    yield Sample("strided", (randn(4, 6)[:, ::2], 0.5 * randn(3, 2 * count, 4).permute(2, 0, 1)[..., ::2]), {"spline": spline})
    yield Sample("expanded", (randn(1, 4).expand(3, 4), params(spline, 1, 4).expand(3, 4, count)), {"spline": spline})
    limits = torch.tensor([[-1.0, 1.0], [0.0, 3.0], [-4.0, -0.25]], dtype=torch.float64, device=device).to(dtype)
    for inverse in (False, True):
        kwargs = {"spline": spline, "bounds": limits, "inverse": inverse}
        yield Sample(f"bounds{'-inverse' if inverse else ''}", (randn(6, 3), params(spline, 6, 3)), kwargs)
    yield Sample("mixed-dtypes", (randn(3, 6), params(spline, 3, 6, dtype=torch.bfloat16)), {"spline": spline})
    yield Sample("half-state", (randn(3, 40, dtype=torch.float16), params(spline, 3, 40)), {"spline": spline, "inverse": True})


def _outputs(x: torch.Tensor, params: torch.Tensor, *_: Any) -> Pair:
    return empty_as(x), x.new_empty((x.shape[0],), dtype=accumulation_dtype(x, params))


def _settings(bounds: torch.Tensor | None, spline: str, layout: int, parity: int, inverse: bool) -> dict[str, Any]:
    """The arguments of the reference that say what ``_SCHEMA`` says to kernels."""
    return {
        "spline": SplineMap.from_text(spline),
        "split": None if parity < 0 else "checkerboard" if parity else "checkerboard_swap",
        "layout": PARAM_LAYOUTS[layout],
        "bounds": bounds,
        "inverse": inverse,
    }


def _differentiate(x: torch.Tensor, params: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    grad, grad_logabsdet, *configuration = rest
    return differentiate(reference, (x, params), _settings(*configuration), (grad, grad_logabsdet))


def _on_cpu(name: str) -> Any:
    """The extension's entry, which takes a view of the parameters and the numbers of the map."""

    def run(x: torch.Tensor, params: torch.Tensor, *rest: Any) -> None:
        *grads, bounds, text, layout, parity, inverse, first, second = rest
        spline, name_of = SplineMap.from_text(text), PARAM_LAYOUTS[layout]
        views = (trailing(p, name_of, spline.params_per_feature) for p in ((params, second) if grads else (params,)))
        view, *of_gradient = views
        backend.call_native(name, x, view, *grads, bounds, *spline.constants, parity, inverse, first, *(of_gradient or [second]))

    return run


_forward = define(
    f"rational_quadratic_spline(Tensor x, Tensor params, {_SCHEMA}) -> (Tensor, Tensor)",
    outputs=_outputs,
    torch_=lambda x, params, *configuration: reference(x, params, **_settings(*configuration)),
    cpp=_on_cpu("rational_quadratic_spline"),
    triton="rational_quadratic_spline.forward",
)
_backward = define(
    "rational_quadratic_spline_backward(Tensor x, Tensor params, Tensor? grad, Tensor? grad_logabsdet, "
    f"{_SCHEMA}) -> (Tensor, Tensor)",
    outputs=lambda x, params, *_: (empty_as(x), empty_as(params)),
    torch_=_differentiate,
    cpp=_on_cpu("rational_quadratic_spline_backward"),
    triton="rational_quadratic_spline.backward",
)


class _Spline(torch.autograd.Function):
    """Saves the inputs. An output's gradient that is absent stays so, as in ``affine_coupling``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, params: torch.Tensor, bounds: torch.Tensor | None, settings: Any) -> Pair:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, params, bounds)
        ctx.settings = settings
        return _forward(x, params, bounds, *settings)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, grad_logabsdet: torch.Tensor | None) -> Any:
        x, params, bounds = ctx.saved_tensors
        differentiated = _differentiate if reference_differentiates(grad, grad_logabsdet) else _backward
        return *differentiated(x, params, grad, grad_logabsdet, bounds, *ctx.settings), None, None


def rational_quadratic_spline(
    x: torch.Tensor,
    params: torch.Tensor,
    *,
    spline: SplineMap = _SPLINE,
    split: Split | None = None,
    layout: str = "trailing",
    bounds: torch.Tensor | None = None,
    inverse: bool = False,
) -> Pair:
    """Monotone rational-quadratic spline of every value, with its log-determinant, in one pass.

    y = the spline of x, whose K widths, K heights and slopes at the knots ``params`` gives through ``spline``, on the elements
    that ``split`` transforms, y = x on the others; logabsdet = sum of log|dy / dx| over a sample's elements.

    Args:
        x: (B, C), (B, C, H, W), or either with more leading batch dimensions; any strides; float64, float32,
            bfloat16 or float16.
        params: P = ``spline.params_per_feature`` numbers for each of M channels: all of them without a split, else those that it
            transforms, and C for a checkerboard (which ignores the values at kept places). May differ from x in floating dtype.
        spline: the ``SplineMap`` from P numbers to a spline.
        split: None for all elements, or as in ``affine_coupling``.
        layout: where params are: ``"trailing"`` (B, M, ..., P), ``"interleaved"`` (B, M P, ...) with those of a channel side by
            side, or ``"blocks"`` (B, P M, ...) with the first one of all channels, then the second, and so on.
        bounds: (M, 2), low and high of each channel's interval, in place of the map's; constants, without a gradient.
        inverse: the inverse transform, and its logabsdet.

    Returns:
        (y, logabsdet): y as x in shape and dtype; logabsdet of shape (B,) in nats, float64 if an input is, else float32.

    Raises:
        TypeError: an input that is not a floating tensor, and a spline that is no ``SplineMap``.
        ValueError: a wrong shape, device, split or layout; the message says what was expected.

    Source: Durkan et al., "Neural Spline Flows" (2019), eq. 4 to 8.
    """
    check_floating("x", x)
    check_floating("params", params)
    check_same_device("params", params, x)
    kwargs: dict[str, Any] = {"spline": spline, "split": split, "layout": layout, "bounds": bounds, "inverse": inverse}
    if x.ndim not in (2, 4):
        leading, x, params = flatten_batch(x, params)
        y, logabsdet = rational_quadratic_spline(x, params, **kwargs)
        return y.unflatten(0, leading), logabsdet.unflatten(0, leading)
    parity = _check(x, params, spline, split, layout, bounds)
    if reference_runs(x):
        return reference(x, params, **kwargs)
    settings = (spline.__dict__["text"], PARAM_LAYOUTS.index(layout), parity, inverse)
    moved = x if split is None or parity >= 0 else take(x, split)
    bounds = None if bounds is None else bounds.detach().to(accumulation_dtype(x, params))
    if recording(x, params):
        y, logabsdet = _Spline.apply(moved, params, bounds, settings)
    else:
        y, logabsdet = _forward(moved, params, bounds, *settings)
    return (y if moved is x else put(x, y, split)), logabsdet  # type: ignore[arg-type]


def _check(
    x: torch.Tensor, params: torch.Tensor, spline: SplineMap, split: Split | None, layout: str, bounds: torch.Tensor | None
) -> int:
    """The parity of ``_SCHEMA``. Raises as ``rational_quadratic_spline`` does, for x of shape (B, C) or (B, C, H, W)."""
    check_spline(spline)
    if layout not in PARAM_LAYOUTS:
        raise ValueError(f"layout: unknown name {layout!r}; expected one of {', '.join(map(repr, PARAM_LAYOUTS))}")
    code = -1 if split is None else resolve(split, x)
    channels, count = x.shape[1] if split is None else moved_channels(split, x.shape[1]), spline.params_per_feature
    batch, _, *space = x.shape
    expected = (batch, channels, *space, count) if layout == "trailing" else (batch, channels * count, *space)
    if params.shape != expected:
        raise ValueError(
            f"params: expected shape {expected} for x of shape {tuple(x.shape)}, {count} parameters a value "
            f"({spline.bins} bins, {spline.tails}), split {split!r} and layout {layout!r}, got {tuple(params.shape)}"
        )
    if bounds is not None:
        check_tensor("bounds", bounds, (channels, 2), x)
    return {2: 1, 3: 0}.get(code, -1)


register(
    rational_quadratic_spline,
    reference,
    _samples,
    (_forward, _backward),
    outputs=(Output("y"), LOGABSDET),
    laws=Law.INVERTIBLE | Law.LOG_DET,
    ulps=64,  # where a value lies in its bin: a difference, divided by the bin's width
)
