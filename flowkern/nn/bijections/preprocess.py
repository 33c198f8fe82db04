"""Elementwise scales and shifts: from data to the units a flow trains well in, and a learned diagonal scaling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..._core.checks import accumulation_dtype, has_values, host_tensor, on_host
from ..._core.state import CheckedState, require
from .bijection import Bijection, Pair


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


def _relative(x: torch.Tensor, offset: torch.Tensor, scale: torch.Tensor) -> Pair:
    """z = (x - offset) / scale: the difference comes first, and keeps the digits of values far from zero."""
    dtype = accumulation_dtype(x, scale)
    return ((x.to(dtype) - offset.to(dtype)) / scale.to(dtype)).to(x.dtype), -_log_size(scale, x)


class Interval(CheckedState, Bijection):
    """z = (x - low) / (high - low): from the interval (low, high) to (0, 1); values outside go outside.

    For data within known bounds, before an ``nn.Logit``. low and high are numbers, or tensors that broadcast to a sample; both
    are part of the state_dict. logabsdet = -sum of log(high - low) over a sample's elements, in nats. Any shape (B, ...).
    Raises ValueError unless low < high, both finite.
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, low: float | torch.Tensor, high: float | torch.Tensor):
        super().__init__()
        self.register_buffer("low", _constant("low", low))
        self.register_buffer("high", _constant("high", high))
        if has_values(self.low) and has_values(self.high):
            self.check_state({"low": self.low, "high": self.high})

    def check_state(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in state.items():
            require(value.isfinite(), name, f"finite numbers, got {value.tolist()}")
        if len(state) == 2:
            low, high = state["low"], state["high"]
            require(low < high, "low, high", f"low < high, got {low.tolist()} and {high.tolist()}")

    def _ends(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = accumulation_dtype(x, self.low)
        return self.low.to(dtype), self.high.to(dtype)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        low, high = self._ends(x)
        return _relative(x, low, high - low)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        low, high = self._ends(z)
        x = torch.lerp(low, high, z.to(low.dtype))  # exact at both ends
        return x.to(z.dtype), _log_size(high - low, z)


class Standardize(CheckedState, Bijection):
    """z = (x - mean) / scale for each column, the identity until ``fit`` has taken both from data.

    ``nn.Standardize(features).fit(data)``: each column then has mean 0 and variance 1 over the data. Both are part of the
    state_dict, and nothing else changes them. logabsdet = -sum of log(scale), in nats.

    Shapes: x and z (B, features). Raises ValueError for an input of another shape.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, features: int):
        super().__init__()
        if features < 1:
            raise ValueError(f"Standardize: features must be at least 1, got {features}")
        self.features = features
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def check_state(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in state.items():
            require(value.isfinite() & ((value > 0) | (name == "mean")), name, "finite numbers, and scales above 0")

    @torch.no_grad()
    def fit(self, x: torch.Tensor, names: Sequence[str] | None = None) -> Standardize:
        """Take the mean and the standard deviation (divided by the count) of each column of x (N, features).

        Returns the layer itself. ``names`` are those of the columns, for messages. An x that holds no values (on meta) changes
        nothing: the state is to be loaded. Raises ValueError, and changes nothing, for another shape, for fewer than two rows,
        and, with the columns, for values that are not finite and for a column that is constant, or varies by less than the
        layer's dtype resolves at its size.
        """
        self._check(x)
        if len(x) < 2:
            raise ValueError(f"Standardize: expected at least 2 rows to fit to, got {len(x)}")
        if names is not None and len(names) != self.features:
            raise ValueError(f"names: expected {self.features}, one for each column, got {len(names)}")
        if not has_values(x):
            return self
        values = x.double()
        self._refuse(~values.isfinite().all(0), names, "NaN or infinite values")
        size, limits = values.abs().amax(0), torch.finfo(self.scale.dtype)
        shares = values / size.clamp_min(torch.finfo(size.dtype).tiny)  # whose sums and squares do not overflow
        mean, scale = size * shares.mean(0), size * shares.std(0, correction=0)
        # Of equal values rounding can leave more.
        constant = (values == values[0]).all(0) | (scale <= limits.eps * size)
        self._refuse(constant, names, f"one value alone, to the digits of {self.scale.dtype}")
        self._refuse((scale < limits.tiny) | (size > limits.max), names, f"a scale that {self.scale.dtype} does not hold")
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        return self

    def _refuse(self, columns: torch.Tensor, names: Sequence[str] | None, what: str) -> None:
        if wrong := columns.nonzero().flatten().tolist():
            listed = ", ".join(str(i) if names is None else f"{i} ({names[i]!r})" for i in wrong)
            raise ValueError(f"Standardize: {what} in column{'s' * (len(wrong) > 1)} {listed}")

    def _check(self, x: torch.Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"Standardize: expected shape (B, {self.features}), got {tuple(x.shape)}")

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self._check(x)
        return _relative(x, self.mean, self.scale)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self._check(z)
        dtype = accumulation_dtype(z, self.scale)
        return torch.addcmul(self.mean.to(dtype), z.to(dtype), self.scale.to(dtype)).to(z.dtype), _log_size(self.scale, z)

    def extra_repr(self) -> str:
        return f"features={self.features}"
