"""Sums of the rows that belong to each code: the same bits in any order, on any number of threads, devices and processes.

Every row is written in fixed point, in units of its code: 2^u with u = E + B - 62, where 2^E exceeds the magnitudes of that
code's rows and 2^B their number. Sums of integers have no rounding, so that nothing depends on their order; a sum is within
2^(E + 2B - 63) of the exact one, for up to a million rows closer than float32 adds two numbers. No unit is under 2^-1000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ._checks import accumulation_dtype
from ._opaque import opaque

__all__ = ["CodeSums", "code_sums"]

#: Sums the values of all processes, or takes the largest ("sum", "max"), in place.
Reduce = Callable[[torch.Tensor, str], object]
#: Columns that are summed at a time, and sums: a few MB. The number of blocks depends on nothing that processes differ in.
_COLUMNS, _SUMS = 32, 1 << 18


def alone(values: torch.Tensor, how: str) -> None:
    """The reduction of a single process."""


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float64, exactly; ``pow`` promises no more than closeness."""
    return ((exponent.clamp(-1000, 1000) + 1023) << 52).view(torch.float64)


class CodeSums:
    """n_k = number of the rows i with index_i = k, and S_k = sum of these rows.

    Args:
        x: (N, D), floating.
        index: (N,) int64, under ``codes``. Of ``codes``, K, there may be more than rows.
        reduce: makes the numbers of this process those of all of them. It is called with tensors whose shapes depend on
            K and D alone, and as often: a process without rows takes part.

    Attributes: counts, (K,) int64. A code with a row that is not finite has sums that are NaN.
    """

    def __init__(self, x: torch.Tensor, index: torch.Tensor, codes: int, reduce: Reduce = alone):
        self.x, self.index, self.reduce = x, index, reduce
        self.counts = torch.zeros(codes, dtype=torch.int64, device=x.device).index_add_(0, index, torch.ones_like(index))
        largest = torch.linalg.vector_norm(x, torch.inf, dim=1) if len(x) else x.new_empty(0)
        self.largest = torch.zeros(codes, dtype=torch.float64, device=x.device)
        self.largest.scatter_reduce_(0, index, largest.double(), "amax")
        reduce(self.counts, "sum")
        # NaN would be lost in a maximum over processes.
        reduce(self.largest.nan_to_num_(nan=torch.inf, posinf=torch.inf), "max")
        finite = self.largest.isfinite()
        magnitude = torch.where(finite, self.largest, 1.0).frexp().exponent.long()
        unit = magnitude + self.counts.double().frexp().exponent - 62
        self._per_unit = _power_of_two(-unit)[index][:, None]
        self._unit = torch.where(finite, _power_of_two(unit), torch.nan)[:, None]

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns, S of these columns in float64), one block of columns after the other. S is the caller's to change."""
        features, codes = self.x.shape[1], len(self.counts)
        width = max(1, min(_COLUMNS, _SUMS // max(1, codes)))
        for start in range(0, features, width):
            columns = slice(start, min(start + width, features))
            fixed = (self.x[:, columns].double() * self._per_unit).round_().long()
            sums = torch.zeros(codes, fixed.shape[1], dtype=torch.int64, device=self.x.device).index_add_(0, self.index, fixed)
            self.reduce(sums, "sum")
            yield columns, sums.double().mul_(self._unit)


def _output(x: torch.Tensor, index: torch.Tensor, codes: int) -> torch.Tensor:
    return x.new_empty((codes, x.shape[1]), dtype=accumulation_dtype(x))


@opaque(fake=_output)
def code_sums(x: torch.Tensor, index: torch.Tensor, codes: int) -> torch.Tensor:
    """S, (K, D): the sums of the rows of each code, in float64 for float64 rows, else in float32."""
    sums = _output(x, index, codes)
    for columns, values in CodeSums(x, index, codes).blocks():
        sums[:, columns] = values
    return sums
