"""Nearest neighbour in a codebook, certified: the index is the one that float64 arithmetic on the given inputs returns.

Source: the quantizer of van den Oord et al., "Neural Discrete Representation Learning" (2017), eq. 1 and 2.

The distance of a row x and a code c of D entries is defined in float64, in one order of operations that all backends follow:

====  ==============================================================================================
s_j   (x_j - c_j)^2, of x and c converted to float64, which is exact; zeros up to the next power of 2
d     halves of s are added, s[:h] + s[h:], until one value is left
====  ==============================================================================================

Nobody computes all of these. A screen of scores x.c - |c|^2/2, greatest for the nearest code, comes with a rigorous bound of
its error; the definition decides among the codes that this leaves. In unit roundoffs u of the screen, whatever the order of
its sums (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1):

    |error of a score| <= n / (1 - n) (|x| |c| + |c|^2 / 2) + underflow,  n = (D + 8) u
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .._registry import define
from ._checks import accumulation_dtype, check_floating, check_same_device, outside_autocast

__all__ = ["METRICS", "nearest_code"]

METRICS = ("euclidean", "cosine")

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# The torch code screens so many scores at a time, which stay in the cache, keeps the best of each tile of codes, and
# computes the definition of so many entries at a time.
_SCORES, _TILE, _ENTRIES = 1 << 18, 32, 1 << 22


# --- the definition ---


def _halving_sum(s: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension by halving, as defined."""
    size = 1 << max(0, s.shape[-1] - 1).bit_length()
    s = F.pad(s, (0, size - s.shape[-1]))
    while size > 1:
        size //= 2
        s = s[..., :size] + s[..., size:]
    return s[..., 0]


def _operand(x: torch.Tensor, cosine: bool) -> torch.Tensor:
    """x in float64; for the cosine divided by its norm. A row of zeros stays what it is."""
    x = x.double()
    if not cosine:
        return x
    norm = _halving_sum(x.square()).sqrt()
    return x / torch.where(norm == 0, 1.0, norm)[..., None]


def _not_finite(x: torch.Tensor) -> torch.Tensor:
    return ~x.isfinite().all(-1)


