"""Layers, bases, conditioners and ``Flow``: exact inverses and log-determinants, and errors that say what is wrong."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import distributions

from flowkern import nn, ops


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    """In float64: some 1e4 roundings of 1e-16, amplified by condition numbers below 1e2, stay under 1e-10."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64 with every parameter drawn anew: layers that start at zero would hide mistakes."""
    module = module.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def mask() -> ops.FeatureMask:
    return ops.FeatureMask(torch.tensor([True, False, False, True, True]))


def small_multiscale() -> nn.MultiScale:
    def coupling(split: str, inputs: int, outputs: int) -> nn.AffineCoupling:
        # A bounded scale: with random weights a sigmoid saturates, and the inverse is ill-conditioned.
        return nn.AffineCoupling(nn.ResNet(inputs, outputs, 4, 1, context=2), split=split, scale=ops.ScaleMap.tanh(1.0))

    first = nn.Compose(coupling("checkerboard", 1, 2), nn.Squeeze(), coupling("channel", 2, 4), coupling("channel_swap", 2, 4))
    second = nn.Compose(coupling("checkerboard_swap", 2, 4), nn.Permutation.reverse(2))
    return nn.MultiScale(first, second, shape=(1, 4, 4))


# name -> (layer, shape of x, size of the context)
LAYERS = {
    "affine": lambda: (nn.AffineCoupling(nn.MLP(3, 4, (8,))), (5,), None),
    "affine-context": lambda: (nn.AffineCoupling(nn.MLP(3, 4, (8,), context=2)), (5,), 2),
    "affine-swap-interleaved": lambda: (
        nn.AffineCoupling(
            nn.MLP(2, 6, (8,)),
            split="channel_swap",
            scale=ops.ScaleMap.exp(),
            layout="interleaved_shift_scale",
            shift_first=True,
        ),
        (5,),
        None,
    ),
    "affine-mask": lambda: (nn.AffineCoupling(nn.MLP(2, 6, (8,)), split=mask(), scale=ops.ScaleMap.tanh(1.0)), (5,), None),
    "affine-two-networks": lambda: (
        nn.AffineCoupling(nn.Parallel(nn.MLP(3, 2, (8,), context=2), nn.MLP(3, 2, (8,), context=2))),
        (5,),
        2,
    ),
    "affine-checkerboard": lambda: (nn.AffineCoupling(nn.ResNet(2, 4, 4, 1), split="checkerboard"), (2, 3, 4), None),
    "affine-image-context": lambda: (
        nn.AffineCoupling(nn.ResNet(2, 2, 4, 2, context=2, activation="silu"), split="channel"),
        (3, 3, 2),
        2,
    ),
    "additive": lambda: (nn.AdditiveCoupling(nn.MLP(3, 2, (8,), activation="tanh")), (5,), None),
    "additive-mask": lambda: (nn.AdditiveCoupling(nn.MLP(2, 3, (8,)), split=mask()), (5,), None),
    "additive-checkerboard": lambda: (
        nn.AdditiveCoupling(nn.ResNet(1, 1, 4, 1, context=2), split="checkerboard_swap"),
        (1, 4, 4),
        2,
    ),
    "permutation": lambda: (nn.Permutation([2, 0, 1]), (3,), None),
    "permutation-image": lambda: (nn.Permutation.random(4, seed=3), (4, 2, 3), None),
    "squeeze": lambda: (nn.Squeeze(), (3, 4, 6), None),
    "flatten": lambda: (nn.Flatten((2, 3, 2)), (2, 3, 2), None),
    "compose": lambda: (
        nn.Compose(nn.AffineCoupling(nn.MLP(2, 4, (8,))), nn.Permutation.reverse(4), nn.AffineCoupling(nn.MLP(2, 4, (8,)))),
        (4,),
        None,
    ),
    "compose-nothing": lambda: (nn.Compose(), (4,), None),
    "multiscale": lambda: (small_multiscale(), (1, 4, 4), 2),
    "logit": lambda: (nn.Logit(0.05), (2, 3, 2), None),
    "rescale": lambda: (nn.Rescale(17.0, -0.5), (6,), None),
    "rescale-channels": lambda: (nn.Rescale(torch.tensor([2.0, -3.0]).view(2, 1, 1), torch.ones(2, 1, 1)), (2, 2, 3), None),
    "scaling": lambda: (nn.Scaling((2, 3)), (2, 3), None),
}


