"""Transformers, in couplings and in autoregressive layers: the library's and a user's own; and the solver of their inverses."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
import torch
from layers import assert_exact, assert_refused, fit, remade, trained

from flowkern import nn
from flowkern.nn.bijections.root import solve_increasing
from flowkern.ops import FeatureMask, ScaleMap, SplineMap

K = 3


class Sinh(nn.Transformer):
    """A user's own: y = sinh(x exp(a) + b), written with what the documentation asks for and no more."""

    params_per_feature = 2

    def forward(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (0.3 * params).unbind(-1)
        if inverse:
            inner = torch.asinh(x)
            return (inner - b) * (-a).exp(), -a - inner.cosh().log()
        inner = x * a.exp() + b
        return inner.sinh(), a + inner.cosh().log()


class Powered(nn.Transformer, torch.nn.Module, kind="test-powered"):
    """Another, with a parameter of its own, and a name: y = x exp(t p)."""

    params_per_feature = 1

    def __init__(self, power: float = 0.5):
        super().__init__()
        self.power = power
        self.log_scale = torch.nn.Parameter(torch.tensor(power))

    def forward(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        logabsdet = params[..., 0] * (-self.log_scale if inverse else self.log_scale)
        return x * logabsdet.exp(), logabsdet


TRANSFORMERS: dict[str, Any] = {
    "affine": nn.Affine,
    "affine-exp": lambda: nn.Affine(ScaleMap.tanh(1.0), "shift_scale"),
    "affine-shift-first": lambda: nn.Affine(ScaleMap.softplus(), shift_first=True),
    "gated": nn.GatedAffine,
    "additive": nn.Additive,
    "mixture": lambda: nn.MixtureLogistic(K),
    "spline": nn.RationalQuadraticSpline,
    "spline-circular": lambda: nn.RationalQuadraticSpline(SplineMap(4, 2.0, "circular", kind="nflows")),
    "own": Sinh,
    "own-module": Powered,
}
FUSED = ("affine", "affine-exp", "affine-shift-first", "additive", "spline", "spline-circular")

#: Shape of x, split, number of moved channels.
SPLITS: dict[str, tuple[tuple[int, ...], str | FeatureMask, int]] = {
    "channel": ((4, 5), "channel", 2),
    "channel_swap": ((4, 5), "channel_swap", 3),
    "checkerboard": ((4, 2, 3, 3), "checkerboard", 2),
    "mask": ((4, 4), FeatureMask(torch.tensor([True, False, True, True])), 3),
}


class _Given(torch.nn.Module):
    """A conditioner that returns what it holds, whatever it is shown."""

    def __init__(self, params: torch.Tensor):
        super().__init__()
        self.params = torch.nn.Parameter(params)

    def forward(self, kept: torch.Tensor) -> torch.Tensor:
        return self.params


def coupling(transformer: nn.Transformer, split: str, scale: float = 1.0) -> tuple[nn.Coupling, torch.Tensor]:
    """A coupling in float64 whose parameters are drawn, and an input."""
    shape, how, moved = SPLITS[split]
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params = scale * draw(shape[0], transformer.params_per_feature * moved, *shape[2:])
    return nn.Coupling(_Given(params), transformer, split=how).double(), 2.0 * draw(shape)


def autoregressive(name: str, direction: str = "forward", context: int | None = None) -> tuple[nn.Autoregressive, torch.Tensor]:
    torch.manual_seed(0)
    how: dict[str, Any] = {"direction": direction, "activation": "tanh", "order": "random", "context": context}
    return nn.Autoregressive(4, TRANSFORMERS[name](), (7,), **how).double(), torch.randn(3, 4, dtype=torch.float64)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("name", "scale"), [*((name, 1.0) for name in TRANSFORMERS), ("mixture", 4.0)])
def test_coupling_inverse_and_log_determinant(name: str, scale: float, split: str) -> None:
    assert_exact(*coupling(TRANSFORMERS[name](), split, scale))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_autoregressive_inverse_and_log_determinant(name: str, direction: str) -> None:
    layer, x = autoregressive(name, direction)
    assert_exact(layer, x)
    assert (layer.network is None) == (name not in ("affine", "affine-exp", "gated"))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_equals_the_default(name: str, split: str, inverse: bool) -> None:
    transformer = TRANSFORMERS[name]()
    layer, x = coupling(transformer, split)
    arguments = x.requires_grad_(), layer.conditioner.params
    results = []
    for couple in (transformer.couple, functools.partial(nn.Transformer.couple, transformer)):
        outputs = couple(*arguments, layer.split, inverse)
        loss = (outputs[0].square().flatten(1).sum(1) + outputs[1]).sum()
        results.append((*outputs, *torch.autograd.grad(loss, arguments)))
    for fused, default in zip(*results, strict=True):
        torch.testing.assert_close(fused, default)


@pytest.mark.parametrize("name", ["affine", "affine-exp", "gated"])
def test_the_op_equals_passes(name: str) -> None:
    layer, x = autoregressive(name, context=2)
    context = torch.randn(3, 2, dtype=torch.float64)
    by_passes = copy.deepcopy(layer)
    by_passes._network, by_passes._levels = None, [level.tolist() for level in layer.made.levels()]
    results = []
    for made in (layer, by_passes):
        made.zero_grad()
        outputs = made.inverse(x, context)
        (outputs[0].square().sum() + outputs[1].sum()).backward()
        results.append((*outputs, *(p.grad for p in made.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["additive", "mixture", "spline", "spline-circular", "own", "own-module"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    transformer = TRANSFORMERS[name]()
    draw = functools.partial(torch.randn, dtype=torch.float64, requires_grad=True)
    x, params = draw(2, 2), draw(2, transformer.params_per_feature)
    if isinstance(transformer, torch.nn.Module):
        transformer.double()
    for inverse in (False, True):
        couple = functools.partial(transformer.couple, split="channel", inverse=inverse)
        assert torch.autograd.gradcheck(couple, (x, params))
        assert torch.autograd.gradgradcheck(couple, (x, params))
    layer, x = autoregressive(name)
    assert torch.autograd.gradcheck(layer.inverse, (x.requires_grad_(),))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_reversible_memory(name: str, inverse: bool) -> None:
    """One evaluation of the conditioner in the backward, and the gradients of storing."""
    calls: list[bool] = []

    class Counted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            return super().forward(x)

    torch.manual_seed(0)
    transformers = [TRANSFORMERS[name]() for _ in range(2)]
    pairs = zip(transformers, ("channel", "channel_swap"), strict=True)
    couplings = [nn.Coupling(Counted(2, 2 * t.params_per_feature), t, split=split) for t, split in pairs]
    stored, x, results = nn.Compose(*couplings, autoregressive(name)[0]).double(), torch.randn(3, 4, dtype=torch.float64), []
    for chain in (stored, remade(stored, memory="reversible")):
        calls.clear()
        results.append(trained(chain, x, inverse=inverse))
    assert calls == [False, False, True, True]
    torch.testing.assert_close(*results)


def test_a_module_moves_and_learns_with_its_layer() -> None:
    layer = nn.Coupling(nn.MLP(2, 2), Powered())
    assert "transformer.log_scale" in layer.state_dict()
    assert layer.double().transformer.log_scale.dtype is torch.float64
    assert "Powered" in repr(layer)
    assert "Sinh" in repr(nn.Coupling(nn.MLP(2, 4), Sinh()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "mixture", "spline"])
def test_own_layers_compile_in_one_graph_and_keep_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowkern._core.root.ROUNDS", 1)  # of the solver
    layers = coupling(TRANSFORMERS[name](), "channel")[0].float(), autoregressive(name)[0].float()
    for layer, x in zip(layers, (torch.randn(4, 5), torch.randn(4, 4)), strict=True):
        # The steps of a solver in each of several passes are a graph that takes long to trace.
        for direction in (layer,) if name == "mixture" and isinstance(layer, nn.Autoregressive) else (layer, layer.inverse):
            torch._dynamo.reset()
            compiled = torch.compile(lambda v, f=direction: f(v), fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), direction(x))
        half = layer.bfloat16()
        for z, logabsdet in (half(x.bfloat16()), half.inverse(x.bfloat16())):
            assert (z.dtype, logabsdet.dtype) == (torch.bfloat16, torch.float32)


def test_kept_pixels_of_a_checkerboard_have_no_say() -> None:
    layer, x = coupling(Sinh(), "checkerboard")
    expected = layer(x)
    kept = nn.Coupling(_Given(torch.ones(4, 2, 3, 3)), nn.Additive(), split="checkerboard")(torch.zeros(4, 2, 3, 3))[0] == 0
    with torch.no_grad():
        layer.conditioner.params.masked_fill_(kept.repeat(1, 2, 1, 1), torch.inf)
    z, logabsdet = layer(x.requires_grad_())
    torch.testing.assert_close((z, logabsdet), expected)
    (z.sum() + logabsdet.sum()).backward()
    assert x.grad.isfinite().all()
    assert layer.conditioner.params.grad.isfinite().all()


@pytest.mark.parametrize("name", ["affine-exp", "gated", "additive", "mixture", "spline", "spline-circular"])
def test_config_round_trip(name: str) -> None:
    transformer = TRANSFORMERS[name]()
    config = json.loads(json.dumps(transformer.config()))
    assert nn.TRANSFORMERS[config["kind"]] is type(transformer)
    assert nn.Transformer.of(config) == transformer
    assert nn.Transformer.of(transformer) is transformer


def test_a_name_stands_for_the_default_settings() -> None:
    for name in ("spline", "rational_quadratic_spline"):
        assert nn.Transformer.of(name) == nn.RationalQuadraticSpline(SplineMap(8))
    assert nn.Transformer.of("spline").config()["kind"] == "rational_quadratic_spline"
    box = nn.RationalQuadraticSpline(SplineMap(3, (0.0, 1.0), "box"))
    assert nn.Transformer.of(json.loads(json.dumps(box.config()))) == box


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", ["spline", "spline-circular"])
def test_a_spline_is_that_of_its_map(name: str, inverse: bool) -> None:
    """Single values, sums and couplings against the definition, with gradients, in float64."""
    transformer = TRANSFORMERS[name]()
    draw = functools.partial(torch.randn, dtype=torch.float64, requires_grad=True)
    x, params = draw(5, 4), draw(5, 4, transformer.params_per_feature)
    y, log_slope = transformer.spline(x, params, None, inverse)
    loss = (y.sin() + log_slope.square()).sum()
    expected = (y, log_slope, *torch.autograd.grad(loss, (x, params), retain_graph=True))
    y_, log_slope_ = transformer.forward(x, params, inverse)
    single = (y_, log_slope_, *torch.autograd.grad((y_.sin() + log_slope_.square()).sum(), (x, params)))
    torch.testing.assert_close(single, expected)
    torch.testing.assert_close(transformer.transform(x, params, inverse), (y, log_slope.sum(1)))
    blocks = params.movedim(-1, 1).flatten(1)
    everything = FeatureMask(torch.tensor([True] * 4))
    torch.testing.assert_close(transformer.couple(x, blocks, everything, inverse), (y, log_slope.sum(1)))


def test_config_of_own_transformers() -> None:
    assert Powered(0.25).config() == {"kind": "test-powered", "power": 0.25}
    assert nn.Transformer.of({"kind": "test-powered", "power": 0.25}).power == 0.25
    with pytest.raises(TypeError, match=r"Sinh: it has no name to be saved by; declare it as class Sinh\(\.\.\., kind"):
        Sinh().config()

    class Unnamed(nn.Affine):
        """Derived from one with a name, and something else."""

    with pytest.raises(TypeError, match="Unnamed: it has no name"):
        Unnamed().config()

    class Forgetful(nn.Transformer, kind="test-forgetful"):
        def __init__(self, bins: int):
            self.widths = bins

    assert_refused(
        (lambda: Forgetful(3).config(), "Forgetful: no attribute for the argument 'bins'", TypeError),
        (lambda: nn.Transformer.of({"kind": "cubic"}), "transformer: unknown kind 'cubic'; expected one of 'affine'"),
        (lambda: nn.Transformer.of("cubic"), "transformer: unknown kind 'cubic'; expected one of 'affine'"),
        (lambda: nn.Transformer.of(3), "transformer: expected a Transformer, its config .* or its name, got 3", TypeError),
        (lambda: nn.Transformer.of({"kind": "affine", "power": 2}), "unexpected keyword argument 'power'", TypeError),
    )


def logistic(batch: int) -> tuple[nn.MixtureLogisticCoupling, torch.Tensor]:
    params = torch.randn(batch, 2 + 3 * K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return nn.MixtureLogisticCoupling(_Given(params), K), torch.randn(batch, 2, dtype=torch.float64)


def test_values_by_the_distribution_function() -> None:
    coupling, x = logistic(4)
    raw, shift, *mixture = coupling.conditioner.params.unbind(1)
    logits, mean, raw_scales = (torch.stack(mixture[i * K : (i + 1) * K], 1) for i in range(3))
    distribution = (logits.softmax(1) * ((x[:, 1:] - mean) / coupling.scale(raw_scales)[0]).sigmoid()).sum(1)
    expected = coupling.scale(raw)[0] * distribution.logit() + shift
    torch.testing.assert_close(coupling(x)[0], torch.stack([x[:, 0], expected], 1))


def test_far_from_every_component() -> None:
    """Where F is 0 or 1 to every bit the map is still linear, finite and invertible, in float32 too."""
    coupling, x = logistic(2)[0].float(), torch.tensor([[0.0, 1e4], [0.0, -1e4]])
    z, logabsdet = coupling(x)
    assert all(t.isfinite().all() for t in (z, logabsdet))
    torch.testing.assert_close(coupling.inverse(z)[0], x, rtol=1e-5, atol=1e-3)


def test_trains_inside_a_flow() -> None:
    torch.manual_seed(0)
    make = lambda split: nn.MixtureLogisticCoupling(nn.MLP(1, 2 + 3 * K, (16,), zero_init=False), K, split=split)  # noqa: E731
    flow = nn.Flow(nn.Compose(make("channel"), make("channel_swap")), nn.StandardNormal(2))
    x = torch.randn(256, 2).sign() * 2 + 0.3 * torch.randn(256, 2)
    losses = fit(flow, lambda: -flow.log_prob(x), 60, lr=0.02)
    assert losses[-1] < losses[0] - 0.5
    drawn = flow.sample(200)
    assert ((drawn.abs() - 2).abs() < 1.2).float().mean() > 0.8


def test_roots() -> None:
    """Of functions on which Newton's method alone runs away, from any bracket."""
    target = torch.linspace(-3.0, 3.0, 13, dtype=torch.float64)
    for function, slope in (
        (lambda x: x.tanh() * 3.1, lambda x: 3.1 * (1 - x.tanh().square())),
        (lambda x: x**3, lambda x: 3 * x**2),
        (lambda x: x.sinh(), lambda x: x.cosh()),
    ):
        bracket = torch.full_like(target, -50.0), torch.full_like(target, 70.0)
        root = solve_increasing(lambda x, f=function, s=slope: (f(x) - target, s(x)), *bracket)
        torch.testing.assert_close(function(root), target, rtol=1e-9, atol=1e-9)


def test_derivatives_of_roots() -> None:
    """Of the cube root, by autograd, forward mode and functional transforms."""
    t = torch.tensor([0.5, 2.0, -3.0], dtype=torch.float64, requires_grad=True)

    def cube_root(t: torch.Tensor) -> torch.Tensor:
        return solve_increasing(lambda x: (x**3 - t, 3 * x**2), torch.full_like(t, -4.0), torch.full_like(t, 5.0))

    root, derivative = cube_root(t), t.abs() ** (1 / 3) * t.sign()
    torch.testing.assert_close(root, derivative)
    for order in range(3):
        (root,) = torch.autograd.grad(root.sum(), t, create_graph=True)
        derivative = derivative * (1 / 3 - order) / t
        torch.testing.assert_close(root, derivative)
    slopes = t.detach().abs() ** (-2 / 3) / 3
    torch.testing.assert_close(torch.func.jvp(cube_root, (t.detach(),), (torch.ones_like(t),))[1], slopes)
    torch.testing.assert_close(torch.func.jacrev(cube_root)(t.detach()), slopes.diag())


def test_errors() -> None:
    short = nn.MixtureLogisticCoupling(torch.nn.Identity(), K)
    other, direction = r"transformer: expected an nn\.Transformer, got ", "direction: unknown name 'backward'; expected one of "
    assert_refused(
        (lambda: nn.MixtureLogisticCoupling(torch.nn.Identity(), 0), "components: expected at least 1, got 0"),
        (lambda: nn.GatedAffine(ScaleMap.exp()), "gated: expected a sigmoid scale"),
        (lambda: nn.Affine(layout="rows"), "layout: unknown name 'rows'"),
        (lambda: nn.MixtureLogistic(K, scale="tanh"), r"scale: expected an ops\.ScaleMap", TypeError),
        (lambda: nn.RationalQuadraticSpline(8), r"spline: expected an ops\.SplineMap", TypeError),
        (lambda: nn.RationalQuadraticSpline({"bins": 1}), "bins: expected an integer of at least 2, got 1"),
        (lambda: nn.Coupling(torch.nn.Identity(), nn.RationalQuadraticSpline())(torch.zeros(2, 2)), "params: expected shape"),
        (lambda: short(torch.zeros(2, 2)), r"params: expected shape \(B, 11\), got \(2, 1\)"),
        (lambda: nn.Coupling(torch.nn.Identity(), "affine"), other + "str", TypeError),
        (lambda: nn.Autoregressive(3, ScaleMap.exp()), other + "ScaleMap", TypeError),
        (lambda: nn.Autoregressive(3, nn.Affine(), direction="backward"), direction + "'forward', 'inverse'"),
        (lambda: nn.Transformer().forward(*torch.zeros(2, 1), False), "Transformer has no forward", NotImplementedError),
    )
