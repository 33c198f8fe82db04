"""Codebooks that learn by moving averages, alike in all processes: k-means, averages and revival."""

import torch
import torch.nn.functional as F
from torch import distributed

from ... import ops
from ..._core.code_sums import magnitudes
from ..._core.opaque import opaque
from ...ops.parts import update_averages_

_LLOYD_ITERATIONS = 10
#: Codes that one step may revive: what processes exchange for it has this many rows, whether codes are dead or not.
_REVIVED_AT_ONCE = 256

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


def normalize(codebook: torch.Tensor) -> None:
    codebook.copy_(F.normalize(codebook, dim=-1))


def lookup(rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """(N, heads) int64."""
    return torch.stack([ops.nearest_code(rows[:, i], codes)[0] for i, codes in enumerate(codebook)], 1)


def _follow(rows: torch.Tensor, index: torch.Tensor, averages: tuple[torch.Tensor, ...], decay: float, unit: bool) -> None:
    """One step of the ``averages``, codebook, counts and sums, of all heads at once: head h's code k is code h K + k."""
    codebook, counts, sums = averages
    first = torch.arange(len(codebook), device=index.device) * codebook.shape[1]
    flat = codebook.flatten(0, 1), counts.flatten(), sums.flatten(0, 1)
    update_averages_(rows.flatten(0, 1), (index + first).flatten(), *flat, decay, _reduce)
    if unit:
        normalize(codebook)


@opaque(mutates=("codebook", "counts", "sums", "initialized"))
def initialize_codes(
    rows: torch.Tensor, codebook: torch.Tensor, counts: torch.Tensor, sums: torch.Tensor, initialized: torch.Tensor, unit: bool
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
        _follow(rows, lookup(rows, codebook), (codebook, counts, sums), 0.0, unit)
    initialized.fill_(True)


@opaque(mutates=("codebook", "counts", "sums", "steps"))
def update_codes(
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
    _follow(rows, index, (codebook, counts, sums), decay, unit)
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
