"""A VAE with an autoregressive decoder."""

from __future__ import annotations

import itertools

import pytest
import torch
from built import fit

from flowkern import models


def small(**config) -> models.PixelVAE:
    torch.manual_seed(0)
    return models.PixelVAE((1, 2, 2), levels=2, latent=2, hidden=[8], pixelcnn={"hidden": 16, "layers": 2}, **config)


@pytest.mark.slow
def test_probabilities_sum_to_one() -> None:
    model = small().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    v = torch.tensor(list(itertools.product(range(2), repeat=4))).view(-1, 1, 2, 2)
    probability, error = model.importance_log_prob(v, samples=4000, chunk=1000)
    assert abs(probability.exp().sum() - 1.0) < 5 * (error * probability.exp()).square().sum().sqrt()
    with torch.no_grad():
        assert model.elbo(v, samples=200).exp().sum() < 1.0


def test_latents_reach_the_pixels_and_train() -> None:
    """Two kinds of images that only a latent, or the first pixel, can tell apart."""
    model = small(objective={"free_bits": 0.2}, context=3)
    x = (torch.randint(2, (64, 1, 1, 1)).expand(-1, -1, 2, 2) + torch.rand(64, 1, 2, 2)) / 2
    context = torch.zeros(64, 3)
    losses = fit(model, lambda: model.objective(x, context), 80)
    assert losses[-1] < losses[0] - 1.0
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert model.render(model.embed(x, context), context).shape == x.shape
    assert model.sample(3, context[:1], temperature=0.8).shape == (3, 1, 2, 2)


def test_reconstructions_and_errors() -> None:
    model = small()
    v = torch.randint(2, (5, 1, 2, 2))
    again = model.reconstruct(v)
    assert again.shape == v.shape
    assert set(again.unique().tolist()) <= {0.0, 1.0}
    with pytest.raises(NotImplementedError, match="the parameters of a pixel follow from the pixels before"):
        model.decode(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="pixelcnn: levels follow from the other settings"):
        models.PixelVAE((1, 2, 2), levels=2, pixelcnn={"levels": 3})
    v[0, 0, 0, 0] = 2
    with pytest.raises(ValueError, match="expected integers from 0 to 1, got 1 of 20 others"):
        model.elbo(v)
