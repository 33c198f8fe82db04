"""``models.MAF`` and ``models.IAF``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from built import assert_all_graded, assert_refused, fit

from flowkern import models, nn, ops

KINDS = [models.MAF, models.IAF]


def build(kind: type, **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(**{"layers": 3, "hidden": (16, 16), **settings}).double()


def inputs(model: Any, batch: int = 4) -> torch.Tensor:
    return torch.rand(batch, *model.shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_slow_direction_is_one_call(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind, shape=(1, 4, 4), layers=4, permutation="random", preprocess={"logit": 0.05})
    x = inputs(model)
    calls, single = [], ops.autoregressive_inverse
    monkeypatch.setattr(ops, "autoregressive_inverse", lambda *a, **k: (calls.append(len(a[2])), single(*a, **k))[1])
    z, _ = model.bijection(x)
    model.bijection.inverse(z)
    assert calls == [4]


def test_batch_normalization_and_a_mixture_base() -> None:
    model = build(models.MAF, shape=4, batch_norm=True, components=3)
    model(inputs(model, 16)).mean().backward()
    assert_all_graded(model)
    assert isinstance(model.base, nn.Mixture)
    assert model.eval().sample(7).shape == (7, 4)


def target_log_prob(x: torch.Tensor) -> torch.Tensor:
    """A banana: x0 ~ N(0, 1), x1 | x0 ~ N(x0^2 / 2, 1/2), and in more dimensions x_i | x_{i-1} alike."""
    mean = torch.cat([torch.zeros_like(x[:, :1]), 0.5 * x[:, :-1].square().clamp(max=4.0)], 1)
    scale = torch.full_like(x, 0.5)
    scale[:, 0] = 1.0
    return torch.distributions.Normal(mean, scale).log_prob(x).sum(1)


@pytest.mark.parametrize(("kind", "features"), [(models.IAF, 2), (models.IAF, 64), (models.MAF, 2), (models.MAF, 64)])
def test_reverse_kl_training(kind: type, features: int) -> None:
    """E[log q - log p] falls to a small part of where it starts; MAF's gradients come through its incremental inverse."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = kind(features, layers=2, hidden=(32,), permutation="none")

    def loss() -> torch.Tensor:
        x, log_q = model.sample_and_log_prob(128)
        return log_q - target_log_prob(x)

    losses = fit(model, loss, 60 if features == 2 else 40)
    torch.set_num_threads(threads)
    first, last = losses[0], sum(losses[-5:]) / 5
    assert last < 0.35 * first, (first, last)
    assert last > -0.1 * features, "a KL divergence is not negative"


def test_bad_settings_are_named() -> None:
    swap = "permutation: unknown name 'swap'; expected one of 'reverse', 'random', 'none'"
    assert_refused(
        (lambda: models.MAF(4, permutation="swap"), swap),
        (lambda: models.IAF(4, gated=True, scale=ops.ScaleMap.exp()), "gated: expected a sigmoid scale"),
        (lambda: models.MAF(4).log_prob(torch.randn(2, 5)), r"x: expected shape \(B, 4\), got \(2, 5\)"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_in_its_sample(kind: type) -> None:
    model = build(kind, shape=5)
    x = inputs(model)
    bad = x.clone()
    bad[1, 2] = math.nan
    for function in (model.bijection, model.bijection.inverse):
        (expected, _), (actual, logabsdet) = function(x), function(bad)
        kept = [0, 2, 3]
        torch.testing.assert_close(actual[kept], expected[kept])
        assert logabsdet[kept].isfinite().all()
        assert not actual[1].isfinite().all()
