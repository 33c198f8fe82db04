"""``MADE`` and ``MADEDensity``: what sees what, the peers' network, and densities that sum to one."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from layers import assert_refused, fit
from torch.utils._python_dispatch import TorchDispatchMode

import flowkern
from flowkern import nn

ACTIVATIONS = ("relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid")
SHAPES: dict[str, dict[str, Any]] = {
    "sorted": {},
    "cyclic": {"degrees": "cyclic"},
    "random": {"degrees": "random", "order": "random", "seed": 3},
    "order": {"order": torch.tensor([3, 0, 4, 1, 2])},
    "residual": {"residual": True, "activation": "tanh"},
    "residual-random": {"residual": True, "degrees": "random", "order": "random"},
    "context": {"context": 3},
    "residual-context": {"residual": True, "context": 3, "degrees": "cyclic"},
    "linear": {"hidden": ()},
    "given": {"degrees": [torch.tensor([0, 4, 1, 3, 2, 2]), torch.tensor([1, 0, 3])], "hidden": (6, 3)},
}


def made(name: str, features: int = 5, **changes: Any) -> nn.MADE:
    torch.manual_seed(1)
    return nn.MADE(features, **{"hidden": (16, 12), "params_per_feature": 3, **SHAPES[name], **changes}).double()


def context_of(network: nn.MADE, batch: int) -> torch.Tensor | None:
    return None if network.context is None else torch.randn(batch, network.context, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_see_the_features_before_theirs_and_no_others(name: str, backend: str) -> None:
    network = made(name)
    x, context = torch.randn(8, 5, dtype=torch.float64), context_of(made(name), 8)
    with flowkern.backend(backend):
        jacobian = torch.autograd.functional.jacobian(lambda x: network(x, context).sum(0), x)  # (D, K, B, D)
    before = network.order[None, :] < network.order[:, None]
    seen = (jacobian != 0).any(2).any(1)
    assert not (seen & ~before).any()
    if name not in ("given", "random", "residual-random"):  # every path that the order allows is there
        assert torch.equal(seen, before)
    if context is not None:
        by_context = (torch.autograd.functional.jacobian(lambda c: network(x, c).sum(0), context) != 0).any(2).any(-1)
        assert by_context[1:].all()
        assert by_context[0].all() == (name == "context")  # by cyclic degrees the first output sees no hidden unit


def test_the_context_starts_as_a_part_of_the_first_layer() -> None:
    torch.manual_seed(0)
    start = nn.MADE(6, (500,), context=3).context_layer.weight.abs()
    assert 0.99 / 3.0 < start.max() <= 1.0 / 3.0
    assert abs(start.mean() * 6.0 - 1.0) < 0.1  # uniform


@pytest.mark.parametrize("residual", [False, True])
def test_the_same_weights_give_what_nflows_gives(residual: bool) -> None:
    theirs_of = pytest.importorskip("nflows.transforms.made", reason="nflows is not installed").MADE
    for features, blocks in ((7, 2), (3, 1), (1, 1)):
        how = {"num_blocks": blocks, "output_multiplier": 2, "use_residual_blocks": residual, "activation": torch.tanh}
        theirs = theirs_of(features, 20, **how).double()
        hidden = (20,) * (blocks + 1)
        ours = nn.MADE(features, hidden, 2, activation="tanh", residual=residual, degrees="cyclic").double()
        inner = [m for b in theirs.blocks for m in (b.linear_layers if residual else [b.linear])]
        linears = [theirs.initial_layer, *inner, theirs.final_layer]
        for own, other in zip(ours.layers, linears, strict=True):
            assert torch.equal(own.mask.dense(), other.mask.bool())
            own.load_state_dict({"weight": other.weight, "bias": other.bias})
        x = torch.randn(6, features, dtype=torch.float64)
        torch.testing.assert_close(ours(x).flatten(1), theirs(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    network = made("sorted", activation=activation)
    x = torch.randn(4, 5, dtype=torch.float64)
    function = {"gelu": torch.nn.GELU(), "leaky_relu": torch.nn.LeakyReLU(0.01), "elu": torch.nn.ELU(), "silu": torch.nn.SiLU()}
    h = x
    for i, layer in enumerate(network.layers):
        h = h @ torch.where(layer.mask.dense(), layer.weight, 0.0).t() + layer.bias
        h = h if i == 2 else function.get(activation, getattr(torch, activation, None))(h)  # type: ignore[misc]
    torch.testing.assert_close(network(x), h.view(4, 5, 3))


def test_degrees_are_spread_and_sorted() -> None:
    for features, width in ((5, 16), (5, 3), (2, 4), (100, 7), (784, 1024), (784, 512), (3, 1), (2, 1)):
        network = nn.MADE(features, (width, width))
        for degrees in network.hidden_degrees:
            assert torch.equal(degrees, degrees.sort()[0])
            assert degrees.min() == 1
            assert degrees.max() <= features - 1
            counts = degrees.bincount(minlength=features)[1:]
            if width >= features - 1:
                assert counts.max() - counts.min() <= 1
            elif width > 1:
                assert counts.max() == 1
                assert degrees.max() == features - 1
        assert all(m.rows is None and m.columns is None for m in network.masks())
    assert nn.MADE(5, (9,), context=2).hidden_degrees[0].unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(nn.MADE(5, (9,), degrees="cyclic").hidden_degrees[0], torch.arange(9) % 4 + 1)
    torch.testing.assert_close(nn.MADE(784, (1024, 1024)).share, 0.5, rtol=0.02, atol=0)


def test_depth_counts_the_distinct_sets_that_outputs_see() -> None:
    for name, features in itertools.product(("sorted", "cyclic", "random", "residual-random", "linear"), (1, 2, 5, 40)):
        network = made(name, features)
        visible = {tuple(row.tolist()) for row in network.masks()[-1].dense()}
        assert network.depth == len(visible)
        assert f"depth={network.depth}" in repr(network)
        assert torch.equal(torch.cat(network.levels()).sort()[0], torch.arange(features))
    assert nn.MADE(784, (512,)).depth == 513
    assert nn.MADE(20, (512,)).depth == 20


def test_one_feature_sees_nothing() -> None:
    for residual in (False, True):
        network = nn.MADE(1, (4, 4), context=2, residual=residual)
        assert all((d == 0).all() for d in network.hidden_degrees)
        context = torch.randn(3, 2)
        first, second = (network(torch.randn(3, 1), context) for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(first, network(torch.randn(3, 1), context + 1))
        weights = sum(layer.weight.numel() for layer in network.layers)
        assert network.share == pytest.approx((4 * 4 * len(network.layers[1:-1]) + 2 * 4) / weights)


def test_layers_are_named_in_order_of_use() -> None:
    network = nn.MADE(5, (16, 8, 4), 2, context=3, residual=True)
    assert [tuple(layer.weight.shape) for layer in network.layers] == [(16, 5), (8, 16), (16, 8), (4, 16), (16, 4), (10, 16)]
    assert [len(d) for d in network.hidden_degrees] == [16, 8, 16, 4, 16]
    assert network.context_layer.bias is None
    assert network.preactivation_context(torch.randn(2, 3)).shape == (2, 16)
    assert nn.MADE(5, (4,)).preactivation_context(None) is None
    assert all(name.endswith(("weight", "bias")) for name in network.state_dict())
    x = torch.randn(2, 5)
    h = network.layers[0](x) + network.preactivation_context(torch.ones(2, 3))
    for i in (1, 3):
        h = h + network.layers[i + 1](network.layers[i](h.relu()).relu())
    torch.testing.assert_close(network(x, torch.ones(2, 3)), network.layers[5](h).view(2, 5, 2))


def test_masks_are_resampled_and_copied() -> None:
    network = made("sorted")
    x = torch.randn(2, 5, dtype=torch.float64)
    before = network(x)
    other = copy.deepcopy(network)
    other.resample_masks(torch.Generator().manual_seed(5))
    assert not torch.equal(other.order, network.order)
    assert not torch.equal(other(x), before)
    assert torch.equal(network(x), before)
    same = copy.deepcopy(network)
    same.resample_masks(torch.Generator().manual_seed(5))
    assert torch.equal(same(x), other(x))
    jacobian = torch.autograd.functional.jacobian(lambda x: other(x)[0], x[:1])[:, :, 0]
    assert not ((jacobian != 0).any(1) & (other.order[None, :] >= other.order[:, None])).any()


@pytest.mark.parametrize("name", ["cyclic", "residual-context", "given", "order"])
def test_sorted_units_compute_the_same(name: str) -> None:
    network = made(name)
    x, context = torch.randn(4, 5, dtype=torch.float64), context_of(network, 4)
    before, depth = network(x, context), network.depth
    network.sort_units()
    torch.testing.assert_close(network(x, context), before)
    assert network.depth == depth
    assert all(mask.rows is None and mask.columns is None for mask in network.masks()[1:-1])


def test_compile_and_gradients() -> None:
    network = made("residual-context")
    x, context = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), context_of(network, 3)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), network(x, context))
    assert torch.autograd.gradcheck(lambda x: network(x, context), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: network(x, context), x, fast_mode=True)


def test_bad_input_is_named() -> None:
    own, nothing = r"layers\[0\]: unit 2 of degree 4 sees every input: an .* own", r"layers\[0\]: unit 1 of degree 0 sees nothing"
    added, three = r"layers\[2\]: unit 1 of degree 1 is added to one of another degree", [[1, 2, 3], [2, 1, 1], [1, 1, 3]]
    for arguments, match in (
        ({"features": 0}, "features, params_per_feature: expected at least 1, got 0 and 2"),
        ({"hidden": (4, 0)}, "hidden: expected widths of at least 1"),
        ({"hidden": (), "residual": True}, "hidden: expected widths of at least 1, and one at least with residual=True"),
        ({"hidden": (), "context": 2}, "context: expected a hidden layer"),
        ({"activation": "sine"}, "activation: unknown name 'sine'"),
        ({"order": "reverse"}, "order: unknown name 'reverse'"),
        ({"order": torch.tensor([0, 1, 1, 2])}, r"order: expected each of 0..3 once, shape \(4,\)"),
        ({"order": torch.arange(3)}, r"order: expected each of 0..3 once, shape \(4,\)"),
        ({"degrees": "spread"}, "degrees: unknown rule 'spread'"),
        ({"degrees": [torch.tensor([1, 2])]}, r"degrees: expected integer tensors of lengths \[3, 3\], got shapes \[\(2,\)\]"),
        ({"degrees": [torch.tensor([1, 2, 4]), torch.ones(3).long()]}, own),
        ({"degrees": [torch.tensor([1, 0, 1]), torch.tensor([-5, -9, -5])]}, nothing + " and feeds"),
        ({"degrees": [*map(torch.tensor, three)], "residual": True}, added),
    ):
        keywords: dict[str, Any] = {"features": 4, "hidden": (3, 3), **arguments}
        with pytest.raises(ValueError, match=match):
            nn.MADE(**keywords)
    # A unit that sees something and feeds nothing, and one that sees nothing and feeds something, will do.
    nn.MADE(4, (3, 3), degrees=[torch.tensor([3, 2, 3]), torch.tensor([2, 1, 1])])
    network = nn.MADE(4, (3,), context=2)
    assert_refused(
        (lambda: network(torch.randn(2, 3), torch.randn(2, 2)), r"x: expected shape \(B, 4\), got \(2, 3\)"),
        (lambda: network(torch.randn(2, 4)), r"context: expected shape \(2, 2\), got none"),
    )
    for keywords, match in (
        ({"output": "poisson"}, "output: unknown name 'poisson'"),
        ({"components": 0}, "components, levels: expected at least 1 and 2, got 0 and 256"),
        ({"masks": 0}, "masks: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            nn.MADEDensity(4, (3,), **keywords)


def scrambled(density: nn.MADEDensity, size: float = 1.5) -> nn.MADEDensity:
    """With weights that are far from the uniform start."""
    with torch.no_grad():
        for p in density.parameters():
            p.copy_(size * torch.randn_like(p) / max(1, p.shape[-1]) ** 0.5)
    return density.eval()


@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize(("output", "levels"), [("bernoulli", 2), ("categorical", 3)])
def test_discrete_densities_sum_to_one(output: str, levels: int, masks: int) -> None:
    density = scrambled(nn.MADEDensity(4, (9, 8), output=output, levels=levels, masks=masks, context=2).double())
    x = torch.cartesian_prod(*[torch.arange(levels)] * 4)
    context = torch.randn(1, 2, dtype=torch.float64).expand(len(x), 2)
    for values in (x.double(), x):
        log_prob = density.log_prob(values, context)
        assert log_prob.std() > 0.1
        torch.testing.assert_close(log_prob.logsumexp(0).item(), 0.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("output", ["gaussian", "mixture"])
def test_continuous_densities_integrate_to_one(output: str, masks: int) -> None:
    density = scrambled(nn.MADEDensity(2, (8,), output=output, components=3, masks=masks).double(), 0.7)
    axis = torch.linspace(-16, 16, 801, dtype=torch.float64)
    log_prob = density.log_prob(torch.cartesian_prod(axis, axis))
    volume = (log_prob.logsumexp(0) + 2 * math.log(axis[1] - axis[0])).exp().item()
    assert abs(volume - 1) < 2e-3


@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize(("output", "wrong"), [
    ("gaussian", (math.inf, -math.inf)), ("mixture", (math.inf, -math.inf)), ("bernoulli", (-0.1, 1.1, 2.0, math.inf)),
    ("categorical", (-1.0, 0.5, 3.0, 1e30, math.inf, -math.inf)),
])  # fmt: skip
def test_what_no_sample_can_be_has_density_zero(output: str, wrong: tuple[float, ...], masks: int) -> None:
    density = scrambled(nn.MADEDensity(3, (9,), output=output, components=2, levels=3, masks=masks).double())
    x = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64).repeat(len(wrong) + 2, 1)
    for i, value in enumerate((*wrong, math.nan)):
        x[i, i % 3] = value
    log_prob = density.log_prob(x)
    assert log_prob[:-2].tolist() == [-math.inf] * len(wrong)
    assert log_prob[-2].isnan()
    torch.testing.assert_close(log_prob[-1:], density.log_prob(x[-1:]))
    if masks == 1:  # in training there is one set at a time
        density.log_prob(x[: len(wrong)]).clamp_min(-1e3).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in density.parameters())


@pytest.mark.parametrize("masks", [1, 2])
def test_samples_have_the_probabilities(masks: int) -> None:
    density = scrambled(nn.MADEDensity(3, (8,), output="categorical", levels=2, masks=masks))
    x = density.sample(20000)
    assert x.shape == (20000, 3)
    frequency = (x.long() * torch.tensor([4, 2, 1])).sum(1).bincount(minlength=8) / len(x)
    probability = density.log_prob(torch.cartesian_prod(*[torch.arange(2)] * 3)).exp()
    # Six standard deviations of a frequency.
    assert ((frequency - probability).abs() <= 6 * (probability * (1 - probability) / len(x)).sqrt() + 1e-6).all()


@pytest.mark.parametrize("output", ["gaussian", "mixture", "bernoulli"])
def test_samples_have_the_moments(output: str) -> None:
    density = scrambled(nn.MADEDensity(3, (8, 8), output=output, components=2, context=2, order="random"), 0.5)
    context = torch.randn(1, 2)
    x, again = (density.sample(8000, context) for _ in range(2))
    assert not torch.equal(x, again)
    # E[-log p] from samples of the model is its entropy: the same from both halves; and samples of another model cost more.
    log_prob, other = (density.log_prob(a, context.expand(8000, 2)) for a in (x, x.flip(1)))
    standard_error = (log_prob.std() / 8000**0.5).item()
    second = density.log_prob(again, context.expand(8000, 2)).mean()
    assert abs(log_prob.mean() - second) < 8 * standard_error
    assert log_prob.mean() > other.mean()
    if output == "gaussian":  # the first feature in order is normal with known moments
        first = int(density.network.order.argmin())
        with torch.no_grad():
            mean, raw = density.network(torch.zeros(1, 3), context)[0, first]
        assert abs(x[:, first].mean() - mean) < 6 * x[:, first].std() / 8000**0.5
        scale = (raw / (1 + raw.abs() / math.log(1e3))).exp()
        torch.testing.assert_close(x[:, first].std(), scale, rtol=0.06, atol=0)


class Multiplications(TorchDispatchMode):
    """Counts those of the products of matrices inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.count += a.numel() * b.shape[1]
        else:
            assert "mm" not in name, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SHAPES)
