"""Vector quantizers: a codebook that learns by moving averages or by its loss, on one process or many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import distributed, nn

from ... import ops
from ..._core.checks import accumulation_dtype, check_codes, check_floating, check_same_device
from ..._core.code_sums import magnitudes
from ..._core.opaque import opaque
from ...ops.parts import pass_gradient, update_averages_

__all__ = ["CodeUsage", "ResidualVectorQuantizer", "VectorQuantizer"]

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

INITS = ("kmeans", "uniform")
_LLOYD_ITERATIONS = 10
#: Codes that one step may revive: what processes exchange for it has this many rows, whether codes are dead or not.
_REVIVED_AT_ONCE = 256


class CodeUsage(NamedTuple):
    """How evenly codes are used: ``perplexity`` = exp(entropy), from 1 to K, and ``used``, the share that is used at all."""

    perplexity: torch.Tensor
    used: torch.Tensor


# --- processes: rows are numbered through, those of rank 0 first ---


def _world() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _reduce(values: torch.Tensor, how: str) -> None:
    """The sum or the maximum over all processes, in place."""
    if _world() > 1:
        distributed.all_reduce(values, distributed.ReduceOp.MAX if how == "max" else distributed.ReduceOp.SUM)


def _place(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(number of this process' first row, number of rows of all), 0-d int64."""
    sizes = torch.zeros(_world(), dtype=torch.int64, device=rows.device)
    rank = distributed.get_rank() if len(sizes) > 1 else 0
    sizes[rank] = len(rows)
    _reduce(sizes, "sum")
    return sizes[:rank].sum(), sizes.sum()


