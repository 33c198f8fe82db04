"""Invertible linear map of the channels: one kernel applies a matrix at every pixel, another sums g x^T over the pixels.

The formulas are at the top of flowkern/ops/_invertible_linear.py. The first kernel gives y in both directions and the
gradient of x; a program owns a tile of pixels of one sample and a block of output channels, and walks over the input
channels. The second owns a block of the product and every n-th tile of pixels; the partial products are added in a
fixed order. The factorization of W is torch's, on the device, without waiting for it.

From 32 channels on, NVIDIA's tensor cores multiply bfloat16: each operand is split into numbers of eight binary digits.
Three of them make a float32, and the six products that reach its last digits leave out less than 2^-22 of a product, where
float32 arithmetic rounds each sum. Results of 16 bits take two numbers and up to three products. What does not fit into a
sum such cores cut off instead of rounding, so they add 32 or 64 places at a time, and the sums are added elsewhere. bfloat16
ends at 2^-133: to multiples of that all operands are rounded.
"""

# mypy: allow-untyped-defs
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from flowkern._core.backend import interpreting
from flowkern._core.checks import accumulation_dtype, empty_as

from ._coupling import DTYPES, FORMS, Grid, Launch, Strides, constants, example, sample_strides
from .lang import narrow
from .launch import generation

__all__ = ["backward", "forward"]

#: Its launches are products of matrices: their operands pass through shared memory.
STREAMING = False


@triton.jit
def pixel_offsets(p, W, s_h, s_w, FLAT: tl.constexpr):
    # Where pixels p of a sample lie.
    if FLAT:
        o = p * s_w
    else:
        h = p // W
        o = h * s_h + (p - h * W) * s_w
    return o


@triton.jit
def leading(x, ROUND: tl.constexpr):
    # The first eight binary digits of a float32, rounded to nearest or cut off: that makes nothing infinite.
    bits = x.to(tl.int32, bitcast=True) + ROUND * 32768
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def split(x, TERMS: tl.constexpr, DOT: tl.constexpr):
    # x as the sum of so many numbers of eight digits, the largest first: three are all of a float32, one is x itself.
    first = x.to(DOT)
    second, third = first, first
    if TERMS > 1:
        x = x.to(tl.float32) + 0.0  # a NaN that arithmetic made has a leading digit
        cut = leading(x, False)
        rest = x - cut
        near = leading(rest, TERMS == 3)
        first, second, third = cut.to(DOT), near.to(DOT), (rest - near).to(DOT)
    return first, second, third


@triton.jit
def add_product(total, a, b, A_TERMS: tl.constexpr, B_TERMS: tl.constexpr, DOT: tl.constexpr):
    # total + a b, on tensor cores if the operands have terms.
    if A_TERMS == 0:
        ACC: tl.constexpr = total.dtype
        total = tl.dot(a.to(ACC), b.to(ACC), total, input_precision="ieee", out_dtype=ACC)
    else:
        a_1, a_2, a_3 = split(a, A_TERMS, DOT)
        b_1, b_2, b_3 = split(b, B_TERMS, DOT)
        part = tl.zeros_like(total)
        if A_TERMS == 3:
            part = tl.dot(a_1, b_3, part, input_precision="ieee")
            part = tl.dot(a_2, b_2, part, input_precision="ieee")
            part = tl.dot(a_3, b_1, part, input_precision="ieee")
        if A_TERMS > 1:
            part = tl.dot(a_2, b_1, part, input_precision="ieee")
        if B_TERMS > 1:
            part = tl.dot(a_1, b_2, part, input_precision="ieee")
        if A_TERMS > 1 or B_TERMS > 1:
            # NaN beside an infinite number: then the first terms alone say what comes out. The minimum passes over NaN.
            part = tl.minimum(part, 3e38)
        # The sum is taken outside, where it is rounded: without a limit to what they may add the compiler moves it inside.
        total += tl.dot(a_1, b_1, part, input_precision="ieee", max_num_imprecise_acc=1)
    return total


