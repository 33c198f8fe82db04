"""Maps of columns: values far out and outside of the support, statistics of data, integers, and a table of all kinds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from layers import assert_near, assert_refused, assert_trains_alike, fit
from torch import distributions

from flowkern import nn, ops

INFINITY = math.inf

#: Layers from data of bounded support to the real line, by name, with values of data outside of it.
SUPPORTED: dict[str, tuple[Callable[[], nn.Bijection], list[float]]] = {
    "log": (lambda: nn.Inverse(nn.Exp()), [0.0, -1e-3, -1e30, INFINITY]),
    "softplus": (lambda: nn.Inverse(nn.Softplus()), [0.0, -1e-3, -1e30, INFINITY]),
    "tanh": (lambda: nn.Inverse(nn.Tanh()), [1.0, -1.0, 1.5, -INFINITY]),
    "logit": (lambda: nn.Logit(0.0), [0.0, 1.0, -0.25, INFINITY]),
    "logit-ends": (lambda: nn.Logit(0.05), [-0.06, 1.06, 1e30, -INFINITY]),
    "interval": (lambda: nn.Compose(nn.Interval(-4.0, 4.0), nn.Logit(0.0)), [4.0, -4.0, 7.0, -INFINITY]),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def nan_only(t: torch.Tensor, at: int) -> bool:
    return t.isnan().tolist() == [i == at for i in range(len(t))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SUPPORTED)
def test_outside_of_the_support_the_density_is_zero(name: str, dtype: torch.dtype) -> None:
    """log p is -inf for a sample with a value outside, gradients are finite, and only NaN is NaN."""
    build, outside = SUPPORTED[name]
    flow = nn.Flow(nn.Compose(build(), nn.Scaling(2).to(dtype)), nn.StandardNormal(2))
    x = torch.tensor([[0.625, 0.25], *([0.5, value] for value in outside), [math.nan, 0.5]], dtype=dtype)
    log_prob = flow.log_prob(x)
    assert log_prob[0].isfinite()
    assert (log_prob[1:-1] == -INFINITY).all()
    assert nan_only(log_prob, len(x) - 1)
    given = x[:-1].detach().requires_grad_()
    flow.log_prob(given).sum().backward()
    assert all(g.isfinite().all() for g in (given.grad, flow.bijection.bijections[1].log_scale.grad))
    assert given.grad[0].abs().min() > 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["log", "softplus", "tanh", "logit", "logit-ends"])
def test_samples_stay_within_the_support(name: str, dtype: torch.dtype) -> None:
    """However far out their latents are; those near come back to the digits that the dtype has, and gradients are finite."""
    layer = SUPPORTED[name][0]()
    z = torch.tensor([-1e4, -300.0, -90.0, -30.0, -3.0, -0.5, 0.0, 1e-3, 0.5, 3.0, 30.0, 90.0, 300.0, 1e4], dtype=dtype)[:, None]
    x, slope = layer.inverse(z.requires_grad_())
    back, negated = layer(x)
    assert all(t.isfinite().all() for t in (x, back, negated, *torch.autograd.grad(x.sum() + slope.sum(), z)))
    assert torch.isfinite(slope).all()
    near = z.abs().flatten() < 4.0
    # The map and its inverse multiply and divide what a value is off by, here by up to exp(6) / 4.
    scale = 400 * torch.finfo(dtype).eps
    torch.testing.assert_close(back[near], z[near], rtol=scale, atol=scale)
    torch.testing.assert_close(negated[near], -slope[near], rtol=scale, atol=scale)


@pytest.mark.parametrize("name", ["log", "softplus", "tanh", "logit"])
def test_float32_keeps_the_digits_of_float64(name: str) -> None:
    """In both directions, values and log-determinants, also where exp overflows and where 1 - tanh^2 is 0 in float32."""
    layer = SUPPORTED[name][0]()
    v = torch.cat([torch.linspace(-80.0, 80.0, 641), torch.logspace(-30, -1, 30)])[:, None]
    for direction, given in ((layer.inverse, v), (layer.forward, layer.inverse(v)[0])):
        (y, slope), (exact, of_exact) = direction(given), direction(given.double())
        inside = slope.isfinite() & (exact.flatten().abs() < 80.0)  # float32 ends before
        # Roundings of the result and, in logarithms, of terms of the size of 1.
        atol = 2e-7 if direction == layer.forward else 1e-37
        torch.testing.assert_close(y.double()[inside], exact[inside], rtol=3e-7, atol=atol)
        torch.testing.assert_close(slope.double()[inside], of_exact[inside], rtol=3e-7, atol=2e-7)


def test_channels_last_stays() -> None:
    x = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    layers = [*(nn.Inverse(kind()) for kind in (nn.Exp, nn.Softplus, nn.Tanh)), nn.Logit(), nn.Interval(-1.0, 2.0)]
    for layer in layers:
        z = layer(x)[0]
        assert z.is_contiguous(memory_format=torch.channels_last)
        assert layer.inverse(z)[0].is_contiguous(memory_format=torch.channels_last)


def test_large_values_stay_nearly_as_they_are_under_softplus() -> None:
    x = torch.tensor([[25.0, 1e3, 1e300]], dtype=torch.float64)
    z, logabsdet = nn.Inverse(nn.Softplus())(x)
    assert_near(z, x)
    assert 0.0 < float(logabsdet) < 2e-11


def test_supports_of_flows_are_the_domains() -> None:
    x = torch.tensor([[0.5], [-2.0], [3.0]])
    layers = {name: SUPPORTED[name][0]() for name in ("log", "softplus", "tanh", "logit")} | {"integers": nn.Dequantize()}
    found = {name: nn.Flow(b, nn.StandardNormal(1)).distribution().support.check(x).tolist() for name, b in layers.items()}
    positive, bounded = [True, False, True], [True, False, False]
    assert found == {"log": positive, "softplus": positive, "tanh": bounded, "logit": bounded, "integers": [False, True, True]}


def test_columns_take_their_own_bijections_and_leave_the_rest() -> None:
    x, context = torch.rand(4, 6, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    coupling = nn.AffineCoupling(nn.MLP(1, 2, (8,), context=2, zero_init=False)).double()
    layer = nn.Columns({0: nn.Logit(0.1), (5, 2): coupling, range(3, 4): nn.Scaling(1).double()})
    z, logabsdet = layer(x, context)
    assert torch.equal(z[:, [1, 4]], x[:, [1, 4]])
    first, second = nn.Logit(0.1)(x[:, :1]), coupling(x[:, [5, 2]], context)
    assert torch.equal(z[:, [0, 5, 2]], torch.cat([first[0], second[0]], 1))
    assert_near(logabsdet, first[1] + second[1])
    assert torch.equal(nn.Columns({})(x)[0], x)
    assert [*layer.state_dict()] == [f"bijections.1.conditioner.{k}" for k in coupling.conditioner.state_dict()] + [
        "bijections.2.log_scale"
    ]


def test_interval_is_exact_at_its_ends() -> None:
    """Also far from zero, and where its length is not a float32."""
    low, high = torch.tensor([1950.0, 1e6, -0.1]), torch.tensor([2020.0, 1e6 + 0.5, 0.2])
    layer = nn.Interval(low, high)
    ends = torch.stack([low, high])
    assert torch.equal(layer(ends)[0], torch.tensor([[0.0], [1.0]]).expand(2, 3))
    assert torch.equal(layer.inverse(torch.tensor([[0.0], [1.0]]).expand(2, 3))[0], ends)


def table(rows: int = 1000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([1e6, -3.0, 0.0]) + torch.tensor([100.0, 1e-3, 7.0]) * torch.randn(rows, 3, generator=generator)


def test_standardize_is_fitted_once_and_saved() -> None:
    x = table()
    layer = nn.Standardize(3)
    assert torch.equal(layer(x)[0], x)
    assert layer.fit(x) is layer
    for dtype, digits in ((torch.float64, 1e-5), (torch.float32, 1e-3)):  # the mean is rounded to a part in 1e-3 of a deviation
        z = layer(x.to(dtype))[0]
        assert z.mean(0).abs().max() < digits or dtype is torch.float64
        torch.testing.assert_close(z.std(0, correction=0), torch.ones(3, dtype=dtype), rtol=digits, atol=0.0)
    double = nn.Standardize(3).double().fit(x.double())
    assert double(x.double())[0].mean(0).abs().max() < 1e-9
    other = nn.Standardize(3)
    other.load_state_dict(layer.state_dict())
    before = copy.deepcopy(layer.state_dict())
    assert torch.equal(other.train()(table(5) + 1.0)[0], layer.train()(table(5) + 1.0)[0])
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    # Sums and squares of such values overflow float64.
    huge = nn.Standardize(1).double().fit(torch.tensor([[8e307], [1.6e308]], dtype=torch.float64))
    assert_near(torch.stack([huge.mean, huge.scale]) / 4e307, torch.tensor([[3.0], [1.0]], dtype=torch.float64))


def test_errors_name_columns() -> None:
    x, constant, missing = table(), table(), table()
    constant[:, 1], constant[:, 2], missing[7, 2] = -3.7, 1e-30, math.nan
    close = torch.tensor([[1.0, 2.0, 1e9], [2.0, 3.0, 1e9 + 1.0]], dtype=torch.float64)
    names = ["mass", "age", "dose"]
    layer = nn.Standardize(3)
    kept = copy.deepcopy(layer.state_dict())
    assert_refused(
        (lambda: layer.fit(constant), r"one value alone, to the digits of torch\.float32 in columns 1, 2$"),
        (lambda: nn.Standardize(1).double().fit(torch.full((7777, 1), 0.1).double()), "in column 0$"),
        (lambda: layer.fit(constant, names), r"in columns 1 \('age'\), 2 \('dose'\)"),
        (lambda: layer.fit(close, names), r"one value alone, to the digits of torch\.float32 in column 2 \('dose'\)"),
        (lambda: layer.fit(missing, names), r"NaN or infinite values in column 2 \('dose'\)"),
        (lambda: layer.fit(1e39 * x.double()), r"a scale that torch\.float32 does not hold in columns 0, 1, 2"),
        (lambda: layer.fit(x[:1]), "at least 2 rows to fit to, got 1"),
        (lambda: layer.fit(x[:, :2]), r"expected shape \(B, 3\), got \(1000, 2\)"),
        (lambda: layer.fit(x, names[:2]), "names: expected 3, one for each column, got 2"),
        (lambda: layer(x[:, :1]), r"expected shape \(B, 3\), got \(1000, 1\)"),
        (lambda: layer.load_state_dict({"mean": torch.zeros(3), "scale": torch.zeros(3)}), "scales above 0", RuntimeError),
        (lambda: nn.Standardize(0), "features must be at least 1"),
        (lambda: nn.Interval(2.0, 2.0), r"low, high: expected low < high, got 2\.0 and 2\.0"),
        (lambda: nn.Interval(0.0, INFINITY), "high: expected finite numbers, got inf"),
        (lambda: nn.Columns({0: nn.Exp(), (1, 0): nn.Tanh()}), "column 0 is named twice"),
        (lambda: nn.Columns({-1: nn.Exp()}), "expected columns from 0 on, got -1"),
        (lambda: nn.Columns({(): nn.Exp()}), r"expected columns from 0 on, got \(\)"),
        (lambda: nn.Columns({"age": nn.Exp()}), "a column's number, a tuple of them or a range, got 'age'", TypeError),
        (lambda: nn.Columns({0: "exp"}), "expected a Bijection for column 0, got str", TypeError),
        (lambda: nn.Columns({(1, 3): nn.Exp()})(x), r"expected \(B, D\) with column 3, got shape \(1000, 3\)"),
        (lambda: nn.Columns({0: nn.Exp()})(x[0]), r"expected \(B, D\) with column 0, got shape \(3,\)"),
        (lambda: nn.Inverse(torch.nn.Identity()), "bijection: expected a Bijection, got Identity", TypeError),
        (lambda: nn.Inverse(nn.Squeeze()).output_shape((1, 2, 2)), r"keeps shapes, got one that makes \(4, 1, 1\)"),
    )
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_get_noise_and_come_back(dtype: torch.dtype) -> None:
    layer, x = nn.Dequantize(), torch.arange(-300.0, 301.0).repeat(20, 1).T.to(dtype)
    z, logabsdet = layer(x)
    assert z.dtype is dtype
    assert torch.equal(layer.inverse(z)[0], x)
    assert not logabsdet.any()
    assert logabsdet.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    small = (z - x)[x.abs() <= 3].float()  # uniform: 0.5 with a deviation of sqrt(1 / 12), of 140 draws; five of them
    assert abs(float(small.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / small.numel())
    assert not torch.equal(layer(x)[0], z)
    large = torch.tensor([[2.0**24 + 2.0], [2.0**40]])
    assert torch.equal(layer.inverse(layer(large)[0])[0], large)
    assert layer(torch.tensor([[1.0, 2.0], [1.5, 2.0], [3.0, -INFINITY]]))[1].tolist() == [0.0, -INFINITY, -INFINITY]


def test_density_of_dequantized_integers_bounds_their_probability() -> None:
    """That of a die, from the uniform density on (1, 7)."""
    torch.manual_seed(0)
    flow = nn.Flow(nn.Compose(nn.Dequantize(), nn.Interval(1.0, 7.0)), distributions.Uniform(torch.zeros(1), torch.ones(1)))
    x = torch.randint(1, 7, (100, 1)).float()
    torch.testing.assert_close(flow.log_prob(x), torch.full((100,), -math.log(6.0)), rtol=1e-4, atol=1e-4)
    samples = flow.sample(600)
    assert samples.unique().tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def mixed(rows: int) -> torch.Tensor:
    """A share, a positive amount, a bounded angle, a count, and a column that is what it is."""
    generator = torch.Generator().manual_seed(rows)
    a, b, c, d, e = torch.randn(5, rows, generator=generator)
    count = (2.0 * torch.exp(0.5 * d)).floor()
    return torch.stack([torch.sigmoid(a), torch.exp(b + 0.5 * a), 10.0 + 5.0 * torch.tanh(c), count, 100.0 + 0.01 * e], 1)


def mixed_flow(x: torch.Tensor, **options: str) -> nn.Flow:
    columns = nn.Columns({
        0: nn.Logit(0.0),
        1: nn.Inverse(nn.Exp()),
        2: nn.Compose(nn.Interval(5.0, 15.0), nn.Logit(0.01)),
        3: nn.Dequantize(),
    })  # fmt: skip
    split = ops.FeatureMask(torch.tensor([True, False, True, False, True]))
    layers = [
        columns,
        nn.Standardize(5).fit(columns(x)[0]),
        nn.AffineCoupling(nn.MLP(3, 4, (16,))),
        nn.AffineCoupling(nn.MLP(2, 6, (16,)), split=split),
    ]
    return nn.Flow(nn.Compose(*layers, **options), nn.StandardNormal(5))


def test_a_flow_over_a_table_of_all_kinds() -> None:
    torch.manual_seed(0)
    x = mixed(2000)
    flow = mixed_flow(x)
    losses = fit(flow, lambda: -flow.log_prob(x[torch.randint(2000, (200,))]), 150, lr=0.01)
    assert sum(losses[-20:]) < sum(losses[:20])
    samples = flow.sample(500)
    assert samples.isfinite().all()
    assert flow.log_prob(samples).isfinite().all()
    assert torch.equal(samples[:, 3], samples[:, 3].round())
    assert ((samples[:, 0] > 0.0) & (samples[:, 0] < 1.0) & (samples[:, 1] > 0.0)).all()
    # Medians and quartiles are the data's, to a fifth of the distance between its quartiles; of counts, which jump, the mean.
    wanted, found = (torch.quantile(t[:, [0, 1, 2, 4]], torch.tensor([0.25, 0.5, 0.75]), dim=0) for t in (x, samples))
    assert (x[:, 3].mean() - samples[:, 3].mean()).abs() <= 0.2 * x[:, 3].std()
    assert ((found - wanted).abs() <= 0.2 * (wanted[2] - wanted[0])).all()
    strange = x[:5].clone()
    strange[[0, 1, 2, 3], [0, 1, 2, 3]] = torch.tensor([1.5, -1.0, 99.0, 0.5])
    assert flow.log_prob(strange).isneginf().tolist() == [True, True, True, True, False]


def test_reversible_memory_of_a_table() -> None:
    torch.manual_seed(0)
    x = mixed(20).double()
    flow = mixed_flow(x).double()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.3)
    torch.manual_seed(0)
    assert_trains_alike(flow.bijection, x, memory="reversible")
    assert_trains_alike(nn.Compose(nn.Inverse(flow.bijection.bijections[2]), nn.Tanh()), torch.rand(6, 5).double())


def test_compiles_with_noise() -> None:
    x = mixed(20)
    flow = mixed_flow(x)
    torch._dynamo.reset()
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    log_prob = compiled(x)
    assert log_prob.isfinite().all()
    log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
