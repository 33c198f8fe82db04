"""``models.MAF`` and ``models.IAF``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import flowkern
from flowkern import models, nn, ops

KINDS = [models.MAF, models.IAF]
SETTINGS: list[dict[str, Any]] = [
    {"shape": 5},
    {"shape": 5, "layers": 1, "permutation": "none", "hidden": (9,)},
    {"shape": 6, "permutation": "random", "residual": True, "hidden": (8, 6), "activation": "elu"},
    {"shape": (1, 4, 4), "preprocess": {"logit": 0.05}, "context": 2},
]


def build(kind: type, **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(**{"layers": 3, "hidden": (16, 16), **settings}).double()


def inputs(model: Any, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor | None]:
    context = None if model.context is None else torch.randn(batch, model.context, dtype=torch.float64)
    return torch.rand(batch, *model.shape, dtype=torch.float64), context


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("kind", KINDS)
def test_density_and_samples(kind: type, settings: dict[str, Any]) -> None:
    model = build(kind, **settings)
    x, context = inputs(model)
    row = None if context is None else context[:1]
    z, logabsdet = model.bijection(x, context)
    torch.testing.assert_close(model.bijection.inverse(z, context)[0], x)
    size = math.prod(model.shape)
    jacobian = torch.autograd.functional.jacobian(lambda v: model.bijection(v[None], row)[0].flatten(), x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian.reshape(size, size))[1], logabsdet[0])
    drawn, log_prob = model.sample_and_log_prob(4, context)
    torch.testing.assert_close(model.log_prob(drawn, context), log_prob)


@pytest.mark.parametrize("kind", KINDS)
def test_the_slow_direction_is_one_call(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind, shape=(1, 4, 4), layers=4, permutation="random", preprocess={"logit": 0.05})
    x, _ = inputs(model)
    calls, single = [], ops.autoregressive_inverse
    monkeypatch.setattr(ops, "autoregressive_inverse", lambda *a, **k: (calls.append(len(a[2])), single(*a, **k))[1])
    z, _ = model.bijection(x)
    model.bijection.inverse(z)
    assert calls == [4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_rebuilds_it(kind: type, tmp_path: Path) -> None:
    further: dict[str, Any] = {"components": 3, "batch_norm": True} if kind is models.MAF else {"gated": True}
    model = build(kind, shape=6, permutation="random", seed=3, **further).float().eval()
    models.save(model, tmp_path / "model.pt")
    again = flowkern.load(tmp_path / "model.pt").eval()
    x = torch.randn(3, 6)
    assert torch.equal(again.log_prob(x), model.log_prob(x))


def test_batch_normalization_and_a_mixture_base() -> None:
    model = build(models.MAF, shape=4, batch_norm=True, components=3)
    x, _ = inputs(model, 16)
    model(x).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    z, logabsdet = model.bijection(x)
    back, negated = model.bijection.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(negated, -logabsdet)
    assert isinstance(model.base, nn.Mixture)
    assert model.sample(7).shape == (7, 4)


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
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60 if features == 2 else 40):
        x, log_q = model.sample_and_log_prob(128)
        loss = (log_q - target_log_prob(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    torch.set_num_threads(threads)
    first, last = losses[0], sum(losses[-5:]) / 5
    assert last < 0.35 * first, (first, last)
    assert last > -0.1 * features, "a KL divergence is not negative"


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="layers: expected at least 1, got 0"):
        models.MAF(4, layers=0)
    with pytest.raises(ValueError, match="permutation: unknown name 'swap'; expected one of 'reverse', 'random', 'none'"):
        models.MAF(4, permutation="swap")
    with pytest.raises(ValueError, match="gated: expected a sigmoid scale"):
        models.IAF(4, gated=True, scale=ops.ScaleMap.exp())
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 4\), got \(2, 5\)"):
        models.MAF(4).log_prob(torch.randn(2, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_one_feature(kind: type) -> None:
    model = build(kind, shape=1)
    drawn, log_prob = model.sample_and_log_prob(5)
    torch.testing.assert_close(model.log_prob(drawn), log_prob)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_in_its_sample(kind: type) -> None:
    model = build(kind, shape=5)
    x, _ = inputs(model)
    bad = x.clone()
    bad[1, 2] = math.nan
    for function in (model.bijection, model.bijection.inverse):
        (expected, _), (actual, logabsdet) = function(x), function(bad)
        kept = [0, 2, 3]
        torch.testing.assert_close(actual[kept], expected[kept])
        assert logabsdet[kept].isfinite().all()
        assert not actual[1].isfinite().all()
