"""Layers that move values and change none: permutations of the channels, space to channels, and images to vectors."""

from __future__ import annotations

import math
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


class Squeeze(Bijection):
    """(B, C, H, W) -> (B, C f^2, H/f, W/f): each f x f block of pixels becomes channels; logabsdet = 0.

    Channel c f^2 + i f + j of the output holds pixel (i, j) of the blocks of channel c, the order of
    ``torch.nn.functional.pixel_unshuffle``. An input with its channels innermost (channels_last) gives such an output.
    Raises ValueError for inputs that are not images or do not divide.

    Source: Dinh et al., "Density estimation using Real NVP" (2017), section 3.6.
    """

    def __init__(self, factor: int = 2):
        super().__init__()
        if factor < 1:
            raise ValueError(f"Squeeze: factor must be at least 1, got {factor}")
        self.factor = factor

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        f = self.factor
        if len(shape) != 3 or shape[1] % f or shape[2] % f:
            raise ValueError(f"Squeeze: expected images (C, H, W) with H and W divisible by {f}, got {tuple(shape)}")
        return shape[0] * f * f, shape[1] // f, shape[2] // f

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        # Not F.pixel_unshuffle, which returns an empty batch in its old shape.
        (c, h, w), f = self.output_shape(x.shape[1:]), self.factor
        blocks = x.unflatten(2, (h, f)).unflatten(4, (w, f))
        if x.stride(1) == 1:
            z = blocks.permute(0, 2, 4, 1, 3, 5).reshape(x.shape[0], h, w, c).permute(0, 3, 1, 2)
        else:
            z = blocks.permute(0, 1, 3, 5, 2, 4).reshape(x.shape[0], c, h, w)
        return z, x.new_zeros(x.shape[0], dtype=accumulation_dtype(x))

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        if z.ndim != 4 or z.shape[1] % self.factor**2:
            raise ValueError(f"Squeeze: expected (B, C, H, W) with C divisible by {self.factor**2}, got shape {tuple(z.shape)}")
        (b, c, h, w), f = z.shape, self.factor
        blocks = z.unflatten(1, (c // f**2, f, f))
        if z.stride(1) == 1:
            x = blocks.permute(0, 4, 2, 5, 3, 1).reshape(b, h * f, w * f, c // f**2).permute(0, 3, 1, 2)
        else:
            x = blocks.permute(0, 1, 4, 2, 5, 3).reshape(b, c // f**2, h * f, w * f)
        return x, z.new_zeros(z.shape[0], dtype=accumulation_dtype(z))

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class Flatten(Bijection):
    """(B, *shape) -> (B, D), row by row; logabsdet = 0. Raises ValueError for another shape."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = tuple(shape)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if tuple(shape) != self.shape:
            raise ValueError(f"Flatten: expected shape {self.shape}, got {tuple(shape)}")
        return (math.prod(self.shape),)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self.output_shape(x.shape[1:])
        return x.flatten(1), x.new_zeros(x.shape[0], dtype=accumulation_dtype(x))

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        if z.shape[1:] != (math.prod(self.shape),):
            raise ValueError(f"Flatten: expected (B, {math.prod(self.shape)}), got shape {tuple(z.shape)}")
        return z.unflatten(1, self.shape), z.new_zeros(z.shape[0], dtype=accumulation_dtype(z))

    def extra_repr(self) -> str:
        return f"shape={self.shape}"
