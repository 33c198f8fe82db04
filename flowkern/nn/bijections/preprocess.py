"""Elementwise bijections: from data to the units a flow trains well in, and a learned diagonal scaling."""

import math

import torch
from torch import nn
from torch.distributions import constraints

from ..._core.checks import accumulation_dtype, has_values, host_tensor, on_host
from ..._core.state import CheckedState, require
from .bijection import Bijection, Pair


class Logit(Bijection):
    """z = logit(alpha + (1 - 2 alpha) x) for x in [0, 1]; alpha > 0 keeps the ends finite.

    ``domain`` is all x that the logit has a value for, a margin of alpha / (1 - 2 alpha) on both sides included.
    logabsdet = sum of log(1 - 2 alpha) + softplus(z) + softplus(-z), in nats: exact for any z. Any shape (B, ...).
    Raises ValueError unless 0 <= alpha < 0.5.

    Source: Dinh et al., "Density estimation using Real NVP" (2017), section 4.1; the published code keeps both ends off.
    """

    def __init__(self, alpha: float = 0.05):
        super().__init__()
        if not 0.0 <= alpha < 0.5:
            raise ValueError(f"Logit: alpha must lie in [0, 0.5), got {alpha}")
        self.alpha = float(alpha)

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        margin = self.alpha / (1.0 - 2.0 * self.alpha)
        return constraints.interval(-margin, 1.0 + margin)

    def _logabsdet(self, z: torch.Tensor) -> torch.Tensor:
        # softplus(z) + softplus(-z) written in |z|, which neither overflows nor cancels.
        size = z.abs()
        slope = size + 2.0 * torch.log1p(torch.exp(-size)) + math.log1p(-2.0 * self.alpha)
        return slope.flatten(1).sum(1)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        wide = x.to(accumulation_dtype(x))
        span = 1.0 - 2.0 * self.alpha
        # Both distances to the ends are exact up to rounding: 1 - x is, where x is near 1.
        below, above = self.alpha + span * wide, self.alpha + span * (1.0 - wide)
        outside = torch.minimum(below, above) <= 0.0
        z = torch.log(torch.where(outside, 0.5, below)) - torch.log(torch.where(outside, 0.5, above))
        return z.to(x.dtype), self._logabsdet(z).masked_fill(outside.flatten(1).any(1), -math.inf)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        wide = z.to(accumulation_dtype(z))
        x = (torch.sigmoid(wide) - self.alpha) / (1.0 - 2.0 * self.alpha)
        return x.to(z.dtype), -self._logabsdet(wide)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


def _log_size(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The sum of log|scale|, broadcast to a sample of x, for each sample: (B,)."""
    per_element = scale.to(accumulation_dtype(x)).abs().log().expand(x.shape[1:])
    return per_element.sum().expand(x.shape[0])


def _constant(name: str, value: float | torch.Tensor, nonzero: bool = False) -> torch.Tensor:
    """``value`` in the default dtype, as a tensor of its own; one that holds no values (on meta) is to be loaded."""
    dtype = torch.get_default_dtype()
    if isinstance(value, torch.Tensor) and not has_values(value):
        return value.detach().to(dtype, copy=True)
    given = host_tensor(name, value)
    with on_host():
        given = given.to(dtype)
        if nonzero and not bool((given.isfinite() & (given != 0)).all()):
            raise ValueError(f"Rescale: {name} must be finite and not zero, got {value}")
        numbers = given.tolist()
    return torch.tensor(numbers, dtype=dtype, device=value.device if isinstance(value, torch.Tensor) else None)


class Rescale(CheckedState, Bijection):
    """z = scale * x + shift with constants: numbers, or tensors that broadcast to a sample.

    logabsdet = sum of log|scale| over a sample's elements, in nats. Any shape (B, ...).
    Both are part of the state_dict. Raises ValueError for a scale that is zero or not finite.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, scale: float | torch.Tensor, shift: float | torch.Tensor = 0.0):
        super().__init__()
        self.register_buffer("scale", _constant("scale", scale, nonzero=True))
        self.register_buffer("shift", _constant("shift", shift))

    def check_state(self, state: dict[str, torch.Tensor]) -> None:
        if "scale" in state:
            require(state["scale"].isfinite() & (state["scale"] != 0), "scale", "finite numbers that are not 0")

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return (x * self.scale + self.shift).to(x.dtype), _log_size(self.scale, x)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return ((z - self.shift) / self.scale).to(z.dtype), -_log_size(self.scale, z)


class Scaling(Bijection):
    """z = x * exp(log_scale) with a learned ``log_scale`` of the given shape, zero at first.

    logabsdet = sum of log_scale, in nats. Shapes: x and z (B, *shape).

    Source: Dinh, Krueger and Bengio, "NICE: Non-linear Independent Components Estimation" (2015), section 3.3.
    """

    def __init__(self, shape: int | tuple[int, ...]):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def _logabsdet(self, x: torch.Tensor) -> torch.Tensor:
        return self.log_scale.to(accumulation_dtype(x)).sum().expand(x.shape[0])

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return (x * self.log_scale.exp()).to(x.dtype), self._logabsdet(x)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return (z * (-self.log_scale).exp()).to(z.dtype), -self._logabsdet(z)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.log_scale.shape)}"
