"""W = P L U from its factors, and the backward. The formulas are at the top of flowkern/ops/_plu_weight.py.

A program owns a block of the product and walks over the inner dimension, reading the triangles with masks.
"""

# mypy: allow-untyped-defs
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from flowkern._core.op import KERNELS

from ._coupling import DTYPES, Grid, Launch, constants, example
from .lang import exp, narrow

__all__ = ["backward", "forward"]

#: Its launches are products of small matrices.
STREAMING = False


@triton.jit
def load_lower(p, row, column, s_row, s_column, C, ACC: tl.constexpr):
    # L at (row, column), which broadcast against each other.
    below = tl.load(p + row * s_row + column * s_column, mask=(row < C) & (column < row), other=0.0).to(ACC)
    return tl.where(row == column, 1.0, below)


@triton.jit
def load_upper(p, p_log_diagonal, p_sign, row, column, s_row, s_column, s_log, s_sign, C, ACC: tl.constexpr):
    # U at (row, column), which broadcast against each other.
    above = tl.load(p + row * s_row + column * s_column, mask=(column < C) & (row < column), other=0.0).to(ACC)
    log_diagonal = tl.load(p_log_diagonal + row * s_log, mask=row < C, other=0.0).to(ACC)
    diagonal = tl.load(p_sign + row * s_sign, mask=row < C, other=0.0).to(ACC) * exp(log_diagonal)
    return tl.where(row == column, diagonal, above)


@triton.jit
def forward_kernel(
    p_lower, p_upper, p_log_diagonal, p_sign, p_permutation, p_weight,
    C, n_blocks, l_row, l_column, u_row, u_column, s_log, s_sign, s_permutation,
    BLOCK: tl.constexpr, INNER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) // n_blocks * BLOCK + tl.arange(0, BLOCK)
    j = (tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    row = tl.load(p_permutation + i * s_permutation, mask=i < C, other=0).to(tl.int32)[:, None]
    row = tl.minimum(tl.maximum(row, 0), C - 1)  # a row of L, whatever the permutation holds
    i = i[:, None]
    total = tl.zeros((BLOCK, BLOCK), ACC)
    for k in range(0, C, INNER):
        inner = k + tl.arange(0, INNER)
        left = load_lower(p_lower, row, inner[None, :], l_row, l_column, C, ACC)
        right = load_upper(p_upper, p_log_diagonal, p_sign, inner[:, None], j, u_row, u_column, s_log, s_sign, C, ACC)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=ACC)
    tl.store(p_weight + i * C + j, total, mask=(i < C) & (j < C))


