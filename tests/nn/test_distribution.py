"""Flows as ``torch.distributions``, broadcasting, samples for each context, generators, and what lies outside of the support."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from layers import assert_near, assert_refused, redrawn
from torch import distributions

from flowkern import nn

D, K = 4, 3
SHAPES = [(), (1,), (5,), (2, 5)]


def flow_of(context: int | None = K, base: nn.Base | distributions.Distribution | None = None, *before: nn.Bijection) -> nn.Flow:
    coupling = nn.AffineCoupling(nn.MLP(2, 4, (8,), context=context))
    layers = nn.Compose(*before, coupling, nn.Permutation.reverse(D))
    return redrawn(nn.Flow(layers, nn.DiagonalNormal(D) if base is None else base).double(), 0.3)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def one_by_one(flow: nn.Flow, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """log_prob of x (..., D) and context (..., K), broadcast, each row by itself."""
    batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
    rows = zip(x.expand(*batch, D).reshape(-1, 1, D), context.expand(*batch, K).reshape(-1, 1, K), strict=True)
    return torch.cat([flow.log_prob(*row) for row in rows]).view(batch)


@pytest.mark.parametrize("given", SHAPES)
@pytest.mark.parametrize("batch", SHAPES)
def test_leading_dimensions_of_values_and_contexts_broadcast(given: tuple[int, ...], batch: tuple[int, ...]) -> None:
    flow, x, context = flow_of(), randn(*given, D), randn(*batch, K)
    expected = one_by_one(flow, x, context)
    assert_near(flow.log_prob(x, context), expected)
    distribution = flow.condition(context)
    assert (distribution.batch_shape, distribution.event_shape) == (batch, (D,))
    assert_near(distribution.log_prob(x), expected)
    assert_near(flow_of(None).log_prob(x), flow_of(None).distribution().log_prob(x))


def test_shapes_that_do_not_broadcast_are_refused() -> None:
    flow, x, context = flow_of(), randn(5, D), randn(2, K)
    unconditional = flow_of(None).distribution()
    value = r"value: expected event_shape \(4,\) after what broadcasts with batch_shape \(2,\), got "
    assert_refused(
        (lambda: flow.log_prob(x, context), r"context: expected shape \(5, 3\), got \(2, 3\), which does not broadcast"),
        (lambda: flow.log_prob(randn(2, 5, D), randn(2, K)), r"context: expected shape \(2, 5, 3\), got \(2, 3\)"),
        (lambda: flow.log_prob(x, randn(5, K + 1)), r"context: expected shape \(5, 3\), got \(5, 4\)"),
        (lambda: flow.log_prob(x), "context: expected"),
        (lambda: flow.log_prob(x, torch.tensor(0.0)), "context: expected"),
        (lambda: flow.condition(context).log_prob(x), value + r"\(5, 4\)"),
        (lambda: flow.condition(context).log_prob(randn(2, 3)), value + r"\(2, 3\)"),
        (lambda: flow.condition(context).log_prob(torch.tensor(0.0)), value + r"\(\)"),
        (lambda: unconditional.expand((2,)).log_prob(x), value + r"\(5, 4\)"),
        (lambda: flow.condition(context).log_prob(1.0), "value: expected a tensor, got float", TypeError),
        (lambda: flow.condition(torch.tensor(0.0)), r"context: expected shape \(..., K\), got \(\)"),
        (lambda: flow.condition(None), r"context: expected shape \(..., K\), got none"),
    )


@pytest.mark.parametrize("batch", SHAPES)
@pytest.mark.parametrize("drawn", [(), (3,), (2, 3), (0,)])
def test_samples_have_the_shapes_of_torch_and_the_density_that_is_said(drawn: tuple[int, ...], batch: tuple[int, ...]) -> None:
    context = randn(*batch, K).requires_grad_()
    for distribution in (flow_of().condition(context), flow_of(None).distribution().expand(batch)):
        assert distribution.has_rsample
        sample = distribution.sample(drawn)
        assert sample.shape == (*drawn, *batch, D)
        assert not sample.requires_grad
        assert distribution.rsample(list(drawn)).requires_grad
        x, log_prob = distribution.sample_and_log_prob(drawn)
        assert x.shape == sample.shape
        assert_near(distribution.log_prob(x), log_prob)


def test_each_context_has_samples_of_its_own() -> None:
    """Sample (i, b) is what the bijection makes of the latent i B + b and context b."""
    flow, contexts = flow_of(), randn(2, 5, K)
    rows = contexts.reshape(10, K).repeat(3, 1)
    z = seeded(lambda: flow.base.sample(30))
    expected = flow.bijection.inverse(z, rows)[0].view(3, 2, 5, D)
    for draw in (flow.sample, flow.rsample, lambda *args, **options: flow.sample_and_log_prob(*args, **options)[0]):
        assert_near(seeded(lambda draw=draw: draw(3, contexts, per_context=True)), expected)
    assert_near(seeded(lambda: flow.condition(contexts).sample((3,))), expected)
    assert flow.sample(7, contexts[0, :1], per_context=True).shape == (7, 1, D)
    assert flow.sample(7, contexts[0, 0], per_context=True).shape == (7, D)
    assert flow.sample(1, contexts[0, :1]).shape == (1, D)  # by default one row for all, or one for each sample
    assert flow.sample(2, contexts[0], temperature=0.0, per_context=True).unique(dim=0).shape == (1, 5, D)
    assert_refused(
        (lambda: flow_of(None).sample(3, per_context=True), r"context: expected shape \(..., K\), got none"),
        (lambda: flow.sample(3, contexts[0]), r"context: expected shape \(3, K\) or \(1, K\)"),
    )


def seeded(draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    return draw()


def vamp() -> nn.VampPrior:
    return nn.VampPrior(nn.MLP(4, 2 * D, zero_init=False), nn.GaussianPosterior(D), torch.randn(2, 4))


BASES: dict[str, Callable[[], nn.Base | distributions.Distribution]] = {
    "StandardNormal": lambda: nn.StandardNormal(D),
    "DiagonalNormal": lambda: nn.DiagonalNormal(D),
    "Mixture": lambda: nn.Mixture(D, 3),
    "VampPrior": vamp,
    "HierarchicalPrior": lambda: nn.HierarchicalPrior(2, 2, nn.MLP(2, 4, zero_init=False)),
    "Uniform": lambda: distributions.Uniform(torch.zeros(D), torch.ones(D)),
    "Gamma": lambda: distributions.Gamma(torch.full((D,), 2.0), 1.0),
}


@pytest.mark.parametrize("name", BASES)
def test_a_generator_decides_and_leaves_torchs_own_alone(name: str) -> None:
    flow = nn.Flow(nn.Permutation.reverse(D), BASES[name]())
    expected = seeded(lambda: flow.sample(5))
    before, generator = torch.get_rng_state(), torch.Generator().manual_seed(0)
    first, second = (flow.sample(5, generator=generator) for _ in range(2))
    assert torch.equal(first, expected)
    assert not torch.equal(second, expected)
    assert torch.equal(flow.distribution().sample((5,), generator=generator.manual_seed(0)), expected)
    if flow.has_rsample:
        assert torch.equal(flow.distribution().rsample((5,), generator.manual_seed(0)), expected)
        assert torch.equal(flow.distribution().sample_and_log_prob((5,), generator.manual_seed(0))[0], expected)
    else:
        with pytest.raises(NotImplementedError, match="use sample"):
            flow.distribution().rsample((5,), generator)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="generator: expected one on meta, where the latents are drawn, got cpu"):
        flow_of().to("meta").sample(2, torch.zeros(2, K, device="meta"), generator=torch.Generator())


@pytest.mark.parametrize("name", BASES)
def test_has_rsample(name: str) -> None:
    assert nn.Flow(nn.Compose(), BASES[name]()).distribution().has_rsample is (name not in ("Mixture", "VampPrior"))


class OnlySample(nn.Base):
    def sample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ones(n, *self.shape)


def test_has_rsample_of_own_bases() -> None:
    flow = nn.Flow(nn.Compose(), OnlySample(2))
    assert not flow.distribution().has_rsample
    assert flow.distribution().sample((3,)).shape == (3, 2)
    outer = nn.Flow(nn.Rescale(2.0), nn.Flow(nn.Rescale(0.5), nn.StandardNormal(2)))  # a flow is a base too
    assert outer.distribution().has_rsample
    assert outer.sample(3, temperature=0.0).tolist() == [[0.0, 0.0]] * 3


def test_gradients_reach_parameters_and_context() -> None:
    flow, context = flow_of(), randn(5, K).requires_grad_()
    for value in (lambda d: d.rsample((3,)).square(), lambda d: d.log_prob(randn(2, 5, D))):
        flow.zero_grad()
        context.grad = None
        value(flow.condition(context)).sum().backward()
        assert context.grad.abs().sum() > 0
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.parameters())


def test_it_follows_its_flow() -> None:
    flow, x = flow_of(None), randn(2, D)
    distribution = flow.distribution()
    before = distribution.log_prob(x)
    with torch.no_grad():
        flow.base.loc.add_(1.0)
    assert (distribution.log_prob(x) != before).all()
    assert_near(copy.deepcopy(distribution).log_prob(x), flow.log_prob(x))
    assert repr(distribution) == "FlowDistribution(Flow, batch_shape=torch.Size([]), event_shape=torch.Size([4]))"


def test_expanded() -> None:
    flow, context, x = flow_of(), randn(5, K), randn(2, 1, D)
    for distribution, batch in ((flow.condition(context), (2, 5)), (flow_of(None).distribution(True), (3,))):
        expanded = distribution.expand(batch)
        assert (expanded.batch_shape, expanded.event_shape) == (batch, (D,))
        assert expanded.log_prob(x).shape == torch.broadcast_shapes((2, 1), batch)
        assert_near(expanded.log_prob(x), distribution.log_prob(x).expand(torch.broadcast_shapes((2, 1), batch)))
        sample = expanded.sample((7,))
        assert sample.shape == (7, *batch, D)
        assert len(sample.view(-1, D).unique(dim=0)) == 7 * math.prod(batch)  # not one sample many times
        assert expanded._validate_args is distribution._validate_args


def test_inside_of_other_distributions() -> None:
    flow, context = flow_of(), randn(5, K)
    distribution, x = flow.condition(context), randn(2, 5, D)
    log_prob = flow.log_prob(x, context)
    independent = distributions.Independent(distribution, 1)
    assert independent.event_shape == (5, D)
    assert_near(independent.log_prob(x), log_prob.sum(1))
    assert independent.rsample((2,)).shape == (2, 5, D)
    transforms = [distributions.AffineTransform(1.0, 2.0), distributions.ExpTransform()]
    transformed = distributions.TransformedDistribution(distribution, transforms)
    assert transformed.has_rsample
    y = (1.0 + 2.0 * x).exp()
    assert_near(transformed.log_prob(y), log_prob - (1.0 + 2.0 * x).sum(-1) - D * math.log(2.0))
    assert transformed.expand((2, 5)).sample((3,)).shape == (3, 2, 5, D)
    mixture = distributions.MixtureSameFamily(distributions.Categorical(torch.ones(5, dtype=torch.float64)), distribution)
    assert_near(mixture.log_prob(x[:, 0]), one_by_one(flow, x[:, :1], context).logsumexp(1) - math.log(5.0))
    assert mixture.sample((3,)).shape == (3, D)


def test_flow_as_base_by_its_distribution() -> None:
    inner = flow_of(None)
    outer, x = nn.Flow(nn.Rescale(2.0).double(), inner.distribution()), randn(5, D)
    assert_near(outer.log_prob(x), inner.log_prob(2.0 * x) + D * math.log(2.0))


def test_support() -> None:
    real = flow_of().condition(randn(5, K)).support
    assert (real.event_dim, real.is_discrete) == (1, False)
    assert real.check(randn(3, D)).tolist() == [True] * 3
    x = torch.linspace(-0.3, 1.3, 33, dtype=torch.float64)[:, None].expand(-1, D)
    flow = flow_of(None, None, nn.Logit(0.1))
    found = flow.distribution().support.check(x)
    assert torch.equal(found, ((x > -0.125) & (x < 1.125)).all(1))
    assert torch.equal(found, flow.log_prob(x).isfinite())
    positive = flow_of(None, None, nn.Inverse(nn.Softplus())).distribution().support
    assert positive.check(torch.tensor([[1.0] * D, [0.5] * (D - 1) + [-0.5]])).tolist() == [True, False]
    unknown = (
        flow_of(None, None, nn.Columns({1: nn.Logit()})),
        flow_of(None, None, nn.Inverse(nn.Compose(nn.Rescale(2.0), nn.Tanh(), nn.Rescale(2.0)))),
        flow_of(None, distributions.Uniform(torch.zeros(D), torch.ones(D))),
        flow_of(None, distributions.LogNormal(torch.zeros(D), torch.ones(D))),
        flow_of(None, None, nn.Rescale(2.0), nn.Logit(0.1)),
    )
    for flow in unknown:
        with pytest.raises(NotImplementedError, match="support: not known"):
            flow.distribution().support  # noqa: B018
    for base in (distributions.Normal(torch.zeros(D), torch.ones(D)), distributions.Gumbel(torch.zeros(D), torch.ones(D))):
        assert flow_of(None, base).distribution().support.check(x).all()


def test_domains_of_containers() -> None:
    """What they take and give, as the constraints of their parts."""
    real = distributions.constraints.real
    bijections = (nn.Compose(), nn.Compose(nn.Rescale(2.0), nn.Permutation.reverse(D)), nn.Columns({0: nn.Rescale(2.0)}))
    assert all(b.domain is b.codomain is nn.Inverse(b).domain is nn.Inverse(b).codomain is real for b in bijections)
    logit, tanh, onto = nn.Logit(), nn.Tanh(), torch.tensor([-2.0, 0.5])
    for b in (nn.Compose(logit, nn.Rescale(2.0)), nn.Compose(nn.Compose(logit)), nn.Inverse(nn.Inverse(logit))):
        assert b.domain.check(onto).tolist() == [False, True]
        assert b.codomain is real
    for b in (nn.Compose(nn.Rescale(2.0), tanh), nn.Inverse(nn.Inverse(tanh)), nn.Inverse(logit)):
        assert b.domain is real
        assert b.codomain.check(onto).tolist() == [False, True]
    levels = (nn.Compose(nn.Squeeze(), nn.Rescale(2.0)), nn.Rescale(2.0))
    assert nn.MultiScale(*levels, shape=(1, 4, 4)).domain is nn.MultiScale(*levels, shape=(1, 4, 4)).codomain is real
    first = nn.MultiScale(nn.Compose(logit, nn.Squeeze()), nn.Rescale(2.0), shape=(1, 4, 4))
    assert first.domain.check(onto).tolist() == [False, True]
    unknown = (
        nn.Compose(nn.Rescale(2.0), logit),
        nn.Columns({0: logit}),
        nn.Compose(logit, logit),
        nn.Compose(torch.nn.Identity()),
    )
    assert [b.domain for b in unknown] == [None] * 4


def test_validate_args_raises_as_torchs_do() -> None:
    flow, outside = flow_of(None, None, nn.Logit(0.1)), torch.tensor([[0.5] * D, [0.5] * (D - 1) + [2.0]]).double()
    assert flow.distribution().log_prob(outside).isinf().tolist() == [False, True]
    with pytest.raises(ValueError, match="within the support"):
        flow.distribution(validate_args=True).log_prob(outside)
    with pytest.raises(ValueError, match="within the support"):
        flow_of().condition(randn(2, K), validate_args=True).log_prob(torch.full((2, D), math.nan))


def of(kind: Callable[..., distributions.Distribution], *params: float) -> Callable[[], distributions.Distribution]:
    return lambda: kind(*(torch.full((D,), p, dtype=torch.float64) for p in params))


def uniform_from_one_to_three() -> distributions.Distribution:
    return distributions.TransformedDistribution(of(distributions.Uniform, 0.0, 1.0)(), distributions.AffineTransform(1.0, 2.0))


def two_uniforms() -> distributions.Distribution:
    low = torch.tensor([[0.0] * D, [2.0] * D], dtype=torch.float64)
    parts = distributions.Independent(distributions.Uniform(low, low + 1.0, validate_args=False), 1)
    return distributions.MixtureSameFamily(distributions.Categorical(low[:, 0] + 1.0), parts, validate_args=False)


#: Distribution and a value that it cannot have: in one place of a sample.
BOUNDED: dict[str, tuple[Callable[[], distributions.Distribution], float]] = {
    "uniform": (of(distributions.Uniform, 0.0, 1.0), 1.5),
    "uniform-below": (of(distributions.Uniform, 0.0, 1.0), -1e-6),
    "exponential": (of(distributions.Exponential, 2.0), -0.1),
    "gamma": (of(distributions.Gamma, 2.0, 1.0), -1.0),
    "beta": (of(distributions.Beta, 2.0, 3.0), 1.1),
    "half-normal": (of(distributions.HalfNormal, 1.0), -1.0),
    "log-normal": (of(distributions.LogNormal, 0.0, 1.0), -1.0),
    "pareto": (of(distributions.Pareto, 1.0, 0.5), 0.5),
    "independent": (lambda: distributions.Independent(of(distributions.Uniform, 0.0, 1.0)(), 1), 2.0),
    "transformed": (uniform_from_one_to_three, 0.5),
    "dirichlet": (lambda: distributions.Dirichlet(torch.full((D,), 2.0, dtype=torch.float64)), 0.9),
    "gumbel": (of(distributions.Gumbel, 0.0, 1.0), math.inf),
    "mixture": (two_uniforms, 1.5),
    "cauchy": (of(distributions.Cauchy, 0.0, 1.0), math.inf),
    "normal": (of(distributions.Normal, 0.0, 1.0), math.inf),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_density_is_zero_outside_of_the_support_of_the_base(name: str) -> None:
    build, outside = BOUNDED[name]
    whole = distributions.Independent(build(), 1) if build().batch_shape else build()
    x = whole.sample((4,))
    scale = torch.ones(D, dtype=torch.float64, requires_grad=True)
    x[1, 2], x[3, 0] = outside, math.nan
    flow = nn.Flow(Stretch(scale), build()).double()
    assert flow.log_prob(x)[3].isnan()
    log_prob = flow.log_prob(x := x[:3].requires_grad_())
    assert log_prob[1] == -math.inf
    assert_near(log_prob[::2], whole.log_prob(x[::2]))
    # The density of a uniform does not depend on where x is, and torch's has no gradient then.
    (log_prob.clamp_min(-100.0).sum() + 0.0 * x.sum()).backward()
    assert x.grad.isfinite().all()
    assert (x.grad[1] == 0.0).all()
    assert scale.grad.isfinite().all()


@pytest.mark.parametrize("name", ["uniform", "gamma", "transformed", "dirichlet", "mixture", "normal"])
def test_bases_of_torch_are_left_as_they_are_and_compile(name: str) -> None:
    given = BOUNDED[name][0]()
    torch.compiler.reset()  # each base is another graph
    before, x = vars(given).copy(), given.sample((3,))
    flow = nn.Flow(nn.Compose(), given)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="eager")
    assert_near(compiled(x), flow.log_prob(x))
    flow.float().sample(2)
    assert vars(given).keys() == before.keys()
    assert all(vars(given)[key] is value for key, value in before.items())


def test_far_out_but_inside() -> None:
    """What torch's own formula gives, though the uniform that a Gumbel is made of rounds to its end."""
    x = torch.tensor([[-7.0, 3.0]])
    expected = distributions.Gumbel(torch.zeros(2), torch.ones(2)).log_prob(x).sum(1)
    assert_near(nn.Flow(nn.Compose(), distributions.Gumbel(torch.zeros(2), torch.ones(2))).log_prob(x), expected)


