"""How far rebuilt states are from the exact ones, element by element."""

import math

import torch

from ..._core.checks import accumulation_dtype

#: Samples in a spot: enough to tell the spread of each feature.
ROWS = 8

#: At most so many samples of a state, and so many places in each, tell the spreads of its features.
SAMPLES, PLACES = 16, 8

#: Fewer values than these do not tell the spread of a feature.
FEW = 4

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def drift(rebuilt: torch.Tensor, exact: torch.Tensor, bound: float, kept: float) -> float | None:
    """The largest |rebuilt - exact| / size of all elements if it is above the ``bound``, else None.

    size = max(|exact - middle|, spread, |exact| kept / bound), middle and spread those of the element's feature, an index of
    dimension 1. ``kept`` is the relative error that the dtypes at work make anyway: a feature far from zero is not asked for
    digits that they cannot hold. Samples of ``exact`` that are not finite do not count; an element that is not finite in
    ``rebuilt`` alone makes the drift infinite.
    """
    if exact.numel() == 0:
        return None
    dtype = accumulation_dtype(exact)
    rebuilt, exact = rebuilt.to(dtype), exact.to(dtype)
    if exact.ndim == 1:
        rebuilt, exact = rebuilt[:, None], exact[:, None]
    middle, spread = _middle_and_spread(exact)
    worst = torch.linalg.vector_norm(rebuilt - exact, math.inf, (0, *range(2, exact.ndim)))
    # The spread alone is the least size: most states pass by it.
    if float((worst / spread).amax()) <= bound:
        return None
    finite = exact.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        return drift(rebuilt[finite], exact[finite], bound, kept)
    middle, spread = (t.reshape(-1, *[1] * (exact.ndim - 2)) for t in (middle, _told(spread, exact)))
    size = (exact - middle).abs_().maximum(spread).maximum(exact.abs() * (kept / bound))
    found = float(((rebuilt - exact).abs_() / size.clamp_min_(torch.finfo(dtype).tiny)).amax())
    return None if found <= bound else math.inf if math.isnan(found) else found


def _middle_and_spread(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The middle of each feature's values and half the range of most, a sixteenth at either end left out: (C,) each.

    So neither a few large values nor a few in many that are not zero count. Zeros where the values are too few.
    """
    values = state[:: -(-len(state) // SAMPLES)]
    if state.ndim > 2:
        values = values.flatten(2)
        # An odd stride, so that the places are not all in one column.
        values = values[:, :, :: (values.shape[2] // PLACES) | 1].transpose(1, 2).flatten(0, 1)
    number = len(values)
    if number < FEW:
        return values.new_zeros(values.shape[1]), values.new_zeros(values.shape[1])
    values = values.sort(0).values
    return values[number // 2], (values[number - 1 - number // 16] - values[number // 16]) * 0.5


def _told(spread: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The spreads, with the typical one for features that are the same in all samples, or have too few, and tell none."""
    told = spread[spread > 0.0]
    typical = told.median() if len(told) else state.abs().median()
    return torch.where(spread > 0.0, spread, typical)


def spot(state: torch.Tensor, turn: int) -> torch.Tensor:
    """All features of at most ``ROWS`` samples, copied: of an image at one place. Each turn looks at others. (rows, features)."""
    rows, places = min(len(state), ROWS), state.shape[2:]
    starts = len(state) - rows + 1
    place, start = divmod(int(evenly(turn) * starts * math.prod(places)), starts)
    state = state[start : start + rows]
    for size in reversed(places):
        place, i = divmod(place, size)
        state = state[..., i]
    return state.reshape(rows, math.prod(state.shape[1:])).clone()  # a view would keep the whole state


def evenly(turn: int) -> float:
    """One of the numbers that fill [0, 1) evenly, in whatever steps the turns are taken."""
    return turn * GOLDEN % 1.0
