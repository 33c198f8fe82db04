"""``Bijection``: what every invertible layer answers."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Bijection", "Pair"]

Pair = tuple[torch.Tensor, torch.Tensor]


class Bijection(nn.Module):
    """An invertible layer; derive from it to write your own.

    ``forward(x, context=None) -> (z, logabsdet)`` runs data to latent and ``inverse(z, context=None) -> (x, logabsdet)``
    back. ``logabsdet`` is log|det d out / d in| of the direction called: shape (B,), in nats, float64 if the input is,
    else float32. ``context`` is None or a (B, K) tensor; layers without parameters to condition ignore it.
    """

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of z without its batch dimension, for an x of that ``shape``. Raises ValueError if x does not fit."""
        return shape