def drawn(name: str, batch: int = 3) -> tuple[nn.Bijection, torch.Tensor, torch.Tensor | None]:
    """The layer of that name with random parameters, and an input in (0, 1) with its context."""
    layer, shape, size = LAYERS[name]()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, *shape, generator=generator, dtype=torch.float64)
    context = None if size is None else torch.randn(batch, size, generator=generator, dtype=torch.float64)
    return randomized(layer), x, context


def log_volume(function, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    """log|det d function(x) / dx| of each sample, from its whole Jacobian: (B,)."""
    volumes = []
    for i in range(len(x)):
        row = None if context is None else context[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda sample, row=row: function(sample, row)[0], x[i : i + 1])
        size = x[i].numel()
        volumes.append(torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet)
    return torch.stack(volumes)


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_and_log_determinants(name: str) -> None:
    layer, x, context = drawn(name)
    z, logabsdet = layer(x, context)
    assert z.shape == (len(x), *layer.output_shape(x.shape[1:]))
    assert logabsdet.shape == (len(x),)
    assert logabsdet.dtype == torch.float64
    back, logabsdet_back = layer.inverse(z, context)
    assert_near(back, x)
    assert_near(logabsdet_back, -logabsdet)
    assert_near(logabsdet, log_volume(layer.forward, x, context))
    assert_near(logabsdet_back, log_volume(layer.inverse, z.detach(), context))


@pytest.mark.parametrize("name", LAYERS)
def test_float32_log_determinant_of_half_inputs_and_copies(name: str) -> None:
    layer, x, context = drawn(name)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x, context)[0], layer(x, context)[0])
    half = layer.bfloat16()
    z, logabsdet = half(x.bfloat16(), None if context is None else context.bfloat16())
    assert z.dtype == torch.bfloat16
    assert logabsdet.dtype == torch.float32


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(name: str) -> None:
    layer, x, context = drawn(name)
    z, logabsdet = layer(x[:0], None if context is None else context[:0])
    back, _ = layer.inverse(z, None if context is None else context[:0])
    assert back.shape == x[:0].shape
    assert logabsdet.shape == (0,)


def test_couplings_keep_what_the_split_keeps() -> None:
    x = torch.rand(2, 5)
    z = nn.AffineCoupling(nn.MLP(2, 6, (8,), zero_init=False), split=mask())(x)[0]
    assert torch.equal(z[:, [1, 2]], x[:, [1, 2]])
    assert (z != x)[:, [0, 3, 4]].all()


def test_feature_mask_is_a_submodule_but_not_state() -> None:
    layer = nn.AffineCoupling(nn.MLP(2, 6, (8,)), split=mask())
    assert "split" in dict(layer.named_children())
    assert not any(key.startswith("split") for key in layer.state_dict())


def test_squeeze_order() -> None:
    x = torch.arange(2 * 4 * 4.0).view(1, 2, 4, 4)
    z = nn.Squeeze()(x)[0]
    for c in range(2):
        for i in range(2):
            for j in range(2):
                assert torch.equal(z[:, 4 * c + 2 * i + j], x[:, c, i::2, j::2])


def test_multiscale_orders_latents_by_level() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    z = nn.MultiScale(nn.Squeeze(), nn.Compose(), shape=(1, 4, 4))(x)[0]
    squeezed = nn.Squeeze()(x)[0]
    assert torch.equal(z, torch.cat([squeezed[:, 2:].flatten(1), squeezed[:, :2].flatten(1)], 1))


