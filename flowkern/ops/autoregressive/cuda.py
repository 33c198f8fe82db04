"""The CUDA launcher of ``autoregressive_inverse``: the weights as a stream in the order of use, and the size of the tiles.

The stream is gathered anew for each call, by one launch. Every block reads all of it, side by side; through the
orders each of them would read the weights scattered, once for each tile.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..._core import nvrtc
from ..._core.checks import on_host
from .cuda_gather import Numbers, firsts_of, gather, names_of, numbers_of
from .network import ACTIVATIONS, Plan, plans
from .sweep import Parameters, chain

__all__ = [
    "BACKWARD",
    "FORWARD",
    "RESIDENT",
    "TILES",
    "Arguments",
    "forward",
    "launch",
    "limits_of",
    "rows_of",
    "starts_of",
    "stored_as",
    "tile_of",
    "variant",
]

#: Samples of a tile, and threads of a block for each: the variants of both kernels.
TILES = {torch.float32: {1: 512, 4: 512, 8: 512, 16: 256}, torch.float64: {1: 512, 4: 512}}

#: Weights of a panel that are copied to shared memory, at most.
STAGED = 4096

#: Blocks for each multiprocessor, at most: each takes several tiles where there are more.
RESIDENT = 4


FORWARD, BACKWARD = "autoregressive_inverse", "autoregressive_inverse_backward"

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class Arguments(ctypes.Structure):
    """``Arguments`` of csrc/cuda/autoregressive_inverse.cu."""

    _fields_ = (
        *(("z", _POINTER), ("z_row", _NUMBER), ("z_column", _NUMBER), ("x", _POINTER), ("x_row", _NUMBER), ("x_column", _NUMBER)),
        *(("logabsdet", _POINTER), ("weights", _POINTER), ("biases", _POINTER), ("contexts", _POINTER), ("context_row", _NUMBER)),
        *(("table", _POINTER), ("constants", _POINTER), ("scratch", _POINTER)),
        *((name, _NUMBER) for name in ("batch", "features", "networks", "units", "staged")),
    )


class _Program(NamedTuple):
    """What does not change from call to call, on the device; networks come in the order of use, the last one first."""

    numbers: Numbers  # of the parameters, in the order of use
    table: torch.Tensor
    constants: torch.Tensor
    units: int  # values that are kept of a sample
    staged: int


class _Layer(NamedTuple):
    """One linear layer in one panel: its rows and columns in the weight, and how many columns are known before the panel."""

    rows: torch.Tensor
    columns: torch.Tensor
    known: int


def forward(
    z: torch.Tensor, tensors: Sequence[torch.Tensor], text: str, contexts: Sequence[bool], *outputs: torch.Tensor
) -> None:
    """The op's forward on CUDA tensors, into x and logabsdet: one launch for the whole chain."""
    x, logabsdet = outputs
    if not z.shape[0]:
        return
    dtype = logabsdet.dtype
    program = _program(text, tuple(contexts), z.device)
    limits = limits_of(z.device)
    stored = stored_as([p for _, p in chain(tensors, text, contexts)], dtype)
    weights, values = gather(tensors, program.numbers, len(z), dtype, stored, limits[0])
    state = z.to(dtype)
    out = x if x.dtype is dtype else torch.empty_like(x, dtype=dtype)
    staged = program.staged * stored.itemsize
    tile, shared, fits = tile_of(z.shape[0], dtype, program.units, 2, staged, limits)
    blocks = min(-(-z.shape[0] // tile), RESIDENT * limits[0])
    scratch = state.new_empty(0 if fits else blocks * program.units * tile)
    terms = values.data_ptr() + program.numbers.biases * dtype.itemsize
    arguments = Arguments(
        *(state.data_ptr(), *state.stride(), out.data_ptr(), *out.stride(), logabsdet.data_ptr()),
        *(weights.data_ptr(), values.data_ptr(), terms, program.numbers.contexts),
        *(program.table.data_ptr(), program.constants.data_ptr(), None if fits else scratch.data_ptr()),
        *(*z.shape, len(contexts), program.units, program.staged),
    )
    launch(FORWARD, arguments, dtype, stored, tile, fits, blocks=blocks, shared=shared, device=z.device)
    if out is not x:
        x.copy_(out)


def stored_as(given: Sequence[Parameters], dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the weights are streamed: half of the bytes where all are bfloat16."""
    narrow = dtype is torch.float32 and all(w.dtype is torch.bfloat16 for p in given for w in p.weights)
    return torch.bfloat16 if narrow else dtype


def limits_of(device: torch.device) -> tuple[int, int]:
    """The device's multiprocessors, and the bytes of shared memory that a block can have."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def variant(kernel: str, dtype: torch.dtype, stored: torch.dtype, tile: int, fits: bool) -> nvrtc.Variant:
    """The kernel that computes in ``dtype`` with weights of another, ``tile`` samples at a time.

    ``fits``: what is kept of them lies in shared memory, not in a scratch buffer.
    """
    of_tile = {"TILE": tile, "THREADS": TILES[dtype][tile], "SCRATCH": int(not fits)}
    macros = {**names_of(dtype, stored), **{f"FLOWKERN_{name}": str(value) for name, value in of_tile.items()}}
    return nvrtc.Variant(kernel, tuple(macros.items()))


def launch(
    kernel: str, arguments: ctypes.Structure, dtype: torch.dtype, stored: torch.dtype, tile: int, fits: bool, **grid: Any
) -> None:
    """Start one of the kernels; ``grid``: blocks, shared and device."""
    nvrtc.launch(variant(kernel, dtype, stored, tile, fits), arguments, threads=TILES[dtype][tile], **grid)


def tile_of(batch: int, dtype: torch.dtype, units: int, sums: int, staged: int, limits: tuple[int, int]) -> tuple[int, int, bool]:
    """(samples, bytes of shared memory, whether what is kept of them fits in there) of a tile.

    Kept are ``units`` values of each sample; beside them lie ``sums`` values of each thread and sample, and ``staged`` bytes.
    """
    processors, memory = limits

    def shared(tile: int, units: int) -> int:
        return (units + sums * TILES[dtype][tile]) * tile * dtype.itemsize + staged

    fitting = [tile for tile in TILES[dtype] if shared(tile, units) <= memory]
    # While there are multiprocessors to spare, fewer samples for each are finished earlier.
    tiles = fitting or [*TILES[dtype]]
    tile = next((tile for tile in tiles if tile * processors >= batch), tiles[-1])
    return tile, shared(tile, units if fitting else 0), bool(fitting)


@functools.lru_cache(maxsize=64)
@on_host()
def _program(text: str, contexts: tuple[bool, ...], device: torch.device) -> _Program:
    found = plans(text)
    weights, biases, terms, tables, units, staged = [], [], [], [], [], [0]
    firsts = firsts_of([plan.network.widths for plan in found], contexts)
    starts = starts_of(found, contexts, firsts)
    bias_count = term_count = 0
    for plan, context, (weight, bias, term) in reversed([*zip(found, contexts, starts, strict=True)]):
        tables.append(_table(plan, bias_count, term_count if context else -1))
        units.append(_units(plan)[-1])
        rows = [rows_of(plan, i) for i in range(1, len(plan.layers))]
        biases += [torch.tensor(r) + start for r, start in zip(rows, bias, strict=True)]
        bias_count += sum(map(len, rows))
        if context:
            terms.append(torch.tensor(rows[0]) + term)
            term_count += len(rows[0])
        for panel in _panels(plan):
            blocks = [*zip(panel, weight, plan.network.widths, strict=False)]
            weights += [_numbers(layer, start, width, slice(layer.known)) for layer, start, width in blocks]
            tails = [_numbers(layer, start, width, slice(layer.known, None)) for layer, start, width in blocks]
            staged.append(sum(map(len, tails)))
            weights += tails
    constants = [(plan.network.scale.a, plan.network.scale.b) for plan in reversed(found)]
    return _Program(
        numbers_of(weights, biases, terms, firsts, device),
        torch.tensor([number for table in tables for number in table], dtype=torch.int32, device=device),
        torch.tensor(constants, dtype=torch.float64, device=device),
        _aligned(max(units)),
        _aligned(max(size for size in staged if size <= STAGED)),
    )


def _aligned(count: int) -> int:
    """Whole groups of 16 bytes of every dtype."""
    return -(-count // 8) * 8


def starts_of(
    found: Sequence[Plan], contexts: Sequence[bool], firsts: Sequence[int]
) -> Iterator[tuple[list[int], list[int], int]]:
    """For each network the first numbers of the weights and biases of its layers, and of its context's term."""
    tensor = 0
    for plan, context in zip(found, contexts, strict=True):
        end = tensor + 2 * plan.network.layers
        yield [*firsts[tensor:end:2]], [*firsts[tensor + 1 : end : 2]], firsts[end]
        tensor = end + context


def rows_of(plan: Plan, layer: int) -> list[int]:
    """The rows of a linear layer that are used, in order: those of u and t by turns for the outputs."""
    order = plan.layers[layer].order[: plan.layers[layer].computed]
    if layer < plan.network.layers:
        return order
    raw, shift = plan.network.output_rows
    return [row for i in order for row in (raw[i], shift[i])]


def _panels(plan: Plan) -> Iterator[list[_Layer]]:
    rows = [torch.tensor(rows_of(plan, i)) for i in range(1, len(plan.layers))]
    columns = [torch.tensor(layer.order) for layer in plan.layers]
    for panel in plan.panels:
        found = []
        for i, known in enumerate(panel.known, 1):
            first, last, top = _extent(plan, i, panel.begin, panel.end)
            double = 2 if i == plan.network.layers else 1
            found.append(_Layer(rows[i - 1][double * first : double * last], columns[i - 1][:top], known))
        yield found


def _extent(plan: Plan, layer: int, begin: int, end: int) -> tuple[int, int, int]:
    """(first, last, how many units the last one sees) of a layer's places in steps [begin, end)."""
    _, prefix, ends = plan.layers[layer]
    first, last = ends[begin], ends[end]
    return first, last, prefix[last - 1] if first < last else 0


def _numbers(layer: _Layer, start: int, width: int, part: slice) -> torch.Tensor:
    """Those of the weights of some columns, column by column; ``width`` is that of the layer before."""
    return (start + layer.columns[part, None] + width * layer.rows).flatten()


def _units(plan: Plan) -> list[int]:
    """Where the values of each layer begin among those of a sample, those before the activations, and how many there are."""
    network, last = plan.network, plan.network.layers
    counts = [layer.computed for layer in plan.layers[:-1]]
    places = [network.features]  # after the state
    for count in counts:
        places.append(places[-1] + count)
    end = places.pop()
    before = [*places]
    for i in range(1, last):
        if network.residual and i % 2 == 1 and network.activated(i):  # kept for the layer that it is added to
            before[i], end = end, end + counts[i]
    ends = plan.layers[last].ends
    outputs = 2 * max(ends[panel.end] - ends[panel.begin] for panel in plan.panels)
    return [*places, end, *before, end, end + outputs]


def _table(plan: Plan, biases: int, context: int) -> list[int]:
    """A network as the kernel reads it.

    Its numbers; for each layer the places of its values, of those before the activation, of its biases and of its prefixes;
    the ends of the steps in each layer but the last; the prefixes; order and source of the features; and the panels.
    """
    network, last = plan.network, plan.network.layers
    units = _units(plan)
    values, before = units[: last + 1], units[last + 1 : 2 * last + 2]
    header, ends = 12, [end for layer in plan.layers[:-1] for end in layer.ends]
    prefix = header + 4 * (last + 1) + len(ends)
    layers: list[int] = []
    prefixes: list[int] = []
    for i, layer in enumerate(plan.layers):
        layers += [values[i], before[i], biases, prefix + len(prefixes)]
        if i:
            prefixes += layer.prefix[: layer.computed]
            biases += len(rows_of(plan, i))
    order = prefix + len(prefixes)
    source, panels = order + network.features, []
    for panel in plan.panels:
        panels += [panel.begin, panel.end]
        for i, known in enumerate(panel.known, 1):
            first, last_place, top = _extent(plan, i, panel.begin, panel.end)
            panels += [first, last_place, known, top]
    body = [*layers, *ends, *prefixes, *plan.layers[0].order, *plan.source]
    size = header + len(body) + len(panels)
    kind = [*ACTIVATIONS].index(network.activation), network.scale.code, int(network.residual), int(network.gated)
    return [size, last, plan.depth, len(plan.panels), *kind, context, order, source, header + len(body), *body, *panels]
