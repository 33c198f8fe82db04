"""Calls to be measured, and the check that each must pass first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..cases import BOTH, Case

__all__ = ["Call", "Problem", "WrongResult", "check", "poisoned", "rounding_errors"]

Tensors = tuple[torch.Tensor, ...]
Call = Callable[[], Tensors]

#: What plain torch code, compiled or not, may be off, in units in the last place of the largest value: it forms long sums.
_PLAIN_ULPS = 64
#: Granted on top of twice the plain code's error: a largest error over few values is a lottery.
_GRANTED_ULPS = 4


class WrongResult(Exception):
    """A result that is not that of the float64 reference; the message says which and by how much."""


class Problem:
    """A case with its inputs drawn: ``call(function)`` is the call to measure, and returns all that it computed."""

    def __init__(self, case: Case, direction: str, device: torch.device, reference: Callable[..., Any], seed: int = 0):
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        self.kwargs, self.direction = case.kwargs, direction
        self.args = tuple(a.detach().requires_grad_(direction == BOTH and a.is_floating_point()) for a in case.inputs(draw))
        self.traffic = sum(case.traffic(*self.args)) if direction == BOTH else case.traffic(*self.args)[0]
        with torch.no_grad():
            outputs = reference(*self.args, **self.kwargs)
        self.gradients = tuple(torch.empty_like(y).normal_(generator=generator) for y in outputs) if direction == BOTH else ()

    def call(self, function: Callable[..., Any]) -> Call:
        """``function`` on the inputs; with the backward, also the gradients of the inputs that have one."""
        return self._call(function, self.args, self.gradients)

    def exact(self, reference: Callable[..., Any]) -> Tensors:
        """What the reference computes of the same inputs in float64."""
        args = tuple(a.detach().double().requires_grad_(a.requires_grad) for a in self.args)
        return self._call(reference, args, tuple(g.double() for g in self.gradients))()

    def poison(self, results: Tensors) -> None:
        """Fills the results with NaN, but for those that are views of what was given."""
        given = {a.untyped_storage().data_ptr() for a in (*self.args, *self.gradients)}
        for result in results:
            if result.untyped_storage().data_ptr() not in given:
                result.detach().fill_(float("nan"))

    def _call(self, function: Callable[..., Any], args: Tensors, gradients: Tensors) -> Call:
        kwargs = self.kwargs
        if self.direction != BOTH:
            return lambda: tuple(function(*args, **kwargs))
        leaves = tuple(a for a in args if a.requires_grad)
        outputs = function(*args, **kwargs)
        recorded = [i for i, y in enumerate(outputs) if y.requires_grad]
        given = [gradients[i] for i in recorded]

        def run() -> Tensors:
            outputs = function(*args, **kwargs)
            return *outputs, *torch.autograd.grad([outputs[i] for i in recorded], leaves, given)

        return run


def _largest(values: torch.Tensor) -> float:
    return values.abs().max().item()


def _errors(actual: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> Iterator[tuple[float, float]]:
    """(largest error, one unit in the last place of the largest value) per tensor."""
    for a, truth in zip(actual, exact, strict=True):
        if a.numel():
            yield _largest(a.detach().double() - truth.detach()), torch.finfo(a.dtype).eps * _largest(truth.detach())
        else:
            yield 0.0, 0.0


def rounding_errors(plain: Tensors, exact: Tensors) -> list[float]:
    """The largest error of each result of plain torch code. Raises WrongResult if one is more than rounding."""
    errors = list(_errors(plain, exact))
    for i, (error, ulp) in enumerate(errors):
        if not error <= _PLAIN_ULPS * ulp:
            raise WrongResult(f"result {i}: error {error:.2e}, {_PLAIN_ULPS * ulp:.2e} is allowed")
    return [error for error, _ in errors]


def check(actual: Tensors, exact: Tensors, plain: Sequence[float]) -> None:
    """Raises WrongResult unless every result is about as accurate as that of the plain code, whose errors are given."""
    if [a.shape for a in actual] != [truth.shape for truth in exact]:
        raise WrongResult(f"shapes {[tuple(a.shape) for a in actual]}, expected {[tuple(t.shape) for t in exact]}")
    for i, ((error, ulp), allowed) in enumerate(zip(_errors(actual, exact), plain, strict=True)):
        granted = 2 * allowed + _GRANTED_ULPS * ulp
        if not error <= granted:
            raise WrongResult(f"result {i}: error {error:.2e}, {granted:.2e} is allowed")


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors start as NaN instead of as what an earlier, perhaps right, call left there."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
