"""The nearest code: a screen on the tensor cores with a rigorous bound, then the definition for the codes it leaves.

The definition is at the top of flowkern/ops/_nearest_code.py. Three kernels:

- ``prepare`` rounds the rows, and the codes, to 16 bits, and writes down their norms and those of what was lost. Where that
  is not exact anyway, both are moved first, by a centre of the codes: it changes no distance, but makes the norms small.
- ``screen`` computes scores x.c - |c|^2/2, which are greatest for the nearest code. A program owns a block of rows and walks
  over the tiles of codes. A quarter of a tile is a group, whose codes ``prepare`` lays into those columns of the product that
  one thread of the accumulator's layout has of a row: they are compared without talk among threads. A group is a row of
  quads, four codes each. Of each group the screen takes the quad with the greatest score, and whether another one of the
  group may hold the nearest code too. Per row and group number it keeps the best SLOTS of these, and the best score of all
  that were dropped.
- ``decide`` owns one row. What may be the nearest, by the bound, is looked at by the definition, in float64: the quad of an
  entry of the list, the entry's group where another quad of it may hold the nearest, all codes where one that was dropped may.

In terms of |x|, |c|, of what rounding took from them, dx = x - x~ and dc = c - c~, and of the largest norms in a tile:

    |error of a score| <= |dx| |c| + |x~| |dc| + n (|x~| |c~| + |c|^2) + 2^-46 |x|^2 + underflow

n covers the sums of the tensor cores, which begin with -|c|^2/2, so that no partial sum exceeds |x~| |c~| + |c|^2/2: they
may truncate each term to 2^-23 of that, and n has 2^-21 for each; and the bits of a score that hold the number of a quad,
at most 15 units of its last place, for which n has 2^-18. The term before the last is the rounding of the definition itself.
"""

# mypy: allow-untyped-defs
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flowkern._core.backend import interpreting
from flowkern._core.op import KERNELS

from ._coupling import DTYPES, Grid, Launch, example
from .lang import narrow

__all__ = ["forward"]

#: Its launches are products of matrices: their operands pass through shared memory.
STREAMING = False
#: They depend on the target.
BY_TARGET = True
#: The launches that compute in float64 whatever the inputs: the definition does.
FLOAT64 = ("prepare", "decide")

#: The best so many of each group are kept; ``screen_kernel`` has them one by one.
SLOTS = 4
#: Groups in a tile: four threads share a row of the accumulator.
_GROUPS = 4
#: Programs that a screen is split into where the rows are few.
_PROGRAMS, _MOST_SPLITS = 256, 32
#: (rows, codes, warps, stages) by the major compute capability: where the tensor cores take their operands from shared memory
#: (9, 10) a tile may be large; elsewhere (0) its operands and what is kept of it compete for registers.
_TILINGS = {0: (64, 64, 4, 3), 9: (128, 128, 8, 4), 10: (128, 64, 4, 4)}
#: Entries of a product's chunk, and on 9 those of rows that stay in shared memory: the codes alone are loaded for a tile then.
_CHUNK, _RESIDENT = 64, 256
#: Entries, in float64, that one warp holds of what the definition is computed for.
_PER_WARP = 512


@triton.jit
def halving_sum(s, ROWS: tl.constexpr, SIZE: tl.constexpr, HALVINGS: tl.constexpr):
    # The sum over the second of two dimensions, in the definition's order: each of these sums adds two numbers. Zeros beyond
    # the definition's power of two change nothing.
    for i in tl.static_range(HALVINGS):
        s = tl.sum(tl.reshape(s, (ROWS, 2, SIZE >> (i + 1))), 1)
    return tl.reshape(s, (ROWS,))


@triton.jit
def load(p, i, m, D, s_i, s_d, SIZE: tl.constexpr):
    # Rows i as float64 [ROWS, SIZE], with zeros beyond D.
    d = tl.arange(0, SIZE)
    p_x = p + i.to(tl.int64)[:, None] * s_i + d.to(tl.int64)[None, :] * s_d
    return tl.load(p_x, mask=m[:, None] & (d < D)[None, :], other=0.0).to(tl.float64)


@triton.jit
def operand(x, ROWS: tl.constexpr, SIZE: tl.constexpr, HALVINGS: tl.constexpr, COSINE: tl.constexpr):
    if COSINE:
        norm = tl.sqrt(halving_sum(x * x, ROWS, SIZE, HALVINGS))
        x = x / tl.where(norm == 0.0, 1.0, norm)[:, None]
    return x


