"""A mixture of discretized logistics with its gradient; the formulas stand in flowkern/ops/_discretized_logistic_mixture.py.

A thread has a pixel and goes through its components: once for the sums over them, and once more for the gradient, where all
is computed again, because it costs less than to keep it. Where a pixel's parameters lie one behind the other, several
threads share a pixel. No logarithm of a component's mass is taken: with y = (1 + exp(-|p|)) (1 + exp(-|m|)) it is

    exp(min(p, 0) - max(m, 0)) (1 - exp(m - p)) / y,

whose exponents are added, and whose other factors are multiplied. A narrow component turns the rounding of its mean into
whole nats, so the distance of the mean from the bin is the sum of a multiple of a power of two and a rest, which are exact.
"""

# mypy: allow-untyped-defs
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from flowkern._core.mixture import per_component
from flowkern._core.op import KERNELS

from ._coupling import DTYPES, Grid, Launch, constants, example
from .lang import exponential, log1p, narrow, reciprocal

__all__ = ["backward", "forward"]

#: A tile has some rows of pixels of many channels, and is bound by its arithmetic.
STREAMING = False

#: Of the factors of a log mass each is larger by this power of two: the product of three may be tiny.
LARGER = tl.constexpr(2.0**36)


@triton.jit
def decay(x):
    # exp(-x) and 1 - exp(-x) for x >= 0, both to their last digits.
    MOST: tl.constexpr = 700.0 if x.dtype == tl.float64 else 87.0
    power, less_one = exponential(-tl.where(x > MOST, MOST, x))
    return tl.fma(power, less_one, power), tl.fma(-power, less_one, 1.0 - power)


@triton.jit
def falling(x):
    # exp(x) for x <= 0, beside 1: the relative error in float32 grows with |x|.
    if x.dtype == tl.float64:
        result, _ = decay(-x)
    else:
        result = tl.exp2(x * 1.4426950408889634)
    return result


@triton.jit
def precision_of(log_scale):
    # exp(-log_scale)
    if log_scale.dtype == tl.float64:
        power, less_one = exponential(-tl.where(log_scale > 700.0, 700.0, tl.where(log_scale < -700.0, -700.0, log_scale)))
        result = tl.fma(power, less_one, power)
    else:
        power = log_scale * -1.4426950408889634
        result = tl.exp2(power)
        result = tl.fma(result, tl.fma(power, -0.6931471805599453, -log_scale), result)  # with what power's rounding lost
    return result


