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

    |error of a score| <= n / (1 - n) (|x| |c| + |c|^2 / 2) + underflow,  n = 2 (D + 8) u

Rows and codes are moved and scaled alike beforehand where that makes their norms, and the bound, much smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .._core import backend
from .._core.checks import accumulation_dtype, check_floating, check_same_device
from .._core.op import Law, Output, Sample, accumulated, as_index, define, normal, reference_runs, register
from .._core.reference import outside_autocast

__all__ = ["METRICS", "nearest_code"]

METRICS = ("euclidean", "cosine")

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# The torch code screens so many scores at a time, which stay in the last cache, keeps the best of each tile of codes, and
# computes the definition of so many entries at a time.
_SCORES, _FEWEST_ROWS, _TILE, _ENTRIES = 1 << 22, 64, 64, 1 << 22
_SAMPLED = 15
# The definition's own rounding of a distance, far below this by |x|^2 + |c|^2.
_OWN = 2.0**-45


# --- the definition ---


def _halving_sum(s: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension by halving, as defined."""
    size = 1 << max(0, s.shape[-1] - 1).bit_length()
    s = F.pad(s, (0, size - s.shape[-1])) if size > s.shape[-1] else s
    while size > 1:
        size //= 2
        s = s[..., :size] + s[..., size:]
    return s[..., 0]


def _sqrt(s: torch.Tensor) -> torch.Tensor:
    """The square root as IEEE 754 rounds it: that of torch may be one unit off, where MKL computes it.

    Which of three neighbours is nearest is decided by the exact s - r^2 (Dekker, "A floating-point technique for extending
    the available precision", 1971): a middle between two, squared, falls between two of its possible values.
    """
    fraction, exponent = torch.frexp(s)
    odd = exponent.remainder(2)
    s = torch.ldexp(fraction, odd)
    r = s.sqrt()
    high = r * (2.0**27 + 1)
    high = high - (high - r)
    low, square = r - high, r * r
    rest = (s - square) - (((high * high - square) + 2 * high * low) + low * low)
    above, below = (torch.nextafter(r, torch.full_like(r, end)) for end in (math.inf, 0.0))
    r = torch.where(rest > r * (above - r), above, torch.where((rest <= r * (below - r)) & (r > 0), below, r))
    return torch.ldexp(r, torch.div(exponent - odd, 2, rounding_mode="floor"))


def _operand(x: torch.Tensor, cosine: bool) -> torch.Tensor:
    """x in float64; for the cosine divided by its norm. A row of zeros stays what it is."""
    x = x.double()
    if not cosine:
        return x
    norm = _sqrt(_halving_sum(x.square()))
    return x / torch.where(norm == 0, 1.0, norm)[..., None]


def _largest(x: torch.Tensor) -> torch.Tensor:
    """Of each row the largest magnitude, or NaN: what is not below infinity is also the distance of such a row."""
    return torch.linalg.vector_norm(x, math.inf, -1)


def _reference(x: torch.Tensor, codebook: torch.Tensor, cosine: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes, missing = _operand(codebook, cosine), ~(_largest(codebook) < math.inf)
    indices, distances = [codes.new_empty(0, dtype=torch.int64)], [codes.new_empty(0)]
    for block in x.split(max(1, _ENTRIES // codebook.numel())):
        largest = _largest(block)
        d = _halving_sum((_operand(block, cosine)[:, None] - codes).square())
        d = torch.where(missing | ~(largest[:, None] < math.inf), math.inf, d)
        sqdist, index = d.min(1)
        indices.append(index)
        distances.append(torch.where(largest < math.inf, sqdist, largest.double()))
    return torch.cat(indices), torch.cat(distances).to(accumulation_dtype(x, codebook))


def reference(x: torch.Tensor, codebook: torch.Tensor, *, metric: str = "euclidean") -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in plain torch: all distances in float64, some rows at a time."""
    index, sqdist = _reference(x.reshape(-1, x.shape[-1]), codebook, metric == "cosine")
    return index.view(x.shape[:-1]), sqdist.view(x.shape[:-1])


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    randn = normal(device, dtype)
    for metric in METRICS:
        kwargs = {"metric": metric}
        yield Sample(f"rows-{metric}", (randn(9, 5), randn(7, 5)), kwargs)
        yield Sample(f"images-{metric}", (randn(2, 3, 4, 8), randn(70, 8)), kwargs)
    yield Sample("one-code", (randn(3, 2), randn(1, 2)))
    yield Sample("many-codes", (randn(40, 33), randn(300, 33)))
    yield Sample("empty-batch", (randn(0, 4), randn(3, 4)))
    yield Sample("ties", (randn(4, 6).round(), randn(2, 6).round().repeat(3, 1)))
    yield Sample("strided", (randn(4, 6).t(), randn(9, 8)[::2, ::2]))
    yield Sample("mixed-dtypes", (randn(6, 5), randn(8, 5, dtype=torch.bfloat16)))


# --- kernels ---


def _outputs(x: torch.Tensor, codebook: torch.Tensor, cosine: bool) -> Triple:
    rows = x.shape[:1]
    return (
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(rows, dtype=accumulation_dtype(x, codebook)),
        x.new_empty((), dtype=torch.int64),
    )


class _Screen:
    """What the screen of the torch code knows of the codebook. Codes that are not finite are zeros of score -infinity."""

    def __init__(self, x: torch.Tensor, codebook: torch.Tensor, cosine: bool):
        self.dtype = accumulation_dtype(x, codebook)
        self.count, self.depth = codebook.shape
        self.relative, self.absolute = self._errors(x)
        # Beyond this norm a sum might overflow: then the bound is infinite.
        self.limit = math.sqrt(torch.finfo(self.dtype).max) / 16
        self.centre, self.scale = self._frame(codebook, cosine)
        self.exact, self.codes, norms, finite = self.prepare(codebook, cosine)
        self.missing = None if finite is None else ~finite
        self.shift = norms.square() / -2
        if self.missing is not None:
            self.shift[self.missing] = -math.inf
        tiles = F.pad(self.from_above(norms), (0, -self.count % _TILE)).view(-1, _TILE).amax(1)
        # The bound is slope |x| + offset, and what it has of |x| alone.
        self.slope = torch.where(tiles < self.limit, self.relative * tiles + self.absolute, math.inf)
        self.offset = (self.relative / 2 + 2 * _OWN) * tiles * tiles + self.absolute * (1 + tiles)

    def _frame(self, codebook: torch.Tensor, cosine: bool) -> tuple[torch.Tensor | None, float]:
        """Where the codes lie and what brings them near 1; None where they lie around 0 and near 1 as they are.

        Any centre and scale are right: they only make the bound small. Medians of a few codes, so that no outlier spoils them.
        """
        some = codebook[:: -(-len(codebook) // _SAMPLED)]
        some = _operand(some[_largest(some) < math.inf], cosine).double()
        if not len(some):
            return None, 1.0
        centre = some.median(0).values.to(self.dtype)
        rows = torch.stack([some - centre, some]).square().sum(2)
        spread, size = rows.median(1).values.sqrt().tolist()
        away = float(centre.double().square().sum().sqrt()) > spread
        exponent = math.frexp(spread if away else size)[1]
        # float64 is not scaled: where the definition underflows, the screen shall too.
        exponent = 0 if abs(exponent) < 30 or self.dtype is torch.float64 else max(-100, min(100, exponent))
        return (centre if away else 0 * centre) if away or exponent else None, 2.0**-exponent

    def prepare(self, x: torch.Tensor, cosine: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(operands of the definition, those of the screen, their norms, which rows are finite or None for all).

        Rows that are not are zeros for the screen.
        """
        exact = _operand(x, True) if cosine else x
        rounded = exact if exact.dtype is torch.float64 else exact.to(self.dtype)
        if self.centre is not None:
            rounded = (rounded - self.centre) * self.scale
        rounded = rounded.to(self.dtype)
        norms = torch.linalg.vector_norm(rounded, dim=1)
        if (norms < math.inf).all():
            return exact, rounded, norms, None
        finite = _largest(x) < math.inf
        return exact, torch.where(finite[:, None], rounded, 0), torch.where(finite, norms, 0), finite

    def _errors(self, x: torch.Tensor) -> tuple[float, float]:
        """The error of a score by |x| |c| + |c|^2 / 2, and what underflow adds by 1 + |x| + |c|."""
        info = torch.finfo(self.dtype)
        matmul = (torch.backends.cuda if x.is_cuda else torch.backends.mkldnn).matmul
        # The user may have allowed products of float32 in bfloat16, which has 8 bits.
        lowered = self.dtype is torch.float32 and matmul.fp32_precision not in ("none", "ieee")
        rounding = (self.depth + 8) * info.eps + (2.0**-6 if lowered else 0)
        return rounding / (1 - rounding) if rounding < 1 else math.inf, 2 * (self.depth + 8) * info.tiny

    def from_above(self, norms: torch.Tensor) -> torch.Tensor:
        """Norms with what rounding and underflow may have taken from them, in float64."""
        return norms.double() * (1 + self.relative) + math.sqrt(self.absolute)

    def by_row(self, norms: torch.Tensor) -> torch.Tensor:
        """What the bound has of |x| alone: the definition itself is rounded in float64."""
        return torch.where(norms < self.limit, 2 * _OWN * norms * norms, math.inf)


def _decide(
    x: torch.Tensor, screen: _Screen, row: torch.Tensor, code: torch.Tensor, alone: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest of each row's nearest codes among the pairs (row, code), and its distance, by the definition.

    ``alone``: every row has just one code.
    """
    size = max(1, _ENTRIES // screen.depth)
    parts = zip(row.split(size), code.split(size), strict=True)
    d = [
        _halving_sum(((x if alone and len(r) == len(x) else x[r]).double() - screen.exact[c].double()).square_())
        for r, c in parts
    ]
    distance = torch.cat(d)
    if screen.missing is not None:
        distance[screen.missing[code]] = math.inf
    if not alone:
        sqdist = distance.new_full((len(x),), math.inf).scatter_reduce_(0, row, distance, "amin")
        nearest = torch.where(distance == sqdist[row], code, screen.count)
        code, distance = code.new_full((len(x),), screen.count).scatter_reduce_(0, row, nearest, "amin"), sqdist
    return torch.where(distance < math.inf, code, 0), distance


def _candidates(scores: torch.Tensor, norms: torch.Tensor, screen: _Screen) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, code) of every code whose score may be the greatest of its row. Comparisons with NaN leave a code in."""
    tiles = scores.view(len(scores), -1, _TILE)
    norms = screen.from_above(norms)[:, None]
    best, error = tiles.amax(2), torch.addcmul(screen.offset, norms, screen.slope).add_(screen.by_row(norms))
    least = (best - error).nan_to_num_(-math.inf, math.inf, -math.inf).amax(1, keepdim=True)
    row, tile = (~(best + error < least)).nonzero(as_tuple=True)
    # A score may be so much less; its own rounding to the screen's dtype is within the bound.
    enough = (least[row] - error[row, tile][:, None]).to(scores.dtype)
    pair, place = (~(tiles[row, tile] < enough)).nonzero(as_tuple=True)
    row, code = row[pair], tile[pair] * _TILE + place
    if _TILE * tiles.shape[1] == screen.count:
        return row, code
    real = code < screen.count
    return row[real], code[real]


@outside_autocast
def _torch_forward(
    x: torch.Tensor, codebook: torch.Tensor, cosine: bool, index: torch.Tensor, sqdist: torch.Tensor, looked: torch.Tensor
) -> None:
    looked.zero_()
    if not len(x):
        return
    screen = _Screen(x, codebook, cosine)
    width = len(screen.slope) * _TILE
    rows = min(len(x), max(_FEWEST_ROWS, _SCORES // width))
    buffer = screen.codes.new_empty(rows, width)
    buffer[:, screen.count :] = -math.inf
    for start in range(0, len(x), rows):
        own = slice(start, start + rows)
        exact, rounded, norms, finite = screen.prepare(x[own], cosine)
        scores = buffer[: len(exact)]
        torch.addmm(screen.shift, rounded, screen.codes.t(), out=scores[:, : screen.count])
        row, code = _candidates(scores, norms, screen)
        if finite is None:
            alone = len(row) == len(exact)  # as every row has a candidate
        else:
            row, code, alone = row[finite[row]], code[finite[row]], False
        if not alone:
            looked += (row.bincount(minlength=len(exact)) > 1).sum()
        index[own], d = _decide(exact, screen, row, code, alone)
        sqdist[own] = d if finite is None else torch.where(finite, d, _largest(x[own]).double())


_forward = define(
    "nearest_code(Tensor x, Tensor codebook, bool cosine) -> (Tensor index, Tensor sqdist, Tensor looked)",
    outputs=_outputs,
    torch_=_torch_forward,
    fills=True,
    cpp=lambda *args: backend.call_native("nearest_code", *args[:3], backend.multiply_bfloat16, *args[3:]),
    triton="nearest_code.forward",
)


def nearest_code(
    x: torch.Tensor, codebook: torch.Tensor, *, metric: str = "euclidean", return_stats: bool = False
) -> tuple[torch.Tensor, ...]:
    """index = argmin_k sum_j (x_j - codebook_kj)^2, and that squared distance, without storing all N x K of them.

    Certified: the index is the one that float64 arithmetic on the given values returns, whatever the dtype, backend and
    number of threads, and of codes at equal distance the lowest index. Near ties, duplicates and huge values are no
    exception. The distance in float64 has one order of operations: the squares, with zeros up to the next power of 2, are
    summed by adding halves, s[:h] + s[h:], until one is left.

    Rows that are as far from many codes as from the nearest, to rounding, take longer: each such distance is computed in float64.

    A code that is not finite is at infinite distance: index 0 if all are. A row of x with a NaN has index 0 and distance
    NaN, a row with an infinity and no NaN index 0 and distance infinity. Not differentiable: neither result records gradients.

    Args:
        x: (..., D), any strides; float64, float32, bfloat16 or float16.
        codebook: (K, D), K and D >= 1. May differ from x in floating dtype.
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
    check_floating("x", x)
    check_floating("codebook", codebook)
    if codebook.ndim != 2 or not codebook.numel():
        raise ValueError(f"codebook: expected shape (K, D) with at least one code and entry, got {tuple(codebook.shape)}")
    if x.ndim < 1 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(f"x: expected shape (..., {codebook.shape[1]}) as the codes have, got {tuple(x.shape)}")
    check_same_device("codebook", codebook, x)
    if metric not in METRICS:
        raise ValueError(f"metric: unknown name {metric!r}; expected one of {', '.join(map(repr, METRICS))}")
    codes, cosine, shape = codebook.detach(), metric == "cosine", x.shape[:-1]
    flat = x.detach() if len(shape) == 1 else x.detach().reshape(-1, x.shape[-1])
    if reference_runs(x, own_torch=True):
        index, sqdist = _reference(flat, codes, cosine)
        looked = index.new_tensor(0)
    else:
        index, sqdist, looked = _forward(flat, codes, cosine)
    if len(shape) != 1:
        index, sqdist = index.view(shape), sqdist.view(shape)
    return (index, sqdist, looked) if return_stats else (index, sqdist)


register(
    nearest_code,
    reference,
    _samples,
    (_forward,),
    outputs=(Output("index", as_index, differentiable=False), Output("sqdist", accumulated, differentiable=False)),
    per_sample=1,
    laws=Law.EXACT_INDEX,
)
