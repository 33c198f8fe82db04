"""The parameters of a chain on CUDA, gathered in the order in which a sweep reads them by one launch.

The kernel is csrc/cuda/gather_parameters.cu. It numbers the elements of all tensors through, in the order of the tensors.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..._core import nvrtc

__all__ = ["GATHER", "Numbers", "firsts_of", "gather", "names_of", "numbers_of", "variant"]

GATHER = "gather_parameters"
THREADS = 256

#: Tensors of a launch, at most.
SOURCES = 96
_FIELDS = 5  # of a source

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_NAMES = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "Bfloat16"}
_KINDS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Arguments(ctypes.Structure):
    """``Arguments`` of csrc/cuda/gather_parameters.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("numbers", "weights", "values")),
        *((name, _NUMBER) for name in ("wide", "weight_count", "bias_count", "context_count", "batch", "begin", "end", "count")),
        ("sources", _NUMBER * (_FIELDS * SOURCES)),
    )


class Numbers(NamedTuple):
    """What to gather, on the device: numbers of weights, then of biases, then of the columns of contexts."""

    numbers: torch.Tensor
    weights: int
    biases: int
    contexts: int
    firsts: list[int]  # of each tensor; last, how many there are


def numbers_of(
    weights: list[torch.Tensor], biases: list[torch.Tensor], contexts: list[torch.Tensor], firsts: list[int], device: torch.device
) -> Numbers:
    """The lists one after the other, as 32 bits where these are enough."""
    dtype = torch.int32 if firsts[-1] < 2**31 else torch.int64
    numbers = torch.cat([torch.empty(0, dtype=torch.int64), *weights, *biases, *contexts])
    return Numbers(numbers.to(device, dtype), _count(weights), _count(biases), _count(contexts), firsts)


def _count(parts: list[torch.Tensor]) -> int:
    return sum(map(len, parts))


def firsts_of(widths: Sequence[tuple[int, ...]], contexts: Sequence[bool]) -> list[int]:
    """The first number of each tensor of a chain, and how many numbers there are. A term of a context has one for each column."""
    sizes = []
    for units, context in zip(widths, contexts, strict=True):
        for columns, rows in itertools.pairwise(units):
            sizes += [columns * rows, rows]
        sizes += [units[1]] if context else []
    return [*itertools.accumulate(sizes, initial=0)]


def names_of(dtype: torch.dtype, stored: torch.dtype) -> dict[str, str]:
    """The macros that name the dtype of the arithmetic and that of the weights."""
    return {"FLOWKERN_VALUE": _NAMES[dtype], "FLOWKERN_WEIGHT": _NAMES[stored]}


def variant(dtype: torch.dtype, stored: torch.dtype) -> nvrtc.Variant:
    """The kernel that gathers weights as ``stored``, and the rest as ``dtype``."""
    macros = {**names_of(dtype, stored), "FLOWKERN_TILE": "1", "FLOWKERN_THREADS": str(THREADS)}
    return nvrtc.Variant(GATHER, tuple(macros.items()))


def gather(
    tensors: Sequence[torch.Tensor], what: Numbers, batch: int, dtype: torch.dtype, stored: torch.dtype, processors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights as ``stored``, biases and then contexts (batch, columns) as ``dtype``) of a chain's tensors."""
    device = what.numbers.device
    weights = torch.empty(what.weights, dtype=stored, device=device)
    values = torch.empty(what.biases + batch * what.contexts, dtype=dtype, device=device)
    addresses = what.numbers.data_ptr(), weights.data_ptr(), values.data_ptr()
    counts = int(what.numbers.dtype is torch.int64), what.weights, what.biases, what.contexts, batch
    blocks = min(-(-(len(weights) + len(values)) // THREADS), 8 * processors)
    for first in range(0, len(tensors), SOURCES):
        sources: list[int] = []
        for t, number in zip(tensors[first : first + SOURCES], what.firsts[first:], strict=False):
            row, column = t.stride() if t.ndim == 2 else (0, t.stride(0))
            sources += (t.data_ptr(), number, row, column, 8 * t.shape[-1] + _KINDS[t.dtype])
        count = len(sources) // _FIELDS
        arguments = Arguments(*addresses, *counts, what.firsts[first], what.firsts[first + count], count)
        arguments.sources[: len(sources)] = sources
        nvrtc.launch(variant(dtype, stored), arguments, blocks=blocks, threads=THREADS, shared=0, device=device)
    return weights, values