@triton.jit
def tail(x):
    # w = 1 / (1 + exp(2 |x|)) as a sum of two numbers, to 1e-9: tanh(|x|) = 1 - 2 w.
    v = -2.0 * tl.abs(x)
    if x.dtype == tl.float64:
        e = falling(v)
        w = e / (1.0 + e)
        rest = tl.zeros_like(w)
    else:
        v = tl.where(v < -80.0, -80.0, v)
        t = tl.fma(v, 1.4426950408889634, 12582912.0)  # as in exponential
        n = t - 12582912.0
        r = tl.fma(n, -0.693147182464599609375, v)  # exact
        p = tl.fma(r, 1.991336144848083e-4, 1.3935487654183477e-3)
        p = tl.fma(p, r, 8.333274959603865e-3)
        p = tl.fma(p, r, 4.1666458742923164e-2)
        p = tl.fma(p, r, 1.666666680590783e-1)
        # 1 + r + r^2 / 2 + ..., whose first two sums lose nothing.
        p = tl.fma(0.5 * r, r, r * r * r * p)
        y = r + p
        high = 1.0 + y
        low = tl.fma(n, 1.904654323148236e-09, p - (y - r)) + (y - (high - 1.0))
        power = ((t.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
        high *= power
        low *= power
        inverse = reciprocal(1.0 + high)
        w = high * inverse
        w = tl.where(w < 0.5 * high, 0.5 * high, w)  # so that the next difference is exact
        rest = (tl.fma(-w, high, high - w) + tl.fma(-w, low, low)) * inverse
    return w, rest


@triton.jit
def split_product(a, b, GRID: tl.constexpr):
    # a b as a sum of a multiple of 2**-23 GRID / 1.5, which sums of a few are as well, and a rest.
    whole = tl.fma(a, b, GRID) - GRID
    return whole, tl.fma(a, b, -whole)


@triton.jit
def add_shift(whole, rest, raw, n, GRID: tl.constexpr):
    # Subtracts tanh(raw) n from the sum of two; and what the gradient of the mean is multiplied by, but for a constant.
    w, w_rest = tail(raw)
    slope = tl.fma(w, -4.0 * w, 4.0 * w) * n
    n = tl.where(raw < 0.0, -n, n)
    part, part_rest = split_product(2.0 * n, w, GRID)
    return (whole - n) + part, tl.fma(2.0 * n, w_rest, rest + part_rest), slope


@triton.jit
def bin_mass(level, whole, rest, log_scale, LAST: tl.constexpr, LOG_BIN: tl.constexpr, COMPAT: tl.constexpr):
    # The mass of a bin as (exponent, factor), the latter LARGER, and what it lacks where the exponent is 0; its logarithm's
    # derivatives with respect to mean and log_scale. whole + rest: the bin's centre as seen from the mean, in half bins.
    smaller: tl.constexpr = 1.0 / LARGER
    s = tl.where(log_scale < -7.0, -7.0, log_scale) if COMPAT else log_scale
    precision = precision_of(s)
    unit = precision * (1.0 / LAST)
    rest *= unit
    # The bin that has no end there has it so far that exp(-p), exp(m) and exp(m - p) are nothing. Numbers, not conditions:
    # these stay from component to component, and would fill the scalar registers of an AMD GPU.
    first, last = tl.where(level <= 0.0, -200.0, 1e30), tl.where(level >= LAST, 200.0, -1e30)
    p, m, delta = tl.fma(whole, unit, unit) + rest, tl.fma(whole, unit, -unit) + rest, 2.0 * unit
    p, m, least = tl.where(p < last, last, p), tl.where(m > first, first, m), tl.maximum(last, -first)
    delta = tl.where(delta < least, least, delta)
    ep, em = falling(-tl.abs(p)), falling(-tl.abs(m))
    ed, mass = decay(delta)
    yp = tl.fma(ep, smaller, smaller)
    inverse = reciprocal(tl.fma(yp, em, yp))
    exponent, factor = tl.minimum(p, 0.0) - tl.maximum(m, 0.0), mass * inverse
    lack = (tl.fma(ep, em, ep + em) + ed) * (inverse * smaller)
    above, below = inverse * tl.fma(em, smaller, smaller), inverse * yp
    above = tl.where(p < 0.0, above, ep * above)  # sigmoid(-p)
    below = tl.where(m > 0.0, below, em * below)  # sigmoid(m)
    d_mean = precision * (below - above)
    if mass.dtype == tl.float64:
        by_width = delta * ed / mass
    else:
        root = tl.rsqrt(mass)
        by_width = (delta * ed) * (root * root)
    d_log_scale = tl.fma(m, below, -tl.fma(p, above, by_width))
    if COMPAT:
        c = tl.fma(whole, unit, rest)
        ec = falling(-tl.abs(c))
        half = reciprocal(1.0 + ec)
        slope = tl.where(c < 0.0, ec - 1.0, 1.0 - ec) * half
        density = falling(exponent) * factor <= tl.where(least < 0.0, 1e-5 * LARGER, -1.0)  # of bins with two ends
        exponent = tl.where(density, (LOG_BIN - s) - tl.abs(c), exponent)
        factor = tl.where(density, half * (half * LARGER), factor)
        lack = tl.where(density, 1.0, lack)
        d_mean = tl.where(density, precision * slope, d_mean)
        d_log_scale = tl.where(density, tl.fma(c, slope, -1.0), d_log_scale)
        d_log_scale = tl.where(log_scale < -7.0, 0.0, d_log_scale)
    return exponent, factor, lack, d_mean, d_log_scale


@triton.jit
def read(p, row, m, ACC: tl.constexpr):
    return tl.load(p + row).to(ACC) if m is None else tl.load(p + row, mask=m, other=0.0).to(ACC)


@triton.jit
def component(
    p_u, row, step, m, level0, level1, level2,
    CHANNELS: tl.constexpr, LAST: tl.constexpr, GRID: tl.constexpr, LOG_BIN: tl.constexpr, COMPAT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    # Of one component: the mass of the pixel as (exponent, factor, lack), and the derivatives of its logarithm, row by row.
    n0 = 2.0 * level0 - LAST
    whole, rest = split_product(read(p_u, row + step, m, ACC), -LAST, GRID)
    s0 = read(p_u, row + 2 * step, m, ACC)
    e, f, lack, dm0, ds0 = bin_mass(level0, n0 + whole, rest, s0, LAST, LOG_BIN, COMPAT)
    none = tl.zeros_like(e)
    dt0, dm1, ds1, dt1, dm2, ds2, dt2 = none, none, none, none, none, none, none
    if CHANNELS == 3:
        unit: tl.constexpr = 1.0 / LAST
        n1 = 2.0 * level1 - LAST
        raw0 = read(p_u, row + 3 * step, m, ACC)
        whole, rest = split_product(read(p_u, row + 4 * step, m, ACC), -LAST, GRID)
        whole, rest, slope0 = add_shift(n1 + whole, rest, raw0, n0, GRID)
        s1 = read(p_u, row + 5 * step, m, ACC)
        e1, f1, lack1, dm1, ds1 = bin_mass(level1, whole, rest, s1, LAST, LOG_BIN, COMPAT)
        raw1 = read(p_u, row + 6 * step, m, ACC)
        whole, rest = split_product(read(p_u, row + 7 * step, m, ACC), -LAST, GRID)
        whole, rest, slope1 = add_shift((2.0 * level2 - LAST) + whole, rest, raw1, n0, GRID)
        s2 = read(p_u, row + 8 * step, m, ACC)
        raw2 = read(p_u, row + 9 * step, m, ACC)
        whole, rest, slope2 = add_shift(whole, rest, raw2, n1, GRID)
        e2, f2, lack2, dm2, ds2 = bin_mass(level2, whole, rest, s2, LAST, LOG_BIN, COMPAT)
        e += e1 + e2
        f = (f * f1) * f2
        # 1 - (1 - lack) (1 - lack1) (1 - lack2)
        lack = tl.fma(-lack, lack1, lack + lack1)
        lack = tl.fma(-lack, lack2, lack + lack2)
        dt0, dt1, dt2 = dm1 * (slope0 * unit), dm2 * (slope1 * unit), dm2 * (slope2 * unit)
    return e, f, lack, dm0, ds0, dt0, dm1, ds1, dt1, dm2, ds2, dt2


@triton.jit
def kernel(
    p_x, p_params, p_grad, p_partial, p_gradient,
    P, K, n_tiles, x_b, x_c, x_p, u_b, u_r, u_p, g_b, d_b, d_r, d_p,
    CHANNELS: tl.constexpr, LAST: tl.constexpr, GRID: tl.constexpr, LOG_BIN: tl.constexpr, COMPAT: tl.constexpr,
    GRADIENT: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr, COMPONENTS: tl.constexpr, PIXELS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // n_tiles).to(tl.int64)
    k = tl.arange(0, COMPONENTS)[:, None]
    o = (tl.program_id(0) % n_tiles * PIXELS + tl.arange(0, PIXELS))[None, :]
    m_o = o < P
    o = tl.where(m_o, o, P - 1).to(tl.int64)
    p_u = p_params + i_b * u_b + k * u_r + o * u_p
    if WIDE:
        u_r, d_r = tl.cast(u_r, tl.int64), tl.cast(d_r, tl.int64)
    step, step_d = K * u_r, K * d_r  # from one part of the parameters to the next
    p_level = p_x + i_b * x_b + o * x_p
    level0 = tl.load(p_level).to(ACC)
    level1, level2 = level0, level0
    if CHANNELS == 3:
        level1, level2 = tl.load(p_level + x_c).to(ACC), tl.load(p_level + 2 * x_c).to(ACC)

    # Logits count from the largest: a large number that all have in common would swallow the log masses.
    largest = tl.full((COMPONENTS, PIXELS), float("-inf"), ACC)
    for first in range(0, K, COMPONENTS):
        m = first + k < K if RAGGED else None
        logit = read(p_u, first * u_r, m, ACC)
        largest = tl.maximum(largest, tl.where(m, logit, float("-inf")) if RAGGED else logit)
    largest = tl.max(largest, 0)[None, :]

    smaller: tl.constexpr = 1.0 / (LARGER * LARGER * LARGER if CHANNELS == 3 else LARGER)
    LOG_LARGER: tl.constexpr = 0.6931471805599453 * 36 * CHANNELS
    # Each row of the tile has sums of its own, relative to the largest exponent so far.
    top = tl.full((COMPONENTS, PIXELS), -1e37, ACC)
    sum_joint, sum_prior, missing = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    for first in range(0, K, COMPONENTS):
        m = first + k < K if RAGGED else None
        logit = read(p_u, first * u_r, m, ACC) - largest
        logit = tl.where(m, logit, float("-inf")) if RAGGED else logit
        exponent, factor, lack, _, _, _, _, _, _, _, _, _ = component(
            p_u, first * u_r, step, m, level0, level1, level2, CHANNELS, LAST, GRID, LOG_BIN, COMPAT, ACC
        )
        prior = falling(logit)
        lack = tl.where(exponent < 0.0, tl.fma(-falling(exponent), factor * smaller, 1.0), lack)
        sum_prior += prior
        missing = tl.fma(prior, lack, missing)
        exponent += logit
        change = falling(-tl.abs(exponent - top))
        above = exponent > top
        sum_joint = tl.where(above, tl.fma(sum_joint, change, factor), tl.fma(factor, change, sum_joint))
        top = tl.where(above, exponent, top)
    highest = tl.max(top, 0)[None, :]
    sum_joint = tl.sum(sum_joint * falling(top - highest), 0)[None, :]
    sum_prior = tl.sum(sum_prior, 0)[None, :]
    missing = tl.sum(missing, 0)[None, :] / sum_prior
    ratio = sum_joint / sum_prior
    small = ratio < 1.0
    value = tl.log(tl.where(small, ratio, ratio * smaller)) + highest
    value -= tl.where(small, LOG_LARGER, 0.0)
    if tl.float32 == ACC:
        # Where nearly all of the mass is there, what is missing says how much to more digits.
        nearly = missing < 0.25
        q = tl.where(nearly, missing, 0.0)
        value = tl.where(nearly, -log1p(q / (1.0 - q)), value)
    tl.store(p_partial + tl.program_id(0), tl.sum(tl.where(m_o, value, 0.0)))

    if GRADIENT:
        grad = 1.0 if p_grad is None else tl.load(p_grad + i_b * g_b).to(ACC)
        DTYPE: tl.constexpr = p_gradient.dtype.element_ty
        by_joint, by_prior = 1.0 / sum_joint, grad / sum_prior  # a small gradient less LARGER would be nothing
        p_d = p_gradient + i_b * d_b + k * d_r + o * d_p
        for first in range(0, K, COMPONENTS):
            m = first + k < K if RAGGED else None
            logit = read(p_u, first * u_r, m, ACC) - largest
            exponent, factor, _, dm0, ds0, dt0, dm1, ds1, dt1, dm2, ds2, dt2 = component(
                p_u, first * u_r, step, m, level0, level1, level2, CHANNELS, LAST, GRID, LOG_BIN, COMPAT, ACC
            )
            weight = falling(exponent + logit - highest) * (factor * by_joint) * grad
            m_d = m_o & m if RAGGED else m_o
            row = first * d_r
            tl.store(p_d + row, narrow(weight - falling(logit) * by_prior, DTYPE), mask=m_d)
            tl.store(p_d + (row + step_d), narrow(weight * dm0, DTYPE), mask=m_d)
            tl.store(p_d + (row + 2 * step_d), narrow(weight * ds0, DTYPE), mask=m_d)
            if CHANNELS == 3:
                tl.store(p_d + (row + 3 * step_d), narrow(weight * dt0, DTYPE), mask=m_d)
                tl.store(p_d + (row + 4 * step_d), narrow(weight * dm1, DTYPE), mask=m_d)
                tl.store(p_d + (row + 5 * step_d), narrow(weight * ds1, DTYPE), mask=m_d)
                tl.store(p_d + (row + 6 * step_d), narrow(weight * dt1, DTYPE), mask=m_d)
                tl.store(p_d + (row + 7 * step_d), narrow(weight * dm2, DTYPE), mask=m_d)
                tl.store(p_d + (row + 8 * step_d), narrow(weight * ds2, DTYPE), mask=m_d)
                tl.store(p_d + (row + 9 * step_d), narrow(weight * dt2, DTYPE), mask=m_d)


def _launch(
    x: torch.Tensor, params: torch.Tensor, grad: torch.Tensor | None, gradient: torch.Tensor | None, levels: int, compat: bool
) -> Launch:
    """The launch; of its tensors the fourth has each program's part of log_prob: (B, tiles)."""
    batch, channels, pixels = x.shape
    components = params.shape[1] // per_component(channels)
    double = params.dtype is torch.float64
    # A program is one warp: sums over a pixel's rows need no barrier. Its neighbours lie behind each other in memory, pixels or
    # else some components, and more rows than one hide more latency but do what is done once a pixel more often.
    along_pixels = params.stride(2) == 1 or params.stride(1) != 1
    rows = 2 - components % 2 if along_pixels else min(4, triton.next_power_of_2(components))
    width = 32 // rows
    tiles = triton.cdiv(pixels, width)
    strides = (*x.stride(), *params.stride(), 0 if grad is None else grad.stride(0))
    integers = (pixels, components, tiles, *strides, *((0, 0, 0) if gradient is None else gradient.stride()))
    partial = x.new_empty((batch, tiles), dtype=torch.float64 if double else torch.float32)
    last = levels - 1
    # Distances from the mean are under 8 LAST: multiples of what GRID rounds to have 24 bits.
    bins = {"LAST": float(last), "GRID": 6.0 * 2 ** last.bit_length(), "LOG_BIN": math.log(2.0 / last), "COMPAT": compat}
    reach = max(params.shape[1] * stride for stride in (params.stride(1), 0 if gradient is None else gradient.stride(1)))
    tile = {"WIDE": reach >= 2**31, "RAGGED": components % rows != 0, "COMPONENTS": rows, "PIXELS": width}
    keywords = constants(double, 1, CHANNELS=channels, GRADIENT=gradient is not None, **bins, **tile)
    # The second pass must find the exponents that the first one found: one unit in their last place may be many nats.
    keywords["enable_fp_fusion"] = False
    return Launch(kernel, (x, params, grad, partial, gradient), Grid(batch * tiles, tiles, integers, keywords))


def forward(x: torch.Tensor, params: torch.Tensor, levels: int, compat: bool, log_prob: torch.Tensor) -> None:
    """``flowkern::discretized_logistic_mixture``: fills log_prob."""
    backward(x, params, None, levels, compat, log_prob, None)


def backward(x: torch.Tensor, params: torch.Tensor, grad: torch.Tensor | None, levels: int, compat: bool, *outputs: Any) -> None:
    """``flowkern::discretized_logistic_mixture_backward``: fills log_prob and, unless it is None, the gradient of params."""
    log_prob, gradient = outputs
    if not params.numel():
        log_prob.zero_()
        return
    flat = None if gradient is None else gradient.flatten(2)
    launch = _launch(x.flatten(2), params.flatten(2), grad, flat, levels, compat)
    launch.run()
    torch.sum(launch.tensors[3], 1, out=log_prob)


FACTORS: dict[str, Any] = {
    "channels": (3, 1),
    "components": (10, 5),
    "compat": (False, True),
    "form": ("vector", "channels-last", "odd"),
    "dtypes": ("float32", "bfloat16", "float64"),
}


def compile_cases(channels: int, components: int, compat: bool, form: str, dtypes: str) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS."""
    dtype = DTYPES[dtypes][1]
    double, pixels = dtype is torch.float64, (31, 33) if form == "odd" else (32, 32)
    x = torch.empty((32, channels, *pixels), dtype=torch.float64 if double else torch.float32, device="meta")
    params = example((32, per_component(channels) * components, *pixels), dtype, form)
    grad, gradient = KERNELS["discretized_logistic_mixture_backward"].outputs(x, params)
    flat = x.flatten(2), params.flatten(2)
    yield "forward", _launch(*flat, None, None, 256, compat)
    yield "backward", _launch(*flat, grad, gradient.flatten(2), 256, compat)


#: A pixel of one channel has less to compute and less to move.
COUNTED = ({"dtypes": "float32"}, {"dtypes": "bfloat16"}, {"channels": 1}, {"form": "channels-last"})


def trips(name: str, launch: Launch) -> tuple[int, ...]:
    """How often the loops run over the components, of which the first, unrolled, takes four turns at once."""
    turns = triton.cdiv(launch.grid.integers[1], launch.keywords()["COMPONENTS"])
    return (turns // 4, turns, turns)[: 3 if name == "backward" else 2]