@triton.jit
def backward_kernel(
    p_grad, p_lower, p_upper, p_log_diagonal, p_sign, p_origin, p_dlower, p_dupper, p_dlog_diagonal,
    C, n_blocks, g_row, g_column, l_row, l_column, u_row, u_column, s_log, s_sign,
    BLOCK: tl.constexpr, INNER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Row r of the gradient of L U is row origin[r] of that of W.
    i = (tl.program_id(0) // n_blocks * BLOCK + tl.arange(0, BLOCK))[:, None]
    j = (tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    m = (i < C) & (j < C)
    origin = tl.load(p_origin + i, mask=i < C, other=0)
    by_lower, by_upper = tl.zeros((BLOCK, BLOCK), ACC), tl.zeros((BLOCK, BLOCK), ACC)
    for k in range(0, C, INNER):
        inner = k + tl.arange(0, INNER)
        # G U^T at (i, j)
        g = tl.load(p_grad + origin * g_row + inner[None, :] * g_column, mask=(i < C) & (inner < C)[None, :], other=0.0).to(ACC)
        u = load_upper(p_upper, p_log_diagonal, p_sign, j, inner[:, None], u_row, u_column, s_log, s_sign, C, ACC)
        by_lower = tl.dot(g, u, by_lower, input_precision="ieee", out_dtype=ACC)
        # L^T G at (i, j)
        l_flipped = load_lower(p_lower, inner[None, :], i, l_row, l_column, C, ACC)
        inner_origin = tl.load(p_origin + inner, mask=inner < C, other=0)[:, None]
        g = tl.load(p_grad + inner_origin * g_row + j * g_column, mask=(inner < C)[:, None] & (j < C), other=0.0).to(ACC)
        by_upper = tl.dot(l_flipped, g, by_upper, input_precision="ieee", out_dtype=ACC)
    d = load_upper(p_upper, p_log_diagonal, p_sign, i, j, u_row, u_column, s_log, s_sign, C, ACC)
    tl.store(p_dlower + i * C + j, narrow(tl.where(j < i, by_lower, 0.0), p_dlower.dtype.element_ty), mask=m)
    tl.store(p_dupper + i * C + j, narrow(tl.where(j > i, by_upper, 0.0), p_dupper.dtype.element_ty), mask=m)
    p_diagonal = p_dlog_diagonal + i + 0 * j
    tl.store(p_diagonal, narrow(by_upper * d, p_dlog_diagonal.dtype.element_ty), mask=m & (i == j))


def _grid(channels: int, double: bool, integers: tuple[int, ...]) -> Grid:
    block = 16 if double or channels <= 16 else 32
    blocks = triton.cdiv(channels, block)
    keywords = constants(double, 4, BLOCK=block, INNER=16, num_stages=2)
    return Grid(blocks**2, blocks, (channels, blocks, *integers), keywords)


def _forward_launch(factors: Sequence[torch.Tensor], weight: torch.Tensor) -> Launch:
    steps = tuple(s for f in factors for s in f.stride())
    return Launch(forward_kernel, (*factors, weight), _grid(len(weight), weight.dtype is torch.float64, steps))


def _backward_launch(
    grad: torch.Tensor, factors: Sequence[torch.Tensor], origin: torch.Tensor, outputs: tuple[torch.Tensor, ...]
) -> Launch:
    steps = tuple(s for f in (grad, *factors[:4]) for s in f.stride())
    double = torch.float64 in (f.dtype for f in factors[:3])
    return Launch(backward_kernel, (grad, *factors[:4], origin, *outputs), _grid(len(grad), double, steps))


def forward(*arguments: torch.Tensor) -> None:
    """``flowkern::plu_weight``: fills W."""
    *factors, weight = arguments
    if weight.numel():
        _forward_launch(factors, weight).run()


def backward(grad: torch.Tensor, *arguments: torch.Tensor) -> None:
    """``flowkern::plu_weight_backward``: fills dlower, dupper and dlog_diagonal."""
    factors, outputs = arguments[:5], arguments[5:]
    if grad.numel():
        permutation = factors[4]
        numbers = torch.arange(len(permutation), dtype=torch.int32, device=permutation.device)
        origin = torch.zeros_like(numbers).scatter_(0, permutation, numbers)
        _backward_launch(grad, factors, origin, outputs).run()


FACTORS: dict[str, Any] = {"channels": (192, 12, 48, 37), "dtypes": tuple(DTYPES)}


def trips(name: str, launch: Launch) -> tuple[int, ...]:
    """How often the loop of a launch runs."""
    return (triton.cdiv(len(launch.tensors[0]), launch.grid.keywords["INNER"]),)


def compile_cases(channels: int, dtypes: str) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS."""
    square, other = DTYPES[dtypes]
    lower, upper = (example((channels, channels), square, "vector") for _ in range(2))
    log_diagonal, sign = (example((channels,), other, "vector") for _ in range(2))
    factors = lower, upper, log_diagonal, sign, torch.empty(channels, dtype=torch.int64, device="meta")
    weight = KERNELS["plu_weight"].outputs(*factors)
    yield "forward", _forward_launch(factors, weight)
    origin = torch.empty(channels, dtype=torch.int32, device="meta")
    yield "backward", _backward_launch(weight, factors, origin, KERNELS["plu_weight_backward"].outputs(weight, *factors))
