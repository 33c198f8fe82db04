"""Functions of single values from the real line onto an interval, and back: exp, softplus, tanh and, back first, logit."""

import math

import torch
import torch.nn.functional as F
from torch.distributions import constraints

from ..._core.checks import accumulation_dtype
from .bijection import Bijection, Pair


class _Onto(Bijection):
    """An increasing function from the real line onto the open interval (``low``, ``high``), for each value alone.

    What it gives lies inside the interval, as the dtype has it: it is never rounded to an end. A value outside that is to be
    taken back has no density: its sample's logabsdet is -inf, and ``inside`` stands for it, so that what follows is finite.
    """

    low, high, inside = -math.inf, math.inf, 0.0

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """The interval: the ``domain`` of the way back."""
        return constraints.interval(self.low, self.high)

    def limits(self, dtype: torch.dtype) -> tuple[float, float]:
        """The smallest and the largest value that the function gives in a dtype."""
        raise NotImplementedError

    def function(self, v: torch.Tensor) -> Pair:
        """Of each v the function's value, and the logarithm of its derivative."""
        raise NotImplementedError

    def inverse_function(self, y: torch.Tensor) -> Pair:
        """Of each y in the interval the v that it is the value of, and the logarithm of dv / dy."""
        raise NotImplementedError

    def onto(self, v: torch.Tensor) -> Pair:
        y, slope = self.function(v.to(accumulation_dtype(v)))
        return y.clamp(*self.limits(v.dtype)).to(v.dtype), slope.flatten(1).sum(1)

    def back(self, y: torch.Tensor) -> Pair:
        wide = y.to(accumulation_dtype(y))
        outside = (wide <= self.low) | (wide >= self.high)
        # No masked_fill, which loses the memory format.
        v, slope = self.inverse_function(torch.where(outside, self.inside, wide))
        return v.to(y.dtype), torch.where(outside, -math.inf, slope).flatten(1).sum(1)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.onto(x)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.back(z)


class _Positive(_Onto):
    low, inside = 0.0, 1.0
    codomain = constraints.positive

    def limits(self, dtype: torch.dtype) -> tuple[float, float]:
        return torch.finfo(dtype).tiny, torch.finfo(dtype).max


class Exp(_Positive):
    """z = exp(x); logabsdet = sum of x, in nats. Any shape (B, ...).

    Data that is positive takes it the other way round, ``nn.Inverse(nn.Exp())``: z = log x. There, as in ``inverse``, a value
    of 0 or less gives its sample a logabsdet of -inf.
    """

    def function(self, v: torch.Tensor) -> Pair:
        # Short of overflow, where the gradient would be infinite.
        return v.clamp_max(math.log(torch.finfo(v.dtype).max) - 1e-5).exp(), v

    def inverse_function(self, y: torch.Tensor) -> Pair:
        v = y.log()
        return v, -v


class Softplus(_Positive):
    """z = log(1 + exp(x)); logabsdet = sum of -log(1 + exp(-x)), in nats. Any shape (B, ...).

    Data that is positive takes it the other way round, ``nn.Inverse(nn.Softplus())``, which leaves large values nearly as they
    are. There, as in ``inverse``, a value of 0 or less gives its sample a logabsdet of -inf.
    """

    def function(self, v: torch.Tensor) -> Pair:
        # F.softplus and its gradient are cut off above 20, too early for float64.
        return torch.logaddexp(v, torch.zeros_like(v)), F.logsigmoid(v)

    def inverse_function(self, y: torch.Tensor) -> Pair:
        # v = log(exp(y) - 1) = y + log(1 - exp(-y)), which neither overflows nor cancels.
        log_share = torch.log(-torch.expm1(-y))
        return y + log_share, -log_share


class Tanh(_Onto):
    """z = tanh(x); logabsdet = sum of log(1 - z^2), in nats: exact for any x. Any shape (B, ...).

    Data in (-1, 1) takes it the other way round, ``nn.Inverse(nn.Tanh())``. There, as in ``inverse``, a value outside gives its
    sample a logabsdet of -inf.
    """

    low, high = -1.0, 1.0

    def limits(self, dtype: torch.dtype) -> tuple[float, float]:
        most = 1.0 - 0.5 * torch.finfo(dtype).eps
        return -most, most

    def function(self, v: torch.Tensor) -> Pair:
        size = v.abs()
        return v.tanh(), 2.0 * (math.log(2.0) - size - torch.log1p(torch.exp(-2.0 * size)))

    def inverse_function(self, y: torch.Tensor) -> Pair:
        above, below = torch.log1p(y), torch.log1p(-y)
        return 0.5 * (above - below), -(above + below)


class Logit(_Onto):
    """z = logit(alpha + (1 - 2 alpha) x) for x in [0, 1]; alpha > 0 keeps the ends finite.

    ``domain`` is all x that the logit has a value for, a margin of alpha / (1 - 2 alpha) on both sides included.
    logabsdet = sum of log(1 - 2 alpha) + softplus(z) + softplus(-z), in nats: exact for any z. Any shape (B, ...).
    Raises ValueError unless 0 <= alpha < 0.5.

    Source: Dinh et al., "Density estimation using Real NVP" (2017), section 4.1; the published code keeps both ends off.
    """

    inside = 0.5
    domain = _Onto.codomain
    codomain = constraints.real

    def __init__(self, alpha: float = 0.05):
        super().__init__()
        if not 0.0 <= alpha < 0.5:
            raise ValueError(f"Logit: alpha must lie in [0, 0.5), got {alpha}")
        self.alpha = float(alpha)
        self.span = 1.0 - 2.0 * self.alpha
        self.low, self.high = -self.alpha / self.span, 1.0 + self.alpha / self.span

    def limits(self, dtype: torch.dtype) -> tuple[float, float]:
        eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        return (tiny, 1.0 - 0.5 * eps) if self.alpha == 0.0 else (self.low * (1.0 - 2.0 * eps), self.high * (1.0 - 2.0 * eps))

    def _slope(self, z: torch.Tensor) -> torch.Tensor:
        # softplus(z) + softplus(-z) written in |z|, which neither overflows nor cancels.
        size = z.abs()
        return size + 2.0 * torch.log1p(torch.exp(-size)) + math.log1p(-2.0 * self.alpha)

    def function(self, v: torch.Tensor) -> Pair:
        return (torch.sigmoid(v) - self.alpha) / self.span, -self._slope(v)

    def inverse_function(self, y: torch.Tensor) -> Pair:
        # Both distances to the ends are exact up to rounding: 1 - x is, where x is near 1.
        least = self.alpha * torch.finfo(y.dtype).eps
        below, above = ((self.alpha + self.span * d).clamp_min(least) for d in (y, 1.0 - y))
        z = torch.log(below) - torch.log(above)
        return z, self._slope(z)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.back(x)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.onto(z)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