def test_logit_is_stable_at_the_ends() -> None:
    layer = nn.Logit(1e-6)
    x = torch.tensor([[0.0, 1.0, 0.5]])
    z, logabsdet = layer(x)
    exact = nn.Logit(1e-6)(x.double())
    torch.testing.assert_close(z, exact[0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logabsdet, exact[1].float(), rtol=1e-5, atol=1e-5)
    far, slope = layer.inverse(torch.tensor([[200.0, -200.0]]))
    assert far.isfinite().all()
    torch.testing.assert_close(slope, torch.tensor([-400.0]), rtol=1e-5, atol=0.0)


def test_permutation_does_not_touch_the_global_random_state() -> None:
    before = torch.get_rng_state()
    first = nn.Permutation.random(9, seed=5).order
    assert torch.equal(first, nn.Permutation.random(9, seed=5).order)
    assert torch.equal(before, torch.get_rng_state())


def test_errors_of_layers() -> None:
    for order in ([0, 0, 1], [1, 2], [], [[0, 1]], [0.0, 1.0]):
        with pytest.raises(ValueError, match="order must hold each"):
            nn.Permutation(order)
    with pytest.raises(ValueError, match="expected an input with 3 channels"):
        nn.Permutation([2, 0, 1])(torch.rand(2, 4))
    with pytest.raises(ValueError, match="divisible by 2"):
        nn.Squeeze()(torch.rand(1, 3, 5, 4))
    with pytest.raises(ValueError, match="divisible by 2"):
        nn.Squeeze()(torch.rand(1, 8))
    with pytest.raises(ValueError, match="C divisible by 4"):
        nn.Squeeze().inverse(torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="factor"):
        nn.Squeeze(0)
    with pytest.raises(ValueError, match=r"expected shape \(1, 2, 2\)"):
        nn.Flatten((1, 2, 2))(torch.rand(1, 4))
    with pytest.raises(ValueError, match="split: unknown"):
        nn.AffineCoupling(nn.MLP(2, 2), split="rows")
    with pytest.raises(ValueError, match="layout: unknown"):
        nn.AffineCoupling(nn.MLP(2, 2), layout="rows")
    with pytest.raises(ValueError, match="params: expected shape"):
        nn.AffineCoupling(nn.MLP(2, 3))(torch.rand(1, 4))
    with pytest.raises(ValueError, match="alpha"):
        nn.Logit(0.5)
    with pytest.raises(ValueError, match="not zero"):
        nn.Rescale(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="at least one level"):
        nn.MultiScale(shape=(1, 4, 4))
    with pytest.raises(ValueError, match="squeeze first"):
        nn.MultiScale(nn.Compose(), nn.Compose(), shape=(1, 4, 4))
    with pytest.raises(ValueError, match="expected images of shape"):
        small_multiscale()(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"latents \(B, 16\)"):
        small_multiscale().inverse(torch.rand(1, 15))


def test_errors_of_conditioners() -> None:
    with pytest.raises(ValueError, match="activation: unknown name 'sin'"):
        nn.MLP(2, 2, activation="sin")
    with pytest.raises(ValueError, match="activation: unknown name 'sin'"):
        nn.ResNet(2, 2, activation="sin")
    with pytest.raises(ValueError, match="built without"):
        nn.MLP(2, 2)(torch.rand(1, 2), torch.rand(1, 3))
    with pytest.raises(ValueError, match=r"expected shape \(4, 3\), got none"):
        nn.MLP(2, 2, context=3)(torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"expected shape \(4, 3\), got \(1, 3\)"):
        nn.ResNet(2, 2, context=3)(torch.rand(4, 2, 4, 4), torch.rand(1, 3))


@pytest.mark.parametrize("activation", nn.ACTIVATIONS)
def test_conditioners_start_at_zero_or_not(activation: str) -> None:
    for network, shape in ((nn.MLP, (2,)), (nn.ResNet, (2, 3, 3))):
        x = torch.rand(4, *shape)
        assert not network(2, 3, activation=activation)(x).any()
        assert network(2, 3, activation=activation, zero_init=False)(x).any()


def test_dropout_acts_in_training_only() -> None:
    x = torch.rand(4, 2)
    network = nn.MLP(2, 3, dropout=0.5, zero_init=False)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_bases_agree_with_torch_distributions() -> None:
    z = torch.randn(7, 2, 3, dtype=torch.float64)
    standard = distributions.Independent(distributions.Normal(torch.zeros(2, 3).double(), 1.0), 2)
    assert_near(nn.StandardNormal((2, 3)).log_prob(z), standard.log_prob(z))
    diagonal = randomized(nn.DiagonalNormal((2, 3)))
    expected = distributions.Independent(distributions.Normal(diagonal.loc, diagonal.log_scale.exp()), 2)
    assert_near(diagonal.log_prob(z), expected.log_prob(z))
    mixture = randomized(nn.Mixture((2, 3), 4))
    components = distributions.Independent(distributions.Normal(mixture.loc, mixture.log_scale.exp()), 2)
    joint = distributions.MixtureSameFamily(distributions.Categorical(logits=mixture.logits), components)
    assert_near(mixture.log_prob(z), joint.log_prob(z))


def test_mixture_samples_one_component_for_all_dimensions() -> None:
    mixture = nn.Mixture(8, 2)
    with torch.no_grad():
        mixture.loc.copy_(torch.tensor([-10.0, 10.0])[:, None].expand(2, 8))
        mixture.logits.copy_(torch.tensor([0.0, math.log(3.0)]))
    torch.manual_seed(0)
    z = mixture.sample(4000)
    assert ((z > 0).all(1) | (z < 0).all(1)).all()
    # The share of the second component is 0.75 with a standard deviation of 0.0068; five of them.
    assert abs(float((z[:, 0] > 0).float().mean()) - 0.75) < 0.035
    with pytest.raises(NotImplementedError, match="no derivative"):
        mixture.rsample(2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_scales_the_spread(temperature: float) -> None:
    torch.manual_seed(0)
    base = nn.DiagonalNormal(2)
    with torch.no_grad():
        base.loc.fill_(3.0)
        base.log_scale.fill_(0.3)
    mixture = nn.Mixture(2, 1)
    mixture.load_state_dict({"logits": torch.zeros(1), "loc": base.loc[None], "log_scale": base.log_scale[None]})
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
    for distribution in (
        normal,
        distributions.Independent(normal, 1),
        distributions.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    ):
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
    with pytest.raises(ValueError, match=r"expected latents of shape \(B, 4\), got \(2, 3\)"):
        nn.Flow(nn.Compose(), nn.StandardNormal(4)).log_prob(torch.rand(2, 3))
    with pytest.raises(TypeError, match="base: expected a module"):
        nn.Flow(nn.Compose(), "normal")
    with pytest.raises(TypeError, match="base: expected a module"):
        nn.Flow(nn.Compose(), torch.nn.Identity())
    with pytest.raises(ValueError, match="components"):
        nn.Mixture(3, 0)
    with pytest.raises(ValueError, match="at least 1"):
        nn.StandardNormal((3, 0))


def conditional_flow(base: nn.Base | None = None) -> nn.Flow:
    coupling = nn.AffineCoupling(nn.MLP(2, 4, (8,), context=3))
    return randomized(nn.Flow(nn.Compose(coupling, nn.Permutation.reverse(4)), base or nn.StandardNormal(4)))


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
    with pytest.raises(ValueError, match="2 of 5 log-probabilities are NaN"):
        flow.bits_per_dim(x, 256)
    with pytest.raises(ValueError, match="at least 1"):
        flow.bits_per_dim(torch.rand(5, 2), 0)
    with pytest.raises(ValueError, match="empty"):
        flow.bits_per_dim(torch.rand(0, 2), 256)


def test_autocast_keeps_the_log_density_in_float32() -> None:
    flow = nn.Flow(nn.AffineCoupling(nn.MLP(2, 4, (8,), zero_init=False)), nn.StandardNormal(4))
    x = torch.rand(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = flow.log_prob(x)
    assert log_prob.dtype == torch.float32
    # bfloat16 has 8 bits: raw scales below 1 err by 2^-8 each, over two elements and two layers.
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=0.0, atol=0.05)


def test_a_scale_that_is_no_scale_map() -> None:
    with pytest.raises(TypeError, match=r"scale: expected an ops\.ScaleMap, such as ScaleMap\.tanh\(2\.0\), got 'tanh'"):
        nn.AffineCoupling(nn.MLP(2, 4), scale="tanh")
    with pytest.raises(TypeError, match=r"scale: expected an ops\.ScaleMap"):
        ops.affine_coupling(torch.zeros(2, 4), torch.zeros(2, 4), scale="tanh")
