"""Sums of the rows that belong to each code: the same bits in any order, on any number of threads, devices and processes.

Every row is written in fixed point, in units of its code: 2^u with u = E + B - 62, where 2^E exceeds the magnitudes of that
code's rows and 2^B their number. Sums of integers have no rounding, so that nothing depends on their order; a sum is within
2^(E + 2B - 63) of the exact one, for up to a million rows closer than float32 adds two numbers. No unit is under 2^-1000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .checks import accumulation_dtype
from .opaque import opaque

__all__ = ["CodeSums", "code_sums", "magnitudes"]

#: Sums the values of all processes, or takes the largest ("sum", "max"), in place.
Reduce = Callable[[torch.Tensor, str], object]
#: Columns that are summed at a time on a CPU, and sums: a few MB. A GPU, where launches cost more than memory, takes all columns
#: at once, of so many values. The number of blocks depends on nothing that processes differ in.
_COLUMNS, _SUMS, _VALUES = 16, 1 << 17, 1 << 24


def alone(values: torch.Tensor, how: str) -> None:
    """The reduction of a single process."""


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float64, exactly; ``pow`` promises no more than closeness."""
    return ((exponent.clamp(-1000, 1000) + 1023) << 52).view(torch.float64)


def magnitudes(x: torch.Tensor) -> torch.Tensor:
    """(N,): the largest magnitude in each row of x, (N, D); NaN if the row has one. Faster than the norm that it is."""
    return torch.maximum(x.amax(1), -x.amin(1)) if x.numel() else x.new_zeros(x.shape[0])


class CodeSums:
    """n_k = number of the rows i with index_i = k, and S_k = sum of these rows.

    Args:
        x: (N, D), floating.
        index: (N,) int64, under ``codes``. Of ``codes``, K, there may be more than rows.
        skip: leave out rows with a value that is not finite. Otherwise the sums of their codes are NaN.
        reduce: makes the numbers of this process those of all of them. It is called with tensors whose shapes depend on
            K and D alone, and as often: a process without rows takes part.

    Attributes: counts, (K,) int64.
    """

    def __init__(self, x: torch.Tensor, index: torch.Tensor, codes: int, *, skip: bool = False, reduce: Reduce = alone):
        largest = magnitudes(x).double()
        if skip:  # into one more code, which nobody sees
            index = torch.where(largest.isfinite(), index, codes)
        self.x, self.index, self.codes, self.bins, self.reduce = x, index, codes, codes + skip, reduce
        counts = torch.zeros(self.bins, dtype=torch.int64, device=x.device).index_add_(0, index, torch.ones_like(index))
        bound = torch.zeros(self.bins, dtype=torch.float64, device=x.device).scatter_reduce_(0, index, largest, "amax")
        reduce(counts, "sum")
        # NaN would be lost in a maximum over processes.
        reduce(bound.nan_to_num_(nan=torch.inf, posinf=torch.inf), "max")
        finite = bound.isfinite()
        magnitude = torch.where(finite, bound, 1.0).frexp().exponent.long()
        unit = magnitude + counts.double().frexp().exponent - 62
        self.counts = counts[:codes]
        self._per_unit = _power_of_two(-unit)[index][:, None]
        self._unit = torch.where(finite, _power_of_two(unit), torch.nan)[:codes, None]

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns, S of these columns in float64), one block of columns after the other. S is the caller's to change."""
        samples, features = self.x.shape
        if self.x.is_cuda:
            width, together = max(1, features), max(1, _VALUES // max(1, features))
        else:
            width, together = max(1, min(_COLUMNS, _SUMS // max(1, self.codes))), max(1, samples)
        for start in range(0, features, width):
            columns = slice(start, min(start + width, features))
            for first in range(0, max(1, samples), together):
                rows = slice(first, first + together)
                fixed = (self.x[rows, columns].double() * self._per_unit[rows]).round_().long()
                if first == 0:
                    sums = fixed.new_zeros(self.bins, fixed.shape[1])
                sums.index_add_(0, self.index[rows], fixed)
            self.reduce(sums, "sum")
            yield columns, sums[: self.codes].double().mul_(self._unit)


def _output(x: torch.Tensor, index: torch.Tensor, codes: int) -> torch.Tensor:
    return x.new_empty((codes, x.shape[1]), dtype=accumulation_dtype(x))


@opaque(fake=_output)
def code_sums(x: torch.Tensor, index: torch.Tensor, codes: int) -> torch.Tensor:
    """S, (K, D): the sums of the rows of each code, in float64 for float64 rows, else in float32."""
    sums = _output(x, index, codes)
    for columns, values in CodeSums(x, index, codes).blocks():
        sums[:, columns] = values
    return sums
