"""A draw from a Gaussian with its KL divergence, and the backward; the formulas stand in flowkern/ops/_gaussian_kl.py."""

# mypy: allow-untyped-defs
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from flowkern._core.checks import accumulation_dtype
from flowkern._core.op import KERNELS

from ._coupling import DTYPES, Launch, example
from ._philox import elements, noise_grid, normal_noise
from .lang import exp, narrow

__all__ = ["backward", "forward"]

#: The kernels compute random numbers while they stream.
STREAMING = False


@triton.jit
def exp_less_tangent(x, root):
    # exp(2 x) - 1 and exp(2 x) - 1 - 2 x, given exp(x). Near 0, where they cancel, by the series of the second, whose
    # truncation is 7e-8 and 1e-18.
    TERMS: tl.constexpr = 18 if x.dtype == tl.float64 else 9
    x *= 2.0
    is_near = tl.abs(x) < 1.0
    near = tl.where(is_near, x, 0.0)
    total = tl.zeros_like(x) + 1.0
    for i in tl.static_range(0, TERMS - 1):
        total = 1.0 + total * near * (1.0 / (TERMS + 1 - i))
    series, far = 0.5 * near * near * total, root * root - 1.0
    return tl.where(is_near, near + series, far), tl.where(is_near, series, far - x)


@triton.jit
def draw(p_mean, p_scale, p_z, mask, noise, ACC: tl.constexpr):
    # Writes z, and returns the elements' KL divergences.
    mean = tl.load(p_mean, mask=mask, other=0.0).to(ACC)
    log_scale = tl.load(p_scale, mask=mask, other=0.0).to(ACC)
    scale = exp(log_scale)
    tl.store(p_z, narrow(mean + scale * noise, p_z.dtype.element_ty), mask=mask)
    _, less_tangent = exp_less_tangent(log_scale, scale)
    return 0.5 * (mean * mean + less_tangent)  # 0 where the mask is


