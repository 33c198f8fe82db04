"""The scale maps of every backend against mpmath, from tail to tail: s or 1 / s, log s and its slope, to a few last digits."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch

import flowkern
from flowkern import ops
from flowkern.ops import AutoregressiveNetwork, ScaleMap, affine_coupling, autoregressive_inverse
from flowkern.ops.autoregressive.sweep import slope_of_log

MAPS = {
    "exp": ScaleMap.exp(),
    "sigmoid": ScaleMap.sigmoid(),
    "sigmoid-eps": ScaleMap.sigmoid(eps=1e-3),
    "softplus-0": ScaleMap.softplus(0.0),
    "softplus": ScaleMap.softplus(),
    "tanh": ScaleMap.tanh(1.9),
    "atan": ScaleMap.atan(1.9),
    "soft-clip": ScaleMap.soft_clip(),
}
DTYPES = [torch.float32, torch.float64]
Values = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

of_every_map = pytest.mark.parametrize("name", MAPS)
of_both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def exact_map(scale: ScaleMap, u: Any) -> tuple[Any, Any, Any]:
    """(s, log s, slope of log s) of a number of mpmath, which is finite."""
    exp, log1p, a, b = mpmath.exp, mpmath.log1p, mpmath.mpf(scale.a), mpmath.mpf(scale.b)
    if scale.kind == "sigmoid":
        s, rest = 1 / (1 + exp(-u - a)), 1 / (1 + exp(u + a))
        return s + b, log1p(b - rest) if b else -log1p(exp(-u - a)), s * rest / (s + b)
    if scale.kind == "softplus":
        s = (max(u, 0) + log1p(exp(-abs(u)))) + a
        return s, mpmath.log(s), 1 / (1 + exp(-u)) / s
    if scale.kind == "exp":
        log_s, slope = u, mpmath.mpf(1)
    elif scale.kind == "tanh":
        log_s, slope = a * mpmath.tanh(u / a), mpmath.sech(u / a) ** 2
    elif scale.kind == "atan":
        log_s, slope = mpmath.mpf(0.636 * scale.a) * mpmath.atan(u), mpmath.mpf(0.636 * scale.a) / (1 + u * u)
    else:
        log_s, slope = u / (1 + abs(u / a)), 1 / (1 + abs(u / a)) ** 2
    return exp(log_s), log_s, slope


@functools.cache
def grid(dtype: torch.dtype) -> torch.Tensor:
    limit = 120.0 if dtype is torch.float32 else 800.0
    large = torch.logspace(-8, 38 if dtype is torch.float32 else 100, 93, dtype=torch.float64)
    dense = torch.linspace(-limit, limit, 321, dtype=torch.float64)
    tiny = torch.finfo(dtype).tiny
    return torch.cat(
        [large, -large, dense, torch.tensor([0.5413248546, -2.0, 4.9, tiny / 8, -tiny / 8], dtype=torch.float64)]
    ).to(dtype)


@functools.cache
def exact_table(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, 1 / s, log s, slope) in float64 for the grid, and the errors that a rounding of u, of a constant or of log s makes."""
    scale, u = MAPS[name], grid(dtype)
    step = mpmath.mpf(2) ** -60

    def values(u: Any) -> list[Any]:
        s, log_s, slope = exact_map(scale, u)
        return [s, 1 / s, log_s, slope]

    rows, errors = [], []
    with mpmath.workdps(80):
        for number in u.tolist():
            u0 = mpmath.mpf(number)
            here, there = values(u0), values(u0 + max(abs(u0), abs(mpmath.mpf(scale.a))) * step)
            moved = [abs(after - before) / step for before, after in zip(here, there, strict=True)]
            rounded = [abs(v) * (1 + (abs(here[2]) if i < 2 else 0)) for i, v in enumerate(here)]
            rows.append([float(v) for v in here])
            errors.append([float(r + m) for r, m in zip(rounded, moved, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).T, torch.tensor(errors, dtype=torch.float64).T


def assert_values(values: Values, name: str, dtype: torch.dtype, inverse: bool, floor: float = 0.0) -> None:
    """(s or 1 / s, log s, slope) of the grid, to 4 units in the last place and the smallest normal number.

    ``floor``: what the slope may be off besides.
    """
    exact, errors = exact_table(name, dtype)
    info = torch.finfo(dtype)
    for i, actual in zip((int(inverse), 2, 3), values, strict=True):
        assert actual.dtype is dtype
        truth, granted = exact[i], 4 * info.eps * errors[i] + info.tiny + (floor if i == 3 else 0.0)
        actual = actual.double()
        largest = truth.abs() > info.max * (1 - 1e-3)
        assert (actual[largest].abs() > info.max * (1 - 2e-3)).all()
        wrong = ~largest & ~((actual - truth).abs() <= granted)
        assert not wrong.any(), [*zip(grid(dtype)[wrong].tolist(), actual[wrong].tolist(), truth[wrong].tolist(), strict=True)]


def by_coupling(scale: ScaleMap, u: torch.Tensor, inverse: bool) -> Values:
    """(s or 1 / s, log s, slope) as an affine coupling has them: of x = 1 without a shift."""
    params = torch.stack([u, torch.zeros_like(u)], 1).requires_grad_()
    y, logabsdet = affine_coupling(torch.ones_like(params), params, scale=scale, inverse=inverse)
    (slope,) = torch.autograd.grad(logabsdet.sum(), params)
    sign = -1 if inverse else 1
    return y.detach()[:, 1], sign * logabsdet.detach(), sign * slope[:, 0]


def check_sweep(inverse: Callable[..., Any], name: str, dtype: torch.dtype) -> None:
    """1 / s and log s as the inverse of an autoregressive layer has them, whose outputs are its context."""
    u, network = grid(dtype), AutoregressiveNetwork((1,), (), scale=MAPS[name])
    context = torch.stack([u, torch.zeros_like(u)], 1)
    x, logabsdet = inverse(torch.ones_like(u)[:, None], [u.new_zeros((2, 1)), u.new_zeros(2)], [network], contexts=[context])
    assert_values((x[:, 0], -logabsdet, exact_table(name, dtype)[0][3].to(dtype)), name, dtype, True)


@both_ways
@of_both_dtypes
@of_every_map
def test_every_isa(name: str, dtype: torch.dtype, inverse: bool, isa: str) -> None:
    with flowkern.backend("cpp"):
        assert_values(by_coupling(MAPS[name], grid(dtype), inverse), name, dtype, inverse)


def sigmoid_floor(name: str, dtype: torch.dtype) -> float:
    """torch.sigmoid has no subnormal numbers, and the slope is its quotient by s."""
    return torch.finfo(dtype).tiny / 1e-3 if name in ("sigmoid-eps", "softplus") else 0.0


@both_ways
@of_both_dtypes
@of_every_map
def test_reference(name: str, dtype: torch.dtype, inverse: bool) -> None:
    # Autograd has 1 - tanh^2 and a difference of quotients for these two: as exact as the largest slope, which is 1.
    floor = 4 * torch.finfo(dtype).eps if name in ("tanh", "soft-clip") else sigmoid_floor(name, dtype)
    with flowkern.backend("torch"):
        assert_values(by_coupling(MAPS[name], grid(dtype), inverse), name, dtype, inverse, floor)


@of_both_dtypes
@of_every_map
def test_slope_of_log(name: str, dtype: torch.dtype) -> None:
    s, log_s = MAPS[name](grid(dtype))
    assert_values((s, log_s, slope_of_log(MAPS[name], grid(dtype))), name, dtype, False, sigmoid_floor(name, dtype))


@of_both_dtypes
@of_every_map
def test_sweep_of_every_isa(name: str, dtype: torch.dtype, isa: str) -> None:
    with flowkern.backend("cpp"):
        check_sweep(autoregressive_inverse, name, dtype)


def check_ends(function: Callable[..., Values], name: str, dtype: torch.dtype) -> None:
    """At infinity s, log s and its slope have their limits; NaN stays NaN."""
    scale, ends = MAPS[name], torch.tensor([-torch.inf, torch.inf], dtype=dtype)
    s, log_s, slope = function(scale, ends, False)
    limits = {"tanh": 1.9, "atan": 0.636 * 1.9 * torch.pi / 2, "soft-clip": -torch.tensor(1e-3).log().item()}
    low = {"sigmoid-eps": 1e-3, "softplus": 1e-3}
    if name in limits:
        expected = limits[name] * torch.tensor([-1.0, 1.0], dtype=dtype)
    else:
        top = math.log1p(low.get(name, 0.0)) if name.startswith("sigmoid") else torch.inf
        expected = torch.tensor([torch.tensor(low.get(name, 0.0), dtype=dtype).log(), top], dtype=dtype)
    torch.testing.assert_close(log_s, expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(s, expected.exp(), rtol=1e-5, atol=0)
    below = {"exp": [1.0, 1.0], "sigmoid": [1.0, 0.0], "softplus-0": [1.0, 0.0]}.get(name, [0.0, 0.0])
    assert slope.tolist() == below
    for value in function(scale, torch.full((3,), torch.nan, dtype=dtype), False)[:2]:
        assert value.isnan().all()


@of_both_dtypes
@of_every_map
def test_ends_of_every_isa(name: str, dtype: torch.dtype, isa: str) -> None:
    with flowkern.backend("cpp"):
        check_ends(by_coupling, name, dtype)


@of_both_dtypes
@of_every_map
def test_ends_of_the_reference(name: str, dtype: torch.dtype) -> None:
    with flowkern.backend("torch"):
        check_ends(by_coupling, name, dtype)
    check_ends(lambda scale, u, _: (*scale(u), slope_of_log(scale, u)), name, dtype)


NO_NUMBERS = (torch.nan, torch.inf, -torch.inf, 1e39, 1e-39)


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_constants_must_be_numbers_of_float32(value: float) -> None:
    makers: dict[str, Callable[[float], ScaleMap]] = {
        "bias": lambda v: ScaleMap.sigmoid(v),
        "eps": lambda v: ScaleMap.sigmoid(eps=v),
        "clamp": ScaleMap.tanh,
        "a": lambda v: ScaleMap("exp", v),
        "b": lambda v: ScaleMap("sigmoid", 2.0, v),
    }
    more = [("eps", ScaleMap.softplus), ("clamp", ScaleMap.atan)]
    for name, make in [*makers.items(), *more]:
        with pytest.raises(
            ValueError, match=f"ScaleMap: {name}: expected a .*number.* that float32 holds, got {re.escape(str(value))}"
        ):
            make(value)


def test_constants_have_signs() -> None:
    for name, make in (("eps", ScaleMap.softplus), ("b", lambda v: ScaleMap("sigmoid", 0.0, v))):
        with pytest.raises(ValueError, match=f"ScaleMap: {name}: expected a number of at least 0 that float32 holds, got -0.5"):
            make(-0.5)
    with pytest.raises(ValueError, match="ScaleMap: clamp: expected a positive number that float32 holds, got 0"):
        ScaleMap.tanh(0)
    assert ops.ScaleMap.sigmoid(-0.5).a == -0.5
