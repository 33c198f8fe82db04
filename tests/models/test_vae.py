"""Variational autoencoders: bounds against a model whose likelihood is known, and estimators against each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from built import VAES, assert_all_graded, assert_refused, built, fit, seeded

from flowkern import data, diagnostics, models, nn, training

LATENT, DATA = 2, 3


class _UnitNormal(nn.Likelihood):
    """N(params, I / 4): with a linear decoder and a normal prior x is normal too."""

    def log_prob(self, x, params):
        return -2.0 * (x - params[..., 0]).square() - 0.5 * math.log(0.5 * math.pi)

    def sample(self, params, temperature=1.0):
        return params[..., 0] + 0.5 * temperature * torch.randn_like(params[..., 0])

    def mean(self, params):
        return params[..., 0]


def linear(posterior: nn.Posterior | None = None, prior: torch.nn.Module | None = None) -> nn.VAE:
    torch.manual_seed(0)
    posterior = posterior or nn.GaussianPosterior(LATENT)
    encoder = nn.MLP(DATA, posterior.inputs, (), zero_init=False)
    decoder = nn.MLP(LATENT, DATA, (), zero_init=False)
    return nn.VAE(encoder, decoder, _UnitNormal(), prior or nn.StandardNormal(LATENT), posterior).double()


def exact(vae: nn.VAE, x: torch.Tensor) -> torch.Tensor:
    layer = vae.decoder.layers[0]
    covariance = layer.weight @ layer.weight.T + 0.25 * torch.eye(DATA, dtype=x.dtype)
    return torch.distributions.MultivariateNormal(layer.bias, covariance).log_prob(x).detach()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, DATA, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


POSTERIORS = {
    "gaussian": lambda: nn.GaussianPosterior(LATENT),
    "planar": lambda: nn.FlowPosterior(LATENT, nn.Compose(nn.Planar(LATENT, 4), nn.Planar(LATENT, 4)), 4),
    "radial": lambda: nn.FlowPosterior(LATENT, nn.Radial(LATENT)),
    "iaf": lambda: nn.FlowPosterior(LATENT, nn.InverseAutoregressive(LATENT, (8,), context=4), 4),
    "coupling": lambda: nn.FlowPosterior(LATENT, nn.AffineCoupling(nn.MLP(1, 2, (8,), zero_init=False))),
}


@pytest.mark.parametrize("name", POSTERIORS)
def test_bounds_and_importance_sampling(name: str, x: torch.Tensor) -> None:
    vae = linear(POSTERIORS[name]())
    truth = exact(vae, x)
    torch.manual_seed(1)
    estimate, error = vae.importance_log_prob(x, samples=20_000, chunk=5_000)
    assert ((estimate - truth).abs() <= 5 * error).all()
    assert (error < 0.5).all()
    with torch.no_grad():
        elbo = vae.elbo(x, samples=2_000)
        tighter = -torch.stack([vae.loss(x, nn.Objective("iwae", samples=20)) for _ in range(100)]).mean(0)
    assert (elbo < truth).all()
    assert (tighter > elbo).all()
    z, log_q = vae.posterior.sample_and_log_prob(vae.encode(x), 7)
    torch.testing.assert_close(vae.posterior.log_prob(z, vae.encode(x)), log_q, rtol=1e-6, atol=1e-6)


def test_perfect_posterior_makes_the_bound_tight(x: torch.Tensor) -> None:
    """With q(z|x) = p(z|x) every weight is p(x)."""
    vae = linear()
    layer = vae.decoder.layers[0]
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(layer.weight)[0])  # then the exact posterior is diagonal
        gain = 4.0 / (4.0 + 1.0)
        mean, scale = vae.encoder.layers[0].weight.split(LATENT), vae.encoder.layers[0].bias.split(LATENT)
        mean[0].copy_(gain * layer.weight.T)
        mean[1].zero_()
        scale[0].copy_(-gain * layer.weight.T @ layer.bias)
        scale[1].fill_(-0.5 * math.log(5.0))
        torch.testing.assert_close(vae.evidence(x, samples=3).log_weight, exact(vae, x).expand(3, -1))


def test_kl_in_closed_form_is_that_of_samples(x: torch.Tensor) -> None:
    vae = linear()
    h = vae.encode(x)
    z, log_q = vae.posterior.sample_and_log_prob(h, 100_000)
    difference = log_q - vae.prior.log_prob(z.flatten(0, 1)).view_as(log_q)
    error = difference.std(0) / math.sqrt(len(z))
    assert ((difference.mean(0) - vae.posterior.kl(h).sum(1)).abs() <= 5 * error).all()


def test_draw_and_kl_in_one_pass_are_those_apart(x: torch.Tensor) -> None:
    vae = linear()
    h = vae.encode(x).repeat(20_000, 1)
    z, rate = vae.posterior.sample_and_kl(h)
    torch.testing.assert_close(rate, vae.posterior.kl(h).sum(1))
    mean, log_scale = vae.posterior.parameters_of(h)
    eps = ((z - mean) / log_scale.exp()).detach()
    assert eps.mean(0).abs().max() < 5 / math.sqrt(len(eps))
    assert (eps.square().mean(0) - 1.0).abs().max() < 5 * math.sqrt(2.0 / len(eps))


def test_log_scales_far_out_still_have_a_gradient() -> None:
    """Taken as they come from -10 to 10, and beyond within 15 and back on a slope, also at infinity."""
    posterior, infinity = nn.GaussianPosterior(5), math.inf
    free, far = torch.tensor([-10.0, -3.5, 0.0, 9.0, 10.0]), torch.tensor([-infinity, -200.0, -11.0, 30.0, 1e38])
    for raw in (free, far):
        raw.requires_grad_()
        log_scale = posterior.parameters_of(torch.cat([torch.zeros(5), raw])[None])[1][0]
        (slope,) = torch.autograd.grad(log_scale.sum(), raw)
        if raw is free:
            assert torch.equal(log_scale, free)
            assert torch.equal(slope, torch.ones(5))
        else:
            assert (log_scale.abs() > 10.0).all()
            assert (log_scale.abs() <= 15.0).all()
            assert (slope[1:4] > 1e-4).all()
    # A posterior that was far too narrow, or too wide, finds back to the prior.
    h = torch.tensor([[0.0, 0.0, -20.0, 20.0]], requires_grad=True)
    optimizer = torch.optim.Rprop([h])
    for _ in range(100):
        optimizer.zero_grad()
        nn.GaussianPosterior(2).kl(h).sum().backward()
        optimizer.step()
    assert nn.GaussianPosterior(2).kl(h).sum() < 0.01


def _gradients(vae: nn.VAE, x: torch.Tensor, objective: nn.Objective, draws: int) -> torch.Tensor:
    """(draws, P): gradients of the encoder and the decoder, each from samples of its own."""
    parameters = [*vae.encoder.parameters(), *vae.decoder.parameters()]
    rows = [torch.autograd.grad(vae.loss(x, objective).mean(), parameters) for _ in range(draws)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


ESTIMATORS = [("dreg", "iwae", 4), ("likelihood_ratio", "elbo", 1), ("likelihood_ratio", "elbo", 4)]


@pytest.mark.parametrize(("kind", "other", "samples"), ESTIMATORS)
def test_estimators_agree_on_average(kind: str, other: str, samples: int, x: torch.Tensor) -> None:
    vae = linear()
    torch.manual_seed(2)
    many = x.repeat(200, 1)
    one, two = (_gradients(vae, many, nn.Objective(k, samples), 60) for k in (kind, other))
    error = (one.var(0) / len(one) + two.var(0) / len(two)).sqrt()
    assert ((one.mean(0) - two.mean(0)).abs() <= 5 * error).all()
    encoder = slice(0, sum(p.numel() for p in vae.encoder.parameters()))
    # What each is known for: the doubly reparameterized gradient varies less, the likelihood ratio's more.
    ratio = one[:, encoder].var(0).sum() / two[:, encoder].var(0).sum()
    assert ratio < 1.0 if kind == "dreg" else ratio > 2.0


@pytest.mark.parametrize("kind", ["elbo", "iwae", "dreg", "likelihood_ratio"])
def test_values_of_the_objectives(kind: str, x: torch.Tensor) -> None:
    vae = linear(POSTERIORS["planar"]())
    value = seeded(vae.loss, x, nn.Objective(kind, samples=3))
    log_weight = seeded(vae.evidence, x, samples=3).log_weight
    expected = -log_weight.mean(0) if kind in ("elbo", "likelihood_ratio") else math.log(3.0) - log_weight.logsumexp(0)
    torch.testing.assert_close(value, expected)


def test_penalties() -> None:
    rate = torch.tensor([[0.1, 2.0], [0.3, 4.0]])
    totals = torch.tensor([2.1, 4.3])
    for objective, parts, step, expected in (
        (nn.Objective(), rate, 0, totals),
        (nn.Objective(beta=4.0), rate, 0, 4.0 * totals),
        (nn.Objective(beta=2.0, capacity=3.0), rate, 0, torch.tensor([1.8, 2.6])),
        (nn.Objective(free_bits=0.5), rate, 0, torch.tensor([3.5, 3.5])),
        (nn.Objective(min_rate=5.0), rate, 0, torch.tensor([5.0, 5.0])),
        (nn.Objective(warmup=10), rate, 5, 0.5 * totals),
        (nn.Objective(warmup=10), rate, None, totals),
        # Without parts, all dimensions together have what each of them would have.
        (nn.Objective(free_bits=2.0), totals, 0, torch.tensor([4.0, 4.0])),
        (nn.Objective(free_bits=1.0), totals, 0, totals.mean().expand(2)),
    ):
        torch.testing.assert_close(objective.penalty(parts, step, 2), expected)


def test_warm_up_counts_what_trains_says() -> None:
    torch.manual_seed(0)
    model = models.VAE(4, levels=3, latent=2, hidden=[8], objective={"warmup": 10})
    x = torch.rand(6, 4)

    def loss(at: int) -> torch.Tensor:
        model.steps = at
        return seeded(model.objective, x)

    torch.testing.assert_close(loss(5), (loss(0) + loss(10)) / 2)
    torch.testing.assert_close(loss(10), -seeded(model.log_prob, x))
    assert model.steps == 11  # counted where nobody says it
    assert not [name for name in model.state_dict() if "steps" in name]


def test_flow_seen_as_a_vae_has_its_log_likelihood_as_elbo(x: torch.Tensor) -> None:
    """Encoder and decoder are deterministic: log p(x|z) - log q(z|x), a ratio of two deltas, is log|det dz/dx|."""
    flow = nn.Flow(nn.MaskedAutoregressive(DATA, (8,)), nn.StandardNormal(DATA)).double()

    class Deterministic(nn.Posterior):
        def sample_and_log_prob(self, h, k=1):
            z, logabsdet = flow.bijection(h)
            return z[None], -logabsdet[None]

    class Exact(nn.Likelihood):
        def log_prob(self, x, params):
            torch.testing.assert_close(params[..., 0], x)  # the decoder returns x itself
            return torch.zeros_like(x)

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bijection = flow.bijection

        def forward(self, z):
            return self.bijection.inverse(z)[0]

    encoder = torch.nn.Linear(DATA, DATA, bias=False).double()
    torch.nn.init.eye_(encoder.weight)
    vae = nn.VAE(encoder, Decoder(), Exact(), flow.base, Deterministic(DATA, DATA))
    torch.testing.assert_close(vae.elbo(x), flow.log_prob(x))


PRIORS = {
    "mixture": lambda: nn.Mixture(LATENT, 3),
    "flow": lambda: nn.Flow(nn.MaskedAutoregressive(LATENT, (8,)), nn.StandardNormal(LATENT)),
    "vamp": None,
}


@pytest.mark.parametrize("name", PRIORS)
def test_priors_are_densities_and_train(name: str, x: torch.Tensor) -> None:
    vae = linear()
    vae.prior = PRIORS[name]() if PRIORS[name] else nn.VampPrior(vae.encoder, vae.posterior, torch.randn(4, DATA))
    vae.double()
    axis = torch.linspace(-12.0, 12.0, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = vae.prior.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(mass - 1.0) < 1e-3
    torch.manual_seed(0)
    drawn = vae.prior.sample(20_000)
    mean = (grid * vae.prior.log_prob(grid).exp()[:, None]).sum(0).detach() * (axis[1] - axis[0]) ** 2
    assert ((drawn.mean(0) - mean).abs() <= 5 * drawn.std(0) / math.sqrt(len(drawn))).all()
    vae.loss(x, nn.Objective()).mean().backward()
    assert_all_graded(vae)
    assert vae.sample(7).shape == (7, DATA)
    assert vae.reconstruct(x).shape == (5, DATA)


@pytest.mark.parametrize("likelihood", ["categorical", "logistic", "bernoulli"])
def test_values_that_x_cannot_have(likelihood: str) -> None:
    levels = 2 if likelihood == "bernoulli" else 5
    model = models.VAE(4, levels=levels, latent=2, likelihood=likelihood)
    for bad in (levels, -1, math.nan):
        v = torch.zeros(3, 4)
        v[1, 2] = bad
        for call in (model.elbo, model.log_mass, model.evidence, model.importance_log_prob, model.reconstruct):
            with pytest.raises(ValueError, match=f"from 0 to {levels - 1}, got 1 of 12 others, or NaN"):
                call(v)
    if likelihood != "bernoulli":
        with pytest.raises(ValueError, match="expected integers"):
            model.elbo(torch.full((3, 4), 0.5))


def small(inputs: int, encoded: int, latent: int, outputs: int, likelihood: nn.Likelihood, prior: Any = None) -> nn.VAE:
    """Two linear layers, whatever fits or does not."""
    networks = torch.nn.Linear(inputs, encoded), torch.nn.Linear(latent, outputs)
    return nn.VAE(*networks, likelihood, prior or nn.StandardNormal(latent), nn.GaussianPosterior(latent))


def test_networks_of_other_widths() -> None:
    planar = nn.FlowPosterior(3, nn.Planar(3))
    two_layers = nn.HierarchicalPosterior(2, 3, torch.nn.Linear(2, 8))
    flow = nn.Flow(nn.Permutation.reverse(4), nn.StandardNormal(4))
    x, decoder = torch.zeros(2, 4), r"decoder: expected parameters of shape \(4, 3\) for x of \(4,\), got "
    encoder = r"expected \(B, 6\) from the encoder, got "
    prior = r"prior: expected latents of shape \(3,\), as the posterior has, got \(4,\)"
    assert_refused(
        (lambda: small(4, 8, 3, 4, nn.Bernoulli()).elbo(x), f"GaussianPosterior: {encoder}" + r"\(2, 8\)"),
        (lambda: planar.sample_and_log_prob(torch.zeros(2, 9)), f"FlowPosterior: {encoder}" + r"\(2, 9\)"),
        (lambda: two_layers.sample_and_log_prob(x), encoder + r"\(2, 8\)"),
        (lambda: small(4, 6, 3, 27, nn.Categorical(3)).elbo(x), decoder + r"\(9, 3\)"),
        (lambda: small(4, 6, 3, 9, nn.Categorical(3)).elbo(x), decoder + r"\(3, 3\)"),
        (lambda: small(4, 4, 2, 3, nn.Gaussian()).elbo(x), r"decoder: expected \(B, a multiple of 2, .*\), got \(2, 3\)"),
        (lambda: small(4, 6, 3, 4, nn.Bernoulli(), flow), prior),
    )


def test_called_as_a_module() -> None:
    x = torch.randint(3, (5, 4))
    vae, model = small(4, 4, 2, 12, nn.Categorical(3)), models.VAE(4, levels=3, latent=2, hidden=[8])
    assert torch.equal(seeded(vae, x), seeded(vae.elbo, x))
    assert torch.equal(seeded(model, (x + 0.5) / 3), seeded(model.log_prob, (x + 0.5) / 3))


def test_no_samples_and_networks_without_parameters() -> None:
    for prior in ("standard", "mixture", "vamp", "maf"):
        model = models.VAE(4, levels=3, latent=2, hidden=[8], flow_hidden=[8], prior=prior)
        assert model.sample(0).shape == (0, 4)
        assert model.elbo(torch.zeros(0, 4)).shape == (0,)

    class Padded(torch.nn.Module):
        def forward(self, z):
            return torch.cat([z, z], 1)

    vae = nn.VAE(torch.nn.Identity(), Padded(), nn.Bernoulli(), nn.StandardNormal(2), nn.GaussianPosterior(2))
    assert vae.elbo(torch.ones(3, 4, dtype=torch.int64)).isfinite().all()
    for prior in ("realnvp", "maf", "mixture"):
        half = models.VAE(4, levels=3, latent=2, hidden=[8], flow_hidden=[8], prior=prior).bfloat16()
        assert half.log_prob(torch.rand(3, 4)).isfinite().all()


def test_errors() -> None:
    bijection = "bijection: expected a Bijection, got IAF; of a Flow that is its bijection"
    vae = r"vae: expected a flowkern\.nn\.VAE, got RealNVP"
    assert_refused(
        (lambda: nn.FlowPosterior(3, models.IAF(3, hidden=(8,))), bijection, TypeError),
        (lambda: diagnostics.elbo_surgery(models.RealNVP(3), torch.zeros(2, 3)), vae, TypeError),
        (lambda: linear().elbo(torch.zeros(1, DATA), samples=0), "samples: expected at least 1, got 0"),
        (lambda: nn.Objective(capacity=math.nan), "capacity: expected at least 0, got nan"),
        (lambda: nn.Objective(samples=2.5), r"samples: expected a whole number, got 2\.5"),
        (lambda: linear().sample(2, temperature=-1.0), "temperature: expected at least 0, got -1"),
        (lambda: linear(prior=nn.StandardNormal(LATENT + 1)), "prior: expected latents of shape"),
        (lambda: nn.Objective("vi"), "kind: unknown objective 'vi'"),
        (lambda: nn.Objective(beta=-1), "beta: expected at least 0, got -1"),
        (lambda: nn.Objective("iwae", beta=2.0), "they change the rate of 'elbo', not 'iwae'"),
        (lambda: linear().importance_log_prob(torch.zeros(1, DATA), samples=1), "samples, chunk"),
        (lambda: models.VAE(3, latent=2).render(torch.zeros(1, 5)), r"z: expected shape \(B, 2\), got \(1, 5\)"),
    )
    halved = "hidden: expected widths, for each of which 4 x 6 pixels can be halved once, got 2"
    for shape, settings, message in (
        (3, {"likelihood": "categorical"}, "likelihood: 'categorical' is for discrete values"),
        (3, {"prior": "flat"}, "prior: unknown name 'flat'"),
        (3, {"posterior": "flat"}, "posterior: unknown name 'flat'"),
        (3, {"levels": 17, "likelihood": "bernoulli"}, "likelihood: 'bernoulli' is for 2 levels, got 17"),
        (3, {"objective": "iwae"}, r"objective: expected the fields of nn\.Objective, got 'iwae'"),
        (3, {"levels": 0}, "levels: expected at least 2, got 0"),
        (3, {"prior": "realnvp", "flow_hidden": []}, "flow_hidden: 'realnvp' needs at least one width"),
        (3, {"prior": "realnvp", "latent": 1}, "latent: 'realnvp' couples one part"),
        ((1, 4, 4), {"network": "transformer"}, "network: unknown name 'transformer'"),
        (3, {"network": "conv"}, "network: 'conv' is for images"),
        ((1, 4, 6), {"network": "conv", "hidden": [4, 4]}, halved),
        (3, {"upper": 2, "prior": "mixture"}, "upper: two layers have a standard prior"),
        (3, {"context": 2, "prior": "vamp"}, "'vamp' has no context"),
    ):
        with pytest.raises(ValueError, match=message):
            models.VAE(shape, **settings)


@pytest.mark.parametrize("name", VAES)
def test_models_of_images(name: str) -> None:
    torch.manual_seed(0)
    model = models.VAE((1, 2, 3), latent=3, hidden=[16], **VAES[name])
    x = torch.rand(30, 1, 2, 3)
    context = None if model.context is None else torch.randn(30, model.context)
    losses = fit(model, lambda: model.objective(x, context), 60)
    assert sum(losses[-10:]) < sum(losses[:10])
    samples = model.eval().sample(4, None if context is None else context[:1], temperature=0.7)
    assert samples.shape == (4, 1, 2, 3)
    assert samples.isfinite().all()
    bound, _ = model.importance_log_prob(model.values(x) if model.discrete else x, context, samples=200)
    constant = 6 * math.log(model.levels) if model.discrete else 0.0
    elbo = torch.stack([model.log_prob(x, context) for _ in range(50)]).mean(0) - constant
    assert bound.mean() > elbo.mean()


@pytest.mark.parametrize("likelihood", ["categorical", "logistic", "gaussian"])
def test_convolutional_models(likelihood: str) -> None:
    model, x, _ = built(f"vae-conv-{likelihood}", batch=6)
    model.objective(x).mean().backward()
    assert_all_graded(model)
    v = model.values(x) if model.discrete else x
    assert model.sample(2).shape == model.reconstruct(v)[:2].shape == (2, 3, 8, 4)
    assert model.render(model.embed(x)).shape == x.shape
    # A sample's terms are its own, for each of several draws.
    z = torch.randn(4, 6, 3, dtype=torch.float64)
    every = model.log_likelihood(v, z)
    assert every.shape == (4, 6)
    torch.testing.assert_close(every[2:3, 1:2], model.log_likelihood(v[1:2], z[2:3, 1:2]))


def test_convolutional_networks_see_the_context() -> None:
    torch.manual_seed(0)
    model = models.VAE((1, 4, 4), levels=3, latent=2, network="conv", hidden=[4], context=2).eval()
    v, context = torch.randint(3, (5, 1, 4, 4)), torch.eye(2)[torch.tensor([0, 1, 1, 0, 1])]
    other = 1.0 - context
    assert not torch.allclose(model.encode(v, context), model.encode(v, other))
    z = torch.randn(5, 2)
    assert not torch.allclose(model.decode(z, context), model.decode(z, other))
    assert model.sample(5, context).shape == (5, 1, 4, 4)
    with pytest.raises(ValueError, match=r"context: expected shape \(5, 2\), got none"):
        model.elbo(v)


def test_discrete_bound_is_below_the_probability_of_all_values() -> None:
    """sum_v exp(E[log w]) <= 1, and by importance sampling about 1."""
    torch.manual_seed(0)
    model = models.VAE(3, levels=2, latent=2, hidden=[8]).double()
    v = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
    assert sum(model.elbo(v, samples=500).exp()) < 1.0
    probability, error = model.importance_log_prob(v, samples=20_000, chunk=20_000)
    assert abs(probability.exp().sum() - 1.0) < 5 * (error * probability.exp()).square().sum().sqrt()


def test_trained_by_the_trainer(tmp_path) -> None:
    config = {"hidden": [32], "latent": 4, "objective": {"beta": 0.5}}
    plan = training.make_plan("vae", "digits", epochs=2, ema=0.0, config=config)
    score = training.train(plan, tmp_path, draws=3)
    assert score.draws == 3
    assert score.nats < 64 * math.log(17.0)
    again = training.evaluate(models.load(tmp_path / "best.ckpt"), data.load("digits"), draws=3, batch_size=plan.evaluation_batch)
    assert again == score
    samples = {"samples-0.6", "samples-0.8", "samples"}
    others = {"curve", "interpolations", "reconstructions", "means", "traversals", "analogies"}
    assert {p.stem for p in tmp_path.glob("*.png")} == samples | others
