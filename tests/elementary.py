"""The elementary functions of the Triton kernels against mpmath, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import torch
import triton
import triton.language as tl
from flowkern.kernels import lang


@triton.jit
def _apply(p_x, p_y, N, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(p_x + o, mask=o < N, other=0.5)
    if FUNCTION == "exp":
        y = lang.exp(x)
    elif FUNCTION == "log1p":
        y = lang.log1p(x)
    elif FUNCTION == "expm1":
        y = lang.expm1(x)
    elif FUNCTION == "tanh":
        y = lang.tanh(x)
    elif FUNCTION == "atan":
        y = lang.atan(x)
    elif FUNCTION == "log":
        y = lang.log(x)
    elif FUNCTION == "quotient":
        y = lang.quotient(x, 3.0 + x)
    elif FUNCTION == "divide":
        y = lang.divide(x, 255.0)
    else:
        y = lang.reciprocal(x)
    tl.store(p_y + o, y, mask=o < N)


def evaluate(name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.full_like(x, 77.0)
    _apply[(1,)](x, y, len(x), FUNCTION=name, BLOCK=triton.next_power_of_2(len(x)))
    return y


def logarithmic(low: float, high: float) -> torch.Tensor:
    return torch.logspace(low, high, 400, dtype=torch.float64)


FUNCTIONS: dict[str, tuple[Callable[..., Any], torch.Tensor]] = {
    "exp": (mpmath.exp, torch.cat([torch.linspace(-87.0, 88.0, 900, dtype=torch.float64), -logarithmic(-9, 0)])),
    "log1p": (mpmath.log1p, torch.cat([torch.linspace(0, 1, 500, dtype=torch.float64), logarithmic(-30, 0)])),
    "expm1": (mpmath.expm1, torch.cat([torch.linspace(-30, 5, 500, dtype=torch.float64), -logarithmic(-30, 0)])),
    "tanh": (mpmath.tanh, torch.cat([torch.linspace(-25, 25, 500, dtype=torch.float64), logarithmic(-30, 1)])),
    "atan": (mpmath.atan, torch.cat([torch.linspace(-9, 9, 500, dtype=torch.float64), -logarithmic(-30, 30)])),
    "log": (mpmath.log, torch.cat([torch.linspace(1e-3, 2, 500, dtype=torch.float64), logarithmic(-37, 38)])),
    "quotient": (lambda x: x / (3 + x), torch.cat([logarithmic(-30, 17), -logarithmic(-30, 0)])),
    "divide": (lambda x: x / 255, torch.cat([torch.linspace(0, 255, 500, dtype=torch.float64), -logarithmic(-30, 30)])),
    "reciprocal": (lambda x: 1 / x, logarithmic(0, 17)),
}


def assert_elementary(name: str, dtype: torch.dtype, device: str, units: float) -> None:
    """The function is within so many units in the last place of its true value, at every argument of FUNCTIONS."""
    exact, x = FUNCTIONS[name]
    x = x.to(device, dtype)
    for argument, value in zip(x.tolist(), evaluate(name, x).tolist(), strict=True):
        with mpmath.workdps(40):
            truth = exact(mpmath.mpf(argument))
            assert abs(value - truth) <= units * torch.finfo(dtype).eps * abs(truth), f"{name}({argument}) = {value}"
