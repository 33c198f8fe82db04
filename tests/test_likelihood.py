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
    if name != "logistic":  # whose mean is that of the logistics, not of the cells
        torch.testing.assert_close(likelihood.mean(params), (log_prob.exp() * every).sum(0))


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
