"""Invertible linear map of the channels: one kernel applies a matrix at every pixel, another sums g x^T over the pixels.

The formulas are at the top of flowkern/ops/_invertible_linear.py. The first kernel gives y in both directions and the
gradient of x; a program owns a tile of pixels of one sample and a block of output channels, and walks over the input
channels. The second owns a block of the product and every n-th tile of pixels; the partial products are added in a
fixed order. The factorization of W is torch's, on the device, without waiting for it.
"""

# mypy: allow-untyped-defs
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from flowkern._core.checks import accumulation_dtype, empty_as

from ._coupling import DTYPES, FORMS, Grid, Launch, Strides, constants, example, sample_strides
from .lang import narrow

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


@triton.jit(do_not_specialize=["n_tiles"])
def map_kernel(
    p_x, p_matrix, p_minus, p_plus, p_y,
    N, W, C, n_tiles, n_blocks,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w, m_out, m_in,
    FLAT: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    PIXELS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # y = matrix (x - minus) + plus. Tiles are [pixel, channel] if LAST, else [channel, pixel], as they lie in memory.
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
            b_x = tl.load(p_x + o_x[:, None] + o_c[None, :], mask=m_p[:, None] & m_c[None, :], other=0.0).to(ACC)
            if p_minus is not None:
                b_x -= tl.load(p_minus + c, mask=m_c, other=0.0)[None, :]
            b_m = tl.load(p_matrix + c[:, None] * m_in + o[None, :] * m_out, mask=m_c[:, None] & m_o[None, :], other=0.0)
            total = tl.dot(b_x, b_m, total, input_precision="ieee", out_dtype=ACC)
        else:
            b_x = tl.load(p_x + o_c[:, None] + o_x[None, :], mask=m_c[:, None] & m_p[None, :], other=0.0).to(ACC)
            if p_minus is not None:
                b_x -= tl.load(p_minus + c, mask=m_c, other=0.0)[:, None]
            b_m = tl.load(p_matrix + o[:, None] * m_out + c[None, :] * m_in, mask=m_o[:, None] & m_c[None, :], other=0.0)
            total = tl.dot(b_m, b_x, total, input_precision="ieee", out_dtype=ACC)
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
    N, W, C, n_all, n_tiles, n_parts, n_blocks,
    g_b, g_c, g_h, g_w, x_b, x_c, x_h, x_w,
    FLAT: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Part i of sum g x^T [C, C] and of sum g [C]: the tiles i, i + n_parts, i + 2 n_parts, ...
    i_right = tl.program_id(0) % n_blocks
    i_left = tl.program_id(0) // n_blocks % n_blocks
    i_part = tl.program_id(0) // n_blocks // n_blocks
    o, c = i_left * BLOCK + tl.arange(0, BLOCK), i_right * BLOCK + tl.arange(0, BLOCK)
    m_o, m_c = o < C, c < C
    o_o = o.to(tl.int64) * g_c if WIDE else o * g_c
    o_c = c.to(tl.int64) * x_c if WIDE else c * x_c
    total = tl.zeros((BLOCK, BLOCK), ACC)
    sums = tl.zeros((BLOCK,), ACC)
    for i in range(i_part, n_all, n_parts):
        i_b = (i // n_tiles).to(tl.int64)
        i_tile = i % n_tiles
        first = i_tile.to(tl.int64) * PIXELS if WIDE else i_tile * PIXELS
        p = first + tl.arange(0, PIXELS)
        m_p = p < N
        o_g, o_x = pixel_offsets(p, W, g_h, g_w, FLAT), pixel_offsets(p, W, x_h, x_w, FLAT)
        p_g = p_grad + i_b * g_b + o_o[:, None] + o_g[None, :]
        b_g = tl.load(p_g, mask=m_o[:, None] & m_p[None, :], other=0.0).to(ACC)
        b_x = tl.load(p_x + i_b * x_b + o_x[:, None] + o_c[None, :], mask=m_p[:, None] & m_c[None, :], other=0.0).to(ACC)
        total = tl.dot(b_g, b_x, total, input_precision="ieee", out_dtype=ACC)
        sums += tl.sum(b_g, 1)
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


@functools.lru_cache(maxsize=4096)
def _map_grid(shape: tuple[int, ...], x: Strides, y: Strides, matrix: Strides, flipped: bool, double: bool) -> Grid:
    channels = shape[1]
    (samples, pixels, width), flat, strides = _collapsed(shape, (x, y))
    block = min(triton.next_power_of_2(max(channels, 16)), 64 if double else 128)
    most = 32 if double else 64 if block > 32 else 128
    tile = min(triton.next_power_of_2(max(pixels, 16)), most)
    tiles, blocks = triton.cdiv(pixels, tile), triton.cdiv(channels, block)
    wide, warps = _wide(channels, pixels, width, strides), 8 if block * tile >= 8192 else 4
    keywords = constants(double, warps, FLAT=flat, LAST=y[1] == 1, WIDE=wide, PIXELS=tile, OUT=block, IN=16)
    steps = matrix[::-1] if flipped else matrix
    integers = (pixels, width, channels, tiles, blocks, *strides[0], *strides[1], *steps)
    return Grid(samples * tiles * blocks, tiles, integers, keywords)


@functools.lru_cache(maxsize=4096)
def _product_grid(shape: tuple[int, ...], grad: Strides, x: Strides, double: bool) -> Grid:
    channels = shape[1]
    (samples, pixels, width), flat, strides = _collapsed(shape, (grad, x))
    block = min(triton.next_power_of_2(max(channels, 16)), 32 if double else 64)
    tile = 16  # a thread holds whole rows and columns of this length: with more it spills
    tiles, blocks = triton.cdiv(pixels, tile), triton.cdiv(channels, block)
    # Several programs for every multiprocessor of a large GPU; the same number everywhere, so that the sums are the same.
    parts = min(samples * tiles, max(1024 // blocks**2, 1))
    wide, warps = _wide(channels, pixels, width, strides), 8 if block > 16 else 4
    keywords = constants(double, warps, FLAT=flat, WIDE=wide, PIXELS=tile, BLOCK=block, num_stages=2)
    integers = (pixels, width, channels, samples * tiles, tiles, parts, blocks, *strides[0], *strides[1])
    return Grid(parts * blocks**2, parts, integers, keywords)


def _map_launch(
    x: torch.Tensor,
    matrix: torch.Tensor,
    y: torch.Tensor,
    flipped: bool = False,
    minus: torch.Tensor | None = None,
    plus: torch.Tensor | None = None,
) -> Launch:
    how = _map_grid(x.shape, x.stride(), y.stride(), matrix.stride(), flipped, matrix.dtype is torch.float64)
    return Launch(map_kernel, (x, matrix, minus, plus, y), how)


def _product_launch(grad: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> Launch:
    how = _product_grid(x.shape, grad.stride(), x.stride(), dtype is torch.float64)
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


FACTORS = {"channels": (96, 12, 48, 192), "inverse": (False, True), "dtypes": tuple(DTYPES), "form": tuple(FORMS)}


COUNTED = (*({"channels": c, "dtypes": "float32"} for c in (48, 96, 128)), {"channels": 96, "dtypes": "bfloat16"})


def trips(name: str, launch: Launch) -> tuple[int, ...]:
    """How often the loop of a launch runs."""
    _, _, channels, tiles, _ = launch.grid.integers[:5]
    if name == "product":
        return (triton.cdiv(tiles, launch.grid.integers[5]),)
    return (triton.cdiv(channels, launch.grid.keywords["IN"]),)


def compile_cases(channels: int, inverse: bool, dtypes: str, form: str) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS."""
    first, *rest = FORMS[form]
    of_x, of_weight = DTYPES[dtypes]
    dtype = torch.float64 if torch.float64 in (of_x, of_weight) else torch.float32
    x = example((first, channels, *rest[1:]), of_x, form)
    y = empty_as(x)
    matrix, shift = example((channels, channels), dtype, "vector"), example((channels,), dtype, "vector")
    yield "map", _map_launch(x, matrix, y, minus=shift if inverse else None, plus=None if inverse else shift)
    yield "map-back", _map_launch(y, matrix, y, flipped=True)
    yield "product", _product_launch(y, x, dtype)
