"""Bijections one after the other."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from ..ops._checks import accumulation_dtype
from ._bijection import Bijection, Pair

__all__ = ["Compose"]


class Compose(Bijection):
    """z = f_n(... f_2(f_1(x))); logabsdet is the sum of theirs. The inverse runs them backwards.

    The context goes to each of them. Shapes as the first takes and the last gives.
    """

    def __init__(self, *bijections: Bijection):
        super().__init__()
        self.bijections = nn.ModuleList(bijections)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        for bijection in self.bijections:
            shape = cast(Bijection, bijection).output_shape(shape)
        return shape

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        total = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x))
        for bijection in self.bijections:
            x, logabsdet = bijection(x, context)
            total = total + logabsdet
        return x, total

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        total = z.new_zeros(z.shape[0], dtype=accumulation_dtype(z))
        for bijection in reversed(self.bijections):
            z, logabsdet = cast(Bijection, bijection).inverse(z, context)
            total = total + logabsdet
        return z, total
