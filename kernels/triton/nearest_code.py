"""The nearest code: a screen on the tensor cores with a rigorous bound, then the definition for the codes it leaves.

The definition is at the top of flowkern/ops/_nearest_code.py. Four kernels:

- ``begin`` finds a centre of the codes, and clears what is added to. Any finite centre is right; it takes, entry by entry, the
  middle value of some codes, which outliers do not move.
- ``prepare`` rounds rows and codes to 16 bits, and writes down their norms and those of what was lost, of a tile of codes the
  largest. Where that is not exact anyway, both are moved first, by the centre: it changes no distance, but makes the norms small.
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

Nothing is kept from one call to the next. A version counter would not tell that codes have changed: it does not count what is
written through ``.data``, by a collective, by another library's kernel, or when a CUDA graph that holds a training step is
replayed, and codes that are looked up in an old copy would be wrong codes without an error.
"""

# mypy: allow-untyped-defs
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flowkern._core.backend import interpreting
from flowkern._core.op import KERNELS

from ._coupling import DTYPES, example
from .lang import narrow
from .launch import Grid, Launch, Strides, generation

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
#: Codes whose middle is their centre; columns of the program that finds it.
_SAMPLES, _COLUMNS = 16, 16
#: Programs that a screen is split into where the rows are few.
_PROGRAMS, _MOST_SPLITS = 256, 128
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


