"""y = x (W * M)^T + b and its backward, where M lets output r see the first reach[r] inputs, once both are sorted.

The formulas are at the top of flowkern/ops/_masked_linear.py. A program owns a block of the product and walks over
the inner dimension only as far as the mask lets its block see: blocks that are hidden are neither read nor multiplied.
Those that are seen whole, most of them, are read without any mask; those on the diagonal come first, and have their
weights masked in registers. Units are the rows of a block and samples its columns: a tensor core takes 64 rows at once, and
of units there are as many.

Where rows lie at 16 bytes and units come sorted, all is read in asynchronous copies of 16 bytes. That is said by UNIT: the
sizes and steps are given in units of so many elements, so that the compiler knows what divides them.
"""

# mypy: allow-untyped-defs
import functools
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

#: Of a large GPU: blocks are made smaller where there would be fewer of them.
_MULTIPROCESSORS = 132


@triton.jit
def unit(p_index, i, n):
    # Where sorted unit i lies, as an offset that may be multiplied by any stride. Whatever the table holds, it is a unit.
    if p_index is not None:
        i = tl.minimum(tl.maximum(tl.load(p_index + i, mask=i < n, other=0), 0), n - 1)
    return i.to(tl.int64)


@triton.jit
def along(p, p_index, k, n, stride, INNER: tl.constexpr):
    # Of pointers [1, ...] or [..., 1] to sorted unit 0, those to INNER units from the k-th on.
    i = tl.arange(0, INNER)
    i = tl.expand_dims(i, 0) if p.shape[0] > 1 else tl.expand_dims(i, 1)
    if p_index is None:
        return p + i.to(tl.int64) * stride + tl.cast(k, tl.int64) * stride
    return p + unit(p_index, k + i, n) * stride


@triton.jit
def ends(p_reach, r, N_IN, N_OUT):
    # How many inputs the sorted outputs see: some of those that there are, whatever the table holds.
    return tl.minimum(tl.maximum(tl.load(p_reach + r, mask=r < N_OUT, other=0), 0), N_IN)


