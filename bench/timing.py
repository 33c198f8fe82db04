"""How calls are timed: all variants in turn, in one process, warmed up, many samples of each."""

from __future__ import annotations

import functools
import gc
import itertools
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Call", "Graph", "Samples", "cpu_samples", "gpu_samples", "input_sets", "pages_here"]

Call = Callable[[], Any]
#: Seconds per call, of every variant.
Samples = dict[str, list[float]]

_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 101
_WARM_UP_ROUNDS = 2
_MOST_SETS = 16


def pages_here() -> str:
    """``retained`` if freed memory stays with the process, ``fresh`` if it goes back to the system; found by trying."""

    def faults(megabytes: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(megabytes << 18).fill_(1.0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(256)
    # What has just been freed has room for the next, even if a small block has taken a place in it. 64 MB are 16384 small
    # pages, or 32 huge ones.
    return "fresh" if min(faults(64) for _ in range(3)) >= 16 else "retained"


@contextmanager
def _without_gc() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _interleaved(measures: Mapping[str, Callable[[], list[float]]], seconds: float) -> Samples:
    """Takes every measure once a round, each round beginning with another one, for about so many seconds."""
    names = list(measures)
    samples: Samples = {name: [] for name in names}
    with _without_gc():
        for measure in [*measures.values()] * _WARM_UP_ROUNDS:
            measure()
        start, done = time.perf_counter(), 0
        while done < _FEWEST_ROUNDS or (done < _MOST_ROUNDS and time.perf_counter() - start < seconds):
            for i in range(len(names)):
                name = names[(done + i) % len(names)]
                samples[name] += measures[name]()
            done += 1
    return samples


def _run(call: Callable[[], object], times: int) -> None:
    for _ in itertools.repeat(None, times):
        call()


def _host_timed(calls: Mapping[str, Call], seconds: float, synchronize: Callable[[], None]) -> Samples:
    """Samples by the host's clock. Calls that are too short for it are timed in batches."""

    def timed(call: Call, times: int) -> float:
        synchronize()
        start = time.perf_counter()
        _run(call, times)
        synchronize()
        return time.perf_counter() - start

    def measure(call: Call, times: int) -> list[float]:
        return [timed(call, times) / times]

    measures = {}
    for name, call in calls.items():
        times = 1
        while timed(call, times) < seconds / 1000:
            times *= 2
        measures[name] = functools.partial(measure, call, times)
    return _interleaved(measures, seconds)


def cpu_samples(calls: Mapping[str, Call], seconds: float) -> Samples:
    """Samples of every call, taken in turn for about so many seconds."""
    return _host_timed(calls, seconds, lambda: None)


# ---------------------------------------------------------------------------------------------------------------------
# CUDA


def input_sets(traffic: float) -> int:
    """How many sets of inputs a GPU call that moves so many bytes rotates over; 1 if it is long enough for events.

    256 MB take about 50 us on the fastest memory there is.
    """
    return 1 if traffic >= 2**28 else max(2, min(_MOST_SETS, int(2**28 // traffic)))


class Graph:
    """A CUDA graph of several calls, one after the other, whose results stay alive."""

    def __init__(self, calls: Sequence[Call]):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _run(calls[0], 3)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # A kernel that is collected while a graph is captured would be unloaded, which ends the capture.
        with _without_gc(), torch.cuda.graph(self._graph, stream=side):
            self.results = [call() for call in calls]

    def replay(self) -> None:
        self._graph.replay()


def _graphs(
    calls: Mapping[str, Sequence[Call]], verify: Callable[[str, Graph], None], reject: Callable[[str, str], None]
) -> dict[str, Graph]:
    """The graphs of the calls that can be captured and compute what they should."""
    graphs = {}
    for name, several in calls.items():
        try:
            graph = Graph(several)
            verify(name, graph)
        except Exception as error:  # whatever it is, the other variants can still be timed
            reject(name, f"as a CUDA graph: {type(error).__name__}: {' '.join(str(error).split())}")
        else:
            graphs[name] = graph
    return graphs


def _cleared(run: Callable[[], object], calls: int, seconds: float) -> list[float]:
    """Samples by events, the cache cleared before each."""
    from triton.testing import do_bench

    milliseconds = 1000 * seconds / _FEWEST_ROUNDS
    return [ms / 1000 / calls for ms in do_bench(run, warmup=milliseconds / 4, rep=milliseconds, return_mode="all")]


def _repeated(run: Callable[[], object], calls: int, seconds: float) -> list[float]:
    """One sample by events, of as many runs in a row as fit."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(times: int) -> float:
        start.record()
        _run(run, times)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    _run(run, 3)
    times = max(1, int(seconds / _FEWEST_ROUNDS / max(timed(1), 1e-6)))
    return [timed(times) / times / calls]


def gpu_samples(
    calls: Mapping[str, Sequence[Call]], seconds: float, verify: Callable[[str, Graph], None], reject: Callable[[str, str], None]
) -> Iterator[tuple[str, Samples]]:
    """(state, samples), for calls given for one or several sets of inputs (``input_sets``), about so many seconds per variant.

    Several: they are replayed from CUDA graphs, over rotating inputs where these shall be cold. ``verify(name, graph)``
    raises for a graph that computes something else; ``reject(name, why)`` hears of a variant that is left out.
    """

    def by_events(how: Callable[..., list[float]], runs: Mapping[str, tuple[Callable[[], object], int]]) -> Samples:
        return _interleaved(
            {name: functools.partial(how, run, n, seconds) for name, (run, n) in runs.items()}, seconds * len(runs)
        )

    firsts = {name: several[0] for name, several in calls.items()}
    if all(len(several) == 1 for several in calls.values()):
        alone = {name: (call, 1) for name, call in firsts.items()}
        yield "cold", by_events(_cleared, alone)
        yield "hot", by_events(_repeated, alone)
        return
    for state, how in (("cold", _cleared), ("hot", _repeated)):
        lists = {name: several if state == "cold" else [several[0]] * len(several) for name, several in calls.items()}
        graphs = _graphs(lists, verify, reject)
        yield state, by_events(how, {name: (graph.replay, len(graph.results)) for name, graph in graphs.items()})
        del graphs
    yield "launched", _host_timed(firsts, seconds * len(firsts), torch.cuda.synchronize)
