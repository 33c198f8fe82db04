"""Affine coupling, forward and backward, in one pass each. The formulas are at the top of flowkern/ops/_affine_coupling.py.

The forward reads x, the raw scale and the shift once and writes all of y. Each program sums the log-scales of its tile;
where a sample has several tiles, a second, fixed-order sum over them makes logabsdet. The backward recomputes the
scale, reads of x what the split transforms, and writes both gradients.
"""

# mypy: allow-untyped-defs
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from flowkern._core.op import KERNELS
from flowkern._core.scale_map import KINDS, LAYOUTS, ScaleMap, named_layout
from flowkern._core.split import SPLITS

from ._coupling import (
    DTYPES,
    FORMS,
    Grid,
    Launch,
    Strides,
    example,
    example_split,
    grid,
    keeps,
    load_pair,
    load_samples,
    locate,
    param_strides,
    sample_strides,
    store_pair,
    tile,
)
from .lang import narrow, scale_map

__all__ = ["backward", "forward"]


@triton.jit(do_not_specialize=["B"])
def forward_kernel(
    p_x, p_params, p_place, p_y, p_logabsdet,
    B, N, C, H, W, kept, n_tiles,
    x_b, x_c, x_h, x_w, u_b, u_c, u_h, u_w, u_distance,
    SPLIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, LINEAR: tl.constexpr, SKIP: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, ELEMENTS: tl.constexpr,
    KIND: tl.constexpr, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, ADJACENT: tl.constexpr, SCALE_FIRST: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, INVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    CHECKERBOARD: tl.constexpr = SPLIT == "checkerboard" or SPLIT == "checkerboard_swap"
    UNIT: tl.constexpr = 2 if ADJACENT else 1
    i_b, m_b, n, m_n, i_tile = tile(B, N, n_tiles, ROWS, ELEMENTS, WIDE)
    c, h, w, m_moved_n, place = locate(n, m_n, C, H, W, kept, p_place, SPLIT, CHANNELS_LAST)
    m_inside, m_moved = m_b & m_n, m_b & m_moved_n  # [ROWS, ELEMENTS]

    o_x = n if LINEAR else c * x_c + h * x_h + w * x_w
    b_x = tl.load(p_x + i_b * x_b + o_x, mask=m_inside, other=0.0)
    if SKIP and keeps(i_tile, N, H, W, kept, SPLIT, ELEMENTS, WIDE):
        tl.store(p_y + i_b * N + n, b_x, mask=m_inside)
        tl.store(p_logabsdet + i_b * n_tiles + i_tile, tl.zeros((ROWS, 1), ACC), mask=m_b)
        return
    # A checkerboard's params are read whole, kept places too: in wide accesses, of lines that are touched anyway.
    m_params = m_inside if CHECKERBOARD else m_moved
    o_params = n * u_w if CHECKERBOARD and LINEAR else place * u_c + h * u_h + w * u_w
    raw, shift = load_pair(p_params + i_b * u_b + o_params * UNIT, u_distance, m_params, ADJACENT, SCALE_FIRST, ACC)
    s, log_s, _ = scale_map(raw, KIND, SCALE_A, SCALE_B)

    out = b_x.to(ACC)
    if INVERSE:
        out = out / s - shift if SHIFT_FIRST else (out - shift) / s
        log_s = -log_s
    else:
        out = (out + shift) * s if SHIFT_FIRST else out * s + shift
    tl.store(p_y + i_b * N + n, tl.where(m_moved, narrow(out, b_x.dtype), b_x), mask=m_inside)
    total = tl.sum(tl.where(m_moved, log_s, 0.0), 1, keep_dims=True)
    tl.store(p_logabsdet + i_b * n_tiles + i_tile, total, mask=m_b)


@triton.jit(do_not_specialize=["B"])
def backward_kernel(
    p_grad, p_grad_logabsdet, p_x, p_params, p_place, p_dx, p_dparams, grad_logabsdet_b,
    B, N, C, H, W, kept, n_tiles,
    g_b, g_c, g_h, g_w, x_b, x_c, x_h, x_w, u_b, u_c, u_h, u_w, u_distance, d_b, d_c, d_h, d_w, d_distance,
    SPLIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, LINEAR: tl.constexpr, SKIP: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, ELEMENTS: tl.constexpr,
    KIND: tl.constexpr, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, ADJACENT: tl.constexpr, SCALE_FIRST: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, INVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    CHECKERBOARD: tl.constexpr = SPLIT == "checkerboard" or SPLIT == "checkerboard_swap"
    UNIT: tl.constexpr = 2 if ADJACENT else 1
    i_b, m_b, n, m_n, i_tile = tile(B, N, n_tiles, ROWS, ELEMENTS, WIDE)
    c, h, w, m_moved_n, place = locate(n, m_n, C, H, W, kept, p_place, SPLIT, CHANNELS_LAST)
    m_inside, m_moved = m_b & m_n, m_b & m_moved_n  # [ROWS, ELEMENTS]
    m_params = m_inside if CHECKERBOARD else m_moved

    o_grad = n if LINEAR else c * g_c + h * g_h + w * g_w
    o_x = n if LINEAR else c * x_c + h * x_h + w * x_w
    o_params = n * u_w if CHECKERBOARD and LINEAR else place * u_c + h * u_h + w * u_w
    o_dparams = n * d_w if CHECKERBOARD and LINEAR else place * d_c + h * d_h + w * d_w
    if p_grad is None:  # and not zeros, which would meet the infinity of a scale or an x that overflows
        b_grad = tl.zeros((ROWS, ELEMENTS), p_dx.dtype.element_ty)
    else:
        b_grad = tl.load(p_grad + i_b * g_b + o_grad, mask=m_inside, other=0.0)
    if SKIP and keeps(i_tile, N, H, W, kept, SPLIT, ELEMENTS, WIDE):
        tl.store(p_dx + i_b * N + n, b_grad, mask=m_inside)
        return
    z = tl.load(p_x + i_b * x_b + o_x, mask=m_params, other=0.0).to(ACC)
    raw, shift = load_pair(p_params + i_b * u_b + o_params * UNIT, u_distance, m_params, ADJACENT, SCALE_FIRST, ACC)
    s, _, slope = scale_map(raw, KIND, SCALE_A, SCALE_B)

    grad = b_grad.to(ACC)
    if INVERSE:
        dx = grad / s
        z = z if SHIFT_FIRST else z - shift
    else:
        dx = grad * s
        z = z + shift if SHIFT_FIRST else z
    if p_grad is None:
        dx, dlog_s = grad, grad
    else:
        dlog_s = dx * z
    if p_grad_logabsdet is not None:
        dlog_s += load_samples(p_grad_logabsdet, grad_logabsdet_b, B, n_tiles, ROWS)
    draw = dlog_s * slope
    dshift = dx if SHIFT_FIRST != INVERSE else grad
    if INVERSE:
        draw, dshift = -draw, -dshift
    tl.store(p_dx + i_b * N + n, tl.where(m_moved, narrow(dx, b_grad.dtype), b_grad), mask=m_inside)
    draw = narrow(tl.where(m_moved, draw, 0.0), p_dparams.dtype.element_ty)
    dshift = narrow(tl.where(m_moved, dshift, 0.0), p_dparams.dtype.element_ty)
    store_pair(p_dparams + i_b * d_b + o_dparams * UNIT, d_distance, draw, dshift, m_params, ADJACENT, SCALE_FIRST)


def _paired(parts: Sequence[Strides]) -> tuple[bool, Sequence[Strides]]:
    """Whether scale and shift are neighbours in all of these tensors; if so, with their strides counted in pairs."""
    if any(distance != 1 or any(s % 2 for s in steps) for _, *steps, distance in parts):
        return False, parts
    return True, [(batch, *(s // 2 for s in steps), 1) for batch, *steps, _ in parts]


@functools.lru_cache(maxsize=4096)
def _grid(
    shape: Strides,
    channels_last: bool,
    double: bool,
    whole: Sequence[Strides],
    parts: Sequence[Strides],
    width: int,
    first: tuple[int, ...],
    *settings: Any,
) -> Grid:
    """How to launch a kernel on tensors of x's shape and tensors of params' shape with ``width`` channels.

    ``first`` are integers before the others.
    """
    split, scale, a, b, layout, shift_first, inverse = settings
    name = LAYOUTS[layout]
    moved = width if name.startswith("pair") else width // 2
    adjacent, steps = _paired([param_strides(strides, name, moved) for strides in parts])
    how = grid(shape, channels_last, double, split, moved, [sample_strides(strides) for strides in whole], steps)
    by_map = {"KIND": KINDS[scale], "SCALE_A": a, "SCALE_B": b, "SHIFT_FIRST": shift_first, "INVERSE": inverse}
    by_layout = {"ADJACENT": adjacent, "SCALE_FIRST": name.endswith("scale_shift")}
    return replace(how, integers=(*first, *how.integers), keywords={**how.keywords, **by_map, **by_layout})


def _forward_launch(x: torch.Tensor, params: torch.Tensor, *rest: Any) -> Launch:
    place, *settings, y, logabsdet = rest
    double = torch.float64 in (x.dtype, params.dtype)
    how = _grid(x.shape, not y.is_contiguous(), double, (x.stride(),), (params.stride(),), params.shape[1], (), *settings)
    sums = logabsdet if how.tiles == 1 else logabsdet.new_empty((len(x), how.tiles))
    return Launch(forward_kernel, (x, params, place, y, sums), how)


def _backward_launch(
    x: torch.Tensor, params: torch.Tensor, grad: torch.Tensor | None, grad_logabsdet: torch.Tensor | None, *rest: Any
) -> Launch:
    place, *settings, dx, dparams = rest
    double = torch.float64 in (x.dtype, params.dtype)
    whole, parts = ((x if grad is None else grad).stride(), x.stride()), (params.stride(), dparams.stride())
    step = 0 if grad_logabsdet is None else grad_logabsdet.stride(0)
    how = _grid(x.shape, not dx.is_contiguous(), double, whole, parts, params.shape[1], (step,), *settings)
    return Launch(backward_kernel, (grad, grad_logabsdet, x, params, place, dx, dparams), how)


def forward(x: torch.Tensor, params: torch.Tensor, *rest: Any) -> None:
    """``flowkern::affine_coupling``: fills y and logabsdet."""
    logabsdet = rest[-1]
    if x.numel() == 0:
        logabsdet.zero_()
        return
    launch = _forward_launch(x, params, *rest)
    launch.run()
    if launch.grid.tiles > 1:
        torch.sum(launch.tensors[-1], 1, out=logabsdet)


def backward(x: torch.Tensor, *rest: Any) -> None:
    """``flowkern::affine_coupling_backward``: fills dx and dparams."""
    if x.numel() > 0:
        _backward_launch(x, *rest).run()


_SCALES = {
    "sigmoid": ScaleMap.sigmoid(),
    "sigmoid-eps": ScaleMap.sigmoid(eps=1e-3),
    "exp": ScaleMap.exp(),
    "softplus": ScaleMap.softplus(),
    "tanh": ScaleMap.tanh(1.9),
    "atan": ScaleMap.atan(1.9),
    "soft-clip": ScaleMap.soft_clip(),
}

FACTORS = {
    "split": (*SPLITS, "mask"),
    "scale": tuple(_SCALES),
    "layout": LAYOUTS,
    "shift_first": (False, True),
    "inverse": (False, True),
    "dtypes": tuple(DTYPES),
    "form": tuple(FORMS),
}


def compile_cases(
    split: str, scale: str, layout: str, shift_first: bool, inverse: bool, dtypes: str, form: str
) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS."""
    shape, code, place, moved = example_split(split, form)
    x = example(shape, DTYPES[dtypes][0], form)
    params = example(named_layout(layout).shape(shape, moved), DTYPES[dtypes][1], form)
    s = _SCALES[scale]
    configuration = place, code, s.code, s.a, s.b, LAYOUTS.index(layout), shift_first, inverse
    y, logabsdet = KERNELS["affine_coupling"].outputs(x, params)
    yield "forward", _forward_launch(x, params, *configuration, y, logabsdet)
    gradients = KERNELS["affine_coupling_backward"].outputs(x, params)
    yield "backward", _backward_launch(x, params, y, logabsdet, *configuration, *gradients)
    yield "backward-of-logabsdet", _backward_launch(x, params, None, logabsdet, *configuration, *gradients)