@triton.jit(do_not_specialize=["n_tiles"])
def map_kernel(
    p_x, p_matrix, p_minus, p_plus, p_y,
    N, W, C, n_tiles, n_blocks,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w, m_out, m_in,
    FLAT: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    PIXELS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    X_TERMS: tl.constexpr, MATRIX_TERMS: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # y = matrix (x - minus) + plus. Tiles are [pixel, channel] if LAST, else [channel, pixel], as they lie in memory. The
    # matrix stays in the multiprocessor's cache, for the program after this one.
    i_block = tl.program_id(0) % n_blocks
    i_tile = tl.program_id(0) // n_blocks
    i_b = (i_tile // n_tiles).to(tl.int64)
    i_tile = i_tile % n_tiles
    first = i_tile.to(tl.int64) * PIXELS if WIDE else i_tile * PIXELS
    p = first + tl.arange(0, PIXELS)
    m_p = p < N
    o = i_block * OUT + tl.arange(0, OUT)
    m_o = o < C
    p_x += i_b * x_b
    p_y += i_b * y_b
    o_x = pixel_offsets(p, W, x_h, x_w, FLAT)
    o_y = pixel_offsets(p, W, y_h, y_w, FLAT)
    total = tl.zeros((PIXELS, OUT), ACC) if LAST else tl.zeros((OUT, PIXELS), ACC)
    for k in range(0, C, IN):
        c = k + tl.arange(0, IN)
        m_c = c < C
        o_c = c.to(tl.int64) * x_c if WIDE else c * x_c
        if LAST:
            b_x = tl.load(p_x + o_x[:, None] + o_c[None, :], mask=m_p[:, None] & m_c[None, :], other=0.0)
            if p_minus is not None:
                b_x = b_x.to(ACC) - tl.load(p_minus + c, mask=m_c, other=0.0)[None, :]
            p_m = p_matrix + c[:, None] * m_in + o[None, :] * m_out
            b_m = tl.load(p_m, mask=m_c[:, None] & m_o[None, :], other=0.0, cache_modifier=".ca")
            total = add_product(total, b_x, b_m, X_TERMS, MATRIX_TERMS, DOT)
        else:
            b_x = tl.load(p_x + o_c[:, None] + o_x[None, :], mask=m_c[:, None] & m_p[None, :], other=0.0)
            if p_minus is not None:
                b_x = b_x.to(ACC) - tl.load(p_minus + c, mask=m_c, other=0.0)[:, None]
            p_m = p_matrix + o[:, None] * m_out + c[None, :] * m_in
            b_m = tl.load(p_m, mask=m_o[:, None] & m_c[None, :], other=0.0, cache_modifier=".ca")
            total = add_product(total, b_m, b_x, MATRIX_TERMS, X_TERMS, DOT)
    o_o = o.to(tl.int64) * y_c if WIDE else o * y_c
    if p_plus is not None:
        plus = tl.load(p_plus + o, mask=m_o, other=0.0)
        total += plus[None, :] if LAST else plus[:, None]
    if LAST:
        p_to = p_y + o_y[:, None] + o_o[None, :]
        tl.store(p_to, narrow(total, p_y.dtype.element_ty), mask=m_p[:, None] & m_o[None, :])
    else:
        p_to = p_y + o_o[:, None] + o_y[None, :]
        tl.store(p_to, narrow(total, p_y.dtype.element_ty), mask=m_o[:, None] & m_p[None, :])


@triton.jit(do_not_specialize=["n_all", "n_tiles"])
def product_kernel(
    p_grad, p_x, p_product, p_sum,
    N, W, C, n_all, n_tiles, n_parts, n_left, n_right,
    g_b, g_c, g_h, g_w, x_b, x_c, x_h, x_w,
    FLAT: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TERMS: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Part i of sum g x^T [C, C] and of sum g [C]: the tiles i, i + n_parts, i + 2 n_parts, ...
    i_right = tl.program_id(0) % n_right
    i_left = tl.program_id(0) // n_right % n_left
    i_part = tl.program_id(0) // n_right // n_left
    o, c = i_left * ROWS + tl.arange(0, ROWS), i_right * COLUMNS + tl.arange(0, COLUMNS)
    m_o, m_c = o < C, c < C
    o_o = o.to(tl.int64) * g_c if WIDE else o * g_c
    o_c = c.to(tl.int64) * x_c if WIDE else c * x_c
    total = tl.zeros((ROWS, COLUMNS), ACC)
    sums = tl.zeros((ROWS,), ACC)
    for i in range(i_part, n_all, n_parts):
        i_b = (i // n_tiles).to(tl.int64)
        i_tile = i % n_tiles
        first = i_tile.to(tl.int64) * PIXELS if WIDE else i_tile * PIXELS
        p = first + tl.arange(0, PIXELS)
        m_p = p < N
        o_g, o_x = pixel_offsets(p, W, g_h, g_w, FLAT), pixel_offsets(p, W, x_h, x_w, FLAT)
        p_g = p_grad + i_b * g_b + o_o[:, None] + o_g[None, :]
        b_g = tl.load(p_g, mask=m_o[:, None] & m_p[None, :], other=0.0)
        b_x = tl.load(p_x + i_b * x_b + o_x[:, None] + o_c[None, :], mask=m_p[:, None] & m_c[None, :], other=0.0)
        total = add_product(total, b_g, b_x, TERMS, TERMS, DOT)
        sums += tl.sum(b_g.to(ACC), 1)
    tl.store(p_product + (i_part * C + o)[:, None] * C + c[None, :], total, mask=m_o[:, None] & m_c[None, :])
    if i_right == 0:
        tl.store(p_sum + i_part * C + o, sums, mask=m_o)


def _collapsed(shape: tuple[int, ...], strides: tuple[Strides, ...]) -> tuple[tuple[int, int, int], bool, tuple[Strides, ...]]:
    """((samples, pixels, width), whether the pixels of a sample are equally spaced, strides of sample, channel, line, column).

    Vectors are the pixels of one sample, as are those of images where they are equally spaced over all samples.
    """
    batch, _, height, width = (*shape, 1, 1)[:4]
    four = tuple(sample_strides(s) for s in strides)
    if width == 1:
        height, width, four = 1, height, tuple((b, c, 0, h) for b, c, h, _ in four)
    flat = height == 1 or all(h == width * w for _, _, h, w in four)
    pixels = height * width
    if pixels == 1:
        return (1, batch, batch), True, tuple((0, c, 0, b) for b, c, _, _ in four)
    if flat and all(batch == 1 or b == pixels * w for b, _, _, w in four):
        return (1, batch * pixels, batch * pixels), True, four
    return (batch, pixels, width), flat, four


def _wide(channels: int, pixels: int, width: int, strides: tuple[Strides, ...]) -> bool:
    """Whether offsets inside a sample need 64 bits."""
    reach = [(channels - 1) * c + (pixels // width) * h + min(pixels, width) * w for _, c, h, w in strides]
    return max(pixels, *reach) + 2**16 >= 2**31


def _generation(device: torch.device) -> int:
    """That of NVIDIA's tensor cores; 0 for none. The interpreter does what Hopper's do."""
    return 9 if interpreting() else generation(device)


def _splits(channels: int, double: bool, generation: int) -> bool:
    """Whether tensor cores multiply: not float64, nor so few channels that the product is cheap beside the bytes."""
    return generation >= 8 and not double and channels >= 32


def _operand(dtype: torch.dtype = torch.bfloat16) -> Any:
    """The dtype in which tensor cores multiply such numbers or terms. The interpreter would multiply bfloat16's bits."""
    return tl.float32 if interpreting() else tl.float16 if dtype is torch.float16 else tl.bfloat16


@functools.lru_cache(maxsize=4096)
def _map_grid(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    strides: tuple[Strides, Strides],
    steps: tuple[int, int],
    shifted: bool,
    double: bool,
    generation: int,
) -> Grid:
    """Of x and y; ``steps`` lead to the matrix's next output and input, ``shifted`` says whether something is taken from x."""
    channels = shape[1]
    (samples, pixels, width), flat, strides = _collapsed(shape, strides)  # type: ignore[assignment]
    last = strides[1][1] == 1
    fits = triton.next_power_of_2(max(pixels, 16))
    if _splits(channels, double, generation):
        block, tile, inner = 64 if channels <= 64 else 128, min(fits, 64), 32
        of_matrix = 3 if dtype is torch.float32 else 2
        of_x = 1 if dtype is torch.bfloat16 and not shifted else of_matrix
        warps = 4 if last else block // 16
        stages = 1 if shifted or dtype is torch.float16 else 2  # registers are short
    else:
        block = min(triton.next_power_of_2(max(channels, 16)), 64 if double else 128)
        tile, inner = min(fits, 32 if double else 64 if block > 32 else 128), 16
        of_matrix = of_x = 0
        warps, stages = 8 if block * tile >= 8192 else 4, 3
    tiles, blocks, wide = triton.cdiv(pixels, tile), triton.cdiv(channels, block), _wide(channels, pixels, width, strides)
    terms = {"X_TERMS": of_x, "MATRIX_TERMS": of_matrix, "DOT": _operand()}
    sizes = {"PIXELS": tile, "OUT": block, "IN": inner, "num_stages": stages}
    keywords = constants(double, warps, FLAT=flat, LAST=last, WIDE=wide, **sizes, **terms)
    integers = (pixels, width, channels, tiles, blocks, *strides[0], *strides[1], *steps)
    return Grid(samples * tiles * blocks, tiles, integers, keywords)


@functools.lru_cache(maxsize=4096)
def _product_grid(shape: tuple[int, ...], dtype: torch.dtype, grad: Strides, x: Strides, double: bool, generation: int) -> Grid:
    channels = shape[1]
    (samples, pixels, width), flat, strides = _collapsed(shape, (grad, x))
    if _splits(channels, double, generation):
        terms = 3 if dtype is torch.float32 else 1
        # Where data does not move in whole pieces their addresses take the registers. Twice the columns halve the splitting.
        even = all(size == 1 or size % 16 == 0 for size in (channels, pixels, *strides[0], *strides[1]))
        rows, columns = 64, 128 if terms == 3 and channels > 64 and even and generation == 9 else 64
        tile, warps = 32 if even or terms == 1 else 16, 4 if even else 8
    else:
        terms, tile = 0, 16  # a thread holds whole rows and columns of this length: with more it spills
        rows = columns = min(triton.next_power_of_2(max(channels, 16)), 32 if double else 64)
        warps = 8 if rows > 16 else 4
    tiles, left, right = triton.cdiv(pixels, tile), triton.cdiv(channels, rows), triton.cdiv(channels, columns)
    # Several programs for every multiprocessor of a large GPU; the same number everywhere, so that the sums are the same.
    parts = min(samples * tiles, max(1024 // left**2, 1))
    sizes = {"PIXELS": tile, "ROWS": rows, "COLUMNS": columns, "TERMS": terms, "DOT": _operand(dtype), "num_stages": 2}
    keywords = constants(double, warps, FLAT=flat, WIDE=_wide(channels, pixels, width, strides), **sizes)
    integers = (pixels, width, channels, samples * tiles, tiles, parts, left, right, *strides[0], *strides[1])
    return Grid(parts * left * right, parts, integers, keywords)


def _map_launch(
    x: torch.Tensor,
    matrix: torch.Tensor,
    y: torch.Tensor,
    flipped: bool = False,
    minus: torch.Tensor | None = None,
    plus: torch.Tensor | None = None,
    generation: int | None = None,
) -> Launch:
    generation = _generation(x.device) if generation is None else generation
    steps = matrix.stride()[::-1] if flipped else matrix.stride()
    double = matrix.dtype is torch.float64
    how = _map_grid(x.shape, x.dtype, (x.stride(), y.stride()), steps, minus is not None, double, generation)
    return Launch(map_kernel, (x, matrix, minus, plus, y), how)


def _product_launch(grad: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, generation: int | None = None) -> Launch:
    generation = _generation(x.device) if generation is None else generation
    how = _product_grid(x.shape, x.dtype, grad.stride(), x.stride(), dtype is torch.float64, generation)
    channels = x.shape[1]
    partial = x.new_empty((how.tiles, channels, channels), dtype=dtype)
    return Launch(product_kernel, (grad, x, partial, x.new_empty((how.tiles, channels), dtype=dtype)), how)


def _factorized(weight: torch.Tensor, invert: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(log|det W|, W^-1 or None) of one factorization in float64."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(weight.double())
    logabsdet = lu.diagonal().abs().log().sum()
    if not invert:
        return logabsdet, None
    return logabsdet, torch.linalg.lu_solve(lu, pivots, torch.eye(len(weight), dtype=lu.dtype, device=lu.device))


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> None:
    """``flowkern::invertible_linear``: fills y, logabsdet, and W^-1 if asked for."""
    weight_inverse, known, inverse, invert, y, logabsdet, found = rest
    if invert or known is None:
        log_found, inverted = _factorized(weight, invert)
        known = log_found if known is None else known
        if inverted is not None:
            weight_inverse = found.copy_(inverted)
    pixels = x.shape[2:].numel()
    logabsdet.copy_((known.double() * (-pixels if inverse else pixels)).expand(logabsdet.shape))
    if x.numel() == 0:
        return
    matrix = weight_inverse if inverse else weight
    shift = None if bias is None else bias.to(logabsdet.dtype).contiguous()
    minus, plus = (shift, None) if inverse else (None, shift)
    _map_launch(x, matrix.to(logabsdet.dtype), y, minus=minus, plus=plus).run()


def backward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> None:
    """``flowkern::invertible_linear_backward``: fills dx, dweight, dbias and dlogabsdet, where they are needed."""
    weight_inverse, known, inverse, needs_x, needs_weight, grad, grad_logabsdet, dx, dweight, dbias, dknown = rest
    dtype = accumulation_dtype(x, weight, bias)
    pixels = -x.shape[2:].numel() if inverse else x.shape[2:].numel()
    log_gradient = 0.0 if grad_logabsdet is None else pixels * grad_logabsdet.sum(dtype=torch.float64)
    if known is not None:
        dknown.copy_(log_gradient) if isinstance(log_gradient, torch.Tensor) else dknown.zero_()
        log_gradient = 0.0
    if needs_x and x.numel():
        matrix = weight_inverse if inverse else weight
        _map_launch(grad, matrix.to(dtype), dx, flipped=True).run()
    if not needs_weight:
        return
    channels = x.shape[1]
    product = x.new_zeros((channels, channels), dtype=torch.float64)
    sums = x.new_zeros((channels,), dtype=torch.float64)
    if x.numel():
        launch = _product_launch(grad, x, dtype)
        launch.run()
        product, sums = (t.sum(0, dtype=torch.float64) for t in launch.tensors[2:])
    inverted: Any = None if weight_inverse is None else weight_inverse.double()
    if inverse:
        if bias is not None:
            product = torch.addr(product, sums, bias.double(), alpha=-1)
        product, sums = -(inverted.t() @ product @ inverted.t()), -(inverted.t() @ sums)
    if isinstance(log_gradient, torch.Tensor):
        product = product + log_gradient * inverted.t()
    dweight.copy_(product)
    if bias is not None:
        dbias.copy_(sums)


BY_TARGET = True
FACTORS = {"channels": (96, 12, 48, 192), "inverse": (False, True), "dtypes": tuple(DTYPES), "form": tuple(FORMS)}


COUNTED = (*({"channels": c, "dtypes": "float32"} for c in (48, 96, 128)), {"channels": 96, "dtypes": "bfloat16"})


def trips(name: str, launch: Launch) -> tuple[int, ...]:
    """How often the loop of a launch runs."""
    _, _, channels, tiles, _ = launch.grid.integers[:5]
    if name == "product":
        return (triton.cdiv(tiles, launch.grid.integers[5]),)
    return (triton.cdiv(channels, launch.grid.keywords["IN"]),)


def compile_cases(channels: int, inverse: bool, dtypes: str, form: str, target: str) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS."""
    first, *rest = FORMS[form]
    of_x, of_weight = DTYPES[dtypes]
    dtype = torch.float64 if torch.float64 in (of_x, of_weight) else torch.float32
    x = example((first, channels, *rest[1:]), of_x, form)
    y, generation = empty_as(x), int(target[3:]) // 10 if target.startswith("sm_") else 0
    matrix, shift = example((channels, channels), dtype, "vector"), example((channels,), dtype, "vector")
    minus, plus = (shift, None) if inverse else (None, shift)
    yield "map", _map_launch(x, matrix, y, minus=minus, plus=plus, generation=generation)
    yield "map-back", _map_launch(y, matrix, y, flipped=True, generation=generation)
    yield "product", _product_launch(y, x, dtype, generation)
