"""What a subject yields: calls that compute the same, other libraries' too, their check, and how they become rows."""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import flowkern

from .memory import peak_extra_bytes
from .row import Row, Target
from .timing import Call, Graph, Samples, cpu_samples, gpu_samples

__all__ = [
    "COMPILED",
    "COPY",
    "EAGER",
    "FLOWKERN",
    "Comparison",
    "Options",
    "Tensors",
    "WrongResult",
    "by_norm",
    "check",
    "measure",
    "off_by",
    "peer",
    "peers_of",
    "poisoned",
    "running",
    "seeded",
]

FLOWKERN, EAGER, COMPILED, COPY = "flowkern", "eager", "compile", "copy"
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    subjects: tuple[str, ...] = ("ops",)
    device: str = "cpu"
    pages: str = "fresh"
    threads: int = 1
    quick: bool = False
    compile: str = "all"  # or "large", or "none"
    only: str = "*"

    def seconds(self, cpu: float = 5.0) -> float:
        """For the samples of one comparison, which take so many seconds on a CPU; on a GPU for those of one variant."""
        return (0.05 if self.quick else 0.3) if self.device == "cuda" else (0.05 if self.quick else cpu)

    def wants(self, *labels: str) -> bool:
        """Whether one of the labels of a case matches one of the patterns, which commas part."""
        return any(fnmatch.fnmatch(label, pattern) for label in labels for pattern in self.only.split(","))


_PEERS: dict[str, dict[str, Callable[..., Any]]] = {}