def _rows_of_all(rows: torch.Tensor, numbers: torch.Tensor, start: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows of these numbers, in like's dtype: each process knows its own, and the others' are zero."""
    found = like.new_zeros(*numbers.shape, rows.shape[1])
    if len(rows):
        own = numbers - start
        mine = (own >= 0) & (own < len(rows))
        found = torch.where(mine[..., None], rows[own.clamp(0, len(rows) - 1)].to(like.dtype), found)
    _reduce(found, "sum")
    return found.add_(0.0)  # minus zero becomes zero, as it does in a sum over processes


# --- the codebook: (heads, K, d), of rows (N, heads, d) ---


def _normalize(codebook: torch.Tensor) -> None:
    codebook.copy_(F.normalize(codebook, dim=-1))


def _lookup(rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """(N, heads) int64."""
    return torch.stack([ops.nearest_code(rows[:, i], codes)[0] for i, codes in enumerate(codebook)], 1)


def _follow(
    rows: torch.Tensor,
    index: torch.Tensor,
    codebook: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    decay: float,
    unit: bool,
) -> None:
    """One step of the moving averages, those of all heads at once: head h's code k is code h K + k."""
    first = torch.arange(len(codebook), device=index.device) * codebook.shape[1]
    flat = codebook.flatten(0, 1), counts.flatten(), sums.flatten(0, 1)
    update_averages_(rows.flatten(0, 1), (index + first).flatten(), *flat, decay, _reduce)
    if unit:
        _normalize(codebook)


@opaque(mutates=("codebook", "counts", "sums", "initialized"))
def _initialize_codes(
    rows: torch.Tensor,
    codebook: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    initialized: torch.Tensor,
    unit: bool,
) -> None:
    """k-means: Lloyd's iterations from rows drawn at random, alike in all processes. Once: it looks at ``initialized``."""
    if initialized.item():
        return
    start, total = _place(rows)
    number = int(total.item())
    if number == 0:
        raise ValueError("VectorQuantizer: the k-means initialization needs at least one row, over all processes")
    heads, codes, _ = codebook.shape
    drawn = torch.randperm(number, generator=torch.Generator().manual_seed(0), device="cpu").to(rows.device)
    drawn = drawn[torch.arange(codes, device=rows.device) % number] * heads
    numbers = drawn + torch.arange(heads, device=rows.device)[:, None]
    centres = _rows_of_all(rows.flatten(0, 1), numbers, start * heads, codebook)
    codebook.copy_(centres.nan_to_num_(0.0, 0.0, 0.0))
    for _ in range(_LLOYD_ITERATIONS):
        _follow(rows, _lookup(rows, codebook), codebook, counts, sums, 0.0, unit)
    initialized.fill_(True)


@opaque(mutates=("codebook", "counts", "sums", "steps"))
def _update_codes(
    rows: torch.Tensor,
    index: torch.Tensor,
    codebook: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    steps: torch.Tensor,
    decay: float,
    revive_below: float,
    unit: bool,
) -> None:
    """One step of the moving averages and, if asked for, of revival. It never waits for a GPU."""
    _follow(rows, index, codebook, counts, sums, decay, unit)
    if revive_below > 0.0:
        _revive(rows, codebook, counts, sums, steps, revive_below)
    steps.add_(1)


def _revive(
    rows: torch.Tensor, codebook: torch.Tensor, counts: torch.Tensor, sums: torch.Tensor, steps: torch.Tensor, below: float
) -> None:
    """The least used codes, if they are dead, move onto rows drawn at random; their averages start anew from there."""
    heads, codes, features = codebook.shape
    start, total = _place(rows)
    least = total.double() * (below / codes)
    flat_counts = counts.view(-1)
    lowest = flat_counts.sort(stable=True).indices[:_REVIVED_AT_ONCE]
    drawn = _random(steps * _REVIVED_AT_ONCE + torch.arange(len(lowest), device=rows.device)) % total.clamp(min=1)
    fresh = _rows_of_all(rows.flatten(0, 1), drawn * heads + lowest // codes, start * heads, codebook)
    dead = (flat_counts[lowest] < least) & magnitudes(fresh).isfinite() & (total > 0)
    least = least.to(counts.dtype)
    for state, value in ((codebook, fresh), (sums, fresh * least)):
        view = state.view(-1, features)
        view.index_copy_(0, lowest, torch.where(dead[:, None], value, view[lowest]))
    flat_counts.index_copy_(0, lowest, torch.where(dead, least, flat_counts[lowest]))


def _random(counter: torch.Tensor) -> torch.Tensor:
    """Pseudo-random int64 of int64, the same on every device and process. Source: Steele et al., SplitMix64 (2014), fig. 16."""
    z = (counter + 1) * -7046029254386353131
    z = (z ^ (z >> 30)) * -4658895280553007687
    z = (z ^ (z >> 27)) * -7723592293110705685
    return z ^ (z >> 31)


def _channels_last(x: torch.Tensor, dim: int, channels_first: bool) -> torch.Tensor:
    """x as (B, ..., D). Raises TypeError unless it is floating, and ValueError for another shape."""
    check_floating("x", x)
    axis = 1 if channels_first else -1
    if x.ndim < 2 or x.shape[axis] != dim:
        expected = f"(B, {dim}, ...), channels first" if channels_first else f"(B, ..., {dim})"
        raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
    return x.movedim(1, -1) if channels_first else x


class VectorQuantizer(nn.Module):
    """The nearest code of every vector: forward(x) -> (quantized, index, loss).

    quantized is in value exactly the code and passes its gradient to x, straight or rotated (``ops.vector_quantize``). The
    codes learn in one of two ways. With a ``decay`` they are the moving averages of the vectors assigned to them, and
    loss = commitment mean (x - sg(c))^2. With ``decay=None`` the codebook is a parameter, and loss has the term
    mean (sg(x) - c)^2 besides.

    In training mode each forward takes one step of the moving averages, as batch normalization does, under ``no_grad`` too;
    in evaluation mode nothing changes. A code that no vector is assigned to stays exactly where it is: the averages are not
    smoothed, which would draw unused codes to the origin. Vectors that are not finite are left out of all statistics.

    Where ``torch.distributed`` is initialized, initialization, averages and revival are those of the vectors of all processes
    together, which must all come to that forward, be it with no vectors. Sums are in fixed point: codebooks have the same
    bits in all processes, for any number of them, and in one process that has all their vectors, rank 0's first.

    Args:
        dim: D, the channels of x.
        codes: K.
        heads: x is split into so many parts, each with a codebook of its own.
        decay: the weight of the past in the moving averages, or None.
        commitment: beta, the weight of the commitment term.
        init: "kmeans": the first forward in training mode sets the codes by Lloyd's iterations on its vectors, which may be
            fewer than the codes; "uniform": values in +-1/K.
        revive_below: a code is dead when its moving count falls under this share of the mean number of vectors per code, N / K
            (0.1, say). It moves onto a vector of the batch drawn at random, and its averages start anew there; at most 256
            codes a step, the least used first. None: codes may die. Needs a decay.
        cosine: vectors (each head's) and codes are divided by their norms first; so quantized has norm 1.
        rotation: the gradient of the rotation trick.
        channels_first: x is (B, D, ...) instead of (B, ..., D).

    Shapes: x and quantized (B, ..., D) or (B, D, ...) with any number of further dimensions; index (B, ...), int64, with heads
    (B, ..., heads); loss 0-d. State: codebook (heads, K, D / heads), counts (heads, K), sums as the codebook, float32 or
    float64 whatever the module is cast to.

    Raises ValueError for arguments out of range, heads that do not divide D, an input of another shape; TypeError for one that
    is not floating.

    Sources: van den Oord et al., "Neural Discrete Representation Learning" (2017), eq. 3 and appendix A.1; Fifty et al.,
    "Restructuring Vector Quantization with the Rotation Trick" (2024).
    """

    codebook: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor
    initialized: torch.Tensor  # 0-d bool
    steps: torch.Tensor  # 0-d int64

    def __init__(
        self,
        dim: int,
        codes: int,
        *,
        heads: int = 1,
        decay: float | None = 0.99,
        commitment: float = 0.25,
        init: str = "kmeans",
        revive_below: float | None = None,
        cosine: bool = False,
        rotation: bool = False,
        channels_first: bool = False,
    ):
        super().__init__()
        _check_arguments(dim, codes, heads, decay, init, revive_below)
        self.dim, self.codes, self.heads, self.decay, self.commitment = dim, codes, heads, decay, float(commitment)
        self.init, self.revive_below, self.cosine, self.rotation = init, revive_below, cosine, rotation
        self.channels_first = channels_first
        codebook = torch.empty(heads, codes, dim // heads).uniform_(-1 / codes, 1 / codes)
        if cosine:
            _normalize(codebook)
        if decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("counts", torch.ones(heads, codes))
            self.register_buffer("sums", codebook.clone())
            self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("initialized", torch.tensor(init == "uniform"))
        self.known = init == "uniform"  # that ``initialized`` is True: what the host knows without asking the device

    def forward(self, x: torch.Tensor) -> Triple:
        last = _channels_last(x, self.dim, self.channels_first)
        rows = self._rows(last)
        if self.training and not self.known:
            check_same_device("x", x, self.codebook, of="the codebook")
            if not rows.is_meta:
                self._initialize(rows.detach())
        parts = [self._quantize(rows[:, i], codes) for i, codes in enumerate(self._codes())]
        if self.heads == 1:
            quantized, index, loss = parts[0]
        else:
            all_quantized, all_index, losses = zip(*parts, strict=True)
            quantized, index = torch.cat(all_quantized, 1), torch.stack(all_index, 1)
            loss = torch.stack(losses).mean()
        if self.training and self.decay is not None:
            state = self.codebook, self.counts, self.sums, self.steps
            how = self.decay, self.revive_below or 0.0, self.cosine
            _update_codes(rows.detach(), index.view(-1, self.heads), *state, *how)
        quantized = quantized.to(x.dtype).view(last.shape)
        return self._as_given(quantized), self._shaped(index, last), loss

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The index of every vector of x, as forward gives it; nothing is learned."""
        last = _channels_last(x, self.dim, self.channels_first)
        return self._shaped(_lookup(self._rows(last), self._codes()), last)

    def decode(self, index: torch.Tensor) -> torch.Tensor:
        """The codes of these indices: quantized of forward, in the dtype of the codebook.

        Raises TypeError for an index that is not int64, and ValueError for one without a last dimension of heads, on another
        device or, where the values can be seen at no cost (on a CPU), with values that are no codes.
        """
        self._check_index(index)
        codebook = self._codes()
        if self.heads == 1:
            return self._as_given(codebook[0][index])
        parts = [codes[index[..., i]] for i, codes in enumerate(codebook)]
        return self._as_given(torch.cat(parts, -1))

    def usage(self, index: torch.Tensor) -> CodeUsage:
        """How evenly these indices use the codes, of this process: perplexity and share that is used, means over heads.

        Raises as ``decode`` does.
        """
        self._check_index(index)
        flat = index.reshape(-1, self.heads)
        counts = torch.zeros(self.codes, self.heads, device=index.device, dtype=torch.float64)
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float64))
        probability = counts / max(1, flat.shape[0])
        entropy = -torch.special.xlogy(probability, probability).sum(0)
        return CodeUsage(entropy.exp().mean().float(), (counts > 0).double().mean().float())

    def _check_index(self, index: torch.Tensor) -> None:
        check_codes("index", index, self.codes, self.codebook, of="the codebook")
        if self.heads > 1 and (index.ndim < 1 or index.shape[-1] != self.heads):
            raise ValueError(f"index: expected shape (..., {self.heads}), got {tuple(index.shape)}")

    def _rows(self, last: torch.Tensor) -> torch.Tensor:
        """(N, heads, d), of norm 1 where that is asked for."""
        rows = last.reshape(-1, self.heads, self.dim // self.heads)
        return F.normalize(rows.to(accumulation_dtype(rows)), dim=-1) if self.cosine else rows

    def _codes(self) -> torch.Tensor:
        """The codebook as it is used. That of moving averages is kept at norm 1."""
        return F.normalize(self.codebook, dim=-1) if self.cosine and self.decay is None else self.codebook

    def _quantize(self, rows: torch.Tensor, codes: torch.Tensor) -> Triple:
        return ops.vector_quantize(rows, codes, beta=self.commitment, codebook_loss=self.decay is None, rotation=self.rotation)

    @torch.no_grad()
    def _initialize(self, rows: torch.Tensor) -> None:
        averages = torch.zeros_like(self.codebook[..., 0]), torch.zeros_like(self.codebook)
        if self.decay is not None:
            averages = self.counts, self.sums
        _initialize_codes(rows, self.codebook.detach(), *averages, self.initialized, self.cosine)
        self.known = True

    def _shaped(self, index: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return index.view(last.shape[:-1] if self.heads == 1 else (*last.shape[:-1], self.heads))

    def _as_given(self, last: torch.Tensor) -> torch.Tensor:
        return last.movedim(-1, 1) if self.channels_first else last

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.known = False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> VectorQuantizer:
        """Half precision would stop the averages from moving: they go along to a device, but not below float32."""
        exact = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            cast = getattr(self, name)
            if torch.finfo(cast.dtype).bits < 32:
                setattr(self, name, before.to(cast.device))
        return self

    def extra_repr(self) -> str:
        parts = [f"{self.dim}, codes={self.codes}"]
        for name, default in (("heads", 1), ("decay", 0.99), ("commitment", 0.25), ("init", "kmeans"), ("revive_below", None)):
            if (value := getattr(self, name)) != default:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts + [f"{name}=True" for name in ("cosine", "rotation", "channels_first") if getattr(self, name)])


def _check_arguments(dim: int, codes: int, heads: int, decay: float | None, init: str, revive_below: float | None) -> None:
    if dim < 1 or codes < 1 or heads < 1:
        raise ValueError(f"VectorQuantizer: dim, codes and heads must be at least 1, got {dim}, {codes} and {heads}")
    if dim % heads:
        raise ValueError(f"VectorQuantizer: heads must divide dim, got {heads} heads of dim {dim}")
    if decay is not None and not 0.0 <= decay < 1.0:
        raise ValueError(f"VectorQuantizer: expected a decay from 0 to under 1, or None, got {decay}")
    if init not in INITS:
        raise ValueError(f"VectorQuantizer: unknown init {init!r}; expected one of {', '.join(map(repr, INITS))}")
    if revive_below is not None and not 0.0 < revive_below < 1.0:
        raise ValueError(f"VectorQuantizer: expected revive_below between 0 and 1, or None, got {revive_below}")
    if revive_below is not None and decay is None:
        raise ValueError("VectorQuantizer: revive_below needs the counts of moving averages; give a decay")


class ResidualVectorQuantizer(nn.Module):
    """A sum of codes, each level quantizing what the levels before it left: forward(x) -> (quantized, index, loss).

    With r_1 = x, c_l the code of level l nearest to r_l and r_(l+1) = r_l - c_l, quantized is the sum of the c_l, and loss the
    sum of the losses of the levels. The gradient of quantized passes to x once, straight or rotated, not once per level.

    Args: dim, codes; levels, how many; the others are those of ``VectorQuantizer``, for each level.

    Shapes: x and quantized (B, ..., D), or (B, D, ...) with ``channels_first``; index (B, ..., levels), int64; loss 0-d.
    Raises ValueError and TypeError as ``VectorQuantizer`` does, and ValueError for no levels.

    Source: Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec" (2021), algorithm 1.
    """

    def __init__(
        self,
        dim: int,
        codes: int,
        levels: int,
        *,
        decay: float | None = 0.99,
        commitment: float = 0.25,
        init: str = "kmeans",
        revive_below: float | None = None,
        rotation: bool = False,
        channels_first: bool = False,
    ):
        super().__init__()
        if levels < 1:
            raise ValueError(f"ResidualVectorQuantizer: levels must be at least 1, got {levels}")
        self.dim, self.rotation, self.channels_first = dim, rotation, channels_first
        how: dict[str, Any] = {"decay": decay, "commitment": commitment, "init": init, "revive_below": revive_below}
        self.levels = nn.ModuleList(VectorQuantizer(dim, codes, **how) for _ in range(levels))

    def forward(self, x: torch.Tensor) -> Triple:
        last = _channels_last(x, self.dim, self.channels_first)
        residual, total = last, torch.zeros_like(last)
        indices, losses = [], []
        for level in self.levels:
            quantized, index, loss = level(residual)
            residual, total = residual - quantized.detach(), total + quantized.detach()
            indices.append(index)
            losses.append(loss)
        quantized = pass_gradient(last, total, rotation=self.rotation)
        return self._as_given(quantized), torch.stack(indices, -1), torch.stack(losses).sum()

    def decode(self, index: torch.Tensor) -> torch.Tensor:
        """The sums of the codes of these indices, (..., levels) or, for those of the first levels alone, fewer.

        Raises TypeError and ValueError as ``VectorQuantizer.decode`` does.
        """
        first: VectorQuantizer = self.levels[0]  # type: ignore[assignment]
        check_codes("index", index, first.codes, first.codebook, of="the codebook")
        if index.ndim < 1 or not 1 <= index.shape[-1] <= len(self.levels):
            raise ValueError(f"index: expected shape (..., {len(self.levels)}) or fewer levels, got {tuple(index.shape)}")
        parts = [level.decode(i) for level, i in zip(self.levels, index.unbind(-1), strict=False)]  # type: ignore[operator]
        return self._as_given(sum(parts[1:], parts[0]))

    def _as_given(self, last: torch.Tensor) -> torch.Tensor:
        return last.movedim(-1, 1) if self.channels_first else last
