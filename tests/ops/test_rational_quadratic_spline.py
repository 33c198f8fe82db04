"""What only the rational-quadratic spline must survive: knots, bounds, minimal bins, values far outside, steep slopes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from comparison import assert_refused

from flowkern import OPS, ops
from flowkern.ops import SplineMap

KINDS = ("zuko", "nflows")
MAPS = [
    SplineMap(8, (0.0, 1.0) if tails == "box" else 3.0, tails, kind)
    for kind, tails in itertools.product(KINDS, ("linear", "circular", "box"))
]
every_map = pytest.mark.parametrize("spline", MAPS, ids=lambda s: f"{s.kind}-{s.tails}")


def drawn(
    spline: SplineMap, count: int, size: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values inside the interval, and parameters."""
    torch.manual_seed(0)
    low, high = spline.interval
    x = low + (high - low) * torch.rand(count, 1, dtype=dtype)
    return x, size * torch.randn(count, 1, spline.params_per_feature, dtype=dtype)


def knots(spline: SplineMap, params: torch.Tensor) -> torch.Tensor:
    """Where bins meet, the ends included: (..., K + 1)."""
    low, high = spline.interval
    shares = spline.shares(params[..., : spline.bins], spline.min_width)
    return low + (high - low) * torch.nn.functional.pad(shares.cumsum(-1), (1, 0))


@every_map
def test_a_million_values_come_back(spline: SplineMap) -> None:
    """On knots and bounds and in bins of the least width too, to 1e-6 of the interval times the slope; all is finite."""
    x, params = drawn(spline, 10**6, 0.7)
    params[:1000, :, 0] = 30.0  # one bin takes all but the least shares
    x[1000:9000, 0] = knots(spline, params[1000:9000, 0])[torch.arange(8000), torch.arange(8000) % 9]
    low, high = spline.interval
    x = x.clamp(low, high)
    y, logabsdet = ops.rational_quadratic_spline(x, params, spline=spline)
    back, negated = ops.rational_quadratic_spline(y, params, spline=spline, inverse=True)
    assert torch.isfinite(y).all()
    assert torch.isfinite(logabsdet).all()
    assert torch.isfinite(back).all()
    # The error of y, half a unit, is magnified by the slope of the inverse.
    slope = 1.0 + torch.maximum((-logabsdet).exp(), negated.exp())[:, None]
    assert ((back - x).abs() / (high - low) / slope).max() < 1e-6


