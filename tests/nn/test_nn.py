"""Layers, bases, conditioners and ``Flow``: exact inverses and log-determinants, and errors that say what is wrong."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from layers import BIJECTIONS, assert_exact, assert_near, assert_refused, fit, mask, redrawn, small_multiscale
from torch import distributions

from flowkern import nn, ops


def drawn(name: str) -> tuple[nn.Bijection, torch.Tensor, torch.Tensor | None]:
    """The layer of that name in float64, away from its start and in evaluation mode, and an input in (0, 1) with its context."""
    build, shape, size = BIJECTIONS[name]
    layer = redrawn(build().double(), 0.2, around=1.0).eval()
    return layer, torch.rand(3, *shape).double(), None if size is None else torch.randn(3, size).double()


@pytest.mark.parametrize("name", BIJECTIONS)
def test_inverse_and_log_determinants(name: str) -> None:
    assert_exact(*drawn(name), tolerance=1e-10)


@pytest.mark.parametrize("name", BIJECTIONS)
def test_gradients(name: str) -> None:
    """In both directions, of the input, the context and all parameters."""
    layer, x, context = drawn(name)
    given = (x, *layer.parameters()) if context is None else (x, context, *layer.parameters())
    for inverse in (False, True):
        direction, v = (layer.inverse, layer(x, context)[0].detach()) if inverse else (layer.forward, x)

        def call(*inputs: torch.Tensor, direction: Any = direction) -> Any:
            return direction(*inputs[: 1 if context is None else 2])

        inputs = tuple(t.requires_grad_() for t in (v, *given[1:]))
        # Along a random direction alone where there are many numbers, each of which would take two evaluations.
        assert torch.autograd.gradcheck(call, inputs, fast_mode=sum(t.numel() for t in inputs) > 200)


@pytest.mark.parametrize("name", BIJECTIONS)
def test_float32_log_determinant_of_half_inputs(name: str) -> None:
    layer, x, context = drawn(name)
    rows = None if context is None else context.bfloat16()
    z, logabsdet = layer.bfloat16()(x.bfloat16(), rows)
    assert z.dtype is torch.bfloat16
    rows = None if context is None else context.float()
    with torch.autocast("cpu", torch.bfloat16):
        z, cast = layer.float()(x.float(), rows)
        back = layer.inverse(z, rows)[1]
    assert logabsdet.dtype is cast.dtype is back.dtype is torch.float32


CONVOLUTIONS = (f"InvertibleConv1x1-{p}-bias" for p in nn.PARAMETRIZATIONS)
COMPILED = ("Columns", "GlowStep-plu", "InverseAutoregressive", "MaskedAutoregressive", *CONVOLUTIONS)


@pytest.mark.parametrize("name", ["ActNorm", *(pytest.param(name, marks=pytest.mark.slow) for name in COMPILED)])
def test_compiles_in_one_graph(name: str) -> None:
    layer, x, context = drawn(name)
    leaves = [x.requires_grad_(), *layer.parameters()]
    for direction in (layer.forward, layer.inverse):
        torch._dynamo.reset()
        found, compiled = [], torch.compile(direction, fullgraph=True, backend="aot_eager")
        for function in (compiled, direction):
            z, logabsdet = function(x, context)
            found.append((z, logabsdet, *torch.autograd.grad(z.square().sum() + logabsdet.sum(), leaves)))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, context), direction(x, context), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BIJECTIONS)
def test_empty_batch(name: str) -> None:
    layer, x, context = drawn(name)
    rows = None if context is None else context[:0]
    z, logabsdet = layer(x[:0], rows)
    assert layer.inverse(z, rows)[0].shape == x[:0].shape
    assert logabsdet.shape == (0,)


def test_couplings_keep_what_the_split_keeps() -> None:
    x = torch.rand(2, 5)
    z = nn.AffineCoupling(nn.MLP(2, 6, (8,), zero_init=False), split=mask())(x)[0]
    assert torch.equal(z[:, [1, 2]], x[:, [1, 2]])
    assert (z != x)[:, [0, 3, 4]].all()


@pytest.mark.parametrize("size", [0.01, 5.0])
def test_couplings_expand_and_contract_as_they_come(size: float) -> None:
    """Two of them on data of that scale come within 0.1 nats of what is right, 6.4 or -6.1 nats."""
    torch.manual_seed(0)
    layers = [nn.AffineCoupling(nn.MLP(1, 2, (16,)), split=split) for split in ("channel", "channel_swap")]
    flow = nn.Flow(nn.Compose(*layers), nn.StandardNormal(2))
    fit(flow, lambda: -flow.log_prob(size * torch.randn(256, 2)), 400, lr=0.02)
    normal = distributions.Normal(0.0, size)
    x = normal.sample((4096, 2))
    with torch.no_grad():
        assert flow.log_prob(x).mean() > normal.log_prob(x).sum(1).mean() - 0.1


def test_multiscale_orders_latents_by_level() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    z = nn.MultiScale(nn.Squeeze(), nn.Compose(), shape=(1, 4, 4))(x)[0]
    squeezed = nn.Squeeze()(x)[0]
    assert torch.equal(z, torch.cat([squeezed[:, 2:].flatten(1), squeezed[:, :2].flatten(1)], 1))


def test_logit_is_stable_at_the_ends() -> None:
    layer, x = nn.Logit(1e-6), torch.tensor([[0.0, 1.0, 0.5]])
    exact = tuple(t.float() for t in layer(x.double()))
    torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=1e-5)
    far, slope = layer.inverse(torch.tensor([[200.0, -200.0]]))
    assert far.isfinite().all()
    torch.testing.assert_close(slope, torch.tensor([-400.0]), rtol=1e-5, atol=0.0)


def test_permutation_does_not_touch_the_global_random_state() -> None:
    before = torch.get_rng_state()
    first = nn.Permutation.random(9, seed=5).order
    assert torch.equal(first, nn.Permutation.random(9, seed=5).order)
    assert torch.equal(before, torch.get_rng_state())


NO_SCALE_MAP = r"scale: expected an ops\.ScaleMap, such as ScaleMap\.tanh\(2\.0\), got 'tanh'"


def test_errors_of_layers_and_conditioners() -> None:
    orders = ([0, 0, 1], [1, 2], [], [[0, 1]], [0.0, 1.0])
    assert_refused(
        *((lambda order=order: nn.Permutation(order), "order must hold each") for order in orders),
        (lambda: nn.Permutation([2, 0, 1])(torch.rand(2, 4)), "expected an input with 3 channels"),
        (lambda: nn.Squeeze()(torch.rand(1, 3, 5, 4)), "divisible by 2"),
        (lambda: nn.Squeeze()(torch.rand(1, 8)), "divisible by 2"),
        (lambda: nn.Squeeze().inverse(torch.rand(1, 3, 4, 4)), "C divisible by 4"),
        (lambda: nn.Squeeze(0), "factor"),
        (lambda: nn.Flatten((1, 2, 2))(torch.rand(1, 4)), r"expected shape \(1, 2, 2\)"),
        (lambda: nn.AffineCoupling(nn.MLP(2, 2), split="rows"), "split: unknown"),
        (lambda: nn.AffineCoupling(nn.MLP(2, 2), layout="rows"), "layout: unknown"),
        (lambda: nn.AffineCoupling(nn.MLP(2, 4), scale="tanh"), NO_SCALE_MAP, TypeError),
        (lambda: ops.affine_coupling(torch.zeros(2, 4), torch.zeros(2, 4), scale="tanh"), NO_SCALE_MAP, TypeError),
        (lambda: nn.AffineCoupling(nn.MLP(2, 3))(torch.rand(1, 4)), "params: expected shape"),
        (lambda: nn.Logit(0.5), "alpha"),
        (lambda: nn.Rescale(torch.tensor([1.0, 0.0])), "not zero"),
        (lambda: nn.MultiScale(shape=(1, 4, 4)), "at least one level"),
        (lambda: nn.MultiScale(nn.Compose(), nn.Compose(), shape=(1, 4, 4)), "squeeze first"),
        (lambda: small_multiscale()(torch.rand(1, 1, 8, 8)), "expected images of shape"),
        (lambda: small_multiscale().inverse(torch.rand(1, 15)), r"latents \(B, 16\)"),
        (lambda: nn.MLP(2, 2)(torch.rand(1, 2), torch.rand(1, 3)), "built without"),
        (lambda: nn.MLP(2, 2, context=3)(torch.rand(4, 2)), r"expected shape \(4, 3\), got none"),
        (lambda: nn.ResNet(2, 2, context=3)(torch.rand(4, 2, 4, 4), torch.rand(1, 3)), r"expected shape \(4, 3\), got \(1, 3\)"),
    )


NETWORKS = {nn.MLP: (2,), nn.ResNet: (2, 3, 3), nn.ConvNet: (2, 3, 3)}


@pytest.mark.parametrize("network", NETWORKS)
def test_conditioners_start_at_zero_or_not_and_drop_in_training_only(network: Any) -> None:
    x = torch.rand(4, *NETWORKS[network])
    for activation in nn.ACTIVATIONS:
        assert not network(2, 3, activation=activation)(x).any()
        assert network(2, 3, activation=activation, zero_init=False)(x).any()
    dropping = redrawn(network(2, 3, dropout=0.5), 0.2, around=1.0)
    assert not torch.equal(dropping(x), dropping(x))
    dropping.eval()
    assert torch.equal(dropping(x), dropping(x))
    with pytest.raises(ValueError, match="activation: unknown name 'sin'"):
        network(2, 2, activation="sin")


def test_bases_agree_with_torch_distributions() -> None:
    z = torch.randn(7, 2, 3, dtype=torch.float64)
    standard = distributions.Independent(distributions.Normal(torch.zeros(2, 3).double(), 1.0), 2)
    assert_near(nn.StandardNormal((2, 3)).log_prob(z), standard.log_prob(z))
    diagonal = redrawn(nn.DiagonalNormal((2, 3)).double(), 0.3)
    expected = distributions.Independent(distributions.Normal(diagonal.loc, diagonal.log_scale.exp()), 2)
    assert_near(diagonal.log_prob(z), expected.log_prob(z))
    mixture = redrawn(nn.Mixture((2, 3), 4).double(), 0.3)
    components = distributions.Independent(distributions.Normal(mixture.loc, mixture.log_scale.exp()), 2)
    joint = distributions.MixtureSameFamily(distributions.Categorical(logits=mixture.logits), components)
    assert_near(mixture.log_prob(z), joint.log_prob(z))


def test_mixture_samples_one_component_for_all_dimensions() -> None:
    mixture = nn.Mixture(8, 2)
    with torch.no_grad():
        mixture.loc.copy_(torch.tensor([-10.0, 10.0])[:, None].expand(2, 8))
        mixture.logits.copy_(torch.tensor([0.0, math.log(3.0)]))
    z = mixture.sample(4000)
    assert ((z > 0).all(1) | (z < 0).all(1)).all()
    # The share of the second component is 0.75 with a standard deviation of 0.0068; five of them.
    assert abs(float((z[:, 0] > 0).float().mean()) - 0.75) < 0.035
    with pytest.raises(NotImplementedError, match="no derivative"):
        mixture.rsample(2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_scales_the_spread(temperature: float) -> None:
    base, mixture = nn.DiagonalNormal(2), nn.Mixture(2, 1)
    state = {"loc": torch.full((2,), 3.0), "log_scale": torch.full((2,), 0.3)}
    base.load_state_dict(state)
    mixture.load_state_dict({"logits": torch.zeros(1), **{name: value[None] for name, value in state.items()}})
    for chosen, loc, scale in ((nn.StandardNormal(2), 0.0, 1.0), (base, 3.0, math.exp(0.3)), (mixture, 3.0, math.exp(0.3))):
        z = nn.Flow(nn.Compose(), chosen).sample(20000, temperature=temperature)
        spread = temperature * scale
        # Of 40000 draws the mean errs by spread / 200 and the deviation by spread / 283; five of these.
        assert abs(float(z.mean()) - loc) < 5 * spread / 200
        assert abs(float(z.std()) - spread) < 5 * spread / 283


def test_bases_move_and_follow_dtypes() -> None:
    for base in (nn.StandardNormal(3), nn.DiagonalNormal(3), nn.Mixture(3, 2)):
        flow = nn.Flow(nn.Compose(), base).double()
        assert flow.sample(2).dtype == torch.float64
        assert flow.to("meta").sample(2).device.type == "meta" or isinstance(base, nn.Mixture)
    wrapped = nn.Flow(nn.Compose(), distributions.Normal(torch.zeros(3), torch.ones(3))).double()
    assert wrapped.sample(2).dtype == torch.float64
    assert wrapped.to("meta").base.distribution.base_dist.loc.device.type == "meta"


def test_torch_distributions_as_bases() -> None:
    z = torch.randn(5, 3)
    expected = nn.StandardNormal(3).log_prob(z)
    normal = distributions.Normal(torch.zeros(3), torch.ones(3))
    multivariate = distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
    for distribution in (normal, distributions.Independent(normal, 1), multivariate):
        flow = nn.Flow(nn.Compose(), distribution)
        torch.testing.assert_close(flow.log_prob(z), expected)
        assert flow.sample(4).shape == (4, 3)
        assert flow.rsample(4).shape == (4, 3)
        assert copy.deepcopy(flow).log_prob(z).shape == (5,)
        with pytest.raises(ValueError, match="temperature: not defined"):
            flow.sample(4, temperature=0.5)
    with pytest.raises(ValueError, match=r"expected latents of shape \(B\), got \(5, 3\)"):
        nn.Flow(nn.Compose(), distributions.Normal(0.0, 1.0)).log_prob(z)
    transformed = distributions.TransformedDistribution(normal, [distributions.AffineTransform(torch.ones(3), torch.ones(3))])
    flow = nn.Flow(nn.Compose(), transformed).double()
    torch.testing.assert_close(flow.log_prob(z.double() + 1.0), expected.double())
    assert flow.sample(2).dtype == torch.float64


def test_errors_of_bases() -> None:
    flow = nn.Flow(nn.Compose(), nn.StandardNormal(4))
    assert_refused(
        (lambda: nn.Flow(nn.Compose(), "normal"), "base: expected a module", TypeError),
        (lambda: nn.Flow(nn.Compose(), torch.nn.Identity()), "base: expected a module", TypeError),
        (lambda: nn.Mixture(3, 0), "components"),
        (lambda: nn.StandardNormal((3, 0)), "at least 1"),
        (lambda: flow.log_prob(torch.rand(2, 3)), r"expected latents of shape \(B, 4\), got \(2, 3\)"),
    )


def conditional_flow(base: nn.Base | None = None) -> nn.Flow:
    coupling = nn.AffineCoupling(nn.MLP(2, 4, (8,), context=3))
    flow = nn.Flow(nn.Compose(coupling, nn.Permutation.reverse(4)), base or nn.StandardNormal(4))
    return redrawn(flow.double(), 0.3)


def test_flow_density_and_samples() -> None:
    flow, context = conditional_flow(), torch.randn(6, 3, dtype=torch.float64)
    x, log_prob = flow.sample_and_log_prob(6, context)
    assert_near(flow.log_prob(x, context), log_prob)
    assert_near(flow(x, context), log_prob)
    assert not flow.sample(6, context).requires_grad
    assert flow.rsample(6, context).requires_grad
    assert flow.sample(6, context[:1]).shape == (6, 4)
    for n, rows in ((6, context[:2]), (2, context), (6, context[0])):
        with pytest.raises(ValueError, match="context: expected shape"):
            flow.sample(n, rows)


def test_sample_i_belongs_to_row_i_of_the_context() -> None:
    flow = conditional_flow(nn.DiagonalNormal(4))
    context = torch.randn(3, 3, dtype=torch.float64)
    z = flow.base.loc.expand(3, -1)
    expected = flow.bijection.inverse(z, context)[0]
    assert_near(flow.sample(3, context, temperature=0.0), expected)
    assert (expected[0] != expected[1]).any()


def test_rsample_differentiates_to_the_parameters() -> None:
    flow = conditional_flow(nn.DiagonalNormal(4))
    context = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    flow.rsample(5, context).square().sum().backward()
    assert context.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


def test_bits_per_dim_of_uniform_data() -> None:
    """A uniform density on [0, 1) gives each of 2^b values b bits, whatever D is."""
    uniform = distributions.Uniform(torch.zeros(1, 4, 4), torch.ones(1, 4, 4))
    flow = nn.Flow(nn.Compose(), uniform)
    assert flow.bits_per_dim(torch.rand(5, 1, 4, 4), 256).item() == pytest.approx(8.0, rel=1e-6)
    scaled = nn.Flow(nn.Rescale(17.0), distributions.Uniform(torch.zeros(8), torch.full((8,), 17.0)))
    assert scaled.bits_per_dim(torch.rand(5, 8), 17).item() == pytest.approx(math.log2(17.0), rel=1e-6)


def test_bits_per_dim_raises_on_nan_and_nonsense() -> None:
    flow = nn.Flow(nn.Compose(), nn.StandardNormal(2))
    x = torch.rand(5, 2)
    x[1, 0] = x[3, 1] = math.nan
    assert_refused(
        (lambda: flow.bits_per_dim(x, 256), "2 of 5 log-probabilities are NaN"),
        (lambda: flow.bits_per_dim(torch.rand(5, 2), 0), "at least 1"),
        (lambda: flow.bits_per_dim(torch.rand(0, 2), 256), "empty"),
    )


def test_autocast_keeps_the_log_density_in_float32() -> None:
    flow = nn.Flow(nn.AffineCoupling(nn.MLP(2, 4, (8,), zero_init=False)), nn.StandardNormal(4))
    x = torch.rand(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = flow.log_prob(x)
    assert log_prob.dtype == torch.float32
    # bfloat16 has 8 bits: raw scales below 1 err by 2^-8 each, over two elements and two layers.
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=0.0, atol=0.05)
