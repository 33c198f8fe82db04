"""Dequantization: densities of the noise, and bounds on probabilities that are known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from layers import assert_refused, fit, redrawn

from flowkern import models, nn

SHAPE = (1, 1, 2)


def variational(scale: float = 0.5) -> nn.VariationalDequantization:
    layer = nn.VariationalDequantization(SHAPE, 3, couplings=2, hidden=4).double()
    return redrawn(layer, scale, seed=0)


def test_uniform_noise() -> None:
    u, log_q = nn.UniformDequantization()(torch.zeros(1000, 2, dtype=torch.int64))
    assert u.shape == (1000, 2)
    assert 0 <= u.min() < u.max() < 1
    assert log_q.tolist() == [0.0] * 1000


def test_noise_stays_in_the_cell() -> None:
    v = torch.full((1000, 1000), 255, dtype=torch.int64)
    u, _ = nn.UniformDequantization()(v)
    assert (u > 0).all()
    assert torch.equal((v + u).floor().long(), v)
    assert abs(u.double().mean() - 0.5) < 5 * (1 / 12 / u.numel()) ** 0.5
    without_parameters = nn.VariationalDequantization((1, 2, 2), 3, flow=nn.Permutation.reverse(1))
    u, log_q = without_parameters(torch.zeros(20, 1, 2, 2, dtype=torch.int64))
    normal = torch.distributions.Normal(0.0, 1.0)
    logit = torch.distributions.TransformedDistribution(normal, [torch.distributions.SigmoidTransform()])
    torch.testing.assert_close(log_q, logit.log_prob(u).flatten(1).sum(1), rtol=1e-4, atol=1e-4)


def test_variational_noise_is_a_density_of_its_samples() -> None:
    """The mean of 1 / q over samples is the volume of the cell, 1; and samples fill it as q says."""
    layer = variational()
    for v in ([0, 2], [1, 1]):
        torch.manual_seed(0)
        rows = torch.tensor(v).view(1, *SHAPE).expand(50_000, *SHAPE)
        with torch.no_grad():
            u, log_q = layer(rows)
        weight = (-log_q).exp()
        assert 0 < u.min() < u.max() < 1
        # Of any part of the cell too.
        for part in (torch.ones(len(u), dtype=torch.bool), (u.flatten(1) < 0.5).all(1)):
            volume = 1.0 if part.all() else 0.25
            mean, error = (weight * part).mean(), (weight * part).std() / math.sqrt(len(u))
            assert abs(mean - volume) < 5 * error
            assert error < 0.05


def test_noise_depends_on_the_values() -> None:
    layer = variational()
    noise = []
    for v in (0, 2):
        torch.manual_seed(0)
        noise.append(layer(torch.full((5, *SHAPE), v))[0])
    assert not torch.equal(*noise)


def model(**config) -> models.DequantizedFlow:
    torch.manual_seed(0)
    settings = {"hidden": 8, "depth": 1, "couplings": 2, "levels": 1}
    flow = models.DequantizedFlow((1, 2, 2), levels=2, settings=settings, couplings=2, hidden=4, **config)
    return redrawn(flow, 0.1, around=1.0)


@pytest.mark.parametrize("dequantization", ["variational", "uniform"])
def test_the_bound_is_below_the_probability(dequantization: str) -> None:
    """log mean_k of the bound's weights is log P(v), and P sums to one."""
    flow = model(dequantization=dequantization)
    v = torch.tensor(list(itertools.product(range(2), repeat=4))).view(-1, 1, 2, 2)
    with torch.no_grad():
        weights = flow.log_mass(v.repeat(3000, 1, 1, 1)).view(3000, 16).double()
    probability = weights.exp().mean(0)
    error = weights.exp().std(0) / math.sqrt(len(weights))
    assert abs(probability.sum() - 1.0) < 5 * error.square().sum().sqrt()
    assert (weights.mean(0) < probability.log()).all()


def test_trains_samples_and_is_rebuilt(tmp_path) -> None:
    flow = model()
    x = (torch.randint(2, (64, 1, 2, 2)) + torch.rand(64, 1, 2, 2)) / 2
    losses = fit(flow, lambda: flow.objective(x), 40, lr=0.01)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(p.grad is not None for p in flow.dequantization.parameters())
    models.save(flow, tmp_path / "flow.ckpt")
    again = models.load(tmp_path / "flow.ckpt")
    values = []
    for m in (flow.eval(), again):
        torch.manual_seed(0)
        values.append(m.log_prob(x))
    assert torch.equal(*values)
    drawn = flow.draw(5)
    assert drawn.shape == (5, 1, 2, 2)
    assert 0 <= drawn.min() <= drawn.max() < 2
    torch.testing.assert_close(flow.render(flow.embed(x)), x, rtol=1e-3, atol=1e-3)


def test_errors() -> None:
    wrong = torch.tensor([[0, 1, 2, 3], [0, 1, -1, 7]]).view(2, 1, 2, 2)
    assert_refused(
        (lambda: nn.VariationalDequantization((4,), 2), "shape, levels: expected"),
        (lambda: models.DequantizedFlow((1, 2, 2), flow="maf"), "flow: unknown name 'maf'"),
        (lambda: models.DequantizedFlow((1, 2, 2), context=3), "context: expected None, got 3"),
        (lambda: model(dequantization="none"), "dequantization: unknown name 'none'"),
        (lambda: model().log_mass(wrong), "expected integers from 0 to 1, got 4 of 8 others"),
    )


def test_half_precision() -> None:
    assert model().bfloat16().log_prob(torch.rand(3, 1, 2, 2)).isfinite().all()