@every_map
def test_logabsdet_is_that_of_differences(spline: SplineMap) -> None:
    x, params = drawn(spline, 2000, dtype=torch.float64)
    x.requires_grad_()
    for inverse in (False, True):
        y, logabsdet = ops.rational_quadratic_spline(x, params, spline=spline, inverse=inverse)
        (slope,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(slope.log().sum(1), logabsdet, rtol=1e-9, atol=1e-9)


@every_map
@pytest.mark.parametrize("inverse", [False, True])
def test_the_error_is_that_of_torch(spline: SplineMap, inverse: bool) -> None:
    """On average over values and gradients in float32: a largest error says more of the values than of the kernel."""
    x, params = drawn(spline, 20000)

    def results(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [t.to(dtype).requires_grad_() for t in (x, params)]
        y, logabsdet = function(*given, spline=spline, inverse=inverse)
        return [y, logabsdet, *torch.autograd.grad(y.sum() + logabsdet.sum(), given)]

    exact, plain = (results(spline_in_torch, dtype) for dtype in (torch.float64, torch.float32))
    for found, own, truth in zip(results(ops.rational_quadratic_spline, torch.float32), plain, exact, strict=True):
        assert (found - truth).abs().mean() <= 2.0 * (own - truth).abs().mean()


def spline_in_torch(x: torch.Tensor, params: torch.Tensor, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return OPS["rational_quadratic_spline"].reference(x, params, **how)


@every_map
def test_knots_go_to_knots_with_their_slopes(spline: SplineMap) -> None:
    _, params = drawn(spline, 50, dtype=torch.float64)
    x, d = knots(spline, params[:, 0]), spline.slopes(params[:, 0, 2 * spline.bins :])
    heights = params.roll(-spline.bins, -1)  # whose first K parameters are the raw heights
    params = params.expand(-1, spline.bins + 1, -1)
    y, _ = ops.rational_quadratic_spline(x, params, spline=spline)
    torch.testing.assert_close(y, knots(spline, heights[:, 0]))
    inner = x[:, 1:-1].requires_grad_()
    y, _ = ops.rational_quadratic_spline(inner, params[:, 1:-1], spline=spline)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inner)[0], d[:, 1:-1])


@pytest.mark.parametrize("inverse", [False, True])
def test_outside_of_the_interval(inverse: bool) -> None:
    """The identity beside linear tails, no density beside a box, the next period on the circle; finite gradients everywhere."""
    x = torch.tensor([[-1e30], [-3.5], [7.0], [1e4], [math.inf]], requires_grad=True)
    for tails, outside in (("linear", 0.0), ("box", -math.inf)):
        spline = SplineMap(4, (-3.0, 3.0), tails)
        params = torch.randn(5, 1, spline.params_per_feature, requires_grad=True)
        y, logabsdet = ops.rational_quadratic_spline(x, params, spline=spline, inverse=inverse)
        assert torch.equal(y, x)
        assert (logabsdet == outside).all()
        dx, dparams = torch.autograd.grad(y.sum() + logabsdet.sum(), (x, params))
        assert (dx == 1).all()
        assert (dparams == 0).all()
    spline = SplineMap(4, (-3.0, 3.0), "circular")
    x, params = torch.rand(9, 1, dtype=torch.float64) * 6 - 3, torch.randn(9, 1, 12, dtype=torch.float64)
    y, logabsdet = ops.rational_quadratic_spline(x, params, spline=spline, inverse=inverse)
    further, same = ops.rational_quadratic_spline(x - 18.0, params, spline=spline, inverse=inverse)
    torch.testing.assert_close(further, y - 18.0)
    torch.testing.assert_close(same, logabsdet)


def test_a_split_that_moves_nothing() -> None:
    x, params = torch.randn(3, 1, requires_grad=True), torch.randn(3, 0, 23, requires_grad=True)
    y, logabsdet = ops.rational_quadratic_spline(x, params, split="channel")
    assert torch.equal(y, x)
    assert torch.equal(logabsdet, torch.zeros(3))
    dx, dparams = torch.autograd.grad(y.sum() + logabsdet.sum(), (x, params))
    assert (dx == 1).all()
    assert dparams.shape == params.shape


def test_zeros_are_nearly_the_identity() -> None:
    """Of zuko's kind: equal shares and slopes of 1. nflows' starts with slopes of log 2."""
    x = torch.randn(100, 3, dtype=torch.float64)
    y, logabsdet = ops.rational_quadratic_spline(x, torch.zeros(100, 3, 23, dtype=torch.float64))
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(logabsdet, torch.zeros(100, dtype=torch.float64), rtol=0.0, atol=1e-12)


def test_extreme_parameters_stay_finite() -> None:
    """Of 1e4, infinite ones in zuko's kind, and bfloat16."""
    for spline, value in itertools.product(MAPS, (1e4, -1e4)):
        x, params = drawn(spline, 200)
        params[:, :, ::3] = value
        for inverse in (False, True):
            given = [x.requires_grad_(), params.bfloat16().requires_grad_()]
            y, logabsdet = ops.rational_quadratic_spline(*given, spline=spline, inverse=inverse)
            assert torch.isfinite(y).all()
            assert not logabsdet.isnan().any()
    x, params = drawn(MAPS[0], 200)
    params[:, :, 3], params[:, :, 20] = math.inf, -math.inf
    assert torch.isfinite(ops.rational_quadratic_spline(x, params, spline=MAPS[0])[0]).all()


def test_bad_maps_and_parameters_are_named() -> None:
    cases: dict[str, tuple[Any, ...]] = {
        "ValueError: SplineMap: bins: .* at least 2, got 1": ({"bins": 1},),
        "ValueError: SplineMap: bound: .* got 0.0": ({"bins": 4, "bound": 0.0},),
        r"ValueError: SplineMap: bound: .* got \(1.0, 1.0\)": ({"bins": 4, "bound": (1.0, 1.0)},),
        "ValueError: SplineMap: min_width: .* less than 1 / bins = 0.25, got 0.25": ({"bins": 4, "min_width": 0.25},),
        "ValueError: SplineMap: min_height": ({"bins": 4, "min_height": -1.0},),
        "ValueError: SplineMap: min_derivative": ({"bins": 4, "min_derivative": 1.0},),
        "ValueError: SplineMap: slope": ({"bins": 4, "slope": 1.0},),
        "ValueError: SplineMap: divisor": ({"bins": 4, "divisor": 0.0},),
        "ValueError: SplineMap: tails: expected one of linear, circular, box, got 'open'": ({"bins": 4, "tails": "open"},),
        "ValueError: SplineMap: kind: expected one of zuko": ({"bins": 4, "kind": "cubic"},),
    }
    assert_refused(SplineMap, cases)
    x, params = torch.randn(4, 3), torch.randn(4, 3, 23)
    shape = r"ValueError: params: expected shape \(4, 3, 23\) for x of shape \(4, 3\), 23 parameters .* got \(4, 3, 22\)"
    cases = {
        shape: (x, params[..., :22]),
        "TypeError: spline: expected an ops.SplineMap": (x, params, {"spline": 8}),
        "ValueError: layout: unknown name 'columns'": (x, params, {"layout": "columns"}),
        "ValueError: bounds: expected shape": (x, params, {"bounds": torch.zeros(2, 2)}),
        "ValueError: split: unknown name": (x, params, {"split": "half"}),
    }
    assert_refused(ops.rational_quadratic_spline, cases)
