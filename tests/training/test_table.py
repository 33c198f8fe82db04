"""The table of models: importance estimates that are right, and runs that are done once."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import (
    assert_refused,
    before_each_step,
    last,
    signals_put_back,
    stop_after,
    train,
    train_until,
    without_pictures,
)

from flowkern import cli, data, models, training
from flowkern.training import _table


@pytest.mark.slow
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


@pytest.mark.slow
def test_table_is_made_run_by_run(tmp_path, capsys, monkeypatch) -> None:
    vae = _table.Row("VAE", "vae", config={"latent": 2, "hidden": [16]})
    monkeypatch.setattr(_table, "ROWS", {"vae": vae, "made": MADE})
    monkeypatch.setattr(_table, "IMPORTANCE_SAMPLES", 5)
    stop_after(monkeypatch, 3)
    command = ["table", "digits", "--out", str(tmp_path), "--max-minutes", "1e-6", "--seeds"]
    assert cli.main([*command, "1"]) == 0
    first = capsys.readouterr().out
    assert first.count("\n| ") == 2
    result = json.loads((tmp_path / "vae" / "0" / "table.json").read_text())
    score = json.loads((tmp_path / "vae" / "0" / "result.json").read_text())["test"]["nats"]
    assert result["test"] == score
    assert f"| VAE * | 1 | {result['validation']:.2f} | {score:.2f} | {result['importance']:.2f} |" in first
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/0/*.ckpt")}
    assert cli.main([*command, "2"]) == 0
    text = (tmp_path / "digits.md").read_text()
    assert text == capsys.readouterr().out
    assert text.count(" ± ") == 6
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/0/*.ckpt")} == before
    assert (tmp_path / "digits.png").stat().st_size > 0


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch) -> None:
    without_pictures(monkeypatch)


#: A row whose runs take a second at most.
MADE = _table.Row("MADE", "made", "default", {"hidden": [16]})


@pytest.fixture
def one_row(monkeypatch) -> None:
    monkeypatch.setattr(_table, "ROWS", {"made": MADE})
    monkeypatch.setattr(_table, "IMPORTANCE_SAMPLES", 2)
    plan = _table.Row.plan
    monkeypatch.setattr(_table.Row, "plan", lambda row, data, seed: dataclasses.replace(plan(row, data, seed), epochs=2))


def finished(out: Path, seed: int, **more: Any) -> None:
    folder = out / "made" / str(seed)
    folder.mkdir(parents=True)
    (folder / "table.json").write_text(json.dumps({"validation": 90.0 + seed, "test": 91.0, "importance": 90.5, **more}))


@pytest.mark.parametrize("more", [None, 60.0])
def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch, one_row, more) -> None:
    stored = tmp_path / "made" / "0" / "table.json"
    with monkeypatch.context() as limit:
        stop_after(limit, 3)
        text = training.table("digits", tmp_path, seeds=1, max_minutes=1e-6)
    assert json.loads(stored.read_text())["ended"] is False
    assert "| MADE * | 1 |" in text
    assert text.splitlines()[-1].startswith("(*) stopped by --max-minutes before the training had ended")
    before = stored.stat().st_mtime_ns
    assert training.table("digits", tmp_path, seeds=1, max_minutes=1e-6) == text
    assert stored.stat().st_mtime_ns == before, "there was no time left, and yet it was done again"
    assert last(stored.parent)["global_step"] == 3
    text = training.table("digits", tmp_path, seeds=1, max_minutes=more)
    assert last(stored.parent)["global_step"] > 3
    content = json.loads(stored.read_text())
    assert content["ended"] is True
    assert training.Plan(**content["plan"]) == MADE.plan("digits", 0)
    assert "*" not in text
    before = stored.stat().st_mtime_ns
    assert training.table("digits", tmp_path, seeds=1, max_minutes=1e-6) == text
    assert stored.stat().st_mtime_ns == before


def test_patience_ends_a_run_within_its_time(tmp_path, monkeypatch, one_row) -> None:
    plan = MADE.plan("digits", 0)
    plan = dataclasses.replace(plan, lr=1e-30, warmup=0, ema=0.0, patience=1, epochs=50)
    monkeypatch.setattr(_table.Row, "plan", lambda *_: plan)
    text = training.table("digits", tmp_path, seeds=1, max_minutes=5.0)
    assert last(tmp_path / "made" / "0")["epoch"] == 1
    assert "*" not in text


def test_a_run_without_a_validation_enters_no_table(tmp_path, one_row) -> None:
    """Killed in its first epoch, and then without time."""
    out = tmp_path / "made" / "0"
    train_until(lambda task, _: task.global_step == 3, MADE.plan("digits", 0), out, checkpoint_steps=2)
    assert (out / "last.ckpt").exists()
    assert not (out / "best.ckpt").exists()
    text = training.table("digits", tmp_path, seeds=1, max_minutes=1e-9)
    assert text == _table.markdown([])
    assert not (out / "table.json").exists()
    assert "| MADE | 1 |" in training.table("digits", tmp_path, seeds=1)


def test_only_the_seeds_asked_for(tmp_path, one_row) -> None:
    """Of results without a plan, as they were written once: these are taken as they are."""
    for seed in range(5):
        finished(tmp_path, seed)
    assert "| MADE | 5 | 92.00 ± 1.58 |" in training.table("digits", tmp_path, seeds=5)
    assert "| MADE | 1 | 90.00 |" in training.table("digits", tmp_path, seeds=1)


def test_rows_of_another_plan(tmp_path, monkeypatch, one_row) -> None:
    plan = MADE.plan("digits", 0)
    older = {name: value for name, value in dataclasses.asdict(plan).items() if name != "accumulate"}
    finished(tmp_path / "same", 0, plan=older, ended=True)
    assert "| MADE | 1 | 90.00 |" in training.table("digits", tmp_path / "same", seeds=1)
    finished(tmp_path / "other", 0, plan=dataclasses.asdict(dataclasses.replace(plan, lr=0.5)), ended=True)
    message = rf"made/0 holds a run of another plan: the row has lr {plan.lr} \(the run has 0.5\)"
    with pytest.raises(ValueError, match=message):
        training.table("digits", tmp_path / "other", seeds=1)
    # Cut off, and not a row yet.
    stop_after(monkeypatch, 1)
    train(dataclasses.replace(plan, lr=0.5), tmp_path / "cut" / "made" / "0", max_minutes=1.0)
    with pytest.raises(ValueError, match=message):
        training.table("digits", tmp_path / "cut", seeds=1)


@pytest.mark.parametrize(
    "text", ['{"validation": 1.0 "test"', '{"validation": 1.0, "test": 2.0}', "[1, 2]", '{"test": null}', "7"]
)
def test_damaged_results(tmp_path, capsys, one_row, text) -> None:
    finished(tmp_path, 0)
    path = tmp_path / "made" / "0" / "table.json"
    path.write_text(text)
    assert cli.main(["table", "digits", "--out", str(tmp_path), "--seeds", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}: not the result of a row" in error
    assert "delete it, and it is made anew" in error


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_interrupt(tmp_path, monkeypatch, capsys, one_row, where) -> None:
    def interrupt(*_: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return torch.zeros(350)

    with signals_put_back(), monkeypatch.context() as patch:
        if where == "training":
            before_each_step(patch, interrupt)
        else:
            patch.setattr(_table, "importance_nlls", interrupt)
        assert cli.main(["table", "digits", "--out", str(tmp_path), "--seeds", "1"]) == 130
    assert f"interrupted; the same command continues from {tmp_path}" in capsys.readouterr().err
    assert "| MADE | 1 |" in training.table("digits", tmp_path, seeds=1)


def test_errors(tmp_path) -> None:
    assert_refused(
        (lambda: training.table("digits", tmp_path, rows=["vaes"]), "rows: unknown name 'vaes'; expected some of realnvp"),
        (lambda: training.table("digits", tmp_path, seeds=0), "seeds: expected at least 1, got 0"),
    )


@pytest.mark.parametrize("name", _table.ROWS)
def test_every_row_can_be_built(name: str) -> None:
    row = _table.ROWS[name]
    plan = training.make_plan(row.model, "digits", preset=row.preset, config=dict(row.config))
    model = plan.build(data.load("digits"))
    x = torch.rand(2, 1, 8, 8)
    assert model.objective(x).isfinite().all()
    assert model.log_weight(x).isfinite().all()
