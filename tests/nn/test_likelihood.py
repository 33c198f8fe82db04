"""Likelihoods of elements: they sum to one, and samples and means are theirs."""

from __future__ import annotations

import math

import pytest
import torch

from flowkern import nn

DISCRETE = {
    "bernoulli": (nn.Bernoulli(), 2),
    "categorical": (nn.Categorical(5), 5),
    "logistic": (nn.DiscretizedLogisticMixture(3, 7), 7),
}
CONTINUOUS = {"gaussian": nn.Gaussian(), "mixture": nn.GaussianMixture(3)}


def parameters(likelihood: nn.Likelihood, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.7 * torch.randn(*shape, likelihood.params, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", DISCRETE)
def test_probabilities(name: str) -> None:
    likelihood, levels = DISCRETE[name]
    params = parameters(likelihood, 2, 3)
    every = torch.arange(levels, dtype=torch.float64)[:, None, None].expand(levels, 2, 3)
    log_prob = likelihood.log_prob(every, params.expand(levels, *params.shape))
    assert log_prob.shape == (levels, 2, 3)
    torch.testing.assert_close(log_prob.logsumexp(0), torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(likelihood.total(every[1], params), log_prob[1].sum(-1))
    drawn = likelihood.sample(params.expand(4000, *params.shape))
    for level in range(levels):
        p = log_prob[level].exp()
        assert (((drawn == level).double().mean(0) - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt()).all()
    assert ((likelihood.encode(every) >= -1.0) & (likelihood.encode(every) <= 1.0)).all()
    # That of the logistics is known up to the rounding to cells.
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if name == "logistic" else {}
    torch.testing.assert_close(likelihood.mean(params), (log_prob.exp() * every).sum(0), **tolerance)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_densities(name: str) -> None:
    likelihood = CONTINUOUS[name]
    params = parameters(likelihood, 2)
    axis = torch.linspace(-30.0, 30.0, 20_001, dtype=torch.float64)
    density = likelihood.log_prob(axis[:, None].expand(-1, 2), params.expand(len(axis), *params.shape)).exp()
    step = axis[1] - axis[0]
    torch.testing.assert_close(density.sum(0) * step, torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    mean = (density * axis[:, None]).sum(0) * step
    torch.testing.assert_close(likelihood.mean(params), mean, rtol=1e-6, atol=1e-6)
    drawn = likelihood.sample(params.expand(20_000, *params.shape))
    assert ((drawn.mean(0) - mean).abs() < 5 * drawn.std(0) / math.sqrt(20_000)).all()
    cold = likelihood.sample(params.expand(50, *params.shape), temperature=1e-6)
    centres = params[..., :1] if name == "gaussian" else params.chunk(3, -1)[1]
    assert ((cold[..., None] - centres).abs().amin(-1) < 1e-4).all()


@pytest.mark.parametrize("log_scale", [-9.0, -5.0, -2.0, 0.0, 4.0, 20.0])
def test_mean_of_logistics_at_the_ends(log_scale: float) -> None:
    likelihood, mean = nn.DiscretizedLogisticMixture(1, 256), torch.tensor([-3.0, -1.0, -0.3, 0.7, 1.0, 9.0])
    params = torch.stack([torch.zeros(6), mean, torch.full((6,), log_scale)], 1)
    every = torch.arange(256.0)[:, None].expand(-1, 6)
    probability = likelihood.log_prob(every, params.double().expand(256, -1, -1)).exp()
    exact = (probability * every).sum(0).float()
    # A component narrower than a cell is at its mean, its draws at the nearest level.
    torch.testing.assert_close(likelihood.mean(params), exact, rtol=0, atol=0.5 if log_scale < -7 else 0.02)


def test_start_of_a_network() -> None:
    """Components lie apart, and the mixture is about as broad as the values."""
    for channels in (1, 2, 3):
        likelihood = nn.DiscretizedLogisticMixture(5, 256)
        maps = likelihood.bias(channels).view(1, -1, 1, 1)
        assert maps.shape[1] == likelihood.maps(channels)
        drawn = likelihood.image_sample(maps.expand(4000, -1, -1, -1))
        assert ((drawn.mean((0, 2, 3)) - 127.5).abs() < 10).all()
        assert (drawn.std((0, 2, 3)) > 50).all()
    assert nn.Categorical(3).bias() is None


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", [*DISCRETE, *CONTINUOUS])
def test_images_are_their_elements(name: str, channels: int) -> None:
    """Where channels do not depend on one another: with coefficients of zero."""
    likelihood, levels = DISCRETE.get(name) or (CONTINUOUS[name], 2)
    params = parameters(likelihood, 2, channels, 2, 3)
    maps = params.movedim(-1, 2).flatten(1, 2)
    if name == "logistic" and channels == 3:
        params[..., :3] = params[:, :1, ..., :3]  # one weight of a component for all channels
        logits, means, log_scales = params.movedim(-1, 2).unflatten(2, (3, -1)).unbind(2)
        per_channel = torch.stack([means, log_scales, torch.zeros_like(means)], 2)
        maps = torch.cat([logits[:, 0], per_channel.flatten(1, 3)], 1)
    assert maps.shape[1] == likelihood.maps(channels)
    x = torch.randint(levels, (2, channels, 2, 3)).double()
    log_prob = likelihood.image_log_prob(x, maps)
    assert log_prob.shape == (2,)
    if name != "logistic" or channels < 3:  # a mixture of products is not the product of mixtures
        torch.testing.assert_close(log_prob, likelihood.log_prob(x, params).flatten(1).sum(1))
    torch.testing.assert_close(likelihood.image_mean(maps), likelihood.mean(params))
    drawn = likelihood.image_sample(maps.repeat(3000, 1, 1, 1))
    assert drawn.shape == (6000, channels, 2, 3)
    drawn = drawn.view(3000, 2, channels, 2, 3)
    expected = likelihood.sample(params.expand(3000, *params.shape))
    error = ((drawn.var(0) + expected.var(0)) / 3000).sqrt()
    assert ((drawn.mean(0) - expected.mean(0)).abs() <= 5 * error + 1e-9).all()


def test_colours_depend_on_one_another() -> None:
    """The probabilities of all colours of a pixel sum to one, and the mean is that of narrow components' draws."""
    likelihood = nn.DiscretizedLogisticMixture(2, 3)
    maps = torch.randn(1, 20, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = torch.cartesian_prod(*[torch.arange(3)] * 3).view(27, 3, 1, 1)
    total = likelihood.image_log_prob(every, maps.expand(27, -1, -1, -1)).logsumexp(0)
    torch.testing.assert_close(total, torch.tensor(0.0, dtype=torch.float64))
    fine = nn.DiscretizedLogisticMixture(2, 4001)
    maps[:, 2:] *= 0.2
    maps[:, [4, 5, 10, 11, 16, 17]] = -4.0
    drawn = fine.image_sample(maps.expand(20_000, -1, -1, -1))
    error = drawn.std(0) / 20_000**0.5
    assert ((drawn.mean(0) - fine.image_mean(maps)[0]).abs() <= 5 * error).all()


def test_mixtures_share_out_their_gradient_in_full() -> None:
    """Far out, where the log densities are huge: components that are alike add up to the gradient of one."""
    x = torch.full((50,), 3000.0)
    params = torch.randn(50, 15)
    params[:, 5:10], params[:, 10:] = 0.0, 0.0
    params.requires_grad_()
    (grad,) = torch.autograd.grad(nn.GaussianMixture(5).log_prob(x, params).sum(), params)
    torch.testing.assert_close(grad[:, 5:10].sum(1), x)
    z = (1000.0 * torch.randn(50, 2)).requires_grad_()
    mixture = nn.Mixture(2, 4)
    encoder = torch.nn.Linear(3, 4)
    vamp = nn.VampPrior(encoder, nn.GaussianPosterior(2), torch.randn(4, 3))
    with torch.no_grad():
        for parameter in (*mixture.parameters(), *vamp.parameters(), *encoder.parameters()):
            parameter.zero_()
        mixture.logits.normal_()
        vamp.logits.normal_()
    for density in (mixture, vamp):
        torch.testing.assert_close(torch.autograd.grad(density.log_prob(z).sum(), z)[0], -z.detach())
