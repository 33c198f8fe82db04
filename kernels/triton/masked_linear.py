"""y = x (W * M)^T + b and its backward, where M lets output r see the first reach[r] inputs, once both are sorted.

The formulas are at the top of flowkern/ops/_masked_linear.py. A program owns a block of the product and walks over
the inner dimension only as far as the mask lets its block see: blocks that are hidden are neither read nor multiplied.
"""

# mypy: allow-untyped-defs
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from flowkern._core.backend import interpreting
from flowkern._core.checks import accumulation_dtype
from flowkern.ops import DegreeMask

from ._coupling import DTYPES, Grid, Launch, constants, example
from .lang import narrow

__all__ = ["backward", "forward"]

#: Its launches are products of matrices: their operands pass through shared memory.
STREAMING = False


@triton.jit
def unit(p_index, i, n):
    # Where sorted unit i lies, as an offset that may be multiplied by any stride. Whatever the table holds, it is a unit.
    if p_index is not None:
        i = tl.minimum(tl.maximum(tl.load(p_index + i, mask=i < n, other=0), 0), n - 1)
    return i.to(tl.int64)


@triton.jit
def ends(p_reach, r, mask, N_IN):
    # How many inputs the sorted outputs see: not more than there are, whatever the table holds.
    return tl.minimum(tl.load(p_reach + r, mask=mask, other=0), N_IN)