@triton.jit(do_not_specialize=["offset"])
def forward_kernel(
    p_mean, p_scale, p_seed, p_z, p_partial,
    N, n_tiles, offset, m_b, m_n, s_b, s_n,
    GROUPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b, i_tile = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    n0, n1, n2, n3 = normal_noise(p_seed, offset, i_b, i_tile, GROUPS, ACC)
    n = elements(i_tile, GROUPS)
    p_mean += i_b.to(tl.int64) * m_b
    p_scale += i_b.to(tl.int64) * s_b
    p_z += i_b.to(tl.int64) * N
    kl = draw(p_mean + n * m_n, p_scale + n * s_n, p_z + n, n < N, n0, ACC)
    n += 16
    kl += draw(p_mean + n * m_n, p_scale + n * s_n, p_z + n, n < N, n1, ACC)
    n += 16
    kl += draw(p_mean + n * m_n, p_scale + n * s_n, p_z + n, n < N, n2, ACC)
    n += 16
    kl += draw(p_mean + n * m_n, p_scale + n * s_n, p_z + n, n < N, n3, ACC)
    tl.store(p_partial + tl.program_id(0), tl.sum(kl))


@triton.jit
def differentiate(p_grad, grad_kl, p_mean, p_scale, p_dmean, p_dscale, mask, noise, ACC: tl.constexpr):
    mean = tl.load(p_mean, mask=mask, other=0.0).to(ACC)
    log_scale = tl.load(p_scale, mask=mask, other=0.0).to(ACC)
    scale = exp(log_scale)
    less_one, _ = exp_less_tangent(log_scale, scale)
    # An absent gradient is not taken for zero: zero times a scale that overflows is not zero.
    d_mean, d_log_scale = tl.zeros_like(mean), tl.zeros_like(mean)
    if p_grad is not None:
        d_mean = tl.load(p_grad, mask=mask, other=0.0).to(ACC)
        d_log_scale = d_mean * scale * noise
    if grad_kl is not None:
        d_mean += grad_kl * mean
        d_log_scale += grad_kl * less_one
    tl.store(p_dmean, narrow(d_mean, p_dmean.dtype.element_ty), mask=mask)
    tl.store(p_dscale, narrow(d_log_scale, p_dscale.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["offset"])
def backward_kernel(
    p_mean, p_scale, p_seed, p_grad, p_grad_kl, p_dmean, p_dscale,
    N, n_tiles, offset, m_b, m_n, s_b, s_n, g_b, g_n, k_b,
    GROUPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b, i_tile = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    n0, n1, n2, n3 = normal_noise(p_seed, offset, i_b, i_tile, GROUPS, ACC)
    grad_kl = None if p_grad_kl is None else tl.load(p_grad_kl + i_b * k_b).to(ACC)
    i_b = i_b.to(tl.int64)
    for w in tl.static_range(0, 4):
        n = elements(i_tile, GROUPS) + 16 * w
        noise = n0 if w == 0 else n1 if w == 1 else n2 if w == 2 else n3
        differentiate(
            None if p_grad is None else p_grad + i_b * g_b + n * g_n, grad_kl, p_mean + i_b * m_b + n * m_n,
            p_scale + i_b * s_b + n * s_n, p_dmean + i_b * N + n, p_dscale + i_b * N + n, n < N, noise, ACC,
        )  # fmt: skip


def _forward_launch(mean: torch.Tensor, log_scale: torch.Tensor, seed: torch.Tensor, offset: int, z: torch.Tensor) -> Launch:
    """The launch; of its tensors the last has each program's part of the divergences: (B, tiles)."""
    dtype = accumulation_dtype(mean, log_scale)
    how = noise_grid(mean.shape, dtype is torch.float64, offset, *mean.stride(), *log_scale.stride())
    return Launch(forward_kernel, (mean, log_scale, seed, z, mean.new_empty((mean.shape[0], how.tiles), dtype=dtype)), how)


def _backward_launch(mean: torch.Tensor, log_scale: torch.Tensor, seed: torch.Tensor, offset: int, *rest: Any) -> Launch:
    grad, grad_kl, *outputs = rest
    steps = (*((0, 0) if grad is None else grad.stride()), 0 if grad_kl is None else grad_kl.stride(0))
    double = accumulation_dtype(mean, log_scale) is torch.float64
    how = noise_grid(mean.shape, double, offset, *mean.stride(), *log_scale.stride(), *steps)
    return Launch(backward_kernel, (mean, log_scale, seed, grad, grad_kl, *outputs), how)


def forward(mean: torch.Tensor, *rest: Any) -> None:
    """``flowkern::gaussian_kl``: fills z and kl."""
    *inputs, kl = rest
    if not mean.numel():
        kl.zero_()
        return
    launch = _forward_launch(mean, *inputs)
    launch.run()
    torch.sum(launch.tensors[-1], 1, out=kl)


def backward(mean: torch.Tensor, *rest: Any) -> None:
    """``flowkern::gaussian_kl_backward``: fills dmean and dlog_scale."""
    if mean.numel():
        _backward_launch(mean, *rest).run()


FACTORS: dict[str, Any] = {
    "length": (65536, 37),
    "form": ("vector", "strided"),
    "dtypes": ("float32", "bfloat16", "bfloat16-float64"),
}


def compile_cases(length: int, form: str, dtypes: str) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS."""
    mean, log_scale = (example((64, length), dtype, form) for dtype in DTYPES[dtypes])
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    z, kl = KERNELS["gaussian_kl"].outputs(mean, log_scale)
    yield "forward", _forward_launch(mean, log_scale, seed, 0, z)
    gradients = KERNELS["gaussian_kl_backward"].outputs(mean, log_scale)
    yield "backward", _backward_launch(mean, log_scale, seed, 0, z, kl, *gradients)
    yield "backward-of-z", _backward_launch(mean, log_scale, seed, 0, z, None, *gradients)
    yield "backward-of-kl", _backward_launch(mean, log_scale, seed, 0, None, kl, *gradients)