@triton.jit
def screened_column(k, CODES: tl.constexpr):
    # Where code k lies for the screen: the codes of a group follow each other, but its columns are pairs, 8 columns apart.
    place, group = k % (CODES // 4), k % CODES // (CODES // 4)
    return k // CODES * CODES + place // 2 * 8 + group * 2 + place % 2


@triton.jit(do_not_specialize=["N"])
def prepare_kernel(
    p_x, p_centre, p_low, p_norm, p_lost, p_shift, N, D, x_n, x_d,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
    SIZE: tl.constexpr, HALVINGS: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o = i
    x = operand(load(p_x, i, i < N, D, x_n, x_d, SIZE), ROWS, SIZE, HALVINGS, COSINE)
    d = tl.arange(0, SIZE)
    if p_centre is not None:
        x -= tl.load(p_centre + d, mask=d < D, other=0.0).to(tl.float64)[None, :]
    if p_shift is not None:
        o = screened_column(i, CODES)
        # A code that is not finite, or not there, is zero, with a score below all others.
        m_code = (tl.sum(x * x, 1) < float("inf")) & (i < N)
        x = tl.where(m_code[:, None], x, 0.0)
        tl.store(p_shift + o, tl.where(m_code, tl.sum(x * x, 1) * -0.5, -3e38).to(tl.float32))
    low = narrow(x, p_low.dtype.element_ty)
    lost = x - low.to(tl.float32).to(tl.float64)
    tl.store(p_low + o[:, None] * WIDTH + d[None, :], low, mask=(d < WIDTH)[None, :])
    # Rounded upwards.
    tl.store(p_norm + o, (tl.sqrt(tl.sum(x * x, 1)) * (1.0 + 1e-6)).to(tl.float32))
    tl.store(p_lost + o, (tl.sqrt(tl.sum(lost * lost, 1)) * (1.0 + 1e-6)).to(tl.float32))


@triton.jit
def two_greatest(first, second, other_first, other_second):
    return tl.maximum(first, other_first), tl.maximum(tl.minimum(first, other_first), tl.maximum(second, other_second))


@triton.jit
def best_two(scores, ROWS: tl.constexpr, CODES: tl.constexpr):
    # Of each group the two quads with the greatest scores: these [ROWS, 4], with the quad's place in the group in the last bits.
    QUADS: tl.constexpr = CODES // 16
    scores = tl.max(tl.max(tl.reshape(scores, (ROWS, QUADS, 2, 4, 2)), 4), 2)
    bits = scores.to(tl.int32, bitcast=True) & -QUADS | tl.arange(0, QUADS)[None, :, None]
    pairs = tl.permute(tl.reshape(bits.to(tl.float32, bitcast=True), (ROWS, QUADS // 2, 2, 4)), (0, 1, 3, 2))
    one, other = tl.split(pairs)
    return tl.reduce((tl.maximum(one, other), tl.minimum(one, other)), 1, two_greatest)


@triton.jit
def bound(norm, lost, tile_norm, tile_lost, WIDTH: tl.constexpr):
    # The error of a score, [ROWS, 1], and whether nothing on the way can have overflowed. NaN compares as if it had.
    RELATIVE: tl.constexpr = (WIDTH + 64) * 2.0**-21 + 2.0**-18
    low = norm + lost
    size = low * (tile_norm + tile_lost) + tile_norm * tile_norm
    error = lost * tile_norm + low * tile_lost + RELATIVE * size + 1.4210854715202004e-14 * (norm * norm)
    error = 1.001 * (error + 7.703719777548943e-34 * (1.0 + norm + tile_norm))
    return error[:, None], ((size < 1e37) & (norm < 1e18))[:, None]


@triton.jit
def exchange(upper, code, kept_upper, kept_code):
    # (what stays, what goes on to the next slot)
    m = upper > kept_upper
    stays, goes = tl.maximum(upper, kept_upper), tl.minimum(upper, kept_upper)
    return stays, tl.where(m, code, kept_code), goes, tl.where(m, kept_code, code)


@triton.jit
def store_slot(p_upper, p_code, o, upper, code):
    tl.store(p_upper + o, upper)
    tl.store(p_code + o, code)


@triton.jit
def beginning(p_shift, tile, ROWS: tl.constexpr, CODES: tl.constexpr):
    # What the scores of a tile begin with: -|c|^2/2, which costs no instruction a score then.
    return tl.broadcast_to(tl.load(p_shift + tile * CODES + tl.arange(0, CODES))[None, :], (ROWS, CODES))


@triton.jit(do_not_specialize=["n_tiles", "n_splits", "n_walk"])
def screen_kernel(
    p_x, p_codes, p_norm, p_lost, p_shift, p_tile_norm, p_tile_lost, p_upper, p_code, p_lower, p_dropped,
    n_tiles, n_splits, n_walk,
    WIDTH: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = WIDTH // INNER
    i_split = tl.program_id(0) % n_splits
    i = (tl.program_id(0) // n_splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_tile = i_split * n_walk
    walk = tl.minimum(n_walk, n_tiles - first_tile)
    norm, lost = tl.load(p_norm + i), tl.load(p_lost + i)
    k, d, group = tl.arange(0, CODES), tl.arange(0, INNER), tl.arange(0, 4)[None, :]
    p_rows = p_x + i[:, None] * WIDTH + d[None, :]
    nothing = tl.full((ROWS, 4), -float("inf"), tl.float32)
    no_code = tl.full((ROWS, 4), -1, tl.int32)
    lower, dropped = nothing, nothing
    u0, u1, u2, u3 = nothing, nothing, nothing, nothing
    k0, k1, k2, k3 = no_code, no_code, no_code, no_code
    if CHUNKS == 1:
        b_x = tl.load(p_rows)
        if UPCAST:
            b_x = b_x.to(tl.float32)
    total = beginning(p_shift, tl.minimum(first_tile, n_tiles - 1), ROWS, CODES)
    # One loop over the tiles and the chunks of their products, so that loads run ahead from one tile to the next.
    for step in range(walk * CHUNKS):
        tile, chunk = first_tile + step // CHUNKS, step % CHUNKS
        b_c = tl.load(p_codes + (tile.to(tl.int64) * CODES + k)[None, :] * WIDTH + (chunk * INNER + d)[:, None])
        if UPCAST:
            b_c = b_c.to(tl.float32)
        if CHUNKS > 1:
            b_x = tl.load(p_rows + chunk * INNER)
            if UPCAST:
                b_x = b_x.to(tl.float32)
        total = tl.dot(b_x, b_c, total, input_precision="ieee", out_dtype=tl.float32)
        if chunk == CHUNKS - 1:
            best, second = best_two(total, ROWS, CODES)
            total = beginning(p_shift, tl.minimum(tile + 1, n_tiles - 1), ROWS, CODES)
            quad = best.to(tl.int32, bitcast=True) & (CODES // 16 - 1)
            error, bounded = bound(norm, lost, tl.load(p_tile_norm + tile), tl.load(p_tile_lost + tile), WIDTH)
            lower = tl.maximum(lower, tl.where(bounded, best - error, -float("inf")))
            upper = tl.where(bounded, best + error, float("inf"))
            whole = ((second + error >= lower) | (bounded == 0)).to(tl.int32)
            code = (tile * CODES + group * (CODES // 4)) + quad * 4 | whole
            u0, k0, upper, code = exchange(upper, code, u0, k0)
            u1, k1, upper, code = exchange(upper, code, u1, k1)
            u2, k2, upper, code = exchange(upper, code, u2, k2)
            u3, k3, upper, code = exchange(upper, code, u3, k3)
            dropped = tl.maximum(dropped, upper)
    n_groups = n_splits * 4
    o_group = i_split * 4 + group
    o_row = i[:, None] * n_groups
    tl.store(p_lower + o_row + o_group, lower)
    tl.store(p_dropped + o_row + o_group, dropped)
    o = o_row * 4 + o_group
    store_slot(p_upper, p_code, o, u0, k0)
    store_slot(p_upper, p_code, o + n_groups, u1, k1)
    store_slot(p_upper, p_code, o + 2 * n_groups, u2, k2)
    store_slot(p_upper, p_code, o + 3 * n_groups, u3, k3)


@triton.jit
def decide_kernel(
    p_x, p_codebook, p_upper, p_code, p_lower, p_dropped, p_index, p_sqdist, p_looked,
    D, K, x_n, x_d, c_k, c_d,
    ENTRIES: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, VISIT: tl.constexpr,
    SIZE: tl.constexpr, HALVINGS: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    x = load(p_x, i + tl.arange(0, 1), tl.arange(0, 1) < 1, D, x_n, x_d, SIZE)
    n_nan, n_special = tl.sum(tl.where(x != x, 1, 0)), tl.sum(tl.where(x - x == 0.0, 0, 1))
    x = operand(x, 1, SIZE, HALVINGS, COSINE)

    # The codes from start to end, for each entry.
    e = tl.arange(0, ENTRIES)
    if p_upper is None:
        m, start, end = e == 0, e * 0, e * 0 + K
        looked = K > 1
    else:
        o_group = i * GROUPS + tl.arange(0, GROUPS)
        lower, dropped = tl.max(tl.load(p_lower + o_group), 0), tl.max(tl.load(p_dropped + o_group), 0)
        code = tl.load(p_code + i * ENTRIES + e)  # the quad's first, which four divide, plus whether all of its group is meant
        m = (tl.load(p_upper + i * ENTRIES + e) >= lower) & (code >= 0)
        whole = m & ((code & 1) == 1)
        everything = dropped >= lower
        looked = (everything | (tl.sum(tl.where(m, 1, 0)) > 1)) | (tl.sum(tl.where(whole, 1, 0)) > 0)
        start = tl.where(everything, 0, code & tl.where(whole, -GROUP, -4))
        end = tl.where(everything, K, tl.minimum(start + tl.where(whole, GROUP, 4), K))
        m = tl.where(everything, e == 0, m)
    m = m & (n_special == 0)

    # From low codes to high ones, each once: of equals the first stays.
    best, index = tl.full((), float("inf"), tl.float64), tl.full((), 0, tl.int32)
    first = tl.min(tl.where(m, start, K), 0)
    while first < K:
        last = tl.max(tl.where(m & (start == first), end, 0), 0)
        for block in range(first, last, VISIT):
            k = block + tl.arange(0, VISIT)
            c = operand(load(p_codebook, k, k < last, D, c_k, c_d, SIZE), VISIT, SIZE, HALVINGS, COSINE)
            distance = halving_sum((x - c) * (x - c), VISIT, SIZE, HALVINGS)
            distance = tl.where((distance == distance) & (k < last), distance, float("inf"))
            least = tl.min(distance, 0)
            index = tl.where(least < best, tl.min(tl.where(distance == least, k, K), 0), index)
            best = tl.where(least < best, least, best)
        first = tl.min(tl.where(m & (start >= last), start, K), 0)

    best = tl.where(n_special > 0, tl.where(n_nan > 0, float("nan"), float("inf")), best)
    tl.store(p_index + i, index.to(tl.int64))
    tl.store(p_sqdist + i, narrow(best, p_sqdist.dtype.element_ty))
    tl.store(p_looked + i, (looked & (n_special == 0)).to(tl.int32))


class _Sizes(NamedTuple):
    """How the rows and the codes are cut up."""

    rows: int
    codes: int
    depth: int
    block: int  # rows of a program
    tile: int  # codes
    inner: int  # entries of a chunk of a product
    splits: int
    warps: int
    stages: int
    size: int  # entries of the definition: a power of two
    width: int  # entries of the screen: whole chunks
    blocks: int
    tiles: int

    @classmethod
    def of(cls, x: torch.Tensor, codebook: torch.Tensor, generation: int) -> "_Sizes":
        rows, depth, codes = *x.shape, len(codebook)
        block, tile, warps, stages = _TILINGS.get(generation, _TILINGS[0])
        block, warps = (block, warps) if rows > 64 else (64, 4)
        size = max(triton.next_power_of_2(depth), 16)
        inner = min(size, _CHUNK)
        if generation == 9 and inner < size <= _RESIDENT and size - depth < _CHUNK:
            # Two tiles fit beside 256 entries of the rows; with fewer, two programs share a multiprocessor and take turns.
            inner, stages = size, 2
        blocks, tiles = triton.cdiv(rows, block), triton.cdiv(codes, tile)
        # A power of two: the entries of a row are one block of ``decide``.
        splits = min(triton.next_power_of_2(triton.cdiv(_PROGRAMS, blocks)), _MOST_SPLITS, triton.next_power_of_2(tiles))
        width = triton.cdiv(max(depth, 1), inner) * inner
        return cls(rows, codes, depth, block, tile, inner, splits, warps, stages, size, width, blocks, tiles)

    def exact(self, cosine: bool) -> dict[str, Any]:
        """What the kernels that follow the definition share."""
        # The products of the definition are not fused with its sums.
        options = {"num_warps": min(max(self.size // _PER_WARP, 1), 16), "enable_fp_fusion": False}
        return {"SIZE": self.size, "HALVINGS": self.size.bit_length() - 1, "COSINE": cosine, **options}


class _Low(NamedTuple):
    """Rows in 16 bits, padded to whole blocks, with what the bound needs of them."""

    low: torch.Tensor
    norm: torch.Tensor
    lost: torch.Tensor
    shift: torch.Tensor | None

    @classmethod
    def empty(cls, like: torch.Tensor, rows: int, width: int, dtype: torch.dtype, codes: bool) -> "_Low":
        vectors = like.new_empty((3, rows), dtype=torch.float32)
        return cls(like.new_empty((rows, width), dtype=dtype), vectors[0], vectors[1], vectors[2] if codes else None)


class _Entries(NamedTuple):
    """What the screen leaves of each row."""

    upper: torch.Tensor
    code: torch.Tensor
    lower: torch.Tensor
    dropped: torch.Tensor

    @classmethod
    def empty(cls, like: torch.Tensor, sizes: _Sizes) -> "_Entries":
        groups = (sizes.blocks * sizes.block, sizes.splits * _GROUPS)
        entries = (groups[0], SLOTS * groups[1])
        shapes = (entries, entries, groups, groups)
        kinds = (torch.float32, torch.int32, torch.float32, torch.float32)
        return cls(*(like.new_empty(shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=True)))


def _low_dtype(x: torch.Tensor, codebook: torch.Tensor) -> torch.dtype:
    """float16 loses nothing of float16, and overflows for all else."""
    return torch.float16 if x.dtype is codebook.dtype is torch.float16 else torch.bfloat16


def _centre(x: torch.Tensor, codebook: torch.Tensor, cosine: bool) -> torch.Tensor | None:
    """Where the codes lie: the middle value of some, entry by entry, which outliers do not move. Any finite one is right."""
    if cosine or (x.dtype is codebook.dtype and x.dtype is not torch.float32):
        return None
    some = codebook[:: triton.cdiv(len(codebook), 64)].to(torch.float32)
    return some.sort(0).values[(len(some) - 1) // 2].nan_to_num(0.0, 0.0, 0.0)


def _prepare_launch(x: torch.Tensor, centre: torch.Tensor | None, to: _Low, sizes: _Sizes, cosine: bool) -> Launch:
    rows = min(max(_PER_WARP // sizes.size, 1), 64)  # what is padded to is a multiple of it
    keywords = {"WIDTH": sizes.width, "ROWS": rows, "CODES": sizes.tile, **sizes.exact(cosine)}
    padded = len(to.low)
    return Launch(prepare_kernel, (x, centre, *to), Grid(triton.cdiv(padded, rows), 1, (*x.shape, *x.stride()), keywords))


def _screen_launch(x: _Low, codes: _Low, tile_norm: torch.Tensor, tile_lost: torch.Tensor, to: _Entries, sizes: _Sizes) -> Launch:
    walk = triton.cdiv(sizes.tiles, sizes.splits)
    # The interpreter would multiply the bits of bfloat16.
    constants = {"WIDTH": sizes.width, "INNER": sizes.inner, "ROWS": sizes.block, "CODES": sizes.tile, "UPCAST": interpreting()}
    keywords = {**constants, "num_warps": sizes.warps, "num_stages": sizes.stages, "enable_fp_fusion": True}
    tensors = (x.low, codes.low, x.norm, x.lost, codes.shift, tile_norm, tile_lost, *to)
    grid = Grid(sizes.blocks * sizes.splits, sizes.tiles, (sizes.tiles, sizes.splits, walk), keywords)
    return Launch(screen_kernel, tensors, grid)


def _decide_launch(
    x: torch.Tensor,
    codebook: torch.Tensor,
    entries: _Entries | None,
    outputs: Sequence[torch.Tensor],
    sizes: _Sizes,
    cosine: bool,
) -> Launch:
    groups, visit = _GROUPS * sizes.splits, max(_PER_WARP // sizes.size, 1)
    # At least a quad, where it fits into the registers; for the cosine each code takes more of them.
    visit = visit if cosine else max(visit, min(4, 2 * _PER_WARP // sizes.size))
    count = 1 if entries is None else SLOTS * groups
    keywords = {"ENTRIES": count, "GROUPS": groups, "GROUP": sizes.tile // 4, "VISIT": visit, **sizes.exact(cosine)}
    integers = (sizes.depth, sizes.codes, *x.stride(), *codebook.stride())
    tensors = (x, codebook, *(entries or (None,) * 4), *outputs)
    return Launch(decide_kernel, tensors, Grid(sizes.rows, 1, integers, keywords))


def _screened(x: torch.Tensor, codebook: torch.Tensor, sizes: _Sizes, cosine: bool) -> _Entries:
    dtype = _low_dtype(x, codebook)
    rows = _Low.empty(x, sizes.blocks * sizes.block, sizes.width, dtype, codes=False)
    codes = _Low.empty(x, sizes.tiles * sizes.tile, sizes.width, dtype, codes=True)
    centre = _centre(x, codebook, cosine)
    _prepare_launch(x, centre, rows, sizes, cosine).run()
    _prepare_launch(codebook, centre, codes, sizes, cosine).run()
    tile_norm, tile_lost = (t.view(-1, sizes.tile).amax(1) for t in (codes.norm, codes.lost))
    entries = _Entries.empty(x, sizes)
    _screen_launch(rows, codes, tile_norm, tile_lost, entries, sizes).run()
    return entries


def _generation(device: torch.device) -> int:
    """The major compute capability of an NVIDIA GPU, else 0."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and not torch.version.hip else 0


def forward(
    x: torch.Tensor, codebook: torch.Tensor, cosine: bool, index: torch.Tensor, sqdist: torch.Tensor, count: torch.Tensor
) -> None:
    """``flowkern::nearest_code``: fills index, sqdist, and how many rows were looked at again."""
    if not len(x):
        count.zero_()
        return
    sizes = _Sizes.of(x, codebook, _generation(x.device))
    entries = None if sqdist.dtype is torch.float64 else _screened(x, codebook, sizes, cosine)
    looked = x.new_empty((len(x),), dtype=torch.int32)
    _decide_launch(x, codebook, entries, (index, sqdist, looked), sizes, cosine).run()
    torch.sum(looked, 0, out=count)


FACTORS: dict[str, Any] = {
    "sizes": ((16384, 256, 8192), (64, 1024, 65536), (1000, 1, 37)),
    "cosine": (False, True),
    "dtypes": ("float32", "float16", "bfloat16-float64"),
}


COUNTED = tuple({"sizes": (16384, depth, 8192), "dtypes": "float32"} for depth in (256, 128, 64))


def trips(name: str, launch: Launch) -> tuple[Any, ...]:
    """How often the loops of a launch run, where one code of a row is looked at."""
    if name == "screen":
        chunks = launch.grid.keywords["WIDTH"] // launch.grid.keywords["INNER"]
        return ((launch.grid.integers[2] * chunks, 1 / chunks),)
    return {"prepare": (), "decide": (1, 1)}[name]


def compile_cases(sizes: tuple[int, int, int], cosine: bool, dtypes: str, target: str) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS. The rows are prepared by less than what prepares the codes."""
    rows, depth, codes = sizes
    of_x, of_codes = DTYPES[dtypes]
    x, codebook = example((rows, depth), of_x, "vector"), example((codes, depth), of_codes, "vector")
    how = _Sizes.of(x, codebook, int(target[3:]) // 10 if target.startswith("sm_") else 0)
    index, sqdist, _ = KERNELS["nearest_code"].outputs(x, codebook, cosine)
    entries = None
    if sqdist.dtype is not torch.float64:
        dtype, entries = _low_dtype(x, codebook), _Entries.empty(x, how)
        low = _Low.empty(x, how.blocks * how.block, how.width, dtype, codes=False)
        low_codes = _Low.empty(x, how.tiles * how.tile, how.width, dtype, codes=True)
        by_tile = x.new_empty((how.tiles,), dtype=torch.float32)
        yield "prepare", _prepare_launch(codebook, _centre(x, codebook, cosine), low_codes, how, cosine)
        yield "screen", _screen_launch(low, low_codes, by_tile, by_tile, entries, how)
    looked = x.new_empty((rows,), dtype=torch.int32)
    yield "decide", _decide_launch(x, codebook, entries, (index, sqdist, looked), how, cosine)
