"""The rational-quadratic spline of every value; the formulas stand in flowkern/ops/_rational_quadratic_spline.py.

A program owns a tile of values, whatever sample they belong to, with the bins of each along a second dimension. It writes the
logarithm of every slope, a small number beside the parameters that it reads, and torch adds them up sample by sample.
"""

# mypy: allow-untyped-defs
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from flowkern._core.checks import accumulation_dtype
from flowkern._core.op import KERNELS
from flowkern._core.spline_map import PARAM_LAYOUTS, SplineMap, trailing

from ._coupling import DTYPES, Grid, Launch, Strides, constants, example, sample_strides
from .lang import exp, log, narrow, quotient, scale_map

__all__ = ["backward", "forward"]

#: The bins of a value pass from thread to thread.
STREAMING = False


@triton.jit
def locate(e, N, H, W, LINEAR: tl.constexpr, WIDE: tl.constexpr):
    # Of value e: its sample, then (channel, line, column); where a sample is one axis, (number, 0, 0).
    i_b = (e // N).to(tl.int64)
    c = e - i_b.to(e.dtype) * N
    h, w = tl.zeros_like(c), tl.zeros_like(c)
    if not LINEAR:
        line = c // W
        w = c - line * W
        c = line // H
        h = line - c * H
    if WIDE:
        c, h, w = c.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return i_b, c, h, w


@triton.jit
def unit(v):
    # Into the unit interval, out of which rounding may have led; NaN stays.
    return tl.where(v < 0.0, 0.0, tl.where(v > 1.0, 1.0, v))


@triton.jit
def exponentials(
    p, step, j, m, BINS: tl.constexpr, ZUKO: tl.constexpr, LIMIT: tl.constexpr, INVERSE_DIVISOR: tl.constexpr, ACC: tl.constexpr
):
    # exp of the raw numbers [values, bins], zero past the last bin, and the derivative of its logarithm by them.
    m_j = (j < BINS)[None, :]
    u = tl.load(p[:, None] + j[None, :] * step, mask=m[:, None] & m_j, other=0.0).to(ACC)
    if ZUKO:
        e, _, slope = scale_map(u, "soft_clip", 0.5 * LIMIT, 0.0)
    else:
        top = tl.max(tl.where(m_j, u, -float("inf")), 1)
        e = exp((u - top[:, None]) * INVERSE_DIVISOR)
        slope = tl.zeros_like(u) + INVERSE_DIVISOR
    return tl.where(m_j, e, 0.0), slope


@triton.jit
def find(e, scale, place, j, BINS: tl.constexpr, MINIMUM: tl.constexpr):
    # The bin that each place lies in; at a knot the one on its right.
    knots = MINIMUM * (j + 1).to(e.dtype)[None, :] + scale[:, None] * tl.cumsum(e, 1)
    return tl.sum(((place[:, None] >= knots) & (j < BINS - 1)[None, :]).to(tl.int32), 1)


@triton.jit
def start_and_width(e, scale, bin, j, MINIMUM: tl.constexpr):
    before = tl.sum(tl.where(j[None, :] < bin[:, None], e, 0.0), 1)
    own = tl.sum(tl.where(j[None, :] == bin[:, None], e, 0.0), 1)
    return MINIMUM * bin.to(e.dtype) + scale * before, MINIMUM + scale * own, before, own


@triton.jit
def end(p, step, m, row, free, ZUKO: tl.constexpr, LIMIT: tl.constexpr, MINIMUM: tl.constexpr, ACC: tl.constexpr):
    # The slope at a knot, 1 where it is not free, and its derivative by the raw number in that row.
    u = tl.load(p + row * step, mask=m & free, other=0.0).to(ACC)
    if ZUKO:
        d, _, slope = scale_map(u, "soft_clip", LIMIT, 0.0)
        by_u = d * slope
    else:
        e = exp(-tl.abs(u))
        d, _, _ = scale_map(u, "softplus", MINIMUM, 0.0)
        by_u = tl.where(u < 0.0, e, 1.0) / (1.0 + e)
    return tl.where(free, d, 1.0), by_u


@triton.jit
def prepare(
    x, kept, low, high, p, step, j, m,
    BINS: tl.constexpr, TAILS: tl.constexpr, ZUKO: tl.constexpr, MIN_WIDTH: tl.constexpr, MIN_HEIGHT: tl.constexpr,
    MIN_DERIVATIVE: tl.constexpr, LIMIT: tl.constexpr, INVERSE_DIVISOR: tl.constexpr, INVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # All that a value's spline says: where the value is, its bin, and the ends of that.
    finite = tl.abs(x) < float("inf")
    inside = (finite if TAILS == 1 else (x >= low) & (x <= high)) & (kept == 0)
    place = quotient(tl.where(inside, x - low, 0.0), high - low)
    turns = tl.floor(place) if TAILS == 1 else tl.zeros_like(place)
    place = unit(place - turns)
    e_w, by_w = exponentials(p, step, j, m, BINS, ZUKO, LIMIT, INVERSE_DIVISOR, ACC)
    e_h, by_h = exponentials(p + BINS * step, step, j, m, BINS, ZUKO, LIMIT, INVERSE_DIVISOR, ACC)
    scale_w, scale_h = (1.0 - BINS * MIN_WIDTH) / tl.sum(e_w, 1), (1.0 - BINS * MIN_HEIGHT) / tl.sum(e_h, 1)
    bin = find(e_h, scale_h, place, j, BINS, MIN_HEIGHT) if INVERSE else find(e_w, scale_w, place, j, BINS, MIN_WIDTH)
    left, w, before_w, own_w = start_and_width(e_w, scale_w, bin, j, MIN_WIDTH)
    bottom, h, before_h, own_h = start_and_width(e_h, scale_h, bin, j, MIN_HEIGHT)
    p_d = p + 2 * BINS * step
    last = bin == BINS - 1
    if TAILS == 0:
        d_0, by_0 = end(p_d, step, m, bin - 1, bin > 0, ZUKO, LIMIT, MIN_DERIVATIVE, ACC)
        d_1, by_1 = end(p_d, step, m, bin, bin < BINS - 1, ZUKO, LIMIT, MIN_DERIVATIVE, ACC)
    else:
        d_0, by_0 = end(p_d, step, m, bin, bin >= 0, ZUKO, LIMIT, MIN_DERIVATIVE, ACC)
        after = tl.where(last, 0, bin + 1) if TAILS == 1 else bin + 1
        d_1, by_1 = end(p_d, step, m, after, bin >= 0, ZUKO, LIMIT, MIN_DERIVATIVE, ACC)
    start, size = (bottom, h) if INVERSE else (left, w)
    # In the last bin by the distance from the end of the interval, where the sum of all shares may be off.
    near = unit(quotient(tl.where(last, 1.0 - place, place - start), size))
    t, u = tl.where(last, 1.0 - near, near), tl.where(last, near, 1.0 - near)
    s = quotient(h, w)
    if INVERSE:
        r = d_0 - t * (d_0 + d_1)
        square = 4.0 * s * s * t * u
        both = tl.sqrt(r * r + square) + tl.abs(r)
        least = 2.0 * s * t
        t = least / (least + tl.where(r >= 0.0, both, square / both))
        u = 1.0 - t
    of_widths = e_w, by_w, scale_w, left, w, before_w, own_w
    of_heights = e_h, by_h, scale_h, bottom, h, before_h, own_h
    return inside, turns, bin, t, u, s, d_0, by_0, d_1, by_1, of_widths, of_heights


@triton.jit
def kept_by(h, w, m, PARITY: tl.constexpr):
    # 1 where a checkerboard keeps the value.
    return (((h + w) & 1) != PARITY).to(tl.int32) if PARITY >= 0 else tl.zeros_like(m.to(tl.int32))


@triton.jit
def interval(p_bounds, c, n_b, n_s, m, LOW: tl.constexpr, HIGH: tl.constexpr, ACC: tl.constexpr):
    low, high = tl.zeros_like(m.to(ACC)) + LOW, tl.zeros_like(m.to(ACC)) + HIGH
    if p_bounds is not None:
        low = tl.load(p_bounds + c * n_b, mask=m, other=0.0).to(ACC)
        high = tl.load(p_bounds + c * n_b + n_s, mask=m, other=1.0).to(ACC)
    return low, high


@triton.jit(do_not_specialize=["TOTAL"])
def forward_kernel(
    p_x, p_params, p_bounds, p_y, p_log,
    TOTAL, N, H, W, n_b, n_s, step, x_b, x_c, x_h, x_w, a_b, a_c, a_h, a_w, y_b, y_c, y_h, y_w,
    BINS: tl.constexpr, WIDTH: tl.constexpr, TAILS: tl.constexpr, ZUKO: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    MIN_WIDTH: tl.constexpr, MIN_HEIGHT: tl.constexpr, MIN_DERIVATIVE: tl.constexpr, LIMIT: tl.constexpr,
    INVERSE_DIVISOR: tl.constexpr, PARITY: tl.constexpr, INVERSE: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    VALUES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * VALUES if WIDE else tl.program_id(0) * VALUES
    e, j = first + tl.arange(0, VALUES), tl.arange(0, WIDTH)
    m = e < TOTAL
    i_b, c, h, w = locate(e, N, H, W, LINEAR, WIDE)
    low, high = interval(p_bounds, c, n_b, n_s, m, LOW, HIGH, ACC)
    x = tl.load(p_x + i_b * x_b + c * x_c + h * x_h + w * x_w, mask=m, other=0.0).to(ACC)
    kept = kept_by(h, w, m, PARITY)
    p = p_params + i_b * a_b + c * a_c + h * a_h + w * a_w
    inside, turns, _, t, u, s, d_0, _, d_1, _, of_widths, of_heights = prepare(
        x, kept, low, high, p, step, j, m, BINS, TAILS, ZUKO, MIN_WIDTH, MIN_HEIGHT, MIN_DERIVATIVE, LIMIT, INVERSE_DIVISOR,
        INVERSE, ACC,
    )  # fmt: skip
    left, width, bottom, height = of_widths[3], of_widths[4], of_heights[3], of_heights[4]
    q = t * u
    ratio = quotient(s, s + ((d_0 - s) + (d_1 - s)) * q)
    mean = d_1 * t * t + 2.0 * s * q + d_0 * u * u
    log_slope = tl.where(ratio == ratio, log(mean * ratio) + log(ratio), ratio)  # NaN, whose bits log takes for a number
    if INVERSE:
        to, log_slope = left + width * t, -log_slope
    else:
        to = bottom + height * (t * t + quotient(d_0 * q, s)) * ratio
    y = low + (high - low) * (unit(to) + turns)
    if TAILS != 1:
        y = tl.where(y < low, low, tl.where(y > high, high, y))  # rounding may lead out
    OUTSIDE: tl.constexpr = -float("inf") if TAILS == 2 else 0.0
    without = tl.where(kept != 0, 0.0, tl.where(x != x, x, OUTSIDE))
    tl.store(p_y + i_b * y_b + c * y_c + h * y_h + w * y_w, narrow(tl.where(inside, y, x), p_y.dtype.element_ty), mask=m)
    tl.store(p_log + e, tl.where(inside, log_slope, without), mask=m)


@triton.jit
def store_shares(p, step, j, m, bin, of_start, of_width, parts, most, BINS: tl.constexpr):
    # The gradients of raw widths or heights, by those of the bin's start and width.
    e, by_u, scale, _, _, before, own = parts
    mean = (of_start * before + of_width * own) * (scale / most)
    of_share = tl.where(
        j[None, :] < bin[:, None], of_start[:, None], tl.where(j[None, :] == bin[:, None], of_width[:, None], 0.0)
    )
    gradient = e * scale[:, None] * (of_share - mean[:, None]) * by_u
    tl.store(p[:, None] + j[None, :] * step, narrow(gradient, p.dtype.element_ty), mask=m[:, None] & (j < BINS)[None, :])


@triton.jit(do_not_specialize=["TOTAL"])
def backward_kernel(
    p_x, p_params, p_grad, p_grad_log, p_bounds, p_dx, p_dparams,
    TOTAL, N, H, W, n_b, n_s, step, x_b, x_c, x_h, x_w, a_b, a_c, a_h, a_w, y_b, y_c, y_h, y_w, d_step, d_b, d_c, d_h, d_w,
    l_b, g_b, g_c, g_h, g_w,
    BINS: tl.constexpr, WIDTH: tl.constexpr, TAILS: tl.constexpr, ZUKO: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    MIN_WIDTH: tl.constexpr, MIN_HEIGHT: tl.constexpr, MIN_DERIVATIVE: tl.constexpr, LIMIT: tl.constexpr,
    INVERSE_DIVISOR: tl.constexpr, PARITY: tl.constexpr, INVERSE: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    VALUES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * VALUES if WIDE else tl.program_id(0) * VALUES
    e, j = first + tl.arange(0, VALUES), tl.arange(0, WIDTH)
    m = e < TOTAL
    i_b, c, h, w = locate(e, N, H, W, LINEAR, WIDE)
    low, high = interval(p_bounds, c, n_b, n_s, m, LOW, HIGH, ACC)
    x = tl.load(p_x + i_b * x_b + c * x_c + h * x_h + w * x_w, mask=m, other=0.0).to(ACC)
    g, of_log = tl.zeros_like(x), tl.zeros_like(x)
    if p_grad is not None:
        g = tl.load(p_grad + i_b * g_b + c * g_c + h * g_h + w * g_w, mask=m, other=0.0).to(ACC)
    if p_grad_log is not None:
        of_log = tl.load(p_grad_log + i_b * l_b, mask=m, other=0.0).to(ACC)
    p = p_params + i_b * a_b + c * a_c + h * a_h + w * a_w
    inside, _, bin, t, u, s, d_0, by_0, d_1, by_1, of_widths, of_heights = prepare(
        x, kept_by(h, w, m, PARITY), low, high, p, step, j, m, BINS, TAILS, ZUKO, MIN_WIDTH, MIN_HEIGHT, MIN_DERIVATIVE, LIMIT,
        INVERSE_DIVISOR, INVERSE, ACC,
    )  # fmt: skip
    width, height = of_widths[4], of_heights[4]
    q, over_0, over_1 = t * u, d_0 - s, d_1 - s
    bend = over_0 + over_1  # what is left where all slopes are alike
    inverse_d = 1.0 / (s + bend * q)
    numerator = s * t * t + d_0 * q
    mean = d_1 * t * t + 2.0 * s * q + d_0 * u * u
    inverse_mean = 1.0 / mean
    by_t = 2.0 * (over_1 * t - over_0 * u) * inverse_mean - 2.0 * bend * (u - t) * inverse_d
    rise = height * s * mean * inverse_d * inverse_d  # dy / dt
    of_y = g * (high - low)
    if INVERSE:
        of_root = (of_y * width - of_log * by_t) / rise
        of_y, of_log = -of_root, -of_log
    of_t = of_y * rise + of_log * by_t
    of_place = of_root if INVERSE else of_t / width
    tl.store(
        p_dx + i_b * y_b + c * y_c + h * y_h + w * y_w,
        narrow(tl.where(inside, of_place / (high - low), g), p_dx.dtype.element_ty), mask=m,
    )  # fmt: skip
    of_s = of_y * height * (t * t - numerator * (1.0 - 2.0 * q) * inverse_d) * inverse_d
    of_s += 2.0 * of_log * (1.0 / s + q * inverse_mean - (1.0 - 2.0 * q) * inverse_d)
    through, less = of_y * height * q * inverse_d * inverse_d, 2.0 * q * inverse_d
    of_0 = tl.where(inside, through * (s + bend * q - numerator) + of_log * (u * u * inverse_mean - less), 0.0) * by_0
    of_1 = tl.where(inside, of_log * (t * t * inverse_mean - less) - through * numerator, 0.0) * by_1
    # To start and width of a bin the same may be added: the last bin, which ends where the interval does, needs no start.
    last = bin == BINS - 1
    of_left = tl.where(inside & (bin < BINS - 1), -of_t / width, 0.0)
    of_width = tl.where(inside, -(of_s * s + of_t * tl.where(last, -u, t)) / width, 0.0)
    of_height = tl.where(inside, of_y * numerator * inverse_d + of_s / width, 0.0)
    p_d = p_dparams + i_b * d_b + c * d_c + h * d_h + w * d_w
    store_shares(p_d, d_step, j, m, bin, of_left, of_width, of_widths, 1.0 - BINS * MIN_WIDTH, BINS)
    of_bottom = tl.where(inside, of_y, 0.0)
    store_shares(p_d + BINS * d_step, d_step, j, m, bin, of_bottom, of_height, of_heights, 1.0 - BINS * MIN_HEIGHT, BINS)
    ENDS: tl.constexpr = BINS - 1 + TAILS
    PADDED: tl.constexpr = triton.next_power_of_2(ENDS)
    r = tl.arange(0, PADDED)
    row_0 = bin - 1 if TAILS == 0 else bin
    row_1 = row_0 + 1 if TAILS != 1 else tl.where(last, 0, bin + 1)
    of_rows = tl.where(r[None, :] == row_0[:, None], of_0[:, None], tl.where(r[None, :] == row_1[:, None], of_1[:, None], 0.0))
    p_r = p_d[:, None] + (2 * BINS + r)[None, :] * d_step
    tl.store(p_r, narrow(of_rows, p_dparams.dtype.element_ty), mask=m[:, None] & (r < ENDS)[None, :])


@functools.lru_cache(maxsize=4096)
def _grid(
    shape: tuple[int, ...], text: str, parity: int, inverse: bool, double: bool, bounds: Strides, strides: tuple[Strides, ...],
    extra: tuple[int, ...] = (),
) -> Grid:  # fmt: skip
    """``strides`` are those of x, params, y or dx and, in the backward, dparams and grad; of params with the step at the end."""
    batch, channels, height, width = (*shape, 1, 1)[:4]
    four = [sample_strides(s[:-1] if len(s) in (3, 5) else s) for s in strides]
    steps = [s[-1] for s in strides if len(s) in (3, 5)]
    linear = parity < 0 and not any(bounds) and all(_is_linear((channels, height, width), s[1:]) for s in four)
    if linear:
        four = [(s[0], _spacing((channels, height, width), s[1:]), 0, 0) for s in four]
    per_sample = channels * height * width
    wide = max(batch * per_sample, *(_reach((channels, height, width), s[1:]) for s in four)) >= 2**31 - 2**16
    spline = SplineMap.from_text(text)
    low, high = spline.interval
    padded = triton.next_power_of_2(spline.bins)
    values = max(min(32, 256 // padded), 4)  # with more, registers spill
    zuko = spline.kind == "zuko"
    numbers = {
        "BINS": spline.bins,
        "WIDTH": padded,
        "TAILS": spline.constants[1],
        "ZUKO": zuko,
        "LOW": low,
        "HIGH": high,
        "MIN_WIDTH": 0.0 if zuko else spline.min_width,
        "MIN_HEIGHT": 0.0 if zuko else spline.min_height,
        "MIN_DERIVATIVE": spline.min_derivative,
        "LIMIT": abs(math.log(spline.slope)),
        "INVERSE_DIVISOR": 1.0 / spline.divisor,
    }
    how = {"PARITY": parity, "INVERSE": inverse, "LINEAR": linear, "WIDE": wide, "VALUES": values}
    backward = [] if len(four) == 3 else [steps[1], *four[3], *extra, *four[4]]
    flat = [*itertools.chain(*four[:3]), *backward]
    integers = (batch * per_sample, per_sample, height, width, *(bounds or (0, 0)), steps[0], *flat)
    return Grid(triton.cdiv(batch * per_sample, values), 1, integers, constants(double, 4, **numbers, **how))


def _is_linear(sizes: Strides, strides: Strides) -> bool:
    """Whether a sample is one axis of equally spaced values."""
    spacing = _spacing(sizes, strides)
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1 and stride != spacing:
            return False
        spacing *= size
    return True


def _spacing(sizes: Strides, strides: Strides) -> int:
    return next((s for n, s in zip(reversed(sizes), reversed(strides), strict=True) if n > 1), 1)


def _reach(sizes: Strides, strides: Strides) -> int:
    return sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))


def _view(params: torch.Tensor, text: str, layout: int) -> torch.Tensor:
    return trailing(params, PARAM_LAYOUTS[layout], SplineMap.from_text(text).params_per_feature)


def _forward_launch(x: torch.Tensor, params: torch.Tensor, bounds: torch.Tensor | None, *rest: Any) -> Launch:
    """The launch; the last of its tensors has the logarithm of each slope, (B, values)."""
    text, layout, parity, inverse, y = rest
    dtype = accumulation_dtype(x, params)
    view = _view(params, text, layout)
    strides = (x.stride(), view.stride(), y.stride())
    how = _grid(x.shape, text, parity, inverse, dtype is torch.float64, () if bounds is None else bounds.stride(), strides)
    return Launch(forward_kernel, (x, view, bounds, y, x.new_empty((len(x), x[0].numel()), dtype=dtype)), how)


def _backward_launch(x: torch.Tensor, params: torch.Tensor, *rest: Any) -> Launch:
    grad, grad_log, bounds, text, layout, parity, inverse, dx, dparams = rest
    view, of_view = (_view(p, text, layout) for p in (params, dparams))
    nowhere = (0,) * x.ndim
    strides = (x.stride(), view.stride(), dx.stride(), of_view.stride(), nowhere if grad is None else grad.stride())
    double = accumulation_dtype(x, params) is torch.float64
    of_log = (0 if grad_log is None else grad_log.stride(0),)
    of_bounds = () if bounds is None else bounds.stride()
    how = _grid(x.shape, text, parity, inverse, double, of_bounds, strides, of_log)
    return Launch(backward_kernel, (x, view, grad, grad_log, bounds, dx, of_view), how)


def forward(x: torch.Tensor, *rest: Any) -> None:
    """``flowkern::rational_quadratic_spline``: fills y and logabsdet."""
    *inputs, logabsdet = rest
    if not x.numel():
        logabsdet.zero_()
        return
    launch = _forward_launch(x, *inputs)
    launch.run()
    torch.sum(launch.tensors[-1], 1, out=logabsdet)


def backward(x: torch.Tensor, *rest: Any) -> None:
    """``flowkern::rational_quadratic_spline_backward``: fills dx and dparams."""
    if x.numel():
        _backward_launch(x, *rest).run()


#: Shapes of x to compile for.
_SHAPES = {"vector": (4096, 64), "image": (32, 12, 32, 32), "channels-last": (32, 12, 32, 32), "odd": (7, 5, 9, 11)}

FACTORS: dict[str, Any] = {
    "form": tuple(_SHAPES),
    "layout": PARAM_LAYOUTS,
    "kind": ("zuko", "nflows"),
    "tails": ("linear", "circular", "box"),
    "inverse": (False, True),
    "bins": (8, 5, 32),
    "parity": (-1, 1),
    "bounded": (False, True),
    "dtypes": tuple(DTYPES),
}


def compile_cases(
    form: str, layout: str, kind: str, tails: str, inverse: bool, bins: int, parity: int, bounded: bool, dtypes: str
) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS. Checkerboards fall back to images for vectors."""
    shape = _SHAPES["odd" if form == "vector" and parity >= 0 else form]
    spline = SplineMap(bins, 3.0, tails, kind)
    of_x, of_params = DTYPES[dtypes]
    x, count = example(shape, of_x, form), spline.params_per_feature
    of_all = (*shape, count) if layout == "trailing" else (shape[0], shape[1] * count, *shape[2:])
    params = example(of_all, of_params, form)
    double = accumulation_dtype(x, params) is torch.float64
    bounds = torch.empty((shape[1], 2), dtype=torch.float64 if double else torch.float32, device="meta") if bounded else None
    settings = (spline.__dict__["text"], PARAM_LAYOUTS.index(layout), parity, inverse)
    y, logabsdet = KERNELS["rational_quadratic_spline"].outputs(x, params)
    yield "forward", _forward_launch(x, params, bounds, *settings, y)
    gradients = KERNELS["rational_quadratic_spline_backward"].outputs(x, params)
    yield "backward", _backward_launch(x, params, y, logabsdet, bounds, *settings, *gradients)
    yield "backward-of-y", _backward_launch(x, params, y, None, bounds, *settings, *gradients)
    yield "backward-of-logabsdet", _backward_launch(x, params, None, logabsdet, bounds, *settings, *gradients)
