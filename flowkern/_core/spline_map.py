"""How a network's output becomes a monotone rational-quadratic spline: ``SplineMap``."""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch

from .scale_map import softplus

__all__ = ["KINDS", "PARAM_LAYOUTS", "TAILS", "SplineMap", "check_spline", "trailing"]

#: The position in each of these tuples is the code in the kernels.
KINDS = ("zuko", "nflows", "normflows")
TAILS = ("linear", "circular", "box")
PARAM_LAYOUTS = ("trailing", "interleaved", "blocks")

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SplineMap:
    """How raw network outputs become a monotone rational-quadratic spline of K bins, which maps an interval onto itself.

    A value has K raw widths, K raw heights and the raw derivatives at the knots, in this order. With their softmax p over the
    bins, a bin has the share w of the interval, and the slope at a knot is d:

    ============================= ===================================== =====================================
    kind                          w of a raw width or height u          d of a raw derivative u
    ============================= ===================================== =====================================
    ``"zuko"``                    p(u / (1 + abs(2 u / log slope)))     exp(u / (1 + abs(u / log slope)))
    ``"nflows"``, ``"normflows"`` minimum + (1 - K minimum) p(u / divisor)  minimum + log(1 + exp(u))
    ============================= ===================================== =====================================

    ============== ================================================================ =================
    tails          outside of the interval                                          derivatives
    ============== ================================================================ =================
    ``"linear"``   the identity; the slopes at both ends are 1                      K - 1, inner knots
    ``"circular"`` the same spline again, one period further; the ends share theirs K
    ``"box"``      no density: the value as it is, log|dy / dx| = -infinity          K + 1
    ============== ================================================================ =================

    Args:
        bins: K, at least 2.
        bound: the interval: (low, high), or B for (-B, B).
        tails, kind: as above.
        min_width, min_height: the least share of a bin, of ``"nflows"`` and ``"normflows"``.
        min_derivative: the least slope at a knot, of the same kinds.
        slope: the least slope at a knot, of ``"zuko"``; the largest one is 1 / slope.
        divisor: what raw widths and heights are divided by: in nflows' layers the square root of the hidden units.

    Raises ValueError for fewer than two bins, an empty interval, an unknown name, minima that fill the interval (K minimum >= 1),
    and whatever no float32 holds.
    Source: Durkan et al., "Neural Spline Flows" (2019), eq. 4 to 8 and section 3.1; the circle: Rezende et al. (2020).
    """

    bins: int
    bound: float | tuple[float, float] = 5.0
    tails: str = "linear"
    kind: str = "zuko"
    min_width: float = 1e-3
    min_height: float = 1e-3
    min_derivative: float = 1e-3
    slope: float = 1e-3
    divisor: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.bins, int) or self.bins < 2:
            raise ValueError(f"SplineMap: bins: expected an integer of at least 2, got {self.bins!r}")
        for name, known in (("kind", KINDS), ("tails", TAILS)):
            if getattr(self, name) not in known:
                raise ValueError(f"SplineMap: {name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("min_width", "min_height", "min_derivative", "slope", "divisor"):
            object.__setattr__(self, name, float(getattr(self, name)))
        pair = isinstance(self.bound, Sequence)  # a list, where it comes from a file
        object.__setattr__(self, "bound", tuple(map(float, self.bound)) if pair else float(self.bound))  # type: ignore[arg-type]
        if pair and len(self.bound) != 2:  # type: ignore[arg-type]
            raise ValueError(f"SplineMap: bound: expected B or (low, high), got {self.bound}")
        low, high = self.interval
        if not (low < high and math.isfinite(high - low) and high - low >= torch.finfo(torch.float32).tiny):
            raise ValueError(f"SplineMap: bound: expected B > 0, or (low, high) with low < high, got {self.bound!r}")
        for name in ("min_width", "min_height"):
            if not 0.0 <= getattr(self, name) * self.bins < 1.0:
                raise ValueError(
                    f"SplineMap: {name}: expected at least 0 and less than 1 / bins = {1.0 / self.bins:g}, "
                    f"got {getattr(self, name)}"
                )
        if not 0.0 <= self.min_derivative < 1.0:
            raise ValueError(f"SplineMap: min_derivative: expected at least 0 and less than 1, got {self.min_derivative}")
        if not 1e-30 < self.slope < 1.0:
            raise ValueError(f"SplineMap: slope: expected a number between 1e-30 and 1, got {self.slope}")
        if not 1e-30 < self.divisor < 1e30:
            raise ValueError(f"SplineMap: divisor: expected a number between 1e-30 and 1e30, got {self.divisor}")
        self.__dict__["text"] = repr(astuple(self))  # no field: to compilers text is constant, and an object's numbers are not

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high)."""
        return self.bound if isinstance(self.bound, tuple) else (-self.bound, self.bound)

    @property
    def params_per_feature(self) -> int:
        """How many parameters a value takes: 3 K - 1, on the circle 3 K, in a box 3 K + 1."""
        return 3 * self.bins + TAILS.index(self.tails) - 1

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def from_text(text: str) -> SplineMap:
        """The map whose ``text`` this is."""
        return SplineMap(*ast.literal_eval(text))

    @functools.cached_property
    def constants(self) -> tuple[int, int, int, float, float, float, float, float, float, float]:
        """For the kernels: bins, tails and kind as codes, low, high, the three minima, log slope and the divisor, both inverted.

        The two kinds with minima are one code. Factors stand for quotients.
        """
        low, high = self.interval
        minima = (self.min_width, self.min_height, self.min_derivative)
        kind = min(KINDS.index(self.kind), 1)
        return self.bins, TAILS.index(self.tails), kind, low, high, *minima, 1.0 / abs(math.log(self.slope)), 1.0 / self.divisor

    def shares(self, u: torch.Tensor, minimum: float) -> torch.Tensor:
        """w of raw widths or heights, along the last dimension."""
        if self.kind == "zuko":
            return torch.softmax(_soft_clip(u, 2.0 / abs(math.log(self.slope))), -1)
        return minimum + (1.0 - self.bins * minimum) * torch.softmax(u / self.divisor, -1)

    def slopes(self, u: torch.Tensor) -> torch.Tensor:
        """d of the raw derivatives, with those of the ends: K + 1 along the last dimension."""
        if self.kind == "zuko":
            d = torch.exp(_soft_clip(u, 1.0 / abs(math.log(self.slope))))
        else:
            d = self.min_derivative + softplus(u)
        if self.tails == "linear":
            end = torch.ones_like(d[..., :1])
            return torch.cat([end, d, end], -1)
        return torch.cat([d, d[..., :1]], -1) if self.tails == "circular" else d

    def __call__(self, x: torch.Tensor, params: torch.Tensor, bounds: torch.Tensor | None, inverse: bool) -> Pair:
        """(y, log|dy / dx|) of every element of x, differentiable any number of times; params (*x.shape, P).

        ``bounds`` is None, or what broadcasts against (*x.shape, 2): low and high of each element.
        """
        low, high = (
            (torch.full((), v, dtype=x.dtype, device=x.device) for v in self.interval) if bounds is None else bounds.unbind(-1)
        )
        inside = x.isfinite() if self.tails == "circular" else (x >= low) & (x <= high)
        place = torch.where(inside, x - low, 0.0) / (high - low)  # infinity would meet a zero in the gradient
        turns = place.detach().floor() if self.tails == "circular" else torch.zeros_like(place)
        parts = params.split([self.bins, self.bins, params.shape[-1] - 2 * self.bins], -1)
        widths, heights = self.shares(parts[0], self.min_width), self.shares(parts[1], self.min_height)
        place, log_slope = _spline(_unit(place - turns), widths, heights, self.slopes(parts[2]), inverse)
        y = low + (high - low) * (_unit(place) + turns)
        if self.tails != "circular":
            y = y + (torch.minimum(torch.maximum(y, low), high) - y).detach()  # rounding may lead out
        nan = x.detach().isnan()
        without = torch.full_like(log_slope, -math.inf if self.tails == "box" else 0.0).masked_fill(nan, math.nan)
        return torch.where(inside, y, x), torch.where(inside, log_slope, without)


def _soft_clip(u: torch.Tensor, inverse_limit: float) -> torch.Tensor:
    """u / (1 + abs(u) * inverse_limit): an infinite u goes to the limit too."""
    most = 1e300 if u.dtype is torch.float64 else 1e30
    u = u.clamp(-most, most)
    return u / (1.0 + u.abs() * inverse_limit)


def _unit(value: torch.Tensor) -> torch.Tensor:
    """A value of the unit interval that rounding may have led out of it; the gradient passes."""
    return value + (value.clamp(0.0, 1.0) - value).detach()


def _spline(place: torch.Tensor, widths: torch.Tensor, heights: torch.Tensor, slopes: torch.Tensor, inverse: bool) -> Pair:
    """The spline of the unit interval at ``place``, and the logarithm of its slope.

    At a knot the bin on its right counts. In the inverse the root of the quadratic is in a form where nothing cancels: what
    stands under the root is a sum of squares.
    """
    sides = heights if inverse else widths
    inner = sides.detach().cumsum(-1)[..., :-1]
    bin_ = (place.detach().unsqueeze(-1) >= inner).sum(-1, keepdim=True)

    def of_bin(shares: torch.Tensor) -> Pair:
        start = torch.nn.functional.pad(shares.cumsum(-1), (1, 0))
        return start.gather(-1, bin_).squeeze(-1), shares.gather(-1, bin_).squeeze(-1)

    (left, width), (bottom, height) = of_bin(widths), of_bin(heights)
    d_0, d_1 = (slopes.gather(-1, i).squeeze(-1) for i in (bin_, bin_ + 1))
    s = height / width
    start, size = (bottom, height) if inverse else (left, width)
    # In the last bin by the distance from the end of the interval, where the sum of all shares may be off.
    last = bin_.squeeze(-1) == widths.shape[-1] - 1
    t = _unit(torch.where(last, 1.0 - place, place - start) / size)
    t, u = torch.where(last, 1.0 - t, t), torch.where(last, t, 1.0 - t)
    if inverse:
        r = d_0 - t * (d_0 + d_1)
        square = 4.0 * s * s * t * u
        root = (r * r + square).sqrt()
        positive = r >= 0.0
        both = root + torch.where(positive, r, -r)
        t = 2.0 * s * t / (2.0 * s * t + torch.where(positive, both, square / both))
        u = 1.0 - t
    q = t * u
    denominator = s + (d_0 + d_1 - 2.0 * s) * q
    mean = d_1 * t * t + 2.0 * s * q + d_0 * u * u
    log_slope = (mean * (s / denominator)).log() + (s / denominator).log()
    if inverse:
        return left + width * t, -log_slope
    return bottom + height * (s * t * t + d_0 * q) / denominator, log_slope


def trailing(params: torch.Tensor, layout: str, per_value: int) -> torch.Tensor:
    """A view of ``params`` with the parameters of a value, so many, along a last dimension."""
    if layout == "trailing":
        return params
    channels = params.shape[1] // per_value
    if layout == "interleaved":
        return params.unflatten(1, (channels, per_value)).movedim(2, -1)
    return params.unflatten(1, (per_value, channels)).movedim(1, -1)


def check_spline(spline: SplineMap) -> None:
    """Raises TypeError for anything but a ``SplineMap``."""
    if not isinstance(spline, SplineMap):
        raise TypeError(f"spline: expected an ops.SplineMap, such as SplineMap(8), got {spline!r}")
