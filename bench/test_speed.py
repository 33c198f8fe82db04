"""The small cases under pytest-benchmark: ``pytest bench --benchmark-only``. The same cases as ``python -m bench``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowkern import OPS

from .cases import CASES, Case, cases_of
from .measure import DIRECTIONS
from .subjects.calls import Problem, check, poisoned, rounding_errors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [pytest.param(name, case, id=f"{name}-{case.name}") for name in CASES for case in cases_of(name, DEVICE) if case.small]


@pytest.mark.parametrize("variant", ["flowkern", "eager"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "case"), SMALL)
def test_speed(name: str, case: Case, direction: str, variant: str, benchmark: Any) -> None:
    op = OPS[name]
    problem = Problem(case, direction, torch.device(DEVICE), op.reference)
    call = problem.call(op.function if variant == "flowkern" else op.reference)
    exact = problem.exact(op.reference)
    allowed = rounding_errors(problem.call(op.reference)(), exact)
    with poisoned():
        check(call(), exact, allowed)

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name} {case.name} {direction}"
    benchmark(run)
