"""The multi-scale architecture: half of the channels leave after each level."""

import math
from typing import cast

import torch
from torch import nn
from torch.distributions import constraints

from ..._core.checks import accumulation_dtype
from .bijection import Bijection, Pair, Run, outermost, run


class MultiScale(Bijection):
    """Levels of bijections on images; after each level but the last, the last C // 2 channels leave as latents.

    (h_i, z_i) = f_i(h_{i-1}), h_0 = x, z_L = f_L(h_{L-1}); z is z_1, ..., z_L, flattened; logabsdet the sum of the levels'.

    Args:
        levels: the bijections f_1, ..., f_L.
        shape: (C, H, W) of x.

    Shapes: x (B, C, H, W), z (B, C H W), logabsdet (B,) in nats.
    Raises ValueError for no level, for a level that leaves fewer than two channels to share, and for inputs of another shape.

    Source: Dinh et al., "Density estimation using Real NVP" (2017), eq. 13 to 16.
    """

    def __init__(self, *levels: Bijection, shape: tuple[int, int, int]):
        super().__init__()
        if not levels:
            raise ValueError("MultiScale: expected at least one level")
        self.levels = nn.ModuleList(levels)
        self.shape: tuple[int, ...] = tuple(shape)
        self.latent_shapes: list[tuple[int, ...]] = []
        stays = self.shape
        for i, level in enumerate(levels, 1):
            channels, *sides = level.output_shape(stays)
            leave = channels if i == len(levels) else channels // 2
            if leave < 1:
                raise ValueError(f"MultiScale: level {i} gives {channels} channel, but half of them must leave; squeeze first")
            self.latent_shapes.append((leave, *sides))
            stays = (channels - leave, *sides)

    @property
    def domain(self) -> constraints.Constraint | None:  # type: ignore[override]
        return outermost(cast(Bijection, level).domain for level in self.levels)

    @property
    def codomain(self) -> constraints.Constraint | None:  # type: ignore[override]
        return outermost([constraints.real, *(cast(Bijection, level).codomain for level in self.levels)])

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if tuple(shape) != self.shape:
            raise ValueError(f"MultiScale: expected images of shape {self.shape}, got {tuple(shape)}")
        return (math.prod(self.shape),)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self._forward(x, context, lambda level, h, c: run(level, h, c, inverse=False))

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self._inverse(z, context, lambda level, h, c: run(level, h, c, inverse=True))

    def walk(self, x: torch.Tensor, context: torch.Tensor | None, inverse: bool, run: Run) -> Pair:
        """``forward`` or ``inverse`` with ``run`` in place of each level's own."""
        return (self._inverse if inverse else self._forward)(x, context, run)

    def _forward(self, x: torch.Tensor, context: torch.Tensor | None, run: Run) -> Pair:
        self.output_shape(x.shape[1:])
        total = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x))
        latents = []
        for level, latent in zip(self.levels, self.latent_shapes, strict=True):
            x, logabsdet = run(cast(Bijection, level), x, context)
            total = total + logabsdet
            stays = x.shape[1] - latent[0]
            latents.append(x[:, stays:].flatten(1))
            x = x[:, :stays]
        return torch.cat(latents, 1), total

    def _inverse(self, z: torch.Tensor, context: torch.Tensor | None, run: Run) -> Pair:
        if z.shape[1:] != (math.prod(self.shape),):
            raise ValueError(f"MultiScale: expected latents (B, {math.prod(self.shape)}), got shape {tuple(z.shape)}")
        total = z.new_zeros(z.shape[0], dtype=accumulation_dtype(z))
        latents = z.split([math.prod(s) for s in self.latent_shapes], 1)
        x: torch.Tensor | None = None
        for level, latent, shape in zip(reversed(self.levels), reversed(latents), reversed(self.latent_shapes), strict=True):
            image = latent.unflatten(1, shape)
            x, logabsdet = run(cast(Bijection, level), image if x is None else torch.cat([x, image], 1), context)
            total = total + logabsdet
        return cast(torch.Tensor, x), total

    def extra_repr(self) -> str:
        return f"shape={self.shape}"
