"""Flows as distributions of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.distributions import Distribution, constraints

from ..bijections.bijection import outermost

if TYPE_CHECKING:
    from .flow import Flow


def broadcast(*shapes: torch.Size) -> torch.Size | None:
    """The shape that they broadcast to, or None."""
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None


class FlowDistribution(Distribution):
    """The density of a flow, given a context or none, as a ``torch.distributions.Distribution``.

    ``flow.condition(context)`` and ``flow.distribution()`` make it. It holds the flow, not a copy: it follows its training.
    ``event_shape`` is the shape of a sample, ``batch_shape`` the leading dimensions of the context (..., K).

    Args:
        flow: an ``nn.Flow``.
        context: (..., K), or None.
        validate_args: whether ``log_prob`` raises ValueError for values outside of the support, as torch's distributions do.
            By default they have log-probability -inf.

    Raises ValueError where the shape of a sample is not known.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, flow: Flow, context: torch.Tensor | None = None, validate_args: bool | None = None):
        if not flow.shape:
            raise ValueError("shape: the bijection changes it, so that of a sample must be said: nn.Flow(..., shape=...)")
        self.flow, self.context = flow, context
        batch = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch, torch.Size(flow.shape), validate_args=bool(validate_args))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.flow, new.context = self.flow, None if self.context is None else self.context.expand(*batch_shape, -1)
        super(FlowDistribution, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.flow.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        """What x can be. Raises NotImplementedError where that is not known."""
        known = outermost(
            getattr(part, name, None) for part, name in ((self.flow.bijection, "domain"), (self.flow.base, "support"))
        )
        if known is None:
            raise NotImplementedError("support: not known of this flow")
        return constraints.independent(known, len(self.event_shape))

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """log p(value), in nats: value (..., *event_shape) -> (...), its leading dimensions broadcast with ``batch_shape``.

        Raises ValueError for another shape, TypeError for no tensor.
        """
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"value: expected a tensor, got {type(value).__name__}")
        if self._validate_args:
            self._validate_sample(value)
        leading = value.shape[: value.ndim - len(self.event_shape)]
        shape = broadcast(leading, self.batch_shape)
        if shape is None or value.shape[len(leading) :] != self.event_shape:
            expected = f"event_shape {tuple(self.event_shape)} after what broadcasts with batch_shape {tuple(self.batch_shape)}"
            raise ValueError(f"value: expected {expected}, got {tuple(value.shape)}")
        return self.flow.log_prob(value, self.context).expand(shape)

    def sample(self, sample_shape: Sequence[int] = torch.Size(), generator: torch.Generator | None = None) -> torch.Tensor:
        """(*sample_shape, *batch_shape, *event_shape), without gradients; ``generator`` is that of ``nn.Flow.sample``."""
        return self._drawn(self.flow.sample, sample_shape, generator).view(self._extended_shape(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Sequence[int] = torch.Size(), generator: torch.Generator | None = None) -> torch.Tensor:
        """As ``sample``, differentiable in the parameters and the context. Raises NotImplementedError unless ``has_rsample``."""
        return self._drawn(self.flow.rsample, sample_shape, generator).view(self._extended_shape(torch.Size(sample_shape)))

    def sample_and_log_prob(
        self, sample_shape: Sequence[int] = torch.Size(), generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, log_prob(x)) as ``rsample`` draws x, from one pass of the flow."""
        x, log_prob = self._drawn(self.flow.sample_and_log_prob, sample_shape, generator)
        leading = torch.Size(sample_shape) + self.batch_shape
        return x.view(leading + self.event_shape), log_prob.view(leading)

    def _drawn(self, draw: Callable[..., Any], sample_shape: Sequence[int], generator: torch.Generator | None) -> Any:
        """What the flow draws, n samples for each context if there is one."""
        shape = torch.Size(sample_shape)
        if self.context is None:
            return draw((shape + self.batch_shape).numel(), generator=generator)
        return draw(shape.numel(), self.context, per_context=True, generator=generator)

    def __repr__(self) -> str:
        return f"FlowDistribution({type(self.flow).__name__}, batch_shape={self.batch_shape}, event_shape={self.event_shape})"