def test_generated_features_come_from_the_outputs_of_a_pass(name: str) -> None:
    for features, hidden in ((5, (16, 12)), (1, (3, 2)), (40, (30, 90))):
        if name in ("given", "order") and features != 5:
            continue
        network = made(name, features, **({} if name in ("given", "linear") else {"hidden": hidden}))
        context = context_of(network, 7)
        shown = torch.full((7, features, 3), float("nan"), dtype=torch.float64)

        def finish(features: list[int], params: torch.Tensor, shown: torch.Tensor = shown) -> torch.Tensor:
            shown[:, features] = params
            return params.sum(-1).cos()

        with Multiplications() as multiplications:
            x = network.generate(7, finish, context)
        assert x.shape == (7, features)
        torch.testing.assert_close(x, shown.sum(-1).cos())
        with torch.no_grad():
            torch.testing.assert_close(shown, network(x, context))
        of_context = 0 if network.context_layer is None else network.context_layer.weight.numel()
        assert multiplications.count <= 7 * (sum(mask.unmasked for mask in network.masks()) + of_context)


@pytest.mark.parametrize(("output", "masks"), [("gaussian", 1), ("mixture", 2), ("bernoulli", 2), ("categorical", 3)])
def test_sampling_draws_from_what_a_pass_over_the_samples_says(output: str, masks: int) -> None:
    options: dict[str, Any] = {"masks": masks, "context": 2, "residual": masks == 2, "activation": "tanh"}
    density = scrambled(nn.MADEDensity(12, (9, 20), output=output, components=2, levels=5, **options).double())
    context, seen, samples = torch.randn(8, 2).double(), [], []
    draw, generate = density.distribution.sample, density.network.generate

    def recording(params: torch.Tensor, temperature: float) -> torch.Tensor:
        seen.append(params)
        return draw(params, temperature)

    def compared(n: int, finish: Any, context: torch.Tensor | None) -> torch.Tensor:
        places: list[list[int]] = []

        def noting(features: list[int], params: torch.Tensor) -> torch.Tensor:
            places.append(features)
            return finish(features, params)

        seen.clear()
        shown = generate(n, noting, context)
        params = density.network(shown, context)
        for features, got in zip(places, seen, strict=True):
            torch.testing.assert_close(got, params[:, features])
        samples.append(shown)
        return shown

    density.distribution.sample = recording  # type: ignore[method-assign]
    density.network.generate = compared  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        x = density.sample(8, context)
    assert x.shape == (8, 12)
    assert len(samples) == masks
    torch.testing.assert_close(density.distribution.encode(x).sum(1).sort()[0], torch.cat(samples).sum(1).sort()[0])


