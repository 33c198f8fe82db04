"""The small cases under pytest-benchmark: ``pytest bench --benchmark-only``. The same cases as ``python -m bench``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import CASES, Case, cases_of
from .comparison import EAGER, FLOWKERN, Options
from .subjects import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [
    pytest.param(name, case, direction, id=f"{name}-{case.name}-{direction}")
    for name in CASES
    for case in cases_of(name, DEVICE)
    if case.small
    for direction in case.directions
]


@pytest.mark.parametrize("variant", [FLOWKERN, EAGER])
@pytest.mark.parametrize(("name", "case", "direction"), SMALL)
def test_speed(name: str, case: Case, direction: str, variant: str, benchmark: Any) -> None:
    comparison = ops.compared(name, case, direction, Options(device=DEVICE, compile="none"))
    for each, call in comparison.calls.items():
        assert comparison.check(each, call) == ""
    call = comparison.calls[variant]

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name} {case.name} {direction}"
    benchmark(run)
