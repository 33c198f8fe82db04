"""Models of discrete values: probabilities that sum to one, seen by the trainer as densities of dequantized data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from built import assert_refused

from flowkern import data, models, training


def small(**config) -> models.MADE:
    torch.manual_seed(0)
    return models.MADE((1, 2, 2), **({"levels": 3, "hidden": [8]} | config))


@pytest.mark.parametrize("levels", [2, 17, 129, 255, 256])
def test_values_come_back_from_any_noise(levels: int) -> None:
    """Also from the least and the largest of the 16 bits."""
    v = np.repeat(np.arange(levels, dtype=np.uint8)[:, None], 4, 1)
    u = np.array([0.0, 1 / 65536, 0.5, 65535 / 65536], np.float32).repeat(levels).reshape(4, levels).T
    x = data.dequantize(v, levels, np.ascontiguousarray(u))
    model = models.MADE(4, levels=levels, hidden=[2])
    assert torch.equal(model.values(x), torch.from_numpy(v).long())


def test_many_levels_need_the_middle_of_the_cell() -> None:
    v = torch.tensor([0, 1, 65535, 2**20 - 1])
    model = models.MADE(4, levels=2, hidden=[2])
    model.levels = 2**20
    assert torch.equal(model.values((v.double() + 0.5).float() / 2**20), v)


def test_probabilities_sum_to_one() -> None:
    model = small().double()
    v = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 1, 2, 2)
    torch.testing.assert_close(model.log_mass(v).logsumexp(0), torch.zeros((), dtype=torch.float64))
    x = (v + torch.rand(v.shape, dtype=torch.float64)) / 3
    torch.testing.assert_close(model.log_prob(x), model.log_mass(v) + 4 * math.log(3.0))
    torch.testing.assert_close(model.objective(x), -model.log_prob(x))


def test_samples_follow_the_probabilities() -> None:
    model = small(hidden=[4])
    torch.manual_seed(1)
    drawn = model.draw(20_000)
    place = (drawn.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    frequency = torch.bincount(place, minlength=81) / len(place)
    v = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 1, 2, 2)
    probability = model.log_mass(v).exp()
    # Five standard deviations of a frequency.
    assert ((frequency - probability).abs() <= 5 * (probability / len(place)).sqrt()).all()
    x = model.sample(5)
    assert x.shape == (5, 1, 2, 2)
    assert torch.equal(x, (model.values(x) + 0.5) / 3)


def test_temperature_sharpens() -> None:
    model = small()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5.0)
    torch.manual_seed(0)
    cold, warm = (-model.log_mass(model.draw(200, temperature=t)).mean() for t in (0.1, 1.0))
    assert cold < warm


def test_trained_by_the_trainer(tmp_path) -> None:
    plan = training.make_plan("made", "digits", epochs=3, lr=0.01, ema=0.0, config={"hidden": [16]})
    score = training.train(plan, tmp_path)
    # The probability itself: no noise, so one draw says all. A uniform distribution has 64 log 17 = 181 nats.
    assert score.draws == 1
    assert score.nats < 64 * math.log(17.0)
    digits = data.load("digits")
    model = models.load(tmp_path / "best.ckpt")
    exact = -model.log_mass(torch.from_numpy(digits.test.values).long()).detach().double().mean()
    assert score.nats == pytest.approx(float(exact), abs=1e-4)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["curve.png", "samples-0.6.png", "samples-0.8.png", "samples.png"]


def test_errors(tmp_path) -> None:
    x = torch.full((2, 1, 2, 2), 0.5)
    x[0, 0, 0], x[1, 0, 1, 1] = torch.tensor([-0.1, 1.0]), math.nan
    np.save(tmp_path / "continuous.npy", np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32))
    source = f"npy:{tmp_path / 'continuous.npy'}"
    assert_refused(
        (lambda: small().log_prob(x), r"x: expected values in \[0, 1\), got 3 of 8 outside, or NaN"),
        (lambda: training.context_of(small(context=3), torch.tensor([1, 3])), "labels: expected 0 to 2, got 1 to 3"),
        (lambda: small().log_prob(torch.rand(3, 4)), r"x: expected shape \(B, 1, 2, 2\), got \(3, 4\)"),
        (lambda: small().sample(2, temperature=0.0), "temperature: expected more than 0"),
        (lambda: training.make_plan("made", source).build(data.load(source)), "MADE is for discrete values"),
    )