class Stretch(nn.Bijection):
    """z = scale x: a layer whose parameter shows whether gradients come."""

    def __init__(self, scale: torch.Tensor):
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.scale, self.scale.abs().log().sum().expand(len(x))


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.05])
def test_density_is_zero_outside_of_the_domain_of_a_logit(alpha: float) -> None:
    flow, margin = flow_of(None, None, nn.Logit(alpha)), alpha / (1.0 - 2.0 * alpha)
    x = torch.rand(7, D, dtype=torch.float64)
    wrong = torch.tensor([-margin - 1e-9, 1.0 + margin + 1e-9, -3.0, 7.0, math.inf, -math.inf], dtype=torch.float64)
    x[range(6), [0, 1, 2, 3, 0, 1]] = wrong
    log_prob = flow.log_prob(x.requires_grad_())
    assert log_prob[:6].tolist() == [-math.inf] * 6
    assert log_prob[6].isfinite()
    log_prob.clamp_min(-100.0).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[:6] == 0.0).all()
    assert all(p.grad.isfinite().all() for p in flow.parameters())
    assert x.grad[6].abs().sum() > 0
    ends = torch.tensor([[0.0] * D, [1.0] * D, [0.5, 0.5, math.nan, 0.5]], dtype=torch.float64)
    assert flow.log_prob(ends).isfinite().tolist() == [alpha > 0.0] * 2 + [False]
    assert flow.log_prob(ends)[2].isnan()


