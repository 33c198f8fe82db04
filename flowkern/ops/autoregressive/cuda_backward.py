"""The CUDA launcher of the backward of ``autoregressive_inverse``: passes, one launch for the sweep in reverse, and products.

What the kernel does is written out as a list of instructions (csrc/cuda/autoregressive_inverse_backward.cu), once a chain.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..._core.checks import accumulation_dtype, on_host
from . import cuda
from .cuda_gather import Numbers, firsts_of, gather, numbers_of
from .network import Plan, plans
from .sweep import Tangent, adds_to_later, chain, ends_of, linearize, parameter_gradients, unsorted

__all__ = ["backward"]

#: Units that one thread sums by itself, at most.
FEW = 32

_PRODUCT, _HIDDEN, _FEATURES = range(3)
_INSTRUCTION = 12
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class Arguments(ctypes.Structure):
    """``Arguments`` of csrc/cuda/autoregressive_inverse_backward.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("rows", "weights", "instructions", "entering", "scratch")),
        *((name, _NUMBER) for name in ("batch", "features", "count", "units")),
    )


class _Rows(NamedTuple):
    """Where the rows of a network begin in the buffer: those that its pass leaves, and those that the sweep finds."""

    scale: int  # and then dz by raw output and by shift, and dL by raw output
    slopes: list[int]  # of each layer, -1 where there is none
    deltas: list[int]  # of each layer; of the features the gradient of z


class _Program(NamedTuple):
    """What does not change from call to call, on the device; networks come in the order of use, the first one first."""

    numbers: Numbers  # of the weights, in the order of use; -1 for a zero
    instructions: torch.Tensor
    entering: torch.Tensor
    rows: list[_Rows]
    given: int  # rows that the passes leave, and the gradient of x before them
    total: int  # of all rows
    units: int  # values that are kept of a sample


def backward(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    grad: torch.Tensor | None,
    grad_logabsdet: torch.Tensor | None,
    text: str,
    contexts: Sequence[bool],
    needs_parameters: bool,
    dz: torch.Tensor,
    outputs: Sequence[torch.Tensor],
) -> None:
    """The op's backward on CUDA tensors, into dz and the gradients of the tensors."""
    batch, dtype = x.shape[0], accumulation_dtype(x, *tensors)
    if not batch:
        for out in outputs:
            out.zero_()
        return
    pairs, program = chain(tensors, text, contexts), _program(text, tuple(contexts), x.device)
    grad_log = None if grad_logabsdet is None else grad_logabsdet.to(dtype)
    tangents, state = [], x.to(dtype).t()
    for k, (plan, p) in enumerate(pairs):
        tangents.append(linearize(state, grad_log, plan, p, k > 0 or grad is not None))
        state = unsorted(tangents[-1].z, plan)
    rows = state.new_empty((program.total, batch))
    entering = torch.zeros_like(state) if grad is None else grad.to(dtype).t()
    torch.cat([entering, *(part for at in tangents for part in _given(at))], out=rows[: program.given])
    _sweep_back(rows, tensors, cuda.stored_as([p for _, p in pairs], dtype), program)
    for (plan, p), (_, outs), at, place in zip(pairs, chain(outputs, text, contexts), tangents, program.rows, strict=True):
        layers = range(plan.network.layers + 1)
        deltas = [rows[place.deltas[i] : place.deltas[i] + ends_of(plan, i, plan.depth)] for i in layers]
        if needs_parameters:
            for out, value in zip(outs.flat, parameter_gradients(deltas, at, plan, p).flat, strict=True):
                out.copy_(value)
    dz.copy_(unsorted(deltas[0], plan).t())


def _given(at: Tangent) -> Iterator[torch.Tensor]:
    yield from (at.scale, at.by_raw, at.by_shift, torch.zeros_like(at.scale) if at.from_log is None else at.from_log)
    yield from (slope for slope in at.slopes if slope is not None)