def peer(subject: str, package: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that registers what makes another library's variant in a subject."""

    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        _PEERS.setdefault(subject, {})[package] = make
        return make

    return register


@functools.cache
def peers_of(subject: str) -> dict[str, Callable[..., Any]]:
    """What makes the variants of the packages that are installed, by package; a missing one is left out."""
    found = {}
    for package, make in _PEERS.get(subject, {}).items():
        if importlib.util.find_spec(package.replace("-", "_")):
            found[package] = make
        else:
            print(f"{subject}: {package} is not installed (pip install {package}): it is left out", file=sys.stderr)
    return found


@dataclass
class Comparison:
    """Calls of one case in one direction that compute the same, or are a measure for those that do.

    Args:
        calls: what is timed, by variant, in turn.
        against: the variant whose time is divided by each one's.
        check: ``check(variant, call)`` says what is wrong with the result of a call, by its truth in float64; "" if nothing.
            It is called for every variant before anything is timed, in the order of ``calls``.
        failures: what else was found wrong, by variant; such variants are not timed.
        traffic: the bytes that have to be moved, for a copy of as many bytes beside the calls.
        seconds: for the samples on a CPU; ``Options.seconds`` has the others.
        slow: seconds of calls that are too slow to be sampled with the others.
        memory: bytes that a call holds above its results; None where the system does not say.
        rotated: on a GPU the calls again, for inputs that are not in the cache; they are timed as CUDA graphs,
            and ``verify(variant, graph)`` raises for a graph that computes something else.
    """

    case: str
    direction: str
    calls: Mapping[str, Call]
    against: str
    check: Callable[[str, Call], str] = lambda variant, call: ""
    failures: Mapping[str, str] = field(default_factory=dict)
    traffic: float | None = None
    seconds: float = 5.0
    slow: Mapping[str, list[float]] = field(default_factory=dict)
    memory: Callable[[Call, torch.device], int | None] = peak_extra_bytes
    target: Target | None = None
    rotated: Mapping[str, Sequence[Call]] = field(default_factory=dict)
    verify: Callable[[str, Graph], None] = lambda variant, graph: None


def measure(subject: str, comparison: Comparison, options: Options, origin: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a comparison: each variant is checked, then its memory is taken, then all are timed in turn."""
    device = torch.device(options.device)
    failures = {name: failure for name, failure in comparison.failures.items() if failure}
    calls: dict[str, Call] = {}
    for name, call in comparison.calls.items():
        failure = failures.get(name) or _judged(subject, comparison, name, call)
        if failure:
            failures[name] = failure
        elif failure is not None:
            calls[name] = call
    peaks = {name: comparison.memory(call, device) for name, call in calls.items()}
    if comparison.traffic:
        calls[COPY] = copy_of(comparison.traffic, device)
    if comparison.calls and comparison.against not in calls and comparison.against not in comparison.slow:
        calls = {}  # nothing is timed that has nothing to be held against
    for state, samples in _samples(comparison, calls, options, failures):
        quartiles = {name: _quartiles(values) for name, values in {**samples, **comparison.slow}.items() if name not in failures}

        def ratio(variant: str, other: str, quartiles: Mapping[str, Sequence[float]] = quartiles) -> float | None:
            return quartiles[other][1] / quartiles[variant][1] if variant in quartiles and other in quartiles else None

        for name in dict.fromkeys([*comparison.calls, *comparison.slow, *samples, *failures]):
            if name not in quartiles and name not in failures:
                continue
            q1, median, q3 = (1e6 * seconds for seconds in quartiles[name]) if name in quartiles else (None, None, None)
            of_copy = ratio(name, COPY)
            yield Row(
                subject=subject,
                case=comparison.case,
                direction=comparison.direction,
                pages=state,
                variant=name,
                median_us=median,
                q1=q1,
                q3=q3,
                ratio=None if name == COPY else ratio(name, comparison.against),
                against=comparison.against,
                vs_compile=None if name == COPY else ratio(name, COMPILED),
                percent_of_copy=None if of_copy is None else 100 * of_copy,
                peak_extra_bytes=peaks.get(name),
                failure=failures.get(name, ""),
                threads=options.threads,
                **origin,
            )


def _judged(subject: str, comparison: Comparison, name: str, call: Call) -> str | None:
    """What is wrong with a call, "" if nothing; None for code that torch.compile cannot compile here, which is no row."""
    try:
        return comparison.check(name, call)
    except WrongResult as error:
        return str(error)
    except Exception as error:  # whatever it is belongs into this row, and the next one is measured
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if name != COMPILED:
            return message
        print(f"{subject} {comparison.case}: torch.compile does not work here: {message}", file=sys.stderr)
        return None


def _samples(
    comparison: Comparison, calls: Mapping[str, Call], options: Options, failures: dict[str, str]
) -> Iterator[tuple[str, Samples]]:
    """(state, seconds of each call) for the states that the device has."""
    seconds = options.seconds(comparison.seconds)
    if options.device != "cuda":
        yield options.pages, cpu_samples(calls, seconds) if calls else {}
    elif not calls:
        yield "cold", {}
    else:
        rotated = dict(comparison.rotated)
        if comparison.traffic and rotated:
            rotated[COPY] = [copy_of(comparison.traffic, torch.device("cuda")) for _ in next(iter(rotated.values()))]
        several = {name: [call, *rotated.get(name, ())] for name, call in calls.items()}
        yield from gpu_samples(several, seconds, comparison.verify, failures.__setitem__)


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def copy_of(traffic: float, device: torch.device) -> Call:
    """A copy that moves so many bytes, half of them read."""
    source = torch.ones(max(1, round(traffic / 8)), device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


# ---------------------------------------------------------------------------------------------------------------------
# Checks

#: What plain torch code, compiled or not, may be off, in units in the last place of the largest value: it forms long sums.
_PLAIN_ULPS = 64
#: Granted on top of twice the plain code's error: a largest error over few values is a lottery.
_GRANTED_ULPS = 4


class WrongResult(Exception):
    """A result that is not that of the float64 reference; the message says which and by how much."""


def _largest(values: torch.Tensor) -> float:
    return values.detach().abs().max().item() if values.numel() else 0.0


def check(actual: Tensors, exact: Tensors, plain: Sequence[float] | None = None) -> list[float]:
    """The largest error of each result.

    Raises WrongResult for a result that is not about as accurate as that of the plain code, whose errors are given; without
    them, for one that is off by more roundings than plain code may be.
    """
    if [a.shape for a in actual] != [truth.shape for truth in exact]:
        raise WrongResult(f"shapes {[tuple(a.shape) for a in actual]}, expected {[tuple(t.shape) for t in exact]}")
    errors = [_largest(a.double() - truth) for a, truth in zip(actual, exact, strict=True)]
    for i, error in enumerate(errors):
        ulp = torch.finfo(actual[i].dtype).eps * _largest(exact[i])
        granted = _PLAIN_ULPS * ulp if plain is None else 2 * plain[i] + _GRANTED_ULPS * ulp
        if not error <= granted:
            raise WrongResult(f"result {i}: error {error:.2e}, {granted:.2e} is allowed")
    return errors


def off_by(results: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], granted: float = 1e-5) -> str:
    """How far the results are from those in float64, by their norms, if that is more than granted."""
    errors = [float((r.double() - e).norm() / e.norm().clamp(min=1e-30)) for r, e in zip(results, exact, strict=True)]
    return "" if all(error < granted for error in errors) else f"off by {max(errors):.1e} of the norm"


def seeded(call: Call) -> Any:
    """What the call returns, with the same random numbers each time."""
    torch.manual_seed(1)
    return call()


def by_norm(truth: Mapping[str, Tensors], granted: Mapping[str, float] | None = None) -> Callable[[str, Call], str]:
    """A check of each variant against its results in float64; one without such results is a measure alone.

    ``granted`` names the variants that may be off by more than 1e-5 of the norm.
    """
    allowed = granted or {}
    return lambda name, call: off_by(seeded(call), truth[name], allowed.get(name, 1e-5)) if name in truth else ""


def running(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on one backend."""

    def run(*args: torch.Tensor) -> Any:
        with flowkern.backend(backend):
            return function(*args)

    return run


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors start as NaN instead of as what an earlier, perhaps right, call left there."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
