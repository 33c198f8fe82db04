"""A mixture of discretized logistics with its gradient; the formulas stand in flowkern/ops/_discretized_logistic_mixture.py.

A program owns a tile of components times pixels of one sample: everything is loaded once, and stays in registers until the
posterior of the components is known. A narrow component turns the rounding of its mean into whole nats, so the distance of
the mean from the bin is a sum of two float32, whose parts are exact products.
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
from .lang import exp, expm1, log1p, narrow

__all__ = ["backward", "forward"]

#: A tile has some rows of pixels of many channels, and is bound by its arithmetic.
STREAMING = False


# Two functions whose series in float64 have more constants than an AMD GPU has scalar registers: there Kahan's quotients do.


@triton.jit
def one_minus_exp(x, e):
    # 1 - exp(-x) for x >= 0 and e = exp(-x).
    if x.dtype == tl.float64:
        near = (e >= 0.5) & (e < 1.0)
        quotient = (1.0 - e) * x / -tl.log(tl.where(near, e, 0.5))
        result = tl.where(near, quotient, tl.where(e == 1.0, x, 1.0 - e))
    else:
        result = -expm1(-x)
    return result


@triton.jit
def log1p_any(x):
    # log(1 + x) for x >= 0.
    if x.dtype == tl.float64:
        u = 1.0 + x
        exact = u - 1.0
        result = tl.where(exact == 0.0, x, tl.log(u) * (x / tl.where(exact == 0.0, 1.0, exact)))
    else:
        small = x < 1.0
        result = tl.where(small, log1p(tl.where(small, x, 1.0)), tl.log(1.0 + x))
    return result


@triton.jit
def two_sum(a, b):
    # a + b as a rounded sum and what the rounding lost.
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


@triton.jit
def leading(x):
    # The first 12 bits of the significand: products of two such numbers are exact.
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def two_product(a, b):
    # a b as a rounded product and what the rounding lost.
    if a.dtype == tl.float64:
        p, e = a * b, tl.zeros_like(a * b)
    else:
        a_high, b_high = leading(a), leading(b)
        a_low, b_low = a - a_high, b - b_high
        p = a * b
        e = ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low
    return p, e


@triton.jit
def two_tanh(x):
    # tanh(x) as a sum of two numbers, to 1e-8: (1 - e) / (1 + e) with e = exp(-2 |x|).
    v = -2.0 * tl.abs(x)
    v = tl.where(v < -40.0, -40.0, v)
    if x.dtype == tl.float64:
        high, low = exp(v), tl.zeros_like(v)
    else:
        t = v * 1.4426950408889634 + 12582912.0  # as in exp
        n = t - 12582912.0
        r, r_low = two_sum(v - n * 0.693359375, n * 2.12194440054690583e-4)
        p = tl.zeros_like(r) + 1.0 / 40320.0
        p = p * r + 1.0 / 5040.0
        p = p * r + 1.0 / 720.0
        p = p * r + 1.0 / 120.0
        p = p * r + 1.0 / 24.0
        p = p * r + 1.0 / 6.0
        p = p * r + 0.5
        high, low = two_sum(tl.zeros_like(r) + 1.0, r)
        low += r_low + p * r * r
        power = ((t.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
        high *= power
        low *= power
    one = tl.zeros_like(high) + 1.0
    numerator, lost = two_sum(one, -high)
    numerator, numerator_low = two_sum(numerator, lost - low)
    denominator, lost = two_sum(one, high)
    denominator, denominator_low = two_sum(denominator, lost + low)
    quotient = numerator / denominator
    p, e = two_product(quotient, denominator)
    rest = ((numerator - p) - e + numerator_low - quotient * denominator_low) / denominator
    return tl.where(x < 0.0, -quotient, quotient), tl.where(x < 0.0, -rest, rest)


@triton.jit
def subtract(high, low, a, a_low, b):
    # (high, low) - (a + a_low) b
    p, e = two_product(a, b)
    high, lost = two_sum(high, -p)
    return high, low + (lost - e - a_low * b)


@triton.jit
def bin_mass(level, high, low, log_scale, LAST: tl.constexpr, LOG_BIN: tl.constexpr, COMPAT: tl.constexpr):
    # The log mass of a bin, and its derivatives with respect to mean and log_scale; high + low: the bin's centre in half bins.
    s = tl.where(log_scale < -7.0, -7.0, log_scale) if COMPAT else log_scale
    precision = exp(-s)
    unit = precision * (1.0 / LAST)
    delta = 2.0 * unit
    upper, lost = two_sum(high, tl.zeros_like(high) + 1.0)
    p = (upper + (lost + low)) * unit
    lower, lost = two_sum(high, tl.zeros_like(high) - 1.0)
    m = (lower + (lost + low)) * unit
    first, last = level <= 0.0, level >= LAST
    ep = tl.where(last, 0.0, exp(-tl.abs(p)))
    em = tl.where(first, 0.0, exp(-tl.abs(m)))
    e = exp(-delta)
    ed = tl.where(first | last, 0.0, e)
    mass = tl.where(first | last, 1.0, one_minus_exp(delta, e))
    p_sum, m_sum = 1.0 + ep, 1.0 + em
    excess = (ep + em + ep * em + ed) / mass
    f = tl.where(last | (p > 0.0), 0.0, p) - tl.where(first | (m < 0.0), 0.0, m) - log1p_any(excess)
    above = tl.where((p < 0.0) & (level < LAST), 1.0, ep) / p_sum
    below = tl.where((m > 0.0) & (level > 0.0), 1.0, em) / m_sum
    d_mean = precision * (below - above)
    d_log_scale = m * below - p * above - delta * ed / mass
    if COMPAT:
        c = (high + low) * unit
        ec = exp(-tl.abs(c))
        slope = tl.where(c < 0.0, ec - 1.0, 1.0 - ec) / (1.0 + ec)
        density = (level > 0.0) & (level < LAST) & (f <= -11.512925464970229)
        f = tl.where(density, LOG_BIN - s - tl.abs(c) - 2.0 * tl.log(1.0 + ec), f)
        d_mean = tl.where(density, precision * slope, d_mean)
        d_log_scale = tl.where(density, c * slope - 1.0, d_log_scale)
        d_log_scale = tl.where(log_scale < -7.0, 0.0, d_log_scale)
    return f, d_mean, d_log_scale


@triton.jit
def kernel(
    p_x, p_params, p_grad, p_partial, p_gradient,
    P, K, n_tiles, x_b, x_c, x_p, u_b, u_r, u_p, g_b, d_b, d_r, d_p,
    CHANNELS: tl.constexpr, LAST: tl.constexpr, LOG_BIN: tl.constexpr, COMPAT: tl.constexpr, GRADIENT: tl.constexpr,
    COMPONENTS: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // n_tiles).to(tl.int64)
    k = tl.arange(0, COMPONENTS)[:, None]
    o = (tl.program_id(0) % n_tiles * PIXELS + tl.arange(0, PIXELS))[None, :].to(tl.int64)
    m = (k < K) & (o < P)
    p_u = p_params + i_b * u_b + k * u_r + o * u_p
    step = K * u_r  # from one part of the parameters to the next
    p_level = p_x + i_b * x_b + o * x_p

    # Rows one after the other, each found from the last: offsets of all of them would fill the scalar registers.
    logit = tl.load(p_u, mask=m, other=0.0).to(ACC)
    logit = tl.where(k < K, logit, float("-inf"))
    level0 = tl.load(p_level, mask=o < P, other=0.0).to(ACC)
    p_u += step
    mean0 = tl.load(p_u, mask=m, other=0.0).to(ACC)
    p_u += step
    scale0 = tl.load(p_u, mask=m, other=0.0).to(ACC)
    last = tl.zeros_like(mean0) + LAST
    none = tl.zeros_like(mean0)
    n0 = 2.0 * level0 - LAST + none
    high, low = subtract(n0, none, mean0, none, last)
    f0, dm0, ds0 = bin_mass(level0, high, low, scale0, LAST, LOG_BIN, COMPAT)
    log_mass = f0
    if CHANNELS == 3:
        p_level += x_c
        level1 = tl.load(p_level, mask=o < P, other=0.0).to(ACC)
        n1 = 2.0 * level1 - LAST + none
        p_u += step
        t0, t0_low = two_tanh(tl.load(p_u, mask=m, other=0.0).to(ACC))
        p_u += step
        high, low = subtract(n1, none, tl.load(p_u, mask=m, other=0.0).to(ACC), none, last)
        high, low = subtract(high, low, t0, t0_low, n0)
        p_u += step
        f1, dm1, ds1 = bin_mass(level1, high, low, tl.load(p_u, mask=m, other=0.0).to(ACC), LAST, LOG_BIN, COMPAT)

        level2 = tl.load(p_level + x_c, mask=o < P, other=0.0).to(ACC)
        p_u += step
        t1, t1_low = two_tanh(tl.load(p_u, mask=m, other=0.0).to(ACC))
        p_u += step
        mean2 = tl.load(p_u, mask=m, other=0.0).to(ACC)
        p_u += step
        scale2 = tl.load(p_u, mask=m, other=0.0).to(ACC)
        p_u += step
        t2, t2_low = two_tanh(tl.load(p_u, mask=m, other=0.0).to(ACC))
        high, low = subtract(2.0 * level2 - LAST + none, none, mean2, none, last)
        high, low = subtract(high, low, t1, t1_low, n0)
        high, low = subtract(high, low, t2, t2_low, n1)
        f2, dm2, ds2 = bin_mass(level2, high, low, scale2, LAST, LOG_BIN, COMPAT)
        log_mass += f1 + f2

    # Logits count from the largest: a large number that all have in common would swallow the log masses.
    logit -= tl.max(logit, 0)[None, :]
    top = tl.max(logit + log_mass, 0)[None, :]
    prior = exp(logit)
    joint = exp(logit + log_mass - top)
    sum_prior = tl.sum(prior, 0)[None, :]
    sum_joint = tl.sum(joint, 0)[None, :]
    value = top + tl.log(sum_joint / sum_prior)
    if tl.float32 == ACC:
        # Where nearly all of the mass is there, what is missing says how much to more digits.
        missing = tl.sum(-expm1(log_mass) * prior, 0)[None, :] / sum_prior
        nearly = missing < 0.25
        q = tl.where(nearly, missing, 0.0)
        value = tl.where(nearly, -log1p(q / (1.0 - q)), value)
    tl.store(p_partial + tl.program_id(0), tl.sum(tl.where(o < P, value, 0.0)))

    if GRADIENT:
        grad = 1.0 if p_grad is None else tl.load(p_grad + i_b * g_b).to(ACC)
        DTYPE: tl.constexpr = p_gradient.dtype.element_ty
        p_d = p_gradient + i_b * d_b + k * d_r + o * d_p
        d_step = K * d_r
        posterior = joint / sum_joint
        weight = posterior * grad
        tl.store(p_d, narrow((posterior - prior / sum_prior) * grad, DTYPE), mask=m)
        p_d += d_step
        tl.store(p_d, narrow(weight * dm0, DTYPE), mask=m)
        p_d += d_step
        tl.store(p_d, narrow(weight * ds0, DTYPE), mask=m)
        if CHANNELS == 3:
            unit: tl.constexpr = 1.0 / LAST
            p_d += d_step
            tl.store(p_d, narrow(weight * dm1 * (1.0 - t0 * t0) * (n0 * unit), DTYPE), mask=m)
            p_d += d_step
            tl.store(p_d, narrow(weight * dm1, DTYPE), mask=m)
            p_d += d_step
            tl.store(p_d, narrow(weight * ds1, DTYPE), mask=m)
            p_d += d_step
            tl.store(p_d, narrow(weight * dm2 * (1.0 - t1 * t1) * (n0 * unit), DTYPE), mask=m)
            p_d += d_step
            tl.store(p_d, narrow(weight * dm2, DTYPE), mask=m)
            p_d += d_step
            tl.store(p_d, narrow(weight * ds2, DTYPE), mask=m)
            p_d += d_step
            tl.store(p_d, narrow(weight * dm2 * (1.0 - t2 * t2) * (n1 * unit), DTYPE), mask=m)


def _launch(
    x: torch.Tensor, params: torch.Tensor, grad: torch.Tensor | None, gradient: torch.Tensor | None, levels: int, compat: bool
) -> Launch:
    """The launch; of its tensors the fourth has each program's part of log_prob: (B, tiles)."""
    batch, channels, pixels = x.shape
    components = params.shape[1] // per_component(channels)
    block = max(2, triton.next_power_of_2(components))
    double = params.dtype is torch.float64
    width = max(16, (256 if double else 512) // block)
    tiles = triton.cdiv(pixels, width)
    strides = (*x.stride(), *params.stride(), 0 if grad is None else grad.stride(0))
    integers = (pixels, components, tiles, *strides, *((0, 0, 0) if gradient is None else gradient.stride()))
    partial = x.new_empty((batch, tiles), dtype=torch.float64 if double else torch.float32)
    bins = {"LAST": float(levels - 1), "LOG_BIN": math.log(2.0 / (levels - 1)), "COMPAT": compat}
    # Triton 3.9 dies on sm_100 of two elements a thread that no vector holds: a thread then has one.
    warps = 16 if pixels % 16 and block * width == 512 else 8
    keywords = constants(double, warps, CHANNELS=channels, GRADIENT=gradient is not None, COMPONENTS=block, PIXELS=width, **bins)
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
