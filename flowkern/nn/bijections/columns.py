"""Bijections of some columns of a table."""

from collections.abc import Iterable, Mapping
from operator import index
from typing import Any, cast

import torch
from torch import nn
from torch.distributions import constraints

from ..._core.checks import accumulation_dtype
from .bijection import Bijection, Pair, outermost, run


class Columns(Bijection):
    """Each bijection on columns of its own, and z = x on the others; logabsdet is the sum of theirs.

    ``nn.Columns({0: nn.Logit(), (2, 5): nn.Inverse(nn.Softplus())})`` takes column 0 by one bijection and columns 2 and 5, as
    (B, 2), by the other. The context goes to each of them.

    Args:
        bijections: of a column, counted from 0, or of several, a tuple of them or a range.

    Shapes: x and z (B, D), logabsdet (B,) in nats. Raises TypeError for columns that are no integers and for what is no
    ``Bijection``; ValueError for a negative column, for one that is named twice, for a table that has not the columns, and for
    a bijection that gives another number of columns than it takes.
    """

    def __init__(self, bijections: Mapping[Any, Bijection]):
        super().__init__()
        self.columns = [_numbers(key) for key in bijections]
        named = [column for group in self.columns for column in group]
        if twice := sorted({column for column in named if named.count(column) > 1}):
            raise ValueError(f"Columns: column {twice[0]} is named twice")
        for group, bijection in zip(self.columns, bijections.values(), strict=True):
            if not isinstance(bijection, Bijection):
                raise TypeError(f"Columns: expected a Bijection for {_named(group)}, got {type(bijection).__name__}")
        self.bijections = nn.ModuleList(bijections.values())
        self._last = max(named, default=-1)

    @property
    def domain(self) -> constraints.Constraint | None:  # type: ignore[override]
        """The whole real line, or not known: columns differ."""
        return outermost([constraints.real, *(cast(Bijection, b).domain for b in self.bijections)])

    @property
    def codomain(self) -> constraints.Constraint | None:  # type: ignore[override]
        return outermost([constraints.real, *(cast(Bijection, b).codomain for b in self.bijections)])

    def _run(self, x: torch.Tensor, context: torch.Tensor | None, inverse: bool) -> Pair:
        if x.ndim != 2 or x.shape[1] <= self._last:
            raise ValueError(f"Columns: expected (B, D) with column {self._last}, got shape {tuple(x.shape)}")
        total = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x))
        columns = list(x.split(1, 1))
        for group, bijection in zip(self.columns, self.bijections, strict=True):
            y, logabsdet = run(cast(Bijection, bijection), torch.cat([columns[c] for c in group], 1), context, inverse)
            if y.ndim != 2 or y.shape[1] != len(group):
                raise ValueError(f"Columns: the bijection of {_named(group)} makes {tuple(y.shape)} of (B, {len(group)})")
            for c, mapped in zip(group, y.split(1, 1), strict=True):
                columns[c] = mapped
            total = total + logabsdet
        return torch.cat(columns, 1), total

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self._run(x, context, inverse=False)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self._run(z, context, inverse=True)

    def extra_repr(self) -> str:
        return f"columns={self.columns}"


def _numbers(key: Any) -> tuple[int, ...]:
    """The columns that a key names."""
    try:
        group = tuple(map(index, key if isinstance(key, Iterable) else (key,)))
    except TypeError:
        raise TypeError(f"Columns: expected a column's number, a tuple of them or a range, got {key!r}") from None
    if not group or min(group) < 0:
        raise ValueError(f"Columns: expected columns from 0 on, got {key!r}")
    return group


def _named(group: tuple[int, ...]) -> str:
    return f"column {group[0]}" if len(group) == 1 else f"columns {', '.join(map(str, group))}"
