"""Diagnostics of VAEs: their identities on models whose terms are known."""

from __future__ import annotations

import math

import pytest
import torch

from flowkern import diagnostics, models, nn


def small(**config) -> models.VAE:
    torch.manual_seed(0)
    return models.VAE(3, levels=4, latent=2, hidden=[8], **config)


def data(n: int = 40) -> torch.Tensor:
    return torch.randint(4, (n, 3), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("config", "draws"), [({}, 200), ({"prior": "mixture"}, 200), ({"posterior": "planar"}, 8)])
def test_surgery_adds_up_to_the_elbo(config: dict, draws: int) -> None:
    vae, x = small(**config), data()
    torch.manual_seed(2)
    surgery = diagnostics.elbo_surgery(vae, x, draws=draws, chunk=17)
    with torch.no_grad():
        elbo = vae.evidence(x, samples=4000).log_weight.mean()
    assert surgery.elbo == pytest.approx(float(elbo), abs=0.8 / math.sqrt(draws))
    assert -1e-6 <= surgery.mutual_information <= surgery.log_n == math.log(40)
    assert surgery.marginal_kl > -0.3 / math.sqrt(draws)
    assert "mutual information" in str(surgery)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_marginal_kl_is_that_of_the_aggregated_posterior(dropout: float) -> None:
    """KL(q(z) || p(z)) with q(z) = mean_i q(z | x_i), by a sum over a grid; with dropout, of the posteriors of one encoding."""
    vae, x = small(dropout=dropout).double(), data(10)
    with torch.no_grad():
        vae.encoder.layers[-1].weight.mul_(3.0)
    torch.manual_seed(7)
    h = vae.encode(x)
    torch.manual_seed(7)
    surgery = diagnostics.elbo_surgery(vae, x, draws=3000)
    axis = torch.linspace(-8.0, 8.0, 321, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mean, log_scale = vae.posterior.parameters_of(h.detach())
    normal = torch.distributions.Normal(mean[:, None], log_scale.exp()[:, None])
    log_q = normal.log_prob(grid).sum(-1).logsumexp(0) - math.log(10)
    log_p = vae.prior.log_prob(grid)
    marginal_kl = float((log_q.exp() * (log_q - log_p)).sum() * 0.05**2)
    assert surgery.marginal_kl == pytest.approx(marginal_kl, abs=0.02)
    assert surgery.mutual_information <= math.log(10) + 1e-6


def test_surgery_of_extremes() -> None:
    """Posteriors that do not look at x carry no information; sharp and distinct ones carry log n."""
    vae, x = small(), torch.arange(40)[:, None].expand(-1, 3) % 4
    last = vae.encoder.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    blind = diagnostics.elbo_surgery(vae, x, draws=5)
    assert blind.mutual_information == pytest.approx(0.0, abs=1e-5)
    assert blind.marginal_kl == pytest.approx(0.0, abs=1e-5)
    assert diagnostics.active_units(vae, x)[0] == 0

    class Sharp(nn.GaussianPosterior):
        def parameters_of(self, h):
            places = torch.arange(len(h), dtype=torch.float32)[:, None].expand(-1, 2)
            return places, torch.full_like(places, -6.0)

    vae.posterior = Sharp(2)
    sharp = diagnostics.elbo_surgery(vae, x, draws=2)
    assert sharp.mutual_information == pytest.approx(math.log(40), abs=1e-4)
    count, variance = diagnostics.active_units(vae, x)
    assert count == 2
    assert variance.min() > 100


def test_gradient_variance_of_the_two_estimators() -> None:
    vae, x = small(), data(16)
    torch.manual_seed(3)
    estimators = {"pathwise": nn.Objective(), "likelihood ratio": nn.Objective("likelihood_ratio")}
    found = diagnostics.gradient_variance(vae, x, estimators, draws=40)
    assert found["likelihood ratio"] > 5 * found["pathwise"] > 0


def test_points() -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    moved = diagnostics.traverse(z, 1, -1.0, 1.0, 3)
    assert moved.tolist() == [[[1.0, -1.0], [1.0, 0.0], [1.0, 1.0]], [[0.0, -1.0], [0.0, 0.0], [0.0, 1.0]]]
    line = diagnostics.interpolate(z[:1], z[1:], 3)
    assert line.tolist() == [[[1.0, 0.0], [0.5, 1.0], [0.0, 2.0]]]
    circle = diagnostics.interpolate(z[:1], z[1:] / 2, 3, spherical=True)
    torch.testing.assert_close(circle.norm(dim=-1), torch.ones(1, 3))
    torch.testing.assert_close(diagnostics.interpolate(z, z, 3, spherical=True), z[:, None].expand(-1, 3, -1))
    for far in (-1.5, -1.5 + 1e-5):  # opposite latents are joined by a straight line
        between = diagnostics.interpolate(z[:1], far * z[:1], 3, spherical=True)
        torch.testing.assert_close(between[:, 1], z[:1] * (1.0 + far) / 2)
    assert diagnostics.analogy(z[0], z[1], z[0]).tolist() == [0.0, 2.0]


def test_errors() -> None:
    vae = small()
    for call, message in (
        (lambda: diagnostics.elbo_surgery(vae, data(0)), "expected at least 1 sample"),
        (lambda: diagnostics.active_units(vae, data(1)), "a variance needs at least 2 samples, got 1"),
        (lambda: diagnostics.traverse(torch.zeros(1, 2), 2), "dimension: expected one of 2, got 2"),
        (lambda: diagnostics.gradient_variance(vae, data(), {}, draws=1), "draws: a variance needs at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
