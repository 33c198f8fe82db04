"""A fixed permutation of the channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..._core.checks import accumulation_dtype, has_values, host_tensor, on_host
from ..._core.state import CheckedState, require
from .bijection import Bijection, Pair


def check_order(name: str, order: torch.Tensor) -> None:
    """Raises ValueError unless ``order`` (n,) holds each of 0..n-1 once, as integers."""
    whole = not (order.is_floating_point() or order.is_complex() or order.dtype is torch.bool)
    numbers = torch.arange(len(order), device=order.device)
    require(whole and torch.equal(order.long().sort()[0], numbers), name, f"each of 0..{len(order) - 1} once")


class Permutation(CheckedState, Bijection):
    """z[:, i] = x[:, order[i]] over the channels of images (B, C, H, W) or the features of vectors (B, D); logabsdet = 0.

    The order is part of the state_dict; one that holds no values (on meta) is to come from there. Raises ValueError if
    ``order`` is not a permutation of 0..n-1, and for an input that has not n channels.
    """

    order: torch.Tensor  # (n,) int64

    def __init__(self, order: torch.Tensor | Sequence[int]):
        super().__init__()
        if isinstance(order, torch.Tensor) and not has_values(order):
            self.register_buffer("order", order.detach().clone().long())
            return
        device = order.device if isinstance(order, torch.Tensor) else None
        given = host_tensor("order", order)
        numbers = given.tolist()
        if given.ndim != 1 or given.is_floating_point() or numbers == [] or sorted(numbers) != [*range(len(numbers))]:
            raise ValueError(f"Permutation: order must hold each of 0..n-1 once, got {numbers}")
        self.register_buffer("order", torch.tensor(numbers, dtype=torch.int64, device=device))

    @classmethod
    def reverse(cls, n: int) -> Permutation:
        """n-1, ..., 1, 0."""
        with on_host():
            numbers = torch.arange(n - 1, -1, -1).tolist()
        return cls(numbers)

    @classmethod
    def random(cls, n: int, seed: int) -> Permutation:
        """The permutation that ``seed`` gives; the global random state is left alone."""
        with on_host():
            numbers = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        return cls(numbers)

    def check_state(self, state: dict[str, torch.Tensor]) -> None:
        if "order" in state:
            check_order("order", state["order"])

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