def _sweep_back(rows: torch.Tensor, tensors: Sequence[torch.Tensor], stored: torch.dtype, program: _Program) -> None:
    batch, limits = rows.shape[1], cuda.limits_of(rows.device)
    weights, _ = gather(tensors, program.numbers, batch, rows.dtype, stored, limits[0])
    tile, shared, fits = cuda.tile_of(batch, rows.dtype, program.units, 1, 0, limits)
    blocks = min(-(-batch // tile), cuda.RESIDENT * limits[0])
    scratch = rows.new_empty(0 if fits else blocks * program.units * tile)
    arguments = Arguments(
        *(t.data_ptr() for t in (rows, weights, program.instructions, program.entering)),
        *(None if fits else scratch.data_ptr(), batch, len(program.entering) // len(program.rows)),
        *(len(program.instructions), program.units),
    )
    cuda.launch(cuda.BACKWARD, arguments, rows.dtype, stored, tile, fits, blocks=blocks, shared=shared, device=rows.device)


@functools.lru_cache(maxsize=64)
@on_host()
def _program(text: str, contexts: tuple[bool, ...], device: torch.device) -> _Program:
    found = plans(text)
    rows, given, count = _rows(found)
    firsts = firsts_of([plan.network.widths for plan in found], contexts)
    listings: list[_Listing] = []
    for k, (plan, place, starts) in enumerate(zip(found, rows, cuda.starts_of(found, contexts, firsts), strict=True)):
        listings.append(_Listing(plan, place, starts[0], k * plan.network.features, sum(part.size for part in listings)))
    numbers = [n for listing in listings for instruction in listing.instructions for n in instruction]
    return _Program(
        numbers_of([part for listing in listings for part in listing.numbers], [], [], firsts, device),
        torch.tensor(numbers, dtype=torch.int32).view(-1, _INSTRUCTION).to(device),
        torch.tensor([*_entering(found, rows)], dtype=torch.int32).to(device),
        *(rows, given, count, max(listing.units for listing in listings)),
    )


def _rows(found: Sequence[Plan]) -> tuple[list[_Rows], int, int]:
    """Those of each network, how many are given, and how many there are."""
    places, end = [], found[0].network.features
    for plan in found:
        scale, end, slopes = end, end + 4 * plan.network.features, [-1]
        for i in range(1, plan.network.layers):
            active = plan.network.activated(i)
            slopes.append(end if active else -1)
            end += plan.layers[i].computed if active else 0
        places.append((scale, slopes))
    given, rows = end, []
    for plan, (scale, slopes) in zip(found, places, strict=True):
        deltas = []
        for i in range(plan.network.layers + 1):
            deltas.append(end)
            end += ends_of(plan, i, plan.depth)
        rows.append(_Rows(scale, slopes, deltas))
    return rows, given, end


def _entering(found: Sequence[Plan], rows: Sequence[_Rows]) -> Iterator[int]:
    """For each network and each place of its features the row of the gradient that enters: of x, or of the z before."""
    of_feature = [*range(found[0].network.features)]
    for plan, place in zip(found, rows, strict=True):
        yield from (of_feature[feature] for feature in plan.source)
        for i, feature in enumerate(plan.layers[0].order):
            of_feature[feature] = place.deltas[0] + i


class _Listing:
    """The instructions of one network, and the numbers of the weights that they read one after the other."""

    def __init__(self, plan: Plan, rows: _Rows, starts: Sequence[int], entering: int, size: int):
        self.plan, self.rows, self.starts, self.entering = plan, rows, starts, entering
        self.first, self.size = size, 0
        self.instructions: list[tuple[int, ...]] = []
        self.numbers: list[torch.Tensor] = []
        self.last = plan.network.layers
        counts = [ends_of(plan, i, plan.depth) for i in range(1, self.last + 1)]
        #: The places of each layer's gradients; those of the features are nobody's.
        self.places = [-1, *itertools.accumulate(counts[:-1], initial=0)]
        self.sums = sum(counts)
        self.units = self.sums
        for begin, end in reversed([(panel.begin, panel.end) for panel in plan.panels]):
            self._panel(begin, end)

    def _panel(self, begin: int, end: int) -> None:
        """What later panels found, as one product a layer; then the steps, whose sums go over their own panel alone."""
        plan = self.plan
        columns = [range(plan.layers[i].ends[begin], plan.layers[i].ends[end]) for i in range(self.last)]
        sums = [*itertools.accumulate(map(len, columns), initial=self.sums)]
        self.units = max(self.units, sums.pop())
        headed = []
        for i, of_layer in enumerate(columns):
            later = range(ends_of(plan, i + 1, end), ends_of(plan, i + 1, plan.depth))
            headed.append(bool(of_layer and later))
            if headed[i]:
                weights = self._weights(i, later, of_layer)
                values = self.places[i + 1] + later.start
                self._add(_PRODUCT, len(of_layer), len(later), weights, len(of_layer), values, sums[i], 1)
        own = [range(ends_of(plan, i + 1, begin), ends_of(plan, i + 1, end)) for i in range(self.last)]
        tails = [self._weights(i, own[i], columns[i]) for i in range(self.last)]
        for step in reversed(range(begin, end)):
            for i in (0, *reversed(range(1, self.last))):
                first, n = plan.layers[i].ends[step], plan.layers[i].ends[step + 1] - plan.layers[i].ends[step]
                if n:
                    row, column = ends_of(plan, i + 1, step + (i == 0)), first - columns[i].start
                    weights = tails[i] + (row - own[i].start) * len(columns[i]) + column
                    read = weights, len(columns[i]), self.places[i + 1] + row, sums[i] + column
                    self._step(i, first, n, own[i].stop - row, read, headed[i])

    def _step(self, layer: int, first: int, n: int, k: int, read: tuple[int, ...], summed: bool) -> None:
        if k > FEW:
            self._add(_PRODUCT, n, k, *read, int(not summed))
            k, summed = 0, True
        read = read if summed else (*read[:-1], -1)
        row = self.rows.deltas[layer]
        if layer == 0:
            places = self.entering + first, self.places[self.last] + 2 * first
            rows = self.rows.deltas[self.last] + 2 * first, row + first
            self._add(_FEATURES, n, k, *read, self.rows.scale + first, *places, *rows)
            return
        slope = self.rows.slopes[layer]
        added = self.places[layer + 2] + first if adds_to_later(self.plan.network, layer) else -1
        self._add(*(_HIDDEN, n, k, *read, slope if slope < 0 else slope + first, added, self.places[layer] + first, row + first))

    def _add(self, *numbers: int) -> None:
        self.instructions.append((*numbers, *[0] * (_INSTRUCTION - len(numbers))))

    def _weights(self, layer: int, rows: range, columns: range) -> int:
        """Where the weights from units ``columns`` of a layer to ``rows`` of the next begin in the stream; hidden ones are 0."""
        start = self.first + self.size
        if rows and columns:
            units, seen = self.plan.layers[layer].order, self.plan.layers[layer + 1].prefix
            doubled = 2 if layer + 1 == self.last else 1
            to = torch.tensor(cuda.rows_of(self.plan, layer + 1)[rows.start : rows.stop])[:, None]
            visible = torch.tensor([seen[row // doubled] for row in rows])[:, None] > torch.tensor([*columns])
            numbers = (
                self.starts[layer] + self.plan.network.widths[layer] * to + torch.tensor(units[columns.start : columns.stop])
            )
            self.numbers.append(numbers.masked_fill_(~visible, -1).flatten())
            self.size += len(rows) * len(columns)
        return start