def test_samples_of_other_dtypes_and_none_at_all() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        density = nn.MADEDensity(5, (8,), output="categorical", levels=3, context=2).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            x = density.sample(4, torch.randn(1, 2))
        assert x.dtype is dtype
        assert ((x >= 0) & (x <= 2) & (x == x.round())).all()
    for output in ("gaussian", "mixture", "bernoulli", "categorical"):
        assert nn.MADEDensity(3, (4,), output=output, masks=2).sample(0).shape == (0, 3)
    assert_refused((lambda: density.sample(4), "context: "), (lambda: density.sample(4, torch.randn(3, 2)), "context: "))


def test_training_takes_one_set_of_masks_after_the_other() -> None:
    density = nn.MADEDensity(4, (8,), output="bernoulli", masks=2, seed=1)
    x = torch.rand(3, 4).round()
    with torch.no_grad():
        first, second, third = (density.train().log_prob(x) for _ in range(3))
        mean = density.eval().log_prob(x)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    torch.testing.assert_close(mean, torch.stack([first, second]).logsumexp(0) - math.log(2))
    same = nn.MADEDensity(4, (8,), output="bernoulli", masks=2, seed=1)
    same.load_state_dict(density.state_dict())
    torch.testing.assert_close(same.eval().log_prob(x), mean)
    assert copy.deepcopy(density).log_prob(x).equal(mean)
    # The fourth step goes on where the third left off, in the same process or in another one.
    assert same.steps == 3
    assert torch.equal(same.train().log_prob(x), second)
    outer, older = (torch.nn.Sequential(copy.deepcopy(same)) for _ in range(2))
    outer.load_state_dict(torch.nn.Sequential(density).state_dict())
    older.load_state_dict({k: v for k, v in outer.state_dict().items() if k != "0.steps"})
    assert (outer[0].steps, older[0].steps) == (3, 4)
    assert "steps" not in nn.MADEDensity(4, (8,), output="bernoulli").state_dict()
    density.resample_masks(torch.Generator().manual_seed(9))
    assert not torch.equal(density.log_prob(x), mean)


def test_it_learns() -> None:
    """Bits of which the last is the parity of the others: a model of independent bits reaches 4 log 2 = 2.77 nats."""
    bits = torch.cartesian_prod(*[torch.arange(2.0)] * 3)
    x = torch.cat([bits, bits.sum(1, keepdim=True) % 2], 1)
    density = nn.MADEDensity(4, (64, 64), output="bernoulli", seed=2)
    losses = fit(density, lambda: -density(x), 200, lr=1e-2)
    assert abs(losses[-1] - 3 * math.log(2)) < 0.05
