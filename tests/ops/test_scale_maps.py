"""The scale maps of every backend against mpmath, from tail to tail: values, ends, and gradients where some are absent."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import mpmath
import pytest
import torch
from scale_maps import MAPS, Values, assert_values, check_sweep, exact_map, grid

from flowkern import ops
from flowkern.ops import ScaleMap, affine_coupling, autoregressive_inverse
from flowkern.ops.autoregressive.sweep import slope_of_log

of_every_map = pytest.mark.parametrize("name", MAPS)
of_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def by_coupling(scale: ScaleMap, u: torch.Tensor, inverse: bool) -> Values:
    """(s or 1 / s, log s, slope) as an affine coupling has them: of x = 1 without a shift."""
    params = torch.stack([u, torch.zeros_like(u)], 1).requires_grad_()
    y, logabsdet = affine_coupling(torch.ones_like(params), params, scale=scale, inverse=inverse)
    (slope,) = torch.autograd.grad(logabsdet.sum(), params)
    sign = -1 if inverse else 1
    return y.detach()[:, 1], sign * logabsdet.detach(), sign * slope[:, 0]


def sigmoid_floor(name: str, dtype: torch.dtype) -> float:
    """torch.sigmoid has no subnormal numbers, and the slope is its quotient by s."""
    return torch.finfo(dtype).tiny / 1e-3 if name in ("sigmoid-eps", "softplus") else 0.0


@of_both_dtypes
@of_every_map
def test_values(name: str, dtype: torch.dtype, where: str) -> None:
    # Autograd has 1 - tanh^2 and a difference of quotients for these two: as exact as the largest slope, which is 1.
    floor = 4 * torch.finfo(dtype).eps if name in ("tanh", "soft-clip") else sigmoid_floor(name, dtype)
    for inverse in (False, True):
        values = by_coupling(MAPS[name], grid(dtype), inverse)
        assert_values(values, name, dtype, inverse, floor if where == "torch" else 0.0)


@of_both_dtypes
@of_every_map
def test_slope_of_log(name: str, dtype: torch.dtype) -> None:
    s, log_s = MAPS[name](grid(dtype))
    assert_values((s, log_s, slope_of_log(MAPS[name], grid(dtype))), name, dtype, False, sigmoid_floor(name, dtype))


@of_both_dtypes
@of_every_map
def test_sweep_of_every_isa(name: str, dtype: torch.dtype, isa: str) -> None:
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
def test_ends(name: str, dtype: torch.dtype, where: str) -> None:
    check_ends(by_coupling, name, dtype)
    if where == "torch":
        check_ends(lambda scale, u, _: (*scale(u), slope_of_log(scale, u)), name, dtype)


EXTREMES = [0.0, 1.0, 50.0, 88.0, 104.0, 1e4]
EXTREMES = [*EXTREMES, *(-v for v in EXTREMES[1:])]


def check_affine(name: str, dtype: torch.dtype, inverse: bool, create_graph: bool = False, floor: float = 0.0) -> None:
    """The gradients of y alone and of logabsdet alone against mpmath, wherever the scale and what it multiplies have a value.

    ``floor``: the absolute error of the slopes that autograd finds.
    """
    scale, sign, (g, k) = MAPS[name], -1 if inverse else 1, (0.75, -1.25)
    most = mpmath.mpf(torch.finfo(dtype).max)
    xs = [0.0, -1.0, 3.0, torch.inf]
    cases = [*itertools.product(EXTREMES, xs, (False, True))]
    for shift_first in (False, True):
        u, x = (torch.tensor([case[i] for case in cases], dtype=dtype) for i in (0, 1))
        moved = torch.stack([torch.zeros_like(x), x], 1).requires_grad_()
        params = torch.stack([u, torch.full_like(u, 0.5)], 1).requires_grad_()
        outputs = ops.affine_coupling(moved, params, scale=scale, inverse=inverse, shift_first=shift_first)
        grads = torch.full_like(moved, g), torch.full_like(outputs[1], k)
        found = [
            torch.autograd.grad(
                y, (moved, params), grad, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
            for y, grad in zip(outputs, grads, strict=True)
        ]
        expected, size = torch.zeros(len(cases), 3, dtype=torch.float64), torch.ones(len(cases), dtype=torch.float64)
        certain = torch.ones(len(cases), dtype=torch.bool)
        for i, (raw, value, of_y) in enumerate(cases):
            with mpmath.workdps(50):
                s, _, slope = exact_map(scale, mpmath.mpf(raw))
                if not of_y:
                    expected[i, 1] = sign * k * float(slope)
                    continue
                factor, z = (1 / s if inverse else s), value + (0.0 if shift_first is inverse else -0.5 if inverse else 0.5)
                through = g * factor
                certain[i] = math.isfinite(value) and max(factor, abs(through), abs(through * z)) < most
                if certain[i]:
                    shift = sign * (through if shift_first is not inverse else g)
                    expected[i, 0], expected[i, 2] = float(through), float(shift)
                    expected[i, 1], size[i] = sign * float(slope * through * z), abs(float(through * z))
        of_y = torch.tensor([case[2] for case in cases])
        for j, actual in enumerate(
            torch.where(of_y, a, b) for a, b in zip(*((d[0][:, 1], d[1][:, 0], d[1][:, 1]) for d in found), strict=True)
        ):
            truth = expected[:, j]
            granted = (64 + 2 * u.abs().clamp(max=1e3).double()) * torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).tiny
            granted = granted + floor * size
            assert not (certain & actual.isnan()).any()
            wrong = certain & ~((actual.double() - truth).abs() <= granted)
            assert not wrong.any(), [(cases[i], j, actual[i].item(), truth[i].item()) for i in wrong.nonzero().flatten().tolist()]


@of_both_dtypes
@of_every_map
def test_gradients_of_one_output_alone(name: str, dtype: torch.dtype, where: str) -> None:
    floor = 4 * torch.finfo(dtype).eps
    for inverse in (False, True):
        check_affine(name, dtype, inverse, floor=floor if where == "torch" else 0.0)
        if where == "torch":
            check_affine(name, dtype, inverse, create_graph=True, floor=floor)


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
