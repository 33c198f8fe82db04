"""A bijection the other way round."""

import torch
from torch.distributions import constraints

from .bijection import Bijection, Pair, Replay


class Inverse(Bijection):
    """z = bijection^-1(x), and the inverse is the bijection itself.

    Shapes, context and errors are those of the bijection; TypeError for what is none. One that changes the shape of a sample
    cannot say here what it changes it to: ``output_shape`` raises ValueError.
    """

    def __init__(self, bijection: Bijection):
        super().__init__()
        if not isinstance(bijection, Bijection):
            raise TypeError(f"bijection: expected a Bijection, got {type(bijection).__name__}")
        self.bijection = bijection

    @property
    def domain(self) -> constraints.Constraint | None:  # type: ignore[override]
        return self.bijection.codomain

    @property
    def codomain(self) -> constraints.Constraint | None:  # type: ignore[override]
        return self.bijection.domain

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.bijection.inverse(x, context)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.bijection(z, context)

    def backward_step(self, y: torch.Tensor, context: torch.Tensor | None, replay: Replay, inverse: bool = False) -> torch.Tensor:
        return self.bijection.backward_step(y, context, replay, not inverse)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if (came := self.bijection.output_shape(shape)) != shape:
            raise ValueError(f"Inverse: expected a bijection that keeps shapes, got one that makes {came} of {tuple(shape)}")
        return shape