@triton.jit(do_not_specialize=["K", "n_tiles"])
def begin_kernel(
    p_codebook, p_norms, p_count, D, K, n_all, n_tiles, c_k, c_d,
    CENTRED: tl.constexpr, COLUMNS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    p_tiles = p_norms + 3 * n_all
    tl.store(p_tiles + o, 0.0, mask=o < 2 * n_tiles)
    tl.store(p_count + o, 0, mask=o < 1)
    if CENTRED:
        i, step = tl.arange(0, SAMPLES), (K + SAMPLES - 1) // SAMPLES
        m = (i * step < K)[None, :]
        p_c = p_codebook + (i * step).to(tl.int64)[None, :] * c_k + o.to(tl.int64)[:, None] * c_d
        c = tl.load(p_c, mask=m & (o < D)[:, None], other=0.0).to(tl.float32)
        c = tl.where(tl.abs(c) < float("inf"), c, 0.0)  # [COLUMNS, SAMPLES]
        one, other = c[:, :, None], c[:, None, :]
        m_before = ((other < one) | ((other == one) & (i[None, None, :] < i[None, :, None]))) & m[:, None, :]
        middle = m & (tl.sum(m_before.to(tl.int32), 2) == (tl.sum(m.to(tl.int32), 1) - 1)[:, None] // 2)
        tl.store(p_tiles + 2 * n_tiles + o, tl.sum(tl.where(middle, c, 0.0), 1), mask=o < D)


@triton.jit
def moved(x, p_centre, d, D, CENTRED: tl.constexpr):
    if CENTRED:
        x -= tl.load(p_centre + d, mask=d < D, other=0.0).to(tl.float64)[None, :]
    return x


@triton.jit
def store_low(x, o, d, p_low, p_norms, n_all, WIDTH: tl.constexpr):
    # x in 16 bits as rows o, and (its norms, those of what is lost), rounded upwards.
    low = narrow(x, p_low.dtype.element_ty)
    lost = x - low.to(tl.float32).to(tl.float64)
    norm, lost = tl.sqrt(tl.sum(x * x, 1)) * (1.0 + 1e-6), tl.sqrt(tl.sum(lost * lost, 1)) * (1.0 + 1e-6)
    norm, lost = norm.to(tl.float32), lost.to(tl.float32)
    tl.store(p_low + o[:, None] * WIDTH + d[None, :], low, mask=(d < WIDTH)[None, :])
    tl.store(p_norms + o, norm)
    tl.store(p_norms + n_all + o, lost)
    return norm, lost


@triton.jit
def largest(p, values):
    # The greatest of these and of what p holds, as integers: both are zero or more. In any order it is the same.
    tl.atomic_max(p.to(tl.pointer_type(tl.int32), bitcast=True), tl.max(values, 0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit(do_not_specialize=["N", "K", "n_tiles"])
def prepare_kernel(
    p_x, p_codebook, p_low, p_norms, D, N, K, n_rows, n_all, n_tiles, x_n, x_d, c_k, c_d,
    CENTRED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
    SIZE: tl.constexpr, HALVINGS: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    first, d = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, SIZE)
    p_tiles = p_norms + 3 * n_all
    p_centre = p_tiles + 2 * n_tiles
    if first < n_rows:
        i = first + tl.arange(0, ROWS)
        x = operand(load(p_x, i, i < N, D, x_n, x_d, SIZE), ROWS, SIZE, HALVINGS, COSINE)
        store_low(moved(x, p_centre, d, D, CENTRED), i, d, p_low, p_norms, n_all, WIDTH)
    else:
        k = first - n_rows + tl.arange(0, ROWS)
        c = operand(load(p_codebook, k, k < K, D, c_k, c_d, SIZE), ROWS, SIZE, HALVINGS, COSINE)
        c = moved(c, p_centre, d, D, CENTRED)
        # A code that is not finite, or not there, is zero, with a score below all others.
        m_code = (tl.sum(c * c, 1) < float("inf")) & (k < K)
        c = tl.where(m_code[:, None], c, 0.0)
        o = n_rows + screened_column(k, CODES)
        norm, lost = store_low(c, o, d, p_low, p_norms, n_all, WIDTH)
        tl.store(p_norms + 2 * n_all + o, tl.where(m_code, tl.sum(c * c, 1) * -0.5, -3e38).to(tl.float32))
        p_tile = p_tiles + (first - n_rows) // CODES
        largest(p_tile, norm)
        largest(p_tile + n_tiles, lost)


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
def store_slot(p, n_groups, upper, code):
    tl.store(p, upper)
    tl.store(p + 4 * n_groups, code.to(tl.float32, bitcast=True))


@triton.jit
def beginning(p_shift, tile, ROWS: tl.constexpr, CODES: tl.constexpr):
    # What the scores of a tile begin with: -|c|^2/2, which costs no instruction a score then.
    return tl.broadcast_to(tl.load(p_shift + tile * CODES + tl.arange(0, CODES))[None, :], (ROWS, CODES))


@triton.jit(do_not_specialize=["n_tiles", "n_splits", "n_walk"])
def screen_kernel(
    p_low, p_norms, p_kept, n_rows, n_all, n_tiles, n_splits, n_walk,
    WIDTH: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = WIDTH // INNER
    i_split = tl.program_id(0) % n_splits
    i = (tl.program_id(0) // n_splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_tile = i_split * n_walk
    walk = tl.minimum(n_walk, n_tiles - first_tile)
    norm, lost = tl.load(p_norms + i), tl.load(p_norms + n_all + i)
    k, d, group = tl.arange(0, CODES), tl.arange(0, INNER), tl.arange(0, 4)[None, :]
    p_rows = p_low + i[:, None] * WIDTH + d[None, :]
    p_codes, p_shift = p_low + n_rows.to(tl.int64) * WIDTH, p_norms + 2 * n_all + n_rows
    p_tiles = p_norms + 3 * n_all
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
            error, bounded = bound(norm, lost, tl.load(p_tiles + tile), tl.load(p_tiles + n_tiles + tile), WIDTH)
            lower = tl.maximum(lower, tl.where(bounded, best - error, -float("inf")))
            upper = tl.where(bounded, best + error, float("inf"))
            whole = ((second + error >= lower) | (bounded == 0)).to(tl.int32)
            code = (tile * CODES + group * (CODES // 4)) + quad * 4 | whole
            u0, k0, upper, code = exchange(upper, code, u0, k0)
            u1, k1, upper, code = exchange(upper, code, u1, k1)
            u2, k2, upper, code = exchange(upper, code, u2, k2)
            u3, k3, upper, code = exchange(upper, code, u3, k3)
            dropped = tl.maximum(dropped, upper)
    # Of a row: the bounds of its entries, their codes, then the lower bounds and those of what was dropped.
    n_groups = n_splits * 4
    o = p_kept + i[:, None] * (n_groups * 10) + i_split * 4 + group
    store_slot(o, n_groups, u0, k0)
    store_slot(o + n_groups, n_groups, u1, k1)
    store_slot(o + 2 * n_groups, n_groups, u2, k2)
    store_slot(o + 3 * n_groups, n_groups, u3, k3)
    tl.store(o + 8 * n_groups, lower)
    tl.store(o + 9 * n_groups, dropped)


@triton.jit
def decide_kernel(
    p_x, p_codebook, p_kept, p_index, p_sqdist, p_count, D, K, x_n, x_d, c_k, c_d,
    ENTRIES: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, VISIT: tl.constexpr,
    SIZE: tl.constexpr, HALVINGS: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    x = load(p_x, i + tl.arange(0, 1), tl.arange(0, 1) < 1, D, x_n, x_d, SIZE)
    n_nan, n_special = tl.sum(tl.where(x != x, 1, 0)), tl.sum(tl.where(x - x == 0.0, 0, 1))
    x = operand(x, 1, SIZE, HALVINGS, COSINE)

    # The codes from start to end, for each entry.
    e = tl.arange(0, ENTRIES)
    if p_kept is None:
        m, start, end = e == 0, e * 0, e * 0 + K
        looked = K > 1
    else:
        p_kept += i * (GROUPS * 10)
        p_bounds = p_kept + 8 * GROUPS + tl.arange(0, GROUPS)
        lower, dropped = tl.max(tl.load(p_bounds), 0), tl.max(tl.load(p_bounds + GROUPS), 0)
        # The quad's first code, which four divide, plus whether all of its group is meant.
        code = tl.load(p_kept + ENTRIES + e).to(tl.int32, bitcast=True)
        m = (tl.load(p_kept + e) >= lower) & (code >= 0)
        whole = m & ((code & 1) == 1)
        everything = dropped >= lower
        looked = (everything | (tl.sum(tl.where(m, 1, 0)) > 1)) | (tl.sum(tl.where(whole, 1, 0)) > 0)
        start = tl.where(everything, 0, code & tl.where(whole, -GROUP, -4))
        end = tl.where(everything, K, tl.minimum(start + tl.where(whole, GROUP, 4), K))
        m = tl.where(everything, e == 0, m)
    m = m & (n_special == 0)
    tl.atomic_add(p_count, 1, mask=looked & (n_special == 0), sem="relaxed")

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
    def of(cls, rows: int, codes: int, depth: int, generation: int) -> "_Sizes":
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

    @property
    def padded(self) -> tuple[int, int]:
        """(rows, codes) of whole blocks and tiles."""
        return self.blocks * self.block, self.tiles * self.tile

    @property
    def groups(self) -> int:
        """Lists of a row."""
        return self.splits * _GROUPS


class _Grids(NamedTuple):
    """How the kernels are launched."""

    begin: Grid
    prepare: Grid
    screen: Grid
    decide: Grid


@functools.lru_cache(maxsize=4096)
def _grids(sizes: _Sizes, x_strides: Strides, code_strides: Strides, cosine: bool, screened: bool, centred: bool) -> _Grids:
    rows, codes = sizes.padded
    # The products of the definition are not fused with its sums.
    warps = min(max(sizes.size // _PER_WARP, 1), 16)
    exact = {"SIZE": sizes.size, "HALVINGS": sizes.size.bit_length() - 1, "COSINE": cosine, "enable_fp_fusion": False}
    begin = {"CENTRED": centred, "COLUMNS": _COLUMNS, "SAMPLES": _SAMPLES, "num_warps": 4, "enable_fp_fusion": True}
    together = min(max(_PER_WARP // sizes.size, 1), 64)  # what is padded to is a multiple of it
    prepare = {"CENTRED": centred, "WIDTH": sizes.width, "ROWS": together, "CODES": sizes.tile, **exact, "num_warps": warps}
    # The interpreter would multiply the bits of bfloat16.
    screen = {"WIDTH": sizes.width, "INNER": sizes.inner, "ROWS": sizes.block, "CODES": sizes.tile, "UPCAST": interpreting()}
    screen |= {"num_warps": sizes.warps, "num_stages": sizes.stages, "enable_fp_fusion": True}
    # At least a quad is looked at together, where it fits into the registers; for the cosine each code takes more of them.
    visit = max(_PER_WARP // sizes.size, 1)
    visit = visit if cosine else max(visit, min(4, 2 * _PER_WARP // sizes.size))
    entries = SLOTS * sizes.groups if screened else 1
    decide = {"ENTRIES": entries, "GROUPS": sizes.groups, "GROUP": sizes.tile // _GROUPS, "VISIT": visit, **exact}
    decide["num_warps"] = max(warps, min(entries // 256, 16))
    walk = triton.cdiv(sizes.tiles, sizes.splits)
    tiled = rows + codes, sizes.tiles
    strides = *x_strides, *code_strides
    programs = triton.cdiv(max(sizes.depth, 2 * sizes.tiles), _COLUMNS)
    return _Grids(
        Grid(programs, 1, (sizes.depth, sizes.codes, *tiled, *code_strides), begin),
        Grid(triton.cdiv(rows + codes, together), 1, (sizes.depth, sizes.rows, sizes.codes, rows, *tiled, *strides), prepare),
        Grid(sizes.blocks * sizes.splits, sizes.tiles, (rows, *tiled, sizes.splits, walk), screen),
        Grid(sizes.rows, 1, (sizes.depth, sizes.codes, *strides), decide),
    )


class _Work(NamedTuple):
    """What the kernels hand on to each other. Rows, padded to whole blocks, come before codes, padded to whole tiles."""

    low: torch.Tensor
    #: Norms, norms of what was lost, and what the scores of a code begin with; of tiles the largest two; and the centre.
    norms: torch.Tensor
    kept: torch.Tensor  # what the screen leaves of each row

    @classmethod
    def empty(cls, x: torch.Tensor, codebook: torch.Tensor, sizes: _Sizes) -> "_Work":
        rows, codes = sizes.padded
        # float16 loses nothing of float16, and overflows for all else.
        dtype = torch.float16 if x.dtype is codebook.dtype is torch.float16 else torch.bfloat16
        return cls(
            x.new_empty((rows + codes, sizes.width), dtype=dtype),
            x.new_empty(3 * (rows + codes) + 2 * sizes.tiles + sizes.depth, dtype=torch.float32),
            x.new_empty((rows, 2 * SLOTS + 2, sizes.groups), dtype=torch.float32),
        )


def _launches(
    x: torch.Tensor, codebook: torch.Tensor, cosine: bool, outputs: Sequence[torch.Tensor], work: _Work | None, sizes: _Sizes
) -> dict[str, Launch]:
    """All launches of a call, in their order. Without a screen nothing needs to be prepared."""
    centred = not cosine and (x.dtype is not codebook.dtype or x.dtype is torch.float32)
    grids = _grids(sizes, x.stride(), codebook.stride(), cosine, work is not None, centred)
    if work is None:
        return {"decide": Launch(decide_kernel, (x, codebook, None, *outputs), grids.decide)}
    low, norms, kept = work
    return {
        "begin": Launch(begin_kernel, (codebook, norms, outputs[2]), grids.begin),
        "prepare": Launch(prepare_kernel, (x, codebook, low, norms), grids.prepare),
        "screen": Launch(screen_kernel, (low, norms, kept), grids.screen),
        "decide": Launch(decide_kernel, (x, codebook, kept, *outputs), grids.decide),
    }


_sizes = functools.lru_cache(maxsize=4096)(_Sizes.of)


def forward(
    x: torch.Tensor, codebook: torch.Tensor, cosine: bool, index: torch.Tensor, sqdist: torch.Tensor, count: torch.Tensor
) -> None:
    """``flowkern::nearest_code``: fills index, sqdist, and how many rows were looked at again."""
    rows, screened = x.shape[0], sqdist.dtype is not torch.float64
    if not (rows and screened):
        count.zero_()
    if not rows:
        return
    sizes = _sizes(rows, *codebook.shape, generation(x.device))
    work = _Work.empty(x, codebook, sizes) if screened else None
    for launch in _launches(x, codebook, cosine, (index, sqdist, count), work, sizes).values():
        launch.run()


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
        return ((launch.grid.integers[-1] * chunks, 1 / chunks),)
    return (1, 1) if name == "decide" else ()


def compile_cases(sizes: tuple[int, int, int], cosine: bool, dtypes: str, target: str) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS."""
    rows, depth, codes = sizes
    of_x, of_codes = DTYPES[dtypes]
    x, codebook = example((rows, depth), of_x, "vector"), example((codes, depth), of_codes, "vector")
    how = _Sizes.of(rows, codes, depth, int(target[3:]) // 10 if target.startswith("sm_") else 0)
    outputs = KERNELS["nearest_code"].outputs(x, codebook, cosine)
    work = None if outputs[1].dtype is torch.float64 else _Work.empty(x, codebook, how)
    yield from _launches(x, codebook, cosine, outputs, work, how).items()
