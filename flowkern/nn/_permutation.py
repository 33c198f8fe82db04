"""A fixed permutation of the channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops._checks import accumulation_dtype
from ._bijection import Bijection, Pair

__all__ = ["Permutation"]


class Permutation(Bijection):
    """z[:, i] = x[:, order[i]] over the channels of images (B, C, H, W) or the features of vectors (B, D); logabsdet = 0.

    The order is part of the state_dict. Raises ValueError if ``order`` is not a permutation of 0..n-1, and for an
    input that has not n channels.
    """

    order: torch.Tensor  # (n,) int64

    def __init__(self, order: torch.Tensor | Sequence[int]):
        super().__init__()
        order = torch.as_tensor(order).detach().clone()
        if order.ndim != 1 or order.is_floating_point() or order.tolist() == [] or sorted(order.tolist()) != [*range(len(order))]:
            raise ValueError(f"Permutation: order must hold each of 0..n-1 once, got {order.tolist()}")
        self.register_buffer("order", order.long())

    @classmethod
    def reverse(cls, n: int) -> Permutation:
        """n-1, ..., 1, 0."""
        return cls(range(n - 1, -1, -1))

    @classmethod
    def random(cls, n: int, seed: int) -> Permutation:
        """The permutation that ``seed`` gives; the global random state is left alone."""
        return cls(torch.randperm(n, generator=torch.Generator().manual_seed(seed)))

    def _check(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim < 2 or x.shape[1] != len(self.order):
            raise ValueError(f"Permutation: expected an input with {len(self.order)} channels, got shape {tuple(x.shape)}")
        return x.new_zeros(x.shape[0], dtype=accumulation_dtype(x))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        logabsdet = self._check(x)
        return x.index_select(1, self.order), logabsdet

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        logabsdet = self._check(z)
        return z.index_copy(1, self.order, z), logabsdet

    def extra_repr(self) -> str:
        return f"channels={len(self.order)}"