def test_samples_are_never_outside_of_a_logits_domain() -> None:
    """In float32, of latents so far out that the sigmoid saturates."""
    for alpha in (0.0, 0.05):
        flow = nn.Flow(nn.Logit(alpha), nn.StandardNormal(D))
        assert flow.log_prob(flow.sample(1000, temperature=100.0)).isfinite().all()


def test_infinite_values_have_density_zero() -> None:
    flow, context = flow_of(), randn(5, K)
    x = randn(5, D)
    x[1, 0], x[2, 3] = math.inf, -math.inf
    log_prob = flow.log_prob(x.requires_grad_(), context)
    assert log_prob[1:3].tolist() == [-math.inf] * 2
    assert_near(log_prob[::3], flow.log_prob(x[::3], context[::3]))
    log_prob.clamp_min(-100.0).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in flow.parameters())


def test_shape_of_a_sample() -> None:
    image, base = (2, 2, 1), nn.StandardNormal(4)
    assert nn.Flow(nn.Compose(), base).shape == (4,)
    assert nn.Flow(nn.Squeeze(), nn.StandardNormal((4, 1, 1)), shape=(1, 2, 2)).distribution().event_shape == (1, 2, 2)
    flow = nn.Flow(nn.Flatten(image), base, shape=image)
    x = torch.randn(3, 5, *image)
    assert_near(flow.log_prob(x), base.log_prob(x.view(15, 4)).view(3, 5))
    assert flow.distribution().sample((3, 2)).shape == (3, 2, *image)
    unsaid = nn.Flow(nn.Flatten(image), base)
    assert_near(unsaid.log_prob(x[0]), flow.log_prob(x[0]))
    assert unsaid.sample(3).shape == (3, *image)
    assert_refused(
        (unsaid.distribution, "shape: the bijection changes it"),
        (lambda: nn.Flow(nn.Flatten(image), base, shape=4), "Flatten"),
        (lambda: nn.Flow(nn.Flatten(image), nn.StandardNormal(5), shape=image), r"shape: samples of \(2, 2, 1\) have latents of"),
    )


def test_bits_per_dim_is_differentiable_and_takes_leading_dimensions() -> None:
    flow, x = flow_of(), torch.rand(3, 5, D, dtype=torch.float64)
    context = randn(5, K)
    bits = flow.bits_per_dim(x, 256, context)
    assert_near(bits, nn.bits_per_dim(flow.log_prob(x, context), D, 256).mean())
    found = torch.autograd.grad(bits, [*flow.parameters()])
    expected = torch.autograd.grad(-flow.log_prob(x, context).mean() / (D * math.log(2.0)), [*flow.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b)
    with torch.no_grad():
        assert not flow.bits_per_dim(x, 256, context).requires_grad


def test_log_prob_of_a_distribution_compiles_and_maps() -> None:
    flow, context, x = flow_of(), randn(5, K), randn(5, D)
    expected = flow.log_prob(x, context)
    compiled = torch.compile(lambda x, context: flow.log_prob(x, context), fullgraph=True, backend="eager")
    assert_near(compiled(x, context), expected)
    assert_near(compiled(x[:, None], context), one_by_one(flow, x[:, None], context))
    assert_near(torch.func.vmap(flow.log_prob)(x, context), expected)  # each x without a batch dimension
