"""From an op and its cases to rows: check, peak memory, samples, ratios."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flowkern import OPS
from flowkern._core.op import Op

from .cases import BOTH, CASES, FORWARD, Case, Target, cases_of
from .memory import peak_extra_bytes
from .provenance import provenance
from .subjects.calls import Call, Problem, WrongResult, check, poisoned, rounding_errors
from .timing import Graph, Samples, cpu_samples, gpu_samples, input_sets, pages_here

__all__ = ["DIRECTIONS", "Options", "Row", "measure", "verdict"]

DIRECTIONS = (FORWARD, BOTH)
FUSED, EAGER, COMPILED, COPY = "flowkern", "eager", "compile", "copy"


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    ops: tuple[str, ...] = ()  # all
    device: str = "cpu"
    pages: str = "fresh"
    threads: int = 1
    quick: bool = False
    compile: str = "all"  # or "large", or "none"
    cases: str = "*"

    def seconds(self) -> float:
        """For the samples of one direction of a case; on a GPU of one variant of it."""
        return (0.05 if self.quick else 0.3) if self.device == "cuda" else (0.3 if self.quick else 5.0)


@dataclass(frozen=True)
class Row:
    """One figure with where it comes from; ``failure`` says why there is none. The columns of the CSV files."""

    op: str
    case: str
    direction: str
    pages: str
    variant: str
    median_us: float | None
    q1: float | None
    q3: float | None
    percent_of_copy: float | None
    vs_eager: float | None
    vs_compile: float | None
    peak_extra_bytes: int | None
    failure: str
    threads: int
    device: str
    torch: str
    triton: str
    flowkern: str
    commit: str


def verdict(row: Row, target: Target) -> str:
    """The target of a row of the fused op, and whether it is reached."""
    wanted = (
        (target.vs_eager, row.vs_eager, "{:g}x eager"),
        (target.vs_compile, row.vs_compile, "{:g}x compile"),
        (target.percent_of_copy, row.percent_of_copy, "{:g}% of copy"),
    )
    parts = [(text.format(least), least, got) for least, got, text in wanted if least is not None]
    missed = [text for text, least, got in parts if got is not None and got < least]
    unknown = [text for text, _, got in parts if got is None]
    found = [f"MISSED {', '.join(missed)}"] if missed else []
    found += [f"not measured {', '.join(unknown)}"] if unknown else []
    return f">= {', '.join(text for text, _, _ in parts)}: {'; '.join(found) or 'reached'}"


def measure(options: Options) -> Iterator[Row]:
    """The rows of all cases, each as soon as it is measured. Raises RuntimeError if pages are not as the options say."""
    torch.set_num_threads(options.threads)
    if options.device == "cpu" and (pages := pages_here()) != options.pages:
        raise RuntimeError(f"pages: asked for {options.pages}, but in this process they are {pages}")
    origin = provenance(options.device)
    for name in options.ops or CASES:
        for case in cases_of(name, options.device, options.cases):
            for direction in DIRECTIONS:
                yield from _Measurement(OPS[name], case, direction, options, origin).rows()


class _Measurement:
    """One direction of one case: its variants, and what is known about each."""

    def __init__(self, op: Op, case: Case, direction: str, options: Options, origin: Mapping[str, str]):
        self.op, self.case, self.direction, self.options, self.origin = op, case, direction, options, origin
        self.device = torch.device(options.device)
        self.failures: dict[str, str] = {}
        self.peaks: dict[str, int] = {}
        traffic = self._problem(0).traffic
        self.problems = [self._problem(i) for i in range(input_sets(traffic) if options.device == "cuda" else 1)]
        self.exact = self.problems[0].exact(op.reference)
        self.allowed: list[float] = []

    def _problem(self, seed: int) -> Problem:
        return Problem(self.case, self.direction, self.device, self.op.reference, seed)

    def rows(self) -> Iterator[Row]:
        """One row per state and variant that was tried, those that failed without figures."""
        calls = self._checked_calls()
        self.exact = () if self.device.type == "cpu" else self.exact
        calls[COPY] = [self._copy(problem) for problem in self.problems]
        for state, samples in self._samples(calls):
            quartiles = {
                name: statistics.quantiles(s, n=4, method="inclusive") for name, s in samples.items() if name not in self.failures
            }
            for name in (FUSED, EAGER, COMPILED, COPY):
                if name in quartiles or name in self.failures:
                    yield self._row(state, name, quartiles)

    def _checked_calls(self) -> dict[str, list[Call]]:
        """The calls of every variant whose results are right."""
        calls: dict[str, list[Call]] = {}
        for name, function in self._functions().items():
            try:
                several = [problem.call(function) for problem in self.problems]
                self._check(name, several[0])
            except WrongResult as error:
                self.failures[name] = str(error)
            except Exception as error:  # whatever it is belongs into this row, and the next one is measured
                message = f"{type(error).__name__}: {' '.join(str(error).split())}"
                if name == COMPILED:
                    print(f"{self.op.name} {self.case.name}: torch.compile does not work here: {message}", file=sys.stderr)
                else:
                    self.failures[name] = message
            else:
                calls[name] = several
                self.peaks[name] = peak_extra_bytes(several[0], self.device)
        return calls

    def _functions(self) -> dict[str, Callable[..., Any]]:
        """The variants, the plain one first: it is what the others are held against."""
        functions = {EAGER: self.op.reference, FUSED: self.op.function}
        if self.options.compile == "all" or (self.options.compile == "large" and not self.case.small):
            torch._dynamo.reset()
            functions[COMPILED] = torch.compile(self.op.reference, fullgraph=True, dynamic=False)
        return functions

    def _check(self, name: str, call: Call) -> None:
        if EAGER in self.failures:
            raise WrongResult("the plain code that it is held against failed")
        if name == EAGER:
            self.allowed = rounding_errors(call(), self.exact)
        elif name == COMPILED:
            rounding_errors(call(), self.exact)
        else:
            with poisoned():
                check(call(), self.exact, self.allowed)

    def _copy(self, problem: Problem) -> Call:
        """A copy that moves as many bytes as the op, half of them read."""
        source = torch.ones(max(1, round(problem.traffic / 8)), device=self.device)
        target = torch.ones_like(source)
        return lambda: (target.copy_(source),)

    def _samples(self, calls: Mapping[str, list[Call]]) -> Iterator[tuple[str, Samples]]:
        seconds = self.options.seconds()
        if self.device.type == "cpu":
            return iter([(self.options.pages, cpu_samples({name: several[0] for name, several in calls.items()}, seconds))])
        return gpu_samples(calls, seconds, self._verify, self.failures.__setitem__)

    def _verify(self, name: str, graph: Graph) -> None:
        if name == COPY:
            return
        self.problems[0].poison(graph.results[0])
        graph.replay()
        if name == FUSED:
            check(graph.results[0], self.exact, self.allowed)
        else:
            rounding_errors(graph.results[0], self.exact)

    def _row(self, state: str, variant: str, quartiles: Mapping[str, list[float]]) -> Row:
        def ratio(other: str) -> float | None:
            return quartiles[other][1] / quartiles[variant][1] if variant in quartiles and other in quartiles else None

        q1, median, q3 = (1e6 * t for t in quartiles[variant]) if variant in quartiles else (None, None, None)
        of_copy = ratio(COPY)
        return Row(
            op=self.op.name,
            case=self.case.name,
            direction=self.direction,
            pages=state,
            variant=variant,
            median_us=median,
            q1=q1,
            q3=q3,
            percent_of_copy=None if of_copy is None else 100 * of_copy,
            vs_eager=None if variant == COPY else ratio(EAGER),
            vs_compile=None if variant == COPY else ratio(COMPILED),
            peak_extra_bytes=self.peaks.get(variant),
            failure=self.failures.get(variant, ""),
            threads=self.options.threads,
            **self.origin,
        )