@triton.jit(do_not_specialize=["B"])
def forward_kernel(
    p_x, p_weight, p_bias, p_reach, p_rows, p_columns, p_y,
    B, N_IN, N_OUT, n_blocks, x_b, x_i, w_o, w_i, s_bias, y_b, y_o,
    BATCH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # The blocks that see furthest come first: they take longest.
    i_block = n_blocks - 1 - tl.program_id(0) % n_blocks
    b = (tl.program_id(0) // n_blocks).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    r = i_block * BLOCK + tl.arange(0, BLOCK)
    m_b, m_r = b < B, r < N_OUT
    reach = ends(p_reach, r, m_r, N_IN)
    furthest = tl.minimum(tl.load(p_reach + tl.minimum(i_block * BLOCK + BLOCK, N_OUT) - 1), N_IN)
    o = unit(p_rows, r, N_OUT)
    total = tl.zeros((BATCH, BLOCK), ACC)
    for k in range(0, furthest, INNER):
        c = k + tl.arange(0, INNER)
        m_c = c < furthest
        i = unit(p_columns, c, N_IN)
        b_x = tl.load(p_x + b[:, None] * x_b + i[None, :] * x_i, mask=m_b[:, None] & m_c[None, :], other=0.0).to(DOT)
        p_w = p_weight + i[:, None] * w_i + o[None, :] * w_o
        b_w = tl.load(p_w, mask=c[:, None] < reach[None, :], other=0.0).to(DOT)
        total = tl.dot(b_x, b_w, total, input_precision="ieee", out_dtype=ACC)
    if p_bias is not None:
        total += tl.load(p_bias + o * s_bias, mask=m_r, other=0.0).to(ACC)[None, :]
    p_to = p_y + b[:, None] * y_b + o[None, :] * y_o
    tl.store(p_to, narrow(total, p_y.dtype.element_ty), mask=m_b[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["B"])
def input_kernel(
    p_grad, p_weight, p_reach, p_first, p_rows, p_columns, p_dx,
    B, N_IN, N_OUT, n_blocks, g_b, g_o, w_o, w_i, x_b, x_i,
    BATCH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0) % n_blocks
    b = (tl.program_id(0) // n_blocks).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    c = i_block * BLOCK + tl.arange(0, BLOCK)
    m_b, m_c = b < B, c < N_IN
    i = unit(p_columns, c, N_IN)
    total = tl.zeros((BATCH, BLOCK), ACC)
    for k in range(tl.maximum(tl.load(p_first + i_block * BLOCK), 0), N_OUT, INNER):
        r = k + tl.arange(0, INNER)
        m_r = r < N_OUT
        reach = ends(p_reach, r, m_r, N_IN)
        o = unit(p_rows, r, N_OUT)
        b_g = tl.load(p_grad + b[:, None] * g_b + o[None, :] * g_o, mask=m_b[:, None] & m_r[None, :], other=0.0).to(DOT)
        p_w = p_weight + o[:, None] * w_o + i[None, :] * w_i
        b_w = tl.load(p_w, mask=c[None, :] < reach[:, None], other=0.0).to(DOT)
        total = tl.dot(b_g, b_w, total, input_precision="ieee", out_dtype=ACC)
    p_to = p_dx + b[:, None] * x_b + i[None, :] * x_i
    tl.store(p_to, narrow(total, p_dx.dtype.element_ty), mask=m_b[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["B"])
def weight_kernel(
    p_grad, p_x, p_reach, p_rows, p_columns, p_dweight,
    B, N_IN, N_OUT, n_blocks, g_b, g_o, x_b, x_i, w_o, w_i,
    BLOCK: tl.constexpr, INNER: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_row, i_column = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    r, c = i_row * BLOCK + tl.arange(0, BLOCK), i_column * BLOCK + tl.arange(0, BLOCK)
    m_r, m_c = r < N_OUT, c < N_IN
    reach = tl.load(p_reach + r, mask=m_r, other=0)
    furthest = tl.load(p_reach + tl.minimum(i_row * BLOCK + BLOCK, N_OUT) - 1)
    o, i = unit(p_rows, r, N_OUT), unit(p_columns, c, N_IN)
    total = tl.zeros((BLOCK, BLOCK), ACC)
    # A block that is hidden has no sum to take, but zeros to write.
    for k in range(0, tl.where(i_column * BLOCK < furthest, B, 0), INNER):
        b = (k + tl.arange(0, INNER)).to(tl.int64)
        m_b = b < B
        b_g = tl.load(p_grad + o[:, None] * g_o + b[None, :] * g_b, mask=m_r[:, None] & m_b[None, :], other=0.0).to(DOT)
        b_x = tl.load(p_x + b[:, None] * x_b + i[None, :] * x_i, mask=m_b[:, None] & m_c[None, :], other=0.0).to(DOT)
        total = tl.dot(b_g, b_x, total, input_precision="ieee", out_dtype=ACC)
    total = tl.where(c[None, :] < reach[:, None], total, 0.0)
    p_to = p_dweight + o[:, None] * w_o + i[None, :] * w_i
    tl.store(p_to, narrow(total, p_dweight.dtype.element_ty), mask=m_r[:, None] & m_c[None, :])


def _operands(double: bool, *dtypes: torch.dtype) -> Any:
    """The dtype in which blocks are multiplied: tensor cores take both in one half precision, and their products are exact."""
    if double:
        return tl.float64
    if all(dtype is dtypes[0] for dtype in dtypes) and not interpreting():  # the interpreter multiplies bfloat16's bits
        return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtypes[0], tl.float32)
    return tl.float32


def _constants(double: bool, operands: Any, warps: int, **others: Any) -> dict[str, Any]:
    half = operands in (tl.bfloat16, tl.float16)
    tile = {"BLOCK": 32 if double else 64, "INNER": 32 if half else 16, "DOT": operands, "num_stages": 3 if half else 2}
    return constants(double, warps, **tile, **others)


def _grid(batch: int, units: int, double: bool, operands: Any, integers: tuple[int, ...]) -> Grid:
    """Of a product with the batch: its blocks of units, and tiles of samples."""
    block, half = 32 if double else 64, operands in (tl.bfloat16, tl.float16)
    samples = min(max(triton.next_power_of_2(batch), 16), 64 if half else 32)
    blocks = triton.cdiv(units, block)
    warps = 8 if samples > 16 and not half else 4
    keywords = _constants(double, operands, warps, BATCH=samples)
    return Grid(triton.cdiv(batch, samples) * blocks, blocks, (*integers[:3], blocks, *integers[3:]), keywords)


def _weight_grid(outputs: int, inputs: int, double: bool, operands: Any, integers: tuple[int, ...]) -> Grid:
    block, half = 32 if double else 64, operands in (tl.bfloat16, tl.float16)
    columns = triton.cdiv(inputs, block)
    keywords = _constants(double, operands, 4 if half else 8)
    return Grid(triton.cdiv(outputs, block) * columns, columns, (*integers[:3], columns, *integers[3:]), keywords)


def _sizes(x: torch.Tensor, weight: torch.Tensor) -> tuple[int, int, int]:
    return x.shape[0], weight.shape[1], weight.shape[0]


def _forward_launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, mask: Sequence[Any], y: torch.Tensor
) -> Launch:
    reach, _, rows, columns, _ = mask
    sizes, double = _sizes(x, weight), accumulation_dtype(x, weight, bias) is torch.float64
    steps = (*x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0), *y.stride())
    grid = _grid(sizes[0], sizes[2], double, _operands(double, x.dtype, weight.dtype), (*sizes, *steps))
    return Launch(forward_kernel, (x, weight, bias, reach, rows, columns, y), grid)


def _input_launch(grad: torch.Tensor, weight: torch.Tensor, mask: Sequence[Any], dx: torch.Tensor, double: bool) -> Launch:
    reach, first, rows, columns, _ = mask
    sizes, steps = _sizes(dx, weight), (*grad.stride(), *weight.stride(), *dx.stride())
    grid = _grid(sizes[0], sizes[1], double, _operands(double, grad.dtype, weight.dtype), (*sizes, *steps))
    return Launch(input_kernel, (grad, weight, reach, first, rows, columns, dx), grid)


def _weight_launch(grad: torch.Tensor, x: torch.Tensor, mask: Sequence[Any], dweight: torch.Tensor, double: bool) -> Launch:
    reach, _, rows, columns, _ = mask
    sizes, steps = _sizes(x, dweight), (*grad.stride(), *x.stride(), *dweight.stride())
    grid = _weight_grid(sizes[2], sizes[1], double, _operands(double, grad.dtype, x.dtype), (*sizes, *steps))
    return Launch(weight_kernel, (grad, x, reach, rows, columns, dweight), grid)


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> None:
    """``flowkern::masked_linear``: fills y."""
    *mask, y = rest
    if y.numel():
        _forward_launch(x, weight, bias, mask, y).run()


def backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> None:
    """``flowkern::masked_linear_backward``: fills dx, dweight and dbias, where they are needed."""
    *mask, needs_x, needs_weight, needs_bias, dx, dweight, dbias = rest
    dtype = accumulation_dtype(x, weight, bias)
    if needs_x and dx.numel():
        _input_launch(grad, weight, mask, dx, dtype is torch.float64).run()
    if needs_weight and dweight.numel():
        _weight_launch(grad, x, mask, dweight, dtype is torch.float64).run()
    if needs_bias:
        dbias.copy_(grad.sum(0, dtype=dtype))


FACTORS: dict[str, Any] = {
    "sizes": ((64, 784, 1024), (1000, 37, 50), (8, 512, 512)),
    "ordered": (True, False),
    "dtypes": tuple(DTYPES),
}


COUNTED = tuple({"sizes": (4096, 1024, 1024), "dtypes": dtypes} for dtypes in ("float32", "bfloat16"))


def trips(name: str, launch: Launch) -> tuple[float, ...]:
    """How often the loop of a launch runs, on average over its programs, where outputs and inputs are as many."""
    batch, inputs, _, blocks, *_ = launch.grid.integers
    inner = launch.grid.keywords["INNER"]
    if name == "weight":
        return (batch / inner * (blocks + 1) / 2 / blocks,)
    return (inputs / inner * (blocks + 1) / 2 / blocks,)


def compile_cases(sizes: tuple[int, int, int], ordered: bool, dtypes: str) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS."""
    of_x, of_weight = DTYPES[dtypes]
    batch, inputs, outputs = sizes
    mask = DegreeMask(torch.arange(outputs), torch.arange(inputs)).to("meta").indices
    if not ordered:
        mask = (*mask[:2], mask[0], mask[1], ())
    x, weight = example((batch, inputs), of_x, "vector"), example((outputs, inputs), of_weight, "vector")
    bias, y = example((outputs,), of_weight, "vector"), example((batch, outputs), of_x, "vector")
    double = accumulation_dtype(x, weight, bias) is torch.float64
    yield "forward", _forward_launch(x, weight, bias, mask, y)
    yield "input", _input_launch(y, weight, mask, x, double)
    yield "weight", _weight_launch(y, x, mask, weight, double)
