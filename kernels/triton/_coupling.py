"""What the kernels of all couplings share: how a launch walks over the elements, and where scale and shift lie.

A program owns a tile of ROWS samples times ELEMENTS elements. Elements are numbered in the order in which the output
lies in memory, (C, H, W) or (H, W, C), so that neighbours in a tile are neighbours in memory. Axes that all tensors let
collapse are collapsed: where samples are contiguous and the split is one of channels, a sample is a single axis, and
the kernel divides nothing and moves 16 bytes at a time.
"""

# mypy: allow-untyped-defs
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from flowkern._core.split import SPLITS, moved_channels

from .launch import Grid as Grid, Launch as Launch, Strides as Strides, constants as constants


@triton.jit
def samples(n_tiles, ROWS: tl.constexpr):
    # The samples of a program [ROWS].
    return (tl.program_id(0) // n_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def load_samples(p, stride, B, n_tiles, ROWS: tl.constexpr):
    # One value per sample [ROWS, 1]. Of one axis: in the layout of a tile each thread may load it once per element.
    i_b = samples(n_tiles, ROWS)
    return tl.load(p + i_b * stride, mask=i_b < B, other=0.0)[:, None]


@triton.jit
def tile(B, N, n_tiles, ROWS: tl.constexpr, ELEMENTS: tl.constexpr, WIDE: tl.constexpr):
    # Samples and their mask [ROWS, 1], elements and their mask [1, ELEMENTS], and the number of the tile.
    i_tile = tl.program_id(0) % n_tiles
    i_b = samples(n_tiles, ROWS)[:, None]
    first = i_tile.to(tl.int64) * ELEMENTS if WIDE else i_tile * ELEMENTS
    n = first + tl.arange(0, ELEMENTS)[None, :]
    return i_b, i_b < B, n, n < N, i_tile


@triton.jit
def keeps(i_tile, N, H, W, kept, SPLIT: tl.constexpr, ELEMENTS: tl.constexpr, WIDE: tl.constexpr):
    # Whether a split of channels transforms nothing in this tile, in memory order (C, H, W).
    first = i_tile.to(tl.int64) * ELEMENTS if WIDE else i_tile * ELEMENTS
    tl.static_assert(SPLIT == "channel" or SPLIT == "channel_swap")
    last = tl.minimum(first + ELEMENTS, N) - 1
    return last // W // H < kept if SPLIT == "channel" else first // W // H >= kept


@triton.jit
def locate(n, m_n, C, H, W, kept, p_place, SPLIT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    # Of element n: its coordinates (c, h, w), whether it is transformed, and its channel's place among those that are.
    if CHANNELS_LAST:
        pixel = n // C
        h = pixel // W
        c, w = n - pixel * C, pixel - h * W
    else:
        line = n // W
        c = line // H
        h, w = line - c * H, n - line * W
    if SPLIT == "channel":
        m_moved, place = c >= kept, c - kept
    elif SPLIT == "channel_swap":
        m_moved, place = c < kept, c
    elif SPLIT == "checkerboard":
        m_moved, place = ((h + w) & 1) == 1, c
    elif SPLIT == "checkerboard_swap":
        m_moved, place = ((h + w) & 1) == 0, c
    else:
        tl.static_assert(SPLIT == "mask")
        place = tl.load(p_place + c, mask=m_n, other=-1)
        m_moved = (place >= 0) & (place < C - kept)  # whatever the table holds, it is a place among the parameters
    return c, h, w, m_n & m_moved, place


@triton.jit
def load_pair(p, distance, mask, ADJACENT: tl.constexpr, SCALE_FIRST: tl.constexpr, ACC: tl.constexpr):
    # (raw scale, shift) [ROWS, ELEMENTS]; where the two are neighbours in memory, in one access.
    if ADJACENT:
        p_both = p[:, :, None] + tl.arange(0, 2)[None, None, :]
        first, second = tl.split(tl.load(p_both, mask=mask[:, :, None], other=0.0).to(ACC))
    else:
        first = tl.load(p, mask=mask, other=0.0).to(ACC)
        second = tl.load(p + distance, mask=mask, other=0.0).to(ACC)
    return (first, second) if SCALE_FIRST else (second, first)


@triton.jit
def store_pair(p, distance, scale, shift, mask, ADJACENT: tl.constexpr, SCALE_FIRST: tl.constexpr):
    first, second = (scale, shift) if SCALE_FIRST else (shift, scale)
    if ADJACENT:
        tl.store(p[:, :, None] + tl.arange(0, 2)[None, None, :], tl.join(first, second), mask=mask[:, :, None])
    else:
        tl.store(p, first, mask=mask)
        tl.store(p + distance, second, mask=mask)


def sample_strides(strides: Strides) -> Strides:
    """Strides of (sample, channel, line, column); a vector has one line of one column."""
    return strides if len(strides) == 4 else (*strides, 0, 0)


def param_strides(strides: Strides, layout: str, moved: int) -> Strides:
    """Strides of (sample, transformed channel, line, column), and the distance from one of (scale, shift) to the other."""
    batch, channel, *space = strides
    if layout.startswith("pair"):
        *space, distance = space
    elif layout.startswith("interleaved"):
        channel, distance = 2 * channel, channel
    else:
        distance = moved * channel
    return (batch, channel, *(space or (0, 0)), distance)


def _joined(outer: Sequence[int], inner: Sequence[int], counts: Sequence[int], size: int) -> list[int] | None:
    """Per tensor the stride of two axes as one, or None if one does not collapse; ``counts`` are the outer sizes."""
    strides = []
    for long, short, count in zip(outer, inner, counts, strict=True):
        if size > 1 and count > 1 and long != size * short:
            return None
        strides.append(long if size == 1 else short)
    return strides


def _spacing(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """The distance of neighbours if a tensor's elements, in the order of these axes, lie equally spaced; else 0."""
    first: int | None = None
    run = 0
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1:
            if first is not None and stride != run:
                return 0
            first = stride if first is None else first
            run = stride * size
    return 1 if first is None else first


def _tiling(samples: int, elements: int, per_thread: int) -> tuple[int, int, int]:
    """(rows, elements, warps) of a tile. A sample that fits is one tile, so that no second sum is needed."""
    warp = 32 * per_thread
    if elements > 16 * warp:
        return 1, 8 * warp, 8
    columns = triton.next_power_of_2(elements)
    # Few elements in all: smaller tiles, to have work for every multiprocessor.
    size = 4 * warp if samples * elements >= 2**17 else warp
    rows = min(max(size // columns, 1), triton.next_power_of_2(samples))
    return rows, columns, max(rows * columns // warp, 1)


def grid(
    shape: Strides, channels_last: bool, double: bool, split: int, moved: int, whole: Sequence[Strides], parts: Sequence[Strides]
) -> Grid:
    """The grid for x of this shape, ``moved`` transformed channels, and outputs in memory order (H, W, C) or (C, H, W).

    ``whole`` has the strides of the tensors of x's shape, ``parts`` those of the tensors that hold something for the
    transformed channels alone (with the distance from scale to shift, where there are both). ``double`` is for
    arithmetic in float64.
    """
    name = SPLITS[split] if split < len(SPLITS) else "mask"
    samples, channels, height, width = (*shape, 1, 1)[:4]
    elements, kept = channels * height * width, channels - (moved if name == "mask" else channels // 2)
    _, by_channel, by_line, by_column = (list(axis) for axis in zip(*(s[:4] for s in (*whole, *parts)), strict=True))

    pixels = _joined(by_line, by_column, [height] * len(by_line), width)
    if pixels and not name.startswith("checkerboard"):
        # Pixels become one axis: the one that leaves the other to be folded away in the kernel's index arithmetic.
        height, width = (height * width, 1) if channels_last else (1, height * width)
        by_line = by_column = pixels
        features = _joined(by_channel, pixels, [channels] * len(whole) + [moved] * len(parts), width)
        if features and name != "mask" and not channels_last:
            channels, kept, width = channels * width, kept * width, 1
            by_channel = features

    strides = list(zip(by_channel, by_line, by_column, strict=True))
    reach = [(channels - 1) * c + (height - 1) * h + (width - 1) * w for c, h, w in strides]
    order = (1, 2, 0) if channels_last else (0, 1, 2)
    sizes = [(channels, height, width)[i] for i in order]
    spacings = [_spacing(sizes, [s[i] for i in order]) for s in strides]
    linear = all(spacing == 1 for spacing in spacings[: len(whole)])
    if name.startswith("checkerboard"):
        linear = linear and all(spacings)
        strides = [(spacing, spacing, spacing) for spacing in spacings] if linear else strides
    # As much as 16-byte accesses need; elsewhere an address each, or two registers for each value, would crowd a thread.
    rows, columns, num_warps = _tiling(samples, elements, 2 if double else 8 if linear else 4)
    tiles = triton.cdiv(elements, columns)
    # Tiles that are kept whole are worth a branch; they occur where a sample has several.
    skip = tiles > 1 and name in ("channel", "channel_swap") and not channels_last
    wide = max(elements + columns, *reach) >= 2**31
    keywords = constants(
        double,
        num_warps,
        SPLIT=name,
        CHANNELS_LAST=channels_last,
        LINEAR=linear,
        SKIP=skip,
        WIDE=wide,
        ROWS=rows,
        ELEMENTS=columns,
    )
    flat = [x for s, steps in zip((*whole, *parts), strides, strict=True) for x in (s[0], *steps, *s[4:])]
    integers = (samples, elements, channels, height, width, kept, tiles, *flat)
    return Grid(triton.cdiv(samples, rows) * tiles, tiles, integers, keywords)


#: Shapes and memory formats of x to compile for; the first is the one that streams.
FORMS = {
    "image": (32, 96, 64, 64),
    "channels-last": (32, 96, 64, 64),
    "strided": (32, 96, 64, 64),
    "one-tile": (64, 12, 16, 16),
    "odd": (7, 5, 9, 11),
    "vector": (4096, 64),
}
#: Dtypes of x and of params to compile for.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32-bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16-float64": (torch.bfloat16, torch.float64),
    "float64": (torch.float64, torch.float64),
}


def example(shape: Sequence[int], dtype: torch.dtype, form: str) -> torch.Tensor:
    """A tensor without data that lies in memory as ``form`` says."""
    if form == "strided":
        return torch.empty((*shape, 3), dtype=dtype, device="meta")[..., 0]
    x = torch.empty(tuple(shape), dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if form == "channels-last" and x.ndim == 4 else x


def example_split(split: str, form: str) -> tuple[tuple[int, ...], int, torch.Tensor | None, int]:
    """(shape of x, code of the split, place, transformed channels). Checkerboards fall back to images for vectors."""
    shape = FORMS["odd" if split.startswith("checkerboard") and form == "vector" else form]
    if split == "mask":
        return shape, len(SPLITS), torch.empty(shape[1], dtype=torch.int32, device="meta"), shape[1] // 2
    return shape, SPLITS.index(split), None, moved_channels(split, shape[1])