@triton.jit(do_not_specialize=["B"])
def forward_kernel(
    p_x, p_weight, p_bias, p_reach, p_rows, p_columns, p_y,
    B, N_IN, N_OUT, n_blocks, x_b, x_i, w_o, w_i, s_bias, y_b, y_o,
    BATCH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # The blocks that see furthest come first: they take longest.
    i_block = n_blocks - 1 - tl.program_id(0) % n_blocks
    b = (tl.program_id(0) // n_blocks).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    r = i_block * BLOCK + tl.arange(0, BLOCK)
    N_IN, N_OUT, x_b, w_o, y_b = N_IN * UNIT, N_OUT * UNIT, x_b * UNIT, w_o * UNIT, y_b * UNIT
    reach = ends(p_reach, r, N_IN, N_OUT)
    nearest = ends(p_reach, i_block * BLOCK, N_IN, N_OUT) // INNER * INNER
    furthest = ends(p_reach, tl.minimum(i_block * BLOCK + BLOCK, N_OUT) - 1, N_IN, N_OUT)
    o = unit(p_rows, r, N_OUT)
    p_w = p_weight + unit(p_rows, tl.minimum(r, N_OUT - 1), N_OUT)[:, None] * w_o
    p_x += tl.minimum(b, B - 1)[None, :] * x_b
    total = tl.zeros((BLOCK, BATCH), ACC)
    # First the diagonal: after the other loop, it would have the tensor cores wait for each of that one's products. Samples
    # that there are none of are read from the last one, and not written.
    for k in range(nearest, furthest, INNER):
        c = k + tl.arange(0, INNER)
        b_w = tl.load(along(p_w, p_columns, k, N_IN, w_i, INNER), mask=(c < N_IN)[None, :], other=0.0)
        b_w = tl.where(c[None, :] < reach[:, None], b_w, 0.0).to(DOT)
        b_x = tl.load(along(p_x, p_columns, k, N_IN, x_i, INNER), mask=(c < N_IN)[:, None], other=0.0).to(DOT)
        total = tl.dot(b_w, b_x, total, input_precision="ieee", out_dtype=ACC)
    for k in range(0, nearest, INNER):
        b_w = tl.load(along(p_w, p_columns, k, N_IN, w_i, INNER)).to(DOT)
        b_x = tl.load(along(p_x, p_columns, k, N_IN, x_i, INNER)).to(DOT)
        total = tl.dot(b_w, b_x, total, input_precision="ieee", out_dtype=ACC)
    if p_bias is not None:
        total += tl.load(p_bias + o * s_bias, mask=r < N_OUT, other=0.0).to(ACC)[:, None]
    p_to = p_y + b[None, :] * y_b + o[:, None] * y_o
    tl.store(p_to, narrow(total, p_y.dtype.element_ty), mask=(b < B)[None, :] & (r < N_OUT)[:, None])


@triton.jit(do_not_specialize=["B"])
def input_kernel(
    p_grad, p_weight, p_first, p_rows, p_columns, p_dx,
    B, N_IN, N_OUT, n_blocks, g_b, g_o, w_o, w_i, x_b, x_i,
    BATCH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0) % n_blocks
    b = (tl.program_id(0) // n_blocks).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    c = i_block * BLOCK + tl.arange(0, BLOCK)
    N_IN, N_OUT, g_b, w_o, x_b = N_IN * UNIT, N_OUT * UNIT, g_b * UNIT, w_o * UNIT, x_b * UNIT
    first = tl.load(p_first + c, mask=c < N_IN, other=0)
    # The steps over rows: from `some` on they see some of these columns, from `every` on all; the last may end outside.
    some = tl.maximum(tl.load(p_first + i_block * BLOCK), 0) // INNER
    every = tl.load(p_first + tl.minimum(i_block * BLOCK + BLOCK, N_IN) - 1)
    last = N_OUT // INNER
    every = tl.minimum(tl.maximum(tl.cdiv(every, INNER), some), tl.maximum(last, some))
    i = unit(p_columns, c, N_IN)
    p_w = p_weight + i[:, None] * w_i
    p_grad += tl.minimum(b, B - 1)[None, :] * g_b
    total = tl.zeros((BLOCK, BATCH), ACC)
    for k in range(some, tl.cdiv(N_OUT, INNER) + every - tl.maximum(last, every), 1):
        start = tl.where(k < every, k, k - every + last) * INNER
        r = start + tl.arange(0, INNER)
        m = (r < N_OUT)[None, :] & (c < N_IN)[:, None]
        b_w = tl.load(along(p_w, p_rows, start, N_OUT, w_o, INNER), mask=m, other=0.0)
        b_w = tl.where(first[:, None] <= r[None, :], b_w, 0.0).to(DOT)
        b_g = tl.load(along(p_grad, p_rows, start, N_OUT, g_o, INNER), mask=(r < N_OUT)[:, None], other=0.0).to(DOT)
        total = tl.dot(b_w, b_g, total, input_precision="ieee", out_dtype=ACC)
    for k in range(every * INNER, last * INNER, INNER):
        b_w = tl.load(along(p_w, p_rows, k, N_OUT, w_o, INNER), mask=(c < N_IN)[:, None], other=0.0).to(DOT)
        b_g = tl.load(along(p_grad, p_rows, k, N_OUT, g_o, INNER)).to(DOT)
        total = tl.dot(b_w, b_g, total, input_precision="ieee", out_dtype=ACC)
    p_to = p_dx + b[None, :] * x_b + i[:, None] * x_i
    tl.store(p_to, narrow(total, p_dx.dtype.element_ty), mask=(b < B)[None, :] & (c < N_IN)[:, None])


@triton.jit(do_not_specialize=["B"])
def weight_kernel(
    p_grad, p_x, p_reach, p_rows, p_columns, p_dweight,
    B, N_IN, N_OUT, n_blocks, g_b, g_o, x_b, x_i, w_o, w_i,
    BATCH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    first_row, first_column = tl.program_id(0) % n_blocks * BLOCK, tl.program_id(0) // n_blocks * BATCH
    r, c = first_row + tl.arange(0, BLOCK), first_column + tl.arange(0, BATCH)
    N_IN, N_OUT, g_b, x_b, w_o = N_IN * UNIT, N_OUT * UNIT, g_b * UNIT, x_b * UNIT, w_o * UNIT
    m_r, m_c = r < N_OUT, c < N_IN
    reach = ends(p_reach, r, N_IN, N_OUT)
    furthest = tl.load(p_reach + tl.minimum(first_row + BLOCK, N_OUT) - 1)
    o, i = unit(p_rows, r, N_OUT), unit(p_columns, c, N_IN)
    p_g = p_grad + o[:, None] * g_o
    p_x += i[None, :] * x_i
    total = tl.zeros((BLOCK, BATCH), ACC)
    # A block that is hidden has no sum to take, but zeros to write.
    seen = tl.where(first_column < furthest, B, 0)
    for k in range(0, seen, INNER):
        m_b = tl.arange(0, INNER) < B - k
        b_g = tl.load(along(p_g, None, k, B, g_b, INNER), mask=m_r[:, None] & m_b[None, :], other=0.0).to(DOT)
        b_x = tl.load(along(p_x, None, k, B, x_b, INNER), mask=m_b[:, None] & m_c[None, :], other=0.0).to(DOT)
        total = tl.dot(b_g, b_x, total, input_precision="ieee", out_dtype=ACC)
    p_to = p_dweight + o[:, None] * w_o + i[None, :] * w_i
    m = m_r[:, None] & m_c[None, :]
    # A mask on all blocks would have the tensor cores wait for each product.
    if tl.load(p_reach + first_row) < first_column + BATCH:
        total = tl.where(c[None, :] < reach[:, None], total, 0.0)
        tl.store(p_to, narrow(total, p_dweight.dtype.element_ty), mask=m)
    else:
        tl.store(p_to, narrow(total, p_dweight.dtype.element_ty), mask=m)


def _operands(double: bool, *dtypes: torch.dtype) -> Any:
    """The dtype in which blocks are multiplied: tensor cores take both in one half precision, and their products are exact."""
    if double:
        return tl.float64
    if all(dtype is dtypes[0] for dtype in dtypes):
        return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtypes[0], tl.float32)
    return tl.float32


def _unit(tensors: Sequence[torch.Tensor], sizes: Sequence[int], tables: Sequence[Any]) -> int:
    """How many neighbours of memory are sure to lie in one piece of 16 bytes: UNIT divides sizes and rows' steps; 1 if none are.

    ``tensors`` are those that the kernel reads and writes in blocks, ``tables`` what they are gathered by.
    """
    if any(table is not None for table in tables) or any(t.stride(1) != 1 or t.data_ptr() % 16 for t in tensors):
        return 1
    unit = 16 // min(t.element_size() for t in tensors)
    return 1 if any(n % unit or n >= 2**31 for n in (*sizes, *(t.stride(0) for t in tensors))) else unit


def _tile(rows: int, columns: int, operands: Any, unit: int) -> dict[str, Any]:
    """Of a product of so many rows and columns: the block of one program, and the compiler's options."""
    half = operands in (tl.bfloat16, tl.float16)
    if half and unit > 1 and triton.cdiv(rows, 128) * triton.cdiv(columns, 128) >= _MULTIPROCESSORS:
        # Of two programs on a multiprocessor one copies while the other multiplies. With steps of 64, sm_80 spills registers.
        return {"BLOCK": 128, "BATCH": 128, "INNER": 32, "num_warps": 4, "num_stages": 4}
    block, wide = 32 if operands is tl.float64 else 64, max(triton.next_power_of_2(columns), 16)
    inner = 16 if not half else 64 if unit > 1 else 32
    warps = 4 if wide == 16 or (half and unit > 1) else 8
    return {"BLOCK": block, "BATCH": min(wide, block), "INNER": inner, "num_warps": warps, "num_stages": 3 if half else 2}


@functools.lru_cache(maxsize=4096)
def _grid(rows: int, columns: int, operands: Any, unit: int, integers: tuple[int, ...]) -> Grid:
    """A program for each block; the blocks of rows are neighbours, so that they find the columns in the cache."""
    tile = _tile(rows, columns, operands, unit)
    blocks = triton.cdiv(rows, tile["BLOCK"])
    multiplied = tl.float32 if interpreting() and operands is not tl.float64 else operands  # it multiplies bfloat16's bits
    how = constants(operands is tl.float64, **tile, UNIT=unit, DOT=multiplied)
    return Grid(triton.cdiv(columns, tile["BATCH"]) * blocks, blocks, (*integers[:3], blocks, *integers[3:]), how)


def _sizes(x: torch.Tensor, weight: torch.Tensor, unit: int) -> tuple[int, int, int]:
    return x.shape[0], weight.shape[1] // unit, weight.shape[0] // unit


def _steps(t: torch.Tensor, unit: int) -> tuple[int, int]:
    """Of rows and columns, the former in units."""
    return t.stride(0) // unit, t.stride(1)


def _forward_launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, mask: Sequence[Any], y: torch.Tensor
) -> Launch:
    reach, _, rows, columns, _ = mask
    operands = _operands(accumulation_dtype(x, weight, bias) is torch.float64, x.dtype, weight.dtype)
    unit = _unit((x, weight, y), weight.shape, (rows, columns))
    steps = (*_steps(x, unit), *_steps(weight, unit), 0 if bias is None else bias.stride(0), *_steps(y, unit))
    grid = _grid(len(weight), len(x), operands, unit, (*_sizes(x, weight, unit), *steps))
    return Launch(forward_kernel, (x, weight, bias, reach, rows, columns, y), grid)


def _input_launch(grad: torch.Tensor, weight: torch.Tensor, mask: Sequence[Any], dx: torch.Tensor, double: bool) -> Launch:
    _, first, rows, columns, _ = mask
    operands = _operands(double, grad.dtype, weight.dtype)
    unit = _unit((grad, weight, dx), weight.shape, (rows, columns))
    steps = (*_steps(grad, unit), *_steps(weight, unit), *_steps(dx, unit))
    grid = _grid(weight.shape[1], len(dx), operands, unit, (*_sizes(dx, weight, unit), *steps))
    return Launch(input_kernel, (grad, weight, first, rows, columns, dx), grid)


def _weight_launch(grad: torch.Tensor, x: torch.Tensor, mask: Sequence[Any], dweight: torch.Tensor, double: bool) -> Launch:
    reach, _, rows, columns, _ = mask
    operands = _operands(double, grad.dtype, x.dtype)
    unit = _unit((grad, x, dweight), dweight.shape, (rows, columns))
    steps = (*_steps(grad, unit), *_steps(x, unit), *_steps(dweight, unit))
    grid = _grid(len(dweight), dweight.shape[1], operands, unit, (*_sizes(x, dweight, unit), *steps))
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
    "sizes": ((4096, 2048, 1536), (64, 784, 1024), (1000, 37, 50), (8, 512, 512)),
    "ordered": (True, False),
    "dtypes": tuple(DTYPES),
}


COUNTED = tuple({"sizes": (4096, 1024, 1024), "dtypes": dtypes} for dtypes in ("float32", "bfloat16"))


def trips(name: str, launch: Launch) -> tuple[float, ...]:
    """How often the loops of a launch run, on average over its programs, where outputs and inputs are as many."""
    batch, _, _, blocks, *_ = launch.grid.integers
    inner, block = (launch.grid.keywords[key] for key in ("INNER", "BLOCK"))
    if name == "weight":
        return (batch / inner * (blocks + 1) / 2 / blocks,)
    return block / inner, block / inner * (blocks - 1) / 2  # on the diagonal, and whole


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
