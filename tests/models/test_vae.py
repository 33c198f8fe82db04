"""Variational autoencoders: bounds against a model whose likelihood is known, and estimators against each other."""

from __future__ import annotations

import json
import math

import pytest
import torch

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


def _gradients(vae: nn.VAE, x: torch.Tensor, objective: nn.Objective, draws: int) -> torch.Tensor:
    """(draws, P): gradients of the encoder and the decoder, each from samples of its own."""
    parameters = [*vae.encoder.parameters(), *vae.decoder.parameters()]
    rows = []
    for _ in range(draws):
        loss = vae.loss(x, objective).mean()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "other", "samples"), [("dreg", "iwae", 4), ("likelihood_ratio", "elbo", 1), ("likelihood_ratio", "elbo", 4)]
)
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
    torch.manual_seed(3)
    value = vae.loss(x, nn.Objective(kind, samples=3))
    torch.manual_seed(3)
    log_weight = vae.evidence(x, samples=3).log_weight
    expected = -log_weight.mean(0) if kind in ("elbo", "likelihood_ratio") else math.log(3.0) - log_weight.logsumexp(0)
    torch.testing.assert_close(value, expected)


def test_penalties() -> None:
    rate = torch.tensor([[0.1, 2.0], [0.3, 4.0]])
    totals = torch.tensor([2.1, 4.3])
    torch.testing.assert_close(nn.Objective().penalty(rate, 0, 2), totals)
    torch.testing.assert_close(nn.Objective(beta=4.0).penalty(rate, 0, 2), 4.0 * totals)
    torch.testing.assert_close(nn.Objective(beta=2.0, capacity=3.0).penalty(rate, 0, 2), torch.tensor([1.8, 2.6]))
    torch.testing.assert_close(nn.Objective(free_bits=0.5).penalty(rate, 0, 2), torch.tensor([3.5, 3.5]))
    torch.testing.assert_close(nn.Objective(min_rate=5.0).penalty(rate, 0, 2), torch.tensor([5.0, 5.0]))
    torch.testing.assert_close(nn.Objective(warmup=10).penalty(rate, 5, 2), 0.5 * totals)
    torch.testing.assert_close(nn.Objective(warmup=10).penalty(rate, None, 2), totals)
    # Without parts, all dimensions together have what each of them would have.
    torch.testing.assert_close(nn.Objective(free_bits=2.0).penalty(totals, 0, 2), torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(nn.Objective(free_bits=1.0).penalty(totals, 0, 2), totals.mean().expand(2))


def test_warm_up_counts_what_trains_says() -> None:
    torch.manual_seed(0)
    model = models.VAE(4, levels=3, latent=2, hidden=[8], objective={"warmup": 10})
    x = torch.rand(6, 4)

    def loss(at: int) -> torch.Tensor:
        model.steps = at
        torch.manual_seed(1)
        return model.objective(x)

    torch.testing.assert_close(loss(5), (loss(0) + loss(10)) / 2)
    torch.testing.assert_close(loss(10), -model_log_prob(model, x))
    assert model.steps == 11  # counted where nobody says it
    assert not [name for name in model.state_dict() if "steps" in name]


def model_log_prob(model: models.VAE, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    return model.log_prob(x)


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
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    assert vae.sample(7).shape == (7, DATA)
    assert vae.reconstruct(x).shape == (5, DATA)


@pytest.mark.parametrize("likelihood", ["categorical", "logistic", "bernoulli"])
def test_values_that_x_cannot_have(likelihood: str) -> None:
    levels = 2 if likelihood == "bernoulli" else 5
    model = models.VAE(4, levels=levels, latent=2, likelihood=likelihood)
    for bad, count in ((levels, 1), (-1, 1), (float("nan"), 1)):
        v = torch.zeros(3, 4)
        v[1, 2] = bad
        for call in (model.elbo, model.log_mass, model.evidence, model.importance_log_prob, model.reconstruct):
            with pytest.raises(ValueError, match=f"from 0 to {levels - 1}, got {count} of 12 others, or NaN"):
                call(v)
    if likelihood != "bernoulli":
        with pytest.raises(ValueError, match="expected integers"):
            model.elbo(torch.full((3, 4), 0.5))


def test_networks_of_other_widths() -> None:
    with pytest.raises(ValueError, match=r"GaussianPosterior: expected \(B, 6\) from the encoder, got \(2, 8\)"):
        nn.VAE(torch.nn.Linear(4, 8), torch.nn.Linear(3, 4), nn.Bernoulli(), nn.StandardNormal(3), nn.GaussianPosterior(3)).elbo(
            torch.zeros(2, 4)
        )
    planar = nn.FlowPosterior(3, nn.Planar(3))
    with pytest.raises(ValueError, match=r"FlowPosterior: expected \(B, 6\) from the encoder, got \(2, 9\)"):
        planar.sample_and_log_prob(torch.zeros(2, 9))
    two_layers = nn.HierarchicalPosterior(2, 3, torch.nn.Linear(2, 8))
    with pytest.raises(ValueError, match=r"expected \(B, 6\) from the encoder, got \(2, 8\)"):
        two_layers.sample_and_log_prob(torch.zeros(2, 4))
    for outputs, expected in ((27, 9), (9, 3)):
        decoder = torch.nn.Linear(3, outputs)
        vae = nn.VAE(torch.nn.Linear(4, 6), decoder, nn.Categorical(3), nn.StandardNormal(3), nn.GaussianPosterior(3))
        message = rf"decoder: expected parameters of shape \(4, 3\) for x of \(4,\), got \({expected}, 3\)"
        with pytest.raises(ValueError, match=message):
            vae.elbo(torch.zeros(2, 4))
    flow = nn.Flow(nn.Permutation.reverse(4), nn.StandardNormal(4))
    with pytest.raises(ValueError, match=r"prior: expected latents of shape \(3,\), as the posterior has, got \(4,\)"):
        nn.VAE(torch.nn.Linear(4, 6), torch.nn.Linear(3, 4), nn.Bernoulli(), flow, nn.GaussianPosterior(3))


def test_what_is_no_bijection_and_no_vae() -> None:
    with pytest.raises(TypeError, match="bijection: expected a Bijection, got IAF; of a Flow that is its bijection"):
        nn.FlowPosterior(3, models.IAF(3, hidden=(8,)))
    with pytest.raises(TypeError, match=r"vae: expected a flowkern\.nn\.VAE, got RealNVP"):
        diagnostics.elbo_surgery(models.RealNVP(3), torch.zeros(2, 3))
    decoder = torch.nn.Linear(2, 3)
    vae = nn.VAE(torch.nn.Linear(4, 4), decoder, nn.Gaussian(), nn.StandardNormal(2), nn.GaussianPosterior(2))
    with pytest.raises(ValueError, match=r"decoder: expected \(B, a multiple of 2, .*\), got \(5, 3\)"):
        vae.elbo(torch.zeros(5, 4))


def test_called_as_a_module() -> None:
    x = torch.randint(3, (5, 4))
    vae = nn.VAE(torch.nn.Linear(4, 4), torch.nn.Linear(2, 12), nn.Categorical(3), nn.StandardNormal(2), nn.GaussianPosterior(2))
    model = models.VAE(4, levels=3, latent=2, hidden=[8])
    values = []
    for call in (lambda: vae(x), lambda: vae.elbo(x), lambda: model((x + 0.5) / 3), lambda: model.log_prob((x + 0.5) / 3)):
        torch.manual_seed(0)
        values.append(call())
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[2], values[3])


def test_no_samples_and_networks_without_parameters() -> None:
    for prior in ("standard", "mixture", "vamp", "maf"):
        model = models.VAE(4, levels=3, latent=2, hidden=[8], flow_hidden=[8], prior=prior)
        assert model.sample(0).shape == (0, 4)
        assert model.elbo(torch.zeros(0, 4)).shape == (0,)
    vae = nn.VAE(torch.nn.Identity(), torch.nn.Identity(), nn.Bernoulli(), nn.StandardNormal(2), nn.GaussianPosterior(2))

    class Padded(torch.nn.Module):
        def forward(self, z):
            return torch.cat([z, z], 1)

    vae.decoder = Padded()
    assert vae.elbo(torch.ones(3, 4, dtype=torch.int64)).isfinite().all()
    for prior in ("realnvp", "maf", "mixture"):
        half = models.VAE(4, levels=3, latent=2, hidden=[8], flow_hidden=[8], prior=prior).bfloat16()
        assert half.log_prob(torch.rand(3, 4)).isfinite().all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        linear().elbo(torch.zeros(1, DATA), samples=0)
    with pytest.raises(ValueError, match="capacity: expected at least 0, got nan"):
        nn.Objective(capacity=math.nan)
    with pytest.raises(ValueError, match=r"samples: expected a whole number, got 2\.5"):
        nn.Objective(samples=2.5)
    with pytest.raises(ValueError, match="temperature: expected at least 0, got -1"):
        linear().sample(2, temperature=-1.0)
    with pytest.raises(ValueError, match="prior: expected latents of shape"):
        linear(prior=nn.StandardNormal(LATENT + 1))
    with pytest.raises(ValueError, match="kind: unknown objective 'vi'"):
        nn.Objective("vi")
    with pytest.raises(ValueError, match="beta: expected at least 0, got -1"):
        nn.Objective(beta=-1)
    with pytest.raises(ValueError, match="they change the rate of 'elbo', not 'iwae'"):
        nn.Objective("iwae", beta=2.0)
    with pytest.raises(ValueError, match="samples, chunk"):
        linear().importance_log_prob(torch.zeros(1, DATA), samples=1)


CONFIGS = {
    "categorical": {"levels": 3},
    "bernoulli": {"levels": 2, "likelihood": "bernoulli", "prior": "mixture", "components": 3},
    "logistic": {"levels": 100, "components": 2},
    "gaussian": {"prior": "vamp", "components": 3},
    "mixture": {"likelihood": "mixture", "components": 2, "prior": "realnvp", "posterior": "planar", "flow_layers": 2},
    "conditional": {"levels": 3, "context": 2, "prior": "maf", "posterior": "iaf", "flow_hidden": [8], "dropout": 0.1},
    "radial": {"levels": 3, "posterior": "radial", "flow_layers": 1},
    "flows": {"levels": 3, "prior": "iaf", "posterior": "realnvp", "flow_layers": 2, "flow_hidden": [8]},
    "additive": {"levels": 3, "prior": "nice", "posterior": "maf", "flow_layers": 2, "flow_hidden": [8]},
    "hierarchical": {"levels": 3, "upper": 2},
    "warm-up": {"levels": 3, "objective": {"warmup": 10, "free_bits": 0.1}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_models_of_images(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = models.VAE((1, 2, 3), latent=3, hidden=[16], **CONFIGS[name])
    x = torch.rand(30, 1, 2, 3)
    context = None if model.context is None else torch.randn(30, model.context)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = model.objective(x, context).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10])
    models.save(model, tmp_path / "vae.ckpt")
    again = models.load(tmp_path / "vae.ckpt")
    assert again.config == json.loads(json.dumps(model.config))
    values = []
    for m in (model.eval(), again):
        torch.manual_seed(1)
        values.append(m.log_prob(x, context))
    assert torch.equal(*values)
    samples = model.sample(4, None if context is None else context[:1], temperature=0.7)
    assert samples.shape == (4, 1, 2, 3)
    assert samples.isfinite().all()
    bound, _ = model.importance_log_prob(model.values(x) if model.discrete else x, context, samples=200)
    constant = 6 * math.log(model.levels) if model.discrete else 0.0
    elbo = torch.stack([model.log_prob(x, context) for _ in range(50)]).mean(0) - constant
    assert bound.mean() > elbo.mean()


@pytest.mark.parametrize("likelihood", ["categorical", "logistic", "gaussian"])
def test_convolutional_models(likelihood: str, tmp_path) -> None:
    torch.manual_seed(0)
    settings = {"likelihood": likelihood, "components": 2, "prior": "vamp", "network": "conv", "hidden": [4, 6], "context": None}
    model = models.VAE((3, 8, 4), levels=5, latent=3, **settings)
    x = torch.rand(6, 3, 8, 4)
    model.objective(x).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    models.save(model, tmp_path / "vae.ckpt")
    again = models.load(tmp_path / "vae.ckpt")
    values = []
    for m in (model.eval(), again):
        torch.manual_seed(1)
        values.append(m.log_prob(x))
    assert torch.equal(*values)
    values_of = model.values(x) if model.discrete else x
    assert model.sample(2).shape == model.reconstruct(values_of)[:2].shape == (2, 3, 8, 4)
    assert model.render(model.embed(x)).shape == x.shape
    # A sample's terms are its own, for each of several draws.
    z = torch.randn(4, 6, 3)
    v = model.values(x) if model.discrete else x
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


def test_errors_of_models() -> None:
    with pytest.raises(ValueError, match="likelihood: 'categorical' is for discrete values"):
        models.VAE(3, likelihood="categorical")
    with pytest.raises(ValueError, match="prior: unknown name 'flat'"):
        models.VAE(3, prior="flat")
    with pytest.raises(ValueError, match="posterior: unknown name 'flat'"):
        models.VAE(3, posterior="flat")
    with pytest.raises(ValueError, match="likelihood: 'bernoulli' is for 2 levels, got 17"):
        models.VAE(3, levels=17, likelihood="bernoulli")
    with pytest.raises(ValueError, match=r"objective: expected the fields of nn\.Objective, got 'iwae'"):
        models.VAE(3, objective="iwae")
    with pytest.raises(ValueError, match="latent: expected at least 1, got -1"):
        models.VAE(3, latent=-1)
    with pytest.raises(ValueError, match="levels: expected at least 2, got 0"):
        models.VAE(3, levels=0)
    with pytest.raises(ValueError, match="flow_hidden: 'realnvp' needs at least one width"):
        models.VAE(3, prior="realnvp", flow_hidden=[])
    with pytest.raises(ValueError, match="latent: 'realnvp' couples one part"):
        models.VAE(3, prior="realnvp", latent=1)
    with pytest.raises(ValueError, match=r"z: expected shape \(B, 2\), got \(1, 5\)"):
        models.VAE(3, latent=2).render(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="network: unknown name 'transformer'"):
        models.VAE((1, 4, 4), network="transformer")
    with pytest.raises(ValueError, match="network: 'conv' is for images"):
        models.VAE(3, network="conv")
    with pytest.raises(ValueError, match="hidden: expected widths, for each of which 4 x 6 pixels can be halved once, got 2"):
        models.VAE((1, 4, 6), network="conv", hidden=[4, 4])
    with pytest.raises(ValueError, match="upper: two layers have a standard prior"):
        models.VAE(3, upper=2, prior="mixture")
    with pytest.raises(ValueError, match="'vamp' has no context"):
        models.VAE(3, context=2, prior="vamp")


def test_trained_by_the_trainer(tmp_path) -> None:
    plan = training.make_plan(
        "vae", "digits", epochs=2, ema=0.0, config={"hidden": [32], "latent": 4, "objective": {"beta": 0.5}}
    )
    score = training.train(plan, tmp_path, draws=3)
    assert score.draws == 3
    assert score.nats < 64 * math.log(17.0)
    again = training.evaluate(models.load(tmp_path / "best.ckpt"), data.load("digits"), draws=3, batch_size=plan.evaluation_batch)
    assert again == score
    pictures = {
        "curve",
        "samples-0.6",
        "samples-0.8",
        "samples",
        "interpolations",
        "reconstructions",
        "means",
        "traversals",
        "analogies",
    }
    assert {p.stem for p in tmp_path.glob("*.png")} == pictures
