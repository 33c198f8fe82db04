"""The table of models: importance estimates that are right, and runs that are done once."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from flowkern import cli, data, models, training
from flowkern.training import _table


def test_importance_of_dequantization_noise() -> None:
    """For a flow: log P(v) = log E_u p(v + u). The uniform flow has P = levels^-D exactly, with any number of draws."""
    digits = data.load("digits")

    class Uniform(models.Model):
        shape, context = (1, 8, 8), None

        def log_prob(self, x, context=None):
            # Density 2 on one half of the first element, 0 on the other: half of the draws weigh nothing.
            half = (x.flatten(1)[:, 0] * 17 % 1) < 0.5
            return torch.where(half, math.log(2.0), -math.inf)

    estimate = training.importance_nlls(Uniform(), digits, "val", draws=1000)
    assert estimate.shape == (350,)
    # A mean of 1000 draws of 2 or 0: its logarithm is within five of its standard deviations.
    assert (estimate - 64 * math.log(17)).abs().max() < 5 / math.sqrt(1000)


def test_importance_of_latents_is_above_the_bound() -> None:
    torch.manual_seed(0)
    digits = data.load("digits")
    vae = models.VAE((1, 8, 8), levels=17, latent=2, hidden=[16])
    with torch.no_grad():
        for p in vae.decoder.parameters():
            p.mul_(3.0)
    bound = training.sample_nlls(vae, digits, "val", draws=20)
    estimate = training.importance_nlls(vae, digits, "val", draws=200)
    one = training.importance_nlls(vae, digits, "val", draws=1)
    assert estimate.mean() < bound.mean()
    assert abs(one.mean() - bound.mean()) < 5 * (one - bound).std() / math.sqrt(350)
    exact = models.MADE((1, 8, 8), levels=17, hidden=[4])
    assert torch.equal(training.importance_nlls(exact, digits, "val"), training.sample_nlls(exact, digits, "val"))


def test_table_is_made_run_by_run(tmp_path, capsys, monkeypatch) -> None:
    rows = {
        "vae": _table.Row("VAE", "vae", config={"latent": 2, "hidden": [16]}),
        "made": _table.Row("MADE", "made", "default", {"hidden": [16]}),
    }
    monkeypatch.setattr(_table, "ROWS", rows)
    monkeypatch.setattr(_table, "IMPORTANCE_SAMPLES", 5)
    command = ["table", "digits", "--out", str(tmp_path), "--max-minutes", "0.01", "--seeds"]
    assert cli.main([*command, "1"]) == 0
    first = capsys.readouterr().out
    assert first.count("\n| ") == 2
    result = json.loads((tmp_path / "vae" / "0" / "table.json").read_text())
    score = json.loads((tmp_path / "vae" / "0" / "result.json").read_text())["test"]["nats"]
    assert result["test"] == score
    assert f"| VAE | 1 | {result['validation']:.2f} | {score:.2f} | {result['importance']:.2f} |" in first
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/0/*.ckpt")}
    time.sleep(0.01)
    assert cli.main([*command, "2"]) == 0
    text = (tmp_path / "digits.md").read_text()
    assert text == capsys.readouterr().out
    assert text.count(" ± ") == 6
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/0/*.ckpt")} == before
    assert (tmp_path / "digits.png").stat().st_size > 0


def test_errors(tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match="rows: unknown name 'vaes'; expected some of realnvp"):
        training.table("digits", tmp_path, rows=["vaes"])
    with pytest.raises(ValueError, match="seeds: expected at least 1, got 0"):
        training.table("digits", tmp_path, seeds=0)


@pytest.mark.parametrize("name", _table.ROWS)
def test_every_row_can_be_built(name: str) -> None:
    row = _table.ROWS[name]
    plan = training.make_plan(row.model, "digits", preset=row.preset, config=dict(row.config))
    model = plan.build(data.load("digits"))
    x = torch.rand(2, 1, 8, 8)
    assert model.objective(x).isfinite().all()
    assert model.log_weight(x).isfinite().all()