def _special(x: torch.Tensor, index: torch.Tensor, sqdist: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and distance with those of rows that are not finite put in: 0 and NaN, without a NaN 0 and infinity."""
    special = torch.where(x.isnan().any(-1), math.nan, math.inf).to(sqdist)
    bad = _not_finite(x)
    return torch.where(bad, 0, index), torch.where(bad, special, sqdist)


def _reference(x: torch.Tensor, codebook: torch.Tensor, cosine: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes, missing = _operand(codebook, cosine), _not_finite(codebook)
    rows = max(1, _ENTRIES // max(1, codebook.numel()))
    found = []
    for block in x.split(rows):
        d = _halving_sum((_operand(block, cosine)[:, None] - codes).square())
        d = torch.where(missing, math.inf, d)
        index = d.nan_to_num(math.inf, math.inf).argmin(1)
        sqdist = d.gather(1, index[:, None])[:, 0].to(accumulation_dtype(x, codebook))
        found.append(_special(block, index, sqdist))
    index, sqdist = (torch.cat(parts) for parts in zip(*found, strict=True))
    return index, sqdist


def reference(x: torch.Tensor, codebook: torch.Tensor, *, metric: str = "euclidean") -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in plain torch: all distances in float64, some rows at a time."""
    index, sqdist = _reference(x.reshape(x.shape[:-1].numel(), x.shape[-1]), codebook, metric == "cosine")
    return index.view(x.shape[:-1]), sqdist.view(x.shape[:-1])


# --- kernels ---


def _outputs(x: torch.Tensor, codebook: torch.Tensor, cosine: bool) -> Triple:
    """What the forward returns, uninitialized: the fake, and what every kernel fills."""
    rows = x.shape[:1]
    return (
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(rows, dtype=accumulation_dtype(x, codebook)),
        x.new_empty((), dtype=torch.int64),
    )


class _Screen:
    """The codebook as the screen of the torch code wants it: whole tiles, in the dtype of its arithmetic.

    Codes that are not finite, and those that fill up the last tile, are zeros whose score is -infinity.
    """

    def __init__(self, x: torch.Tensor, codebook: torch.Tensor, cosine: bool):
        self.dtype = accumulation_dtype(x, codebook)
        self.missing = _not_finite(codebook)
        self.exact = _operand(codebook, True) if cosine else codebook
        self.count, self.depth = codebook.shape
        room = (0, 0, 0, -self.count % _TILE)
        codes = torch.where(self.missing[:, None], 0, self.exact)
        squares = codes.double().square().sum(1)
        self.codes = F.pad(codes.to(self.dtype), room)
        self.shift = -F.pad(torch.where(self.missing, math.inf, squares / 2), room[2:], value=math.inf).to(self.dtype)
        self.norms = F.pad(squares.sqrt(), room[2:])
        self.tile_norms = self.norms.view(-1, _TILE).amax(1)
        self.relative, self.absolute = self._errors(x)

    def _errors(self, x: torch.Tensor) -> tuple[float, float]:
        """The error of a score by |x| |c| + |c|^2 / 2, and what underflow adds by 1 + |x| + |c|."""
        info = torch.finfo(self.dtype)
        matmul = (torch.backends.cuda if x.is_cuda else torch.backends.mkldnn).matmul
        # The user may have allowed products of float32 in bfloat16, which has 8 bits.
        lowered = self.dtype is torch.float32 and matmul.fp32_precision not in ("none", "ieee")
        rounding = (self.depth + 8) * info.eps / 2 + (2.0**-6 if lowered else 0)
        return rounding / (1 - rounding) if rounding < 1 else math.inf, (self.depth + 8) * info.tiny

    def error(self, row_norms: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """The bound, and that of the definition's own rounding: infinite or NaN where a sum of the screen may overflow."""
        size = row_norms * norms + norms * norms / 2
        screen = self.relative * size + self.absolute * (1 + row_norms + norms)
        screen = torch.where(size < torch.finfo(self.dtype).max / 4, screen, math.inf)
        own = (math.log2(self.depth + 1) + 8) * 2.0**-53
        return screen + own * (row_norms + norms) ** 2


def _decide(
    block: torch.Tensor, screen: _Screen, row: torch.Tensor, code: torch.Tensor, cosine: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest of each row's nearest codes among the pairs (row, code), and its distance, by the definition."""
    x = _operand(block, cosine)
    pairs = max(1, _ENTRIES // max(1, screen.depth))
    parts = zip(row.split(pairs), code.split(pairs), strict=True)
    d = torch.cat([_halving_sum((x[r] - screen.exact[c].double()).square()) for r, c in parts])
    d = torch.where(screen.missing[code], math.inf, d).nan_to_num(math.inf, math.inf)
    sqdist = d.new_full((len(block),), math.inf).scatter_reduce(0, row, d, "amin")
    nearest = torch.where(d == sqdist[row], code, screen.count)
    return code.new_full((len(block),), screen.count).scatter_reduce(0, row, nearest, "amin"), sqdist


def _candidates(scores: torch.Tensor, norms: torch.Tensor, screen: _Screen) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, code) of every code whose score may be the greatest of its row. Comparisons with NaN leave a code in."""
    tiles = scores.view(len(scores), -1, _TILE)
    best = tiles.amax(2).double()
    error = screen.error(norms[:, None], screen.tile_norms)
    least = (best - error).nan_to_num(-math.inf, math.inf, -math.inf).amax(1)
    row, tile = (~(best + error < least[:, None])).nonzero(as_tuple=True)
    error = screen.error(norms[row, None], screen.norms.view(-1, _TILE)[tile])
    pair, place = (~(tiles[row, tile] + error < least[row, None])).nonzero(as_tuple=True)
    row, code = row[pair], tile[pair] * _TILE + place
    real = code < screen.count
    return row[real], code[real]


@outside_autocast
def _torch_forward(x: torch.Tensor, codebook: torch.Tensor, cosine: bool) -> Triple:
    index, sqdist, looked = _outputs(x, codebook, cosine)
    screen = _Screen(x, codebook, cosine)
    looked.zero_()
    if not len(x):
        return index, sqdist, looked
    rows = max(16, _SCORES // len(screen.codes))
    buffer = screen.codes.new_empty(min(rows, len(x)), len(screen.codes))
    start = 0
    for block in x.split(rows):
        own = slice(start, start := start + len(block))
        exact = _operand(torch.where(_not_finite(block)[:, None], 0, block), cosine)
        scores = torch.addmm(screen.shift, exact.to(screen.dtype), screen.codes.t(), out=buffer[: len(block)])
        row, code = _candidates(scores, exact.square().sum(1).sqrt(), screen)
        looked += (row.bincount(minlength=len(block)) > 1).sum()
        index[own], sqdist[own] = _special(block, *_decide(block, screen, row, code, cosine))
    return index, sqdist, looked


_forward = define(
    "nearest_code(Tensor x, Tensor codebook, bool cosine) -> (Tensor index, Tensor sqdist, Tensor looked)",
    fake=_outputs,
    torch_=_torch_forward,
    cpp=_torch_forward,
    triton="nearest_code.forward",
)


def _check_inputs(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> None:
    check_floating("x", x)
    check_floating("codebook", codebook)
    if codebook.ndim != 2 or not len(codebook):
        raise ValueError(f"codebook: expected shape (K, D) with at least one code, got {tuple(codebook.shape)}")
    if x.ndim < 1 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(f"x: expected shape (..., {codebook.shape[1]}) as the codes have, got {tuple(x.shape)}")
    check_same_device("codebook", codebook, x)
    if metric not in METRICS:
        raise ValueError(f"metric: unknown name {metric!r}; expected one of {', '.join(map(repr, METRICS))}")


def nearest_code(
    x: torch.Tensor, codebook: torch.Tensor, *, metric: str = "euclidean", return_stats: bool = False
) -> tuple[torch.Tensor, ...]:
    """index = argmin_k sum_j (x_j - codebook_kj)^2, and that squared distance, without storing all N x K of them.

    Certified: the index is the one that float64 arithmetic on the given values returns, whatever the dtype, backend and
    number of threads, and of codes at equal distance the lowest index. Near ties, duplicates and huge values are no
    exception. The distance in float64 has one order of operations: the squares, with zeros up to the next power of 2, are
    summed by adding halves, s[:h] + s[h:], until one is left.

    A code that is not finite is at infinite distance: index 0 if all are. A row of x with a NaN has index 0 and distance
    NaN, a row with an infinity and no NaN index 0 and distance infinity. Not differentiable: neither result records gradients.

    Args:
        x: (..., D), any strides; float64, float32, bfloat16 or float16.
        codebook: (K, D), K >= 1. May differ from x in floating dtype.
        metric: "euclidean", or "cosine": x and the codes are first divided by their norms, in float64, the squares summed
            as above; zeros stay zeros. The squared distance is then 2 - 2 cos.
        return_stats: also return how many rows were looked at again, because the screen in lower precision left more
            than one candidate. It depends on the backend.

    Returns:
        index, (...), int64; sqdist, (...), float32 (infinite where that cannot hold it), float64 if an input is float64;
        with ``return_stats`` the number of rows, 0-d int64. No kernel reads values on the host; on a GPU without Triton the
        torch code does, to size the lists of candidates.

    Raises:
        TypeError: an input that is not a floating tensor.
        ValueError: a wrong shape or device, an empty codebook, an unknown metric.

    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), eq. 1 and 2.
    """
    _check_inputs(x, codebook, metric)
    flat, codes, cosine = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1]), codebook.detach(), metric == "cosine"
    if not (x.is_cpu or x.is_cuda) or torch._C._are_functorch_transforms_active():
        index, sqdist = _reference(flat, codes, cosine)
        looked = index.new_tensor(0)
    else:
        index, sqdist, looked = _forward(flat, codes, cosine)
    index, sqdist = index.view(x.shape[:-1]), sqdist.view(x.shape[:-1])
    return (index, sqdist, looked) if return_stats else (index, sqdist)
