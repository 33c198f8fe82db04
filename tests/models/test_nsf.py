"""``models.NSF``: splines of every layer against their definition, both directions, tails and their bases, training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from built import assert_all_graded, assert_near, assert_refused, fit

from flowkern import models, nn

TAILS: dict[str, dict[str, Any]] = {
    "linear": {},
    "circular": {"tails": "circular", "bound": math.pi},
    "box": {"tails": "box", "bound": [0.0, 1.0]},
}


def build(**settings: Any) -> models.NSF:
    torch.manual_seed(0)
    return models.NSF(**{"shape": 3, "bins": 4, "layers": 2, "hidden": (16, 16), **settings})


def redrawn(model: models.NSF) -> models.NSF:
    """Moved off the start, where a coupling is the identity."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, dtype=p.dtype))
    return model


def moons(n: int) -> torch.Tensor:
    """Two half circles, standardized."""
    angle = math.pi * torch.rand(n)
    side = torch.randint(2, (n,)) * 2.0 - 1.0
    x = torch.stack([side * (angle.cos() - 0.5), side * (angle.sin() - 0.25)], 1) + 0.05 * torch.randn(n, 2)
    return x / torch.tensor([0.87, 0.5])


@pytest.mark.parametrize("tails", TAILS)
def test_autoregressive_layers_are_the_splines_of_their_networks(tails: str) -> None:
    """In float64, one layer after the other, against the definition of the map."""
    model = redrawn(build(**TAILS[tails], context=2).double())
    x, context = torch.rand(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    z, expected = x, torch.zeros(6, dtype=torch.float64)
    for layer in model.bijection.bijections:
        if isinstance(layer, nn.Autoregressive):
            z, log_slope = layer.transformer.spline(z, layer.made(z, context), None, False)
            expected = expected + log_slope.sum(1)
        else:
            z = z.flip(1)
    assert_near(model.embed(x, context), z)
    assert_near(model.log_prob(x, context), expected + model.base.log_prob(z))


@pytest.mark.parametrize("coupling", [False, True])
@pytest.mark.parametrize("tails", TAILS)
def test_samples_and_densities_agree(tails: str, coupling: bool) -> None:
    model = redrawn(build(**TAILS[tails], coupling=coupling).double())
    x, log_prob = model.sample_and_log_prob(200)
    assert log_prob.isfinite().all()
    assert_near(model.log_prob(x), log_prob, 1e-7)
    assert_near(model.render(model.embed(x)), x, 1e-7)
    low, high = (-math.inf, math.inf) if tails == "linear" else (-math.pi, math.pi) if tails == "circular" else (0.0, 1.0)
    assert ((x >= low) & (x <= high)).all()


@pytest.mark.parametrize("coupling", [False, True])
@pytest.mark.parametrize("tails", ["circular", "box"])
def test_the_density_of_an_interval_is_one_there_and_zero_outside(tails: str, coupling: bool) -> None:
    model = redrawn(build(shape=2, **TAILS[tails], coupling=coupling).double())
    low, high = (-math.pi, math.pi) if tails == "circular" else (0.0, 1.0)
    steps = 400
    middles = low + (high - low) * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    with torch.no_grad():
        density = model.log_prob(torch.cartesian_prod(middles, middles)).exp()
        torch.testing.assert_close(density.mean() * (high - low) ** 2, torch.tensor(1.0).double(), rtol=2e-3, atol=0.0)
        ends = torch.tensor([[low, high], [high, low]], dtype=torch.float64)
        assert model.log_prob(ends).isfinite().all()
        assert build(shape=2, **TAILS[tails], coupling=coupling).log_prob(ends.float()).isfinite().all()
        outside = torch.tensor([[low - 0.1, 0.5], [0.5, high + 0.1]], dtype=torch.float64)
        assert model.log_prob(outside).tolist() == [-math.inf] * 2
        assert model.log_prob(torch.tensor([[math.nan, 0.5]]).double()).isnan().all()
        if tails == "circular" and not coupling:  # the two ends are one point: a slope is the same from both sides
            near = torch.tensor([[low + 1e-9, 0.5], [high - 1e-9, 0.5]], dtype=torch.float64)
            first = model.bijection.bijections[0]
            slopes = torch.vmap(torch.func.jacrev(lambda x: first(x[None])[0][0, 0]))(near)[:, 0]
            torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize("coupling", [False, True])
def test_learns_two_moons(coupling: bool, tmp_path: Path) -> None:
    """It beats the Gaussian of the data's own moments, which no affine map of a Gaussian does."""
    model = build(shape=2, coupling=coupling, layers=4, hidden=(32, 32))
    fit(model, lambda: -model.log_prob(moons(256)), 150, lr=5e-3)
    assert_all_graded(model)
    x = moons(2000)
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x).mean()
    with torch.no_grad():
        assert model.log_prob(x).mean() > gaussian + 0.3
    drawn, log_prob = model.sample_and_log_prob(500)
    torch.testing.assert_close(model.log_prob(drawn), log_prob, rtol=1e-3, atol=1e-3)
    models.save(model, tmp_path / "nsf.ckpt")
    again = models.load(tmp_path / "nsf.ckpt")
    assert again.config == model.config
    assert torch.equal(again.log_prob(x), model.log_prob(x))


def test_bad_settings_are_named() -> None:
    assert_refused(
        (lambda: models.NSF(4, bins=1), "bins: expected an integer of at least 2, got 1"),
        (lambda: models.NSF(4, bound=0.0), "bound: expected B > 0"),
        (lambda: models.NSF(4, tails="flat"), "tails: expected one of linear, circular, box"),
        (lambda: models.NSF(1, coupling=True), "shape: a coupling needs at least 2 features, got 1"),
        (lambda: models.NSF(4, coupling=True, permutation="none"), "permutation: unknown name 'none'"),
        (lambda: models.NSF(4, permutation="alternate"), "permutation: unknown name 'alternate'"),
        (lambda: models.NSF(4, layers=0), "layers: expected at least 1, got 0"),
        (lambda: models.NSF(4, tails="box").sample(2, temperature=1.5), "temperature: expected 0 to 1 of a uniform base"),
        (lambda: models.NSF(4).log_prob(torch.randn(2, 5)), r"x: expected shape \(B, 4\), got \(2, 5\)"),
    )
