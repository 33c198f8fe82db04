"""Training runs: what they write, that they resume bit for bit, and that they fail in a clean way."""

from __future__ import annotations

import copy
import dataclasses
import errno
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

np = pytest.importorskip("numpy")

from training_runs import (  # noqa: E402
    assert_near,
    assert_refused,
    before_each_step,
    last,
    signals_put_back,
    stop_after,
    train,
    train_until,
    vectors_plan,
)

from flowkern import data, diagnostics, models, training  # noqa: E402
from flowkern.data import noise  # noqa: E402
from flowkern.training import _codecs, _gallery  # noqa: E402
from flowkern.training._task import AtomicCheckpointIO, FlowTask, diagnosis  # noqa: E402

#: A small flow.
SMALL = {"flatten": True, "couplings": 2, "hidden": 8, "dropout": 0.0}


def small_plan(**given: Any) -> training.Plan:
    config = {**SMALL, **given.pop("config", {})}
    fields = {"epochs": 2, "batch_size": 250, "lr": 1e-2, "warmup": 3, "ema": 0.9, "clip": 50.0, **given}
    return training.make_plan("realnvp", "digits", config=config, **fields)


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def assert_same_state(a: Any, b: Any, where: str) -> None:
    """Nested dicts and lists with bitwise equal tensors."""
    (ours, form), (theirs, other_form) = tree_flatten_with_path(a), tree_flatten_with_path(b)
    assert form == other_form, where
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        assert type(x) is type(y), where + keystr(path)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, where + keystr(path)


TRAINED = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "epoch", "global_step")


def assert_same_run(a: Path, b: Path) -> None:
    """Equal weights, averages, optimizer and place in the run, bit for bit; and equal best weights."""
    for name in TRAINED:
        assert_same_state(last(a)[name], last(b)[name], name)
    assert_same_state(*(models.read_checkpoint(run / "best.ckpt")["state_dict"] for run in (a, b)), "best")


def assert_resumes(run: Path, plan: training.Plan, whole: Path) -> None:
    """The run that was cut off ends as if nothing had been: as the one that is made here in ``whole``."""
    assert training.resumed_plan(run, {}) == plan
    train(plan, run, resume=True)
    train(plan, whole)
    assert_same_run(run, whole)


# ---------------------------------------------------------------------------------------------------------------------
# A whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, training.Plan, training.Score]:
    out = tmp_path_factory.mktemp("run")
    plan = small_plan(epochs=4)
    score = training.train(plan, out, draws=3)
    assert score is not None
    return out, plan, score


def test_run_writes_everything(finished):
    from PIL import Image

    out, plan, score = finished
    pictures = ["curve.png", "interpolations.png", "reconstructions.png", "samples-0.6.png", "samples-0.8.png", "samples.png"]
    assert sorted(p.name for p in out.iterdir()) == sorted([".lock", "best.ckpt", "last.ckpt", "log", "result.json", *pictures])
    result = json.loads((out / "result.json").read_text())
    assert result["test"]["nats"] == score.nats
    assert training.Plan(**result["plan"]) == plan
    # 64 tiles of 8 x 8 with one pixel between them, eight times as large.
    for name in pictures[1:]:
        with Image.open(out / name) as picture:
            assert (picture.mode, picture.size) == ("L", (584, 584)), name
            assert len(np.unique(np.asarray(picture))) > 10, name
    with Image.open(out / "curve.png") as picture:
        assert picture.format == "PNG"
    rows = (out / "log" / "version_0" / "metrics.csv").read_text().splitlines()
    assert rows[0].split(",") == ["epoch", "step", "train_bits_per_dim", "train_nll", "val_bits_per_dim", "val_nll"]
    assert len(rows) == 1 + 2 * plan.epochs


def test_training_lowers_the_nll(finished):
    _, plan, score = finished
    digits = data.load("digits")
    torch.manual_seed(plan.seed)
    assert score.nats < training.evaluate(plan.build(digits), digits, draws=3).nats - 10.0


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
def test_checkpoints_hold_the_bare_model(finished, name):
    out, plan, _ = finished
    content = torch.load(out / name, weights_only=True)
    assert content["model"]["name"] == "realnvp"
    described = {"levels": 17, "classes": [str(i) for i in range(10)], "shape": [1, 8, 8]}
    assert {key: content["data"][key] for key in described} == described
    assert content["data"] == data.load("digits").identity
    assert training.Plan(**content["plan"]) == plan
    model = models.build("realnvp", content["model"]["config"])
    model.load_state_dict(content["state_dict"])
    # The names that runs of version 0.1.0 resume by.
    own = {"flowkern", "model", "state_dict", "data", "plan", "epoch_nll", "current_model_state", "averaging_state"}
    assert own <= content.keys()
    callbacks = {"Timer", "EarlyStopping{'monitor': 'val_nll', 'mode': 'min'}", "ExponentialAverage", "Checkpoints"}
    assert content["callbacks"].keys() == callbacks


def test_result_is_that_of_the_best_checkpoint(finished):
    out, _, score = finished
    assert training.evaluate(models.load(out / "best.ckpt"), data.load("digits"), draws=3) == score


def test_trainer_does_what_the_plan_says(finished):
    """A plain loop with the same batches, optimizer, warm-up, clipping and average arrives at the same weights."""
    out, plan, _ = finished
    digits = data.load("digits")
    torch.manual_seed(plan.seed)
    model = plan.build(digits)
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.lr)
    step = 0
    for epoch in range(plan.epochs):
        for batch in data.loader(digits, "train", plan.batch_size, seed=plan.seed, epoch=epoch):
            optimizer.param_groups[0]["lr"] = plan.lr * min(1.0, (step + 1) / plan.warmup)
            optimizer.zero_grad()
            training.negative_log_likelihood(model.log_prob(batch.x), 64, 17).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
            optimizer.step()
            decay = min(plan.ema, (1 + step) / (10 + step)) if step else 0.0
            with torch.no_grad():
                for a, p in zip(average.parameters(), model.parameters(), strict=True):
                    a.lerp_(p, 1.0 - decay)
            step += 1
    content = last(out)
    assert content["global_step"] == step == 16
    # Both take 16 steps of at most 0.01; rounding differs in the last bits of each.
    current = {k.removeprefix("model."): v for k, v in content["current_model_state"].items()}
    for state, expected in ((current, model), (content["state_dict"], average)):
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_run_without_average_clipping_patience_or_limit(tmp_path):
    plan = small_plan(ema=0.0, clip=0.0, patience=0, warmup=0, optimizer="adamax", epochs=1)
    train(plan, tmp_path, max_minutes=math.inf)
    assert "current_model_state" not in last(tmp_path)
    models.load(tmp_path / "last.ckpt")


#: A small Glow for the digits.
GLOW = {"levels": 2, "steps": 1, "hidden": 8}


def glow_plan(**given: Any) -> training.Plan:
    config = {**GLOW, **given.pop("config", {})}
    fields = {"epochs": 1, "batch_size": 250, "lr": 1e-2, "warmup": 3, "ema": 0.9, **given}
    return training.make_plan("glow", "digits", config=config, **fields)


IMAGES = {"couplings": 1, "depth": 1, "flatten": False}
HALF = {
    "realnvp": small_plan(epochs=1, config=IMAGES, optimizer="adamw", weight_decay=0.1),
    **{f"glow-{memory}": glow_plan(config={"memory": memory}) for memory in ("store", "reversible")},
}


@pytest.mark.parametrize("plan", HALF.values(), ids=HALF)
def test_half_precision_run(tmp_path, monkeypatch, plan):
    """Networks answer in bfloat16; what passes between the layers, log-determinants, loss and weights are float32."""
    from flowkern import nn
    from flowkern.nn.bijections.bijection import Bijection

    networks, states, losses = set(), set(), set()
    training_step, configure = FlowTask.training_step, FlowTask.configure_optimizers

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = training_step(self, batch, batch_idx)
        losses.add(loss.dtype)
        return loss

    def watch(self: Any) -> Any:
        for module in self.model.modules():
            if isinstance(module, Bijection):
                module.register_forward_hook(lambda _, __, out: states.update(t.dtype for t in out))
            if isinstance(module, nn.ResNet | nn.ConvNet):
                module.register_forward_hook(lambda _, __, out: networks.add(out.dtype))
        return configure(self)

    monkeypatch.setattr(FlowTask, "training_step", step)
    monkeypatch.setattr(FlowTask, "configure_optimizers", watch)
    score = train(plan, tmp_path, precision="bf16-mixed")
    assert score is not None
    assert math.isfinite(score.nats)
    assert (networks, states, losses) == ({torch.bfloat16}, {torch.float32}, {torch.float32})
    assert {v.dtype for v in last(tmp_path)["state_dict"].values() if v.is_floating_point()} == {torch.float32}


def test_accumulated_gradients_are_those_of_the_batch(tmp_path):
    """Parts of unequal size: 111, 110 and 110 of 331 samples, 3, 2 and 2 of the last 7."""
    for parts in (1, 3):
        train(small_plan(batch_size=331, accumulate=parts), tmp_path / f"{parts}", precision="64-true")
    assert last(tmp_path / "3")["global_step"] == 8
    assert_near(tmp_path / "1", tmp_path / "3")


def test_parts_of_a_step_draw_different_dropout(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(FlowTask, "on_train_batch_end", lambda *a: seeds.append(torch.initial_seed()))
    train(small_plan(epochs=1, accumulate=2), tmp_path)
    assert len(seeds) == len(set(seeds)) == 8


def test_channels_last_run(tmp_path, monkeypatch):
    """The same run as in the other format, to rounding, also if it resumes in the other one."""
    formats = set()

    def look(task: FlowTask, _: int) -> None:
        weight = next(p for p in task.model.parameters() if p.ndim == 4 and min(p.shape) > 1)
        formats.add((weight.is_contiguous(memory_format=torch.channels_last), weight.is_contiguous()))

    before_each_step(monkeypatch, look)
    plans = [glow_plan(epochs=epochs) for epochs in (1, 2)]
    train(plans[1], tmp_path / "contiguous", precision="64-true")
    assert formats == {(False, True)}
    formats.clear()
    train(plans[0], tmp_path / "mixed", precision="64-true", channels_last=True)
    assert formats == {(True, False)}
    train(plans[1], tmp_path / "mixed", precision="64-true", resume=True)
    assert_near(tmp_path / "contiguous", tmp_path / "mixed", 1e-6)


def test_conditional_run_and_its_samples(tmp_path):
    plan = small_plan(epochs=1, conditional=True)
    training.train(plan, tmp_path, draws=1)
    model = models.load(tmp_path / "best.ckpt")
    assert model.context == 10
    for label in (None, "3"):
        training.save_samples(tmp_path / "best.ckpt", tmp_path / "x.npy", 5, label=label)
        assert np.load(tmp_path / "x.npy").shape == (5, 1, 8, 8)
    with pytest.raises(ValueError, match=r"unknown class 'x'; expected one of 0, 1"):
        training.save_samples(tmp_path / "best.ckpt", tmp_path / "x.npy", label="x")
    model.shape = (3, 32, 32)
    with pytest.raises(ValueError, match="for 10 classes, and photos"):
        training.evaluate(model, data.load("photos"), draws=1)


def test_continuous_data(tmp_path, capsys):
    score = training.train(vectors_plan(tmp_path / "x.npy", normal(200, 6), epochs=2), tmp_path / "run")
    # The entropy of N(0, I) in 6 dimensions is 8.51 nats; the mean over 20 samples has a standard error of 0.39.
    assert score is not None
    assert score.draws == 1
    assert abs(score.nats - 3 * math.log(2 * math.pi * math.e)) < 2.0
    assert [p.name for p in (tmp_path / "run").glob("*.png")] == ["curve.png"]
    training.save_samples(tmp_path / "run" / "best.ckpt", tmp_path / "s.npy", 7)
    assert np.load(tmp_path / "s.npy").shape == (7, 6)
    with pytest.raises(ValueError, match="make no picture"):
        training.save_samples(tmp_path / "run" / "best.ckpt", tmp_path / "s.png", 7)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and resuming


def test_patience_ends_a_run_for_good(tmp_path):
    plan = small_plan(lr=1e-30, ema=0.0, patience=2, epochs=50)
    train(plan, tmp_path)
    assert last(tmp_path)["epoch"] == 2, "the first epoch is the best, two more do not improve"
    train(training.resumed_plan(tmp_path, {}), tmp_path, resume=True)
    assert last(tmp_path)["epoch"] == 2


def test_time_limit(tmp_path, monkeypatch):
    stop_after(monkeypatch, 6)
    train(small_plan(epochs=10_000), tmp_path, max_minutes=1.0)
    assert last(tmp_path)["epoch"] < 9_999
    assert (tmp_path / "result.json").exists()


def test_time_is_over_before_the_first_validation(tmp_path, capsys):
    """Nothing to evaluate yet, and nothing lost: with more time the run ends as if it had not been stopped."""
    train_until(lambda task, _: task.global_step == 3, small_plan(), tmp_path / "run", checkpoint_steps=2)
    capsys.readouterr()
    assert train(small_plan(), tmp_path / "run", resume=True, max_minutes=1e-9) is None
    assert "the time was over before the first validation" in capsys.readouterr().out
    assert last(tmp_path / "run")["global_step"] == 2
    assert_resumes(tmp_path / "run", small_plan(), tmp_path / "whole")


@pytest.mark.parametrize("parts", [1, 2])
def test_the_model_knows_the_step(tmp_path, monkeypatch, parts):
    """The optimizer's, whatever the number of parts, and after resuming."""
    seen, objective = [], models.RealNVP.objective

    def watched(self: Any, *arguments: Any) -> Any:
        seen.append(self.steps)
        return objective(self, *arguments)

    monkeypatch.setattr(models.RealNVP, "objective", watched)
    for epochs in (1, 2):
        train(small_plan(accumulate=parts, epochs=epochs), tmp_path, resume=epochs == 2)
    assert seen == [step for step in range(8) for _ in range(parts)]


RESUMED = {
    "realnvp": small_plan(epochs=3, config={"dropout": 0.3}),
    "accumulating": small_plan(epochs=3, config={"dropout": 0.3}, accumulate=3),
    "glow": glow_plan(epochs=3, config={"dropout": 0.3}, accumulate=2),
    "reversible": glow_plan(epochs=3, config={"dropout": 0.3, "memory": "reversible"}),
}


KILLED_AT = {"realnvp": (3, 4, 6, 7), "accumulating": (3, 7), "glow": (1, 6), "reversible": (3,)}


@pytest.mark.parametrize(("name", "step"), [(name, step) for name, steps in KILLED_AT.items() for step in steps])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, name, step):
    """Killed in the middle (step 3, 6), at the last batch (7) and at the first of an epoch (4), with dropout.

    Where gradients accumulate: before the last part of a step. Glow: also before there is anything to resume.
    """
    plan = RESUMED[name]
    reference = tmp_path.parent / f"uninterrupted-{name}"
    if not reference.exists():
        train(plan, reference, checkpoint_steps=2)
    out = tmp_path / "run"
    last_part = plan.accumulate - 1
    train_until(lambda task, i: task.global_step == step and i % plan.accumulate == last_part, plan, out, checkpoint_steps=2)
    if step >= 2:
        assert last(out)["global_step"] == step - step % 2, "it did not stop where it should"
    moved = out.rename(tmp_path / "moved")
    resumed = training.resumed_plan(moved, {}) if step >= 2 else plan
    train(resumed, moved, resume=True, checkpoint_steps=2)
    assert_same_run(moved, reference)
    log = training.read_log(moved / "log")
    for name, points in training.read_log(reference / "log").items():
        assert log[name] == points, name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_more_epochs(tmp_path, precision):
    for name in ("a", "b"):
        train(small_plan(epochs=2 if name == "a" else 4), tmp_path / name, precision=precision)
    more = training.resumed_plan(tmp_path / "a", {"epochs": 4})
    train(more, tmp_path / "a", resume=True, precision=precision)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert [epoch for epoch, _ in training.read_log(tmp_path / "a" / "log")["val_nll"]] == [0, 1, 2, 3]


def copied(run: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The checkpoints of a run, their content changed."""
    for name in ("best.ckpt", "last.ckpt"):
        content = models.read_checkpoint(run / name)
        change(content)
        models.write_atomically(content, out / name)


def test_resuming_refuses_another_plan(finished):
    out, plan, _ = finished
    assert training.resumed_plan(out, {"lr": plan.lr, "config": {"hidden": 8}, "epochs": 9}) == small_plan(epochs=9)
    with pytest.raises(ValueError, match=r"cannot resume with lr 0.5 \(the run has 0.01\), config {'hidden': 9}"):
        training.resumed_plan(out, {"lr": 0.5, "config": {"hidden": 9}})


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def arguments(plan: training.Plan, out: Path) -> list[str]:
    """The command line of a run of this plan."""
    fields = ("epochs", "batch_size", "accumulate", "lr", "warmup", "ema", "clip")
    given = [f"--{name.replace('_', '-')}={getattr(plan, name)}" for name in fields]
    config = [f"--set={name}={json.dumps(value)}" for name, value in plan.config.items()]
    return ["train", plan.model, f"--data={plan.data}", f"--out={out}", *given, *config]


@pytest.fixture(autouse=True)
def _one_thread():
    """Several threads may share a matrix product differently from run to run, which changes its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


#: Runs the command line in a process that kills itself, as kill -9 does, where the last line says.
KILLED = """
import itertools, os, signal, sys
from flowkern.cli import main
from flowkern.training._task import FlowTask

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

calls, step = itertools.count(1), FlowTask.training_step
{where}
main(sys.argv[1:])
"""


REVERSIBLE = glow_plan(epochs=2, accumulate=2, config={"memory": "reversible", "dropout": 0.2})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "saved", "where"),
    [
        # Each save synchronizes a file and its folder: half of the third last.ckpt is written.
        (small_plan(), 2, "os.fsync = lambda file: next(calls) < 5 or (os.ftruncate(file, 1000), kill())"),
        (REVERSIBLE, 6, "FlowTask.training_step = lambda task, *given: kill() if task.global_step == 6 else step(task, *given)"),
    ],
    ids=["mid-write", "mid-epoch"],
)
def test_a_killed_process_resumes(tmp_path, plan, saved, where):
    """What is there of the run, the checkpoint before the one that was being written, ends as if nothing had been."""
    out = tmp_path / "killed"
    run = [sys.executable, "-W", "ignore", "-c", KILLED.format(where=where), *arguments(plan, out), "--checkpoint-steps=1"]
    process = subprocess.run(run, env=ONE_THREAD, stdout=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert len(list(out.glob(".last.ckpt.*.tmp"))) == (saved == 2), "the process was not writing"
    assert last(out)["global_step"] == saved
    assert_resumes(out, plan, tmp_path / "whole")
    assert not list(out.glob(".last.ckpt.*.tmp"))


@pytest.mark.parametrize(("sent", "code", "saved"), [(signal.SIGTERM, 143, 6), (signal.SIGINT, 1, 4)])
def test_ended_from_outside(tmp_path, monkeypatch, capsys, sent, code, saved):
    """Neither looks like success, and both say how to go on. SIGTERM lets the step end that it came in."""
    before_each_step(monkeypatch, lambda task, _: os.kill(os.getpid(), sent) if task.global_step == 5 else None)
    with signals_put_back(), pytest.raises(SystemExit) as end:
        train(small_plan(), tmp_path, checkpoint_steps=2)
    assert end.value.code == code
    assert "--resume continues from" in capsys.readouterr().out
    assert last(tmp_path)["global_step"] == saved


def test_interrupted_before_anything_was_saved(tmp_path, monkeypatch, capsys):
    before_each_step(monkeypatch, lambda *_: signal.raise_signal(signal.SIGINT))
    with signals_put_back(), pytest.raises(SystemExit):
        train(small_plan(), tmp_path)
    assert "interrupted at step 0; there is no checkpoint to resume from yet" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path, monkeypatch):
    saved, steps = AtomicCheckpointIO.save_checkpoint, []

    def fill(self: Any, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        steps.append(checkpoint["global_step"])
        if checkpoint["global_step"] == 3:
            # What is written beside the checkpoint now ends where no space is left.
            (tmp_path / f".last.ckpt.{os.getpid()}.tmp").symlink_to("/dev/full")
        saved(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", fill)
    with pytest.raises(OSError, match="No space left") as error:
        train(small_plan(), tmp_path, checkpoint_steps=1)
    assert error.value.errno == errno.ENOSPC
    assert steps == [1, 2, 3]
    assert last(tmp_path)["global_step"] == 2
    assert [p.name for p in tmp_path.glob(".*")] == [".lock"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:-10], r"152 samples in train \(it had 160\), 19 samples in val \(it had 20\)"),
        (lambda x: x + 1e-3, "other values or labels in train, other values or labels in val, other values or labels in test"),
        (lambda x: x[:, :4], r"shape \[4\] \(it had \[6\]\)"),
        (lambda x: (x > 0).astype(np.uint8).reshape(-1, 2, 3), r"levels 256 \(it had None\), shape \[1, 2, 3\]"),
    ],
)
def test_resuming_refuses_other_data(tmp_path, change, message):
    values, file, out = normal(200, 6), tmp_path / "x.npy", tmp_path / "run"
    train(vectors_plan(file, values), out)
    before = (out / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match=f"run cannot resume: npy:.* has changed: {message}"):
        train(vectors_plan(file, change(values), epochs=2), out, resume=True)
    assert (out / "last.ckpt").read_bytes() == before
    train(vectors_plan(file, values, epochs=2), out, resume=True)
    assert last(out)["epoch"] == 1


def test_older_checkpoints_resume(finished, tmp_path):
    """They say no more of the data than levels and classes."""
    copied(finished[0], tmp_path, lambda c: c.update(data={key: c["data"][key] for key in ("levels", "classes")}))
    train(training.resumed_plan(tmp_path, {"epochs": 5}), tmp_path, resume=True)
    assert last(tmp_path)["epoch"] == 4


@pytest.mark.parametrize("epochs", [4, 5])
def test_the_best_weights_are_missed(finished, tmp_path, epochs):
    """By a run that had ended and by one that goes on, before it does."""
    (tmp_path / "last.ckpt").write_bytes((finished[0] / "last.ckpt").read_bytes())
    plan = training.resumed_plan(tmp_path, {"epochs": epochs})
    missing = r"cannot resume: best.ckpt, the weights of its lowest validation NLL, [0-9.]+ nats, is missing"
    with pytest.raises(ValueError, match=missing):
        train(plan, tmp_path, resume=True)
    (tmp_path / "best.ckpt").write_bytes((finished[0] / "best.ckpt").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"best.ckpt: not a checkpoint: the file is truncated"):
        train(plan, tmp_path, resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("entry", ["plan", "data", "callbacks", "loops", "optimizer_states", "lr_schedulers"])
def test_only_checkpoints_of_runs_are_resumed(finished, tmp_path, entry):
    copied(finished[0], tmp_path, lambda content: content.pop(entry))
    assert_not_resumed(tmp_path, f"last.ckpt is not the checkpoint of a training run: {entry} missing")


def assert_not_resumed(out: Path, message: str) -> None:
    for resume in (lambda: train(small_plan(epochs=4), out, resume=True), lambda: training.resumed_plan(out, {})):
        with pytest.raises(ValueError, match=message):
            resume()


@pytest.mark.parametrize("plan", [{"epochs": "many"}, {"models": 3}, {"lr": math.nan}, {"config": [1]}])
def test_plans_of_checkpoints_are_checked(finished, tmp_path, plan):
    copied(finished[0], tmp_path, lambda content: content["plan"].update(plan))
    with pytest.raises(ValueError, match=f"not the checkpoint of a training run: plan: .*{next(iter(plan))}"):
        training.resumed_plan(tmp_path, {})


def test_models_of_runs_are_no_larger_than_their_weights(finished, tmp_path):
    copied(finished[0], tmp_path, lambda content: content["plan"]["config"].update(couplings=10**9))
    with pytest.raises(ValueError, match="makes a model much larger than"):
        train(training.resumed_plan(tmp_path, {}), tmp_path, resume=True)


HOLD = """
import contextlib, pathlib, sys
from flowkern.training._processes import alone_in
with contextlib.ExitStack() as held:
    for folder in sys.argv[1:]:
        held.enter_context(alone_in(pathlib.Path(folder)))
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("fcntl") is None, reason="has no such locks")
def test_one_run_at_a_time_in_a_folder(finished, tmp_path):
    """The other one is killed at last, and leaves nothing that holds."""
    plan = small_plan(epochs=4)
    runs = {tmp_path / "run": {}, tmp_path / "over": {"overwrite": True}, tmp_path / "resumed": {"resume": True}}
    for out in list(runs)[1:]:
        shutil.copytree(finished[0], out)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, *runs], **pipes)
    try:
        assert holder.stdout.readline() == "held\n"
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        for out, options in runs.items():
            with pytest.raises(ValueError, match=f"{out}: another run, process {holder.pid}, is writing there"):
                train(plan, out, **options)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    finally:
        holder.kill()
        holder.communicate()
    for out, options in runs.items():
        assert train(plan, out, **options) is not None


@pytest.mark.parametrize("name", ["devices", "workers"])
def test_no_more_processes_than_cores(tmp_path, monkeypatch, name):
    """Nothing is started: neither a process nor the run."""
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    cores = len(os.sched_getaffinity(0))
    for count in (cores + 1, 99, 10**20):
        with pytest.raises(ValueError, match=f"{name}: expected at most {cores}, the number of CPU cores.* got {count}"):
            train(small_plan(), tmp_path / "run", **{name: count})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"GIF89a" + raw])
def test_damaged_checkpoints_are_refused(finished, tmp_path, damage):
    (tmp_path / "last.ckpt").write_bytes(damage((finished[0] / "last.ckpt").read_bytes()))
    assert_not_resumed(tmp_path, "last.ckpt: not a checkpoint: ")


# ---------------------------------------------------------------------------------------------------------------------
# Going wrong


def test_loss_that_is_not_finite(tmp_path, monkeypatch):
    nll = FlowTask._nll
    monkeypatch.setattr(FlowTask, "_nll", lambda self, batch: nll(self, batch) / (0.0 if self.global_step == 5 else 1.0))
    with pytest.raises(training.Diverged, match=r"not finite at step 5 \(epoch 1\). Try a lower learning rate \(--lr\)"):
        train(small_plan(), tmp_path, checkpoint_steps=1)
    content = last(tmp_path)
    assert content["global_step"] == 5
    assert all(v.isfinite().all() for v in content["state_dict"].values() if v.is_floating_point())


def test_what_a_loss_that_is_not_finite_comes_from(tmp_path, monkeypatch):
    def spoil(task: FlowTask, _: int) -> None:
        if task.global_step == 3:
            with torch.no_grad():
                task.model.get_submodule(layer).matrix.weight[2].zero_()

    before_each_step(monkeypatch, spoil)
    layer = "bijection.bijections.1.levels.0.bijections.1.bijections.0.linear"
    message = rf"not finite at step 3 \(epoch 0\). InvertibleConv1x1 '{layer}': the weight is singular: .* Try a lower"
    with pytest.raises(training.Diverged, match=message):
        train(glow_plan(config={"parametrization": "full"}), tmp_path)


def test_diagnosis_names_parameters():
    model = models.Glow((1, 8, 8), **GLOW)
    assert diagnosis(model) == ""
    name, parameter = list(model.named_parameters())[-1]
    parameter.data.fill_(math.nan)
    assert diagnosis(model) == f"NaN or infinity in 1 parameters, the first: {name}. "


def test_training_refuses_nan_and_names_the_batch(tmp_path, monkeypatch):
    plan = vectors_plan(tmp_path / "x.npy", normal(40, 2), batch_size=8)
    loaded = data.load(plan.data)
    loaded.train.values[3, 0] = np.inf
    monkeypatch.setattr("flowkern.training._run.load", lambda *a, **k: loaded)
    batch, row = noise.order(0, 0, 32).tolist().index(3) // 8, loaded.train.origins[3]
    with pytest.raises(ValueError, match=f"x.npy: NaN or infinity in 1 of 8 samples of train batch {batch}, epoch 0: row {row}$"):
        train(plan, tmp_path / "run")


def test_validation_that_is_not_finite(tmp_path, monkeypatch):
    nll = FlowTask._nll
    monkeypatch.setattr(FlowTask, "_nll", lambda self, batch: nll(self, batch) / (1.0 if self.trainer.training else 0.0))
    with pytest.raises(training.Diverged, match="validation NLL is inf after epoch 0"):
        train(small_plan(), tmp_path)
    assert not (tmp_path / "last.ckpt").exists()


def test_plans_are_checked():
    for given, message in (
        ({"lr": 0.0}, "lr: expected more than 0"),
        ({"lr": float("nan")}, "lr: expected more than 0"),
        ({"weight_decay": math.inf}, "weight_decay: expected a finite number"),
        ({"epochs": "3"}, "epochs: expected int, got '3'"),
        ({"conditional": 1}, "conditional: expected bool, got 1"),
        ({"ema": 1.0}, "ema: expected a decay below 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"accumulate": 9, "batch_size": 8}, r"accumulate: expected at most batch_size \(8\), got 9"),
        ({"seed": -1}, "seed: expected at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            training.make_plan("realnvp", "digits", **given)


def test_presets_build_their_models():
    for model, source, preset in training.PRESETS:
        if source != "*":
            plan = training.make_plan(model, source, preset=preset)
            values = data.load(source)
            assert plan.build(values).shape == values.shape


def test_models_are_checked(tmp_path):
    out, plain = tmp_path / "run", vectors_plan(tmp_path / "x.npy", np.zeros((30, 2)))
    labelled = dataclasses.replace(plain, conditional=True)
    no_images = r"channels_last: expected images \(C, H, W\), and .* has \(2,\)"
    assert_refused(
        (lambda: training.make_plan("x", "digits"), f"unknown name 'x'; expected one of {', '.join(models.MODELS)}"),
        (lambda: train(small_plan(config={"hidden": "wide"}), out), r"setting 'hidden': expected int \| None, got 'wide'"),
        (lambda: train(glow_plan(config={"classes": 7}), out), "glow: the model is for 7 classes, and digits has 10"),
        (lambda: train(glow_plan(batch_size=1), out), "the initialization needs a batch of at least 2 samples, got 1"),
        (lambda: train(labelled, out), "has no labels"),
        (lambda: train(plain, out, channels_last=True), no_images),
    )


ERRORS = [TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError, RuntimeError, StopIteration]


@pytest.mark.parametrize("error", ERRORS)
def test_settings_that_a_constructor_cannot_take(monkeypatch, error):
    monkeypatch.setattr(models, "build", mock.Mock(side_effect=error("of another kind")))
    with pytest.raises(ValueError, match=r"realnvp: .*of another kind"):
        small_plan().build(data.load("digits"))


@pytest.mark.parametrize("method", ["objective", "log_prob"])
def test_a_loop_that_ends_in_a_step_does_not_end_the_epoch(tmp_path, monkeypatch, method):
    """Lightning takes a StopIteration for the end of the batches: in training (objective) and in validation."""

    monkeypatch.setattr(models.RealNVP, method, lambda *_: next(iter(())))
    if method == "log_prob":
        monkeypatch.setattr(models.RealNVP, "objective", lambda self, x, context: self.bijection(x, context)[1])
    with pytest.raises(RuntimeError, match="StopIteration in RealNVP"):
        train(small_plan(), tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


class _Uniform(models.Model):
    """The uniform density on [0, 1)^64, or NaN for some samples."""

    shape, context, bad = (1, 8, 8), None, 0

    def log_prob(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        values = torch.zeros(len(x))
        values[: self.bad] = math.nan
        return values


def test_score_of_the_uniform_density():
    score = training.evaluate(_Uniform(), data.load("digits"), draws=2)  # type: ignore[arg-type]
    assert math.isclose(score.nats, 64 * math.log(17), rel_tol=1e-12)
    assert math.isclose(score.bits_per_dim, math.log2(17), rel_tol=1e-12)
    assert score.nats_error == 0.0
    assert (score.samples, score.draws) == (447, 2)


def test_score_refuses_nan():
    model, digits, photos = _Uniform(), data.load("digits"), data.load("photos")
    model.bad = 3
    assert_refused(
        (lambda: training.evaluate(model, digits, draws=1), "of 6 of 447 samples is not a number"),
        (lambda: training.evaluate(model, photos), r"shape \(1, 8, 8\), and photos has \(3, 32, 32\)"),
        (lambda: training.evaluate(model, digits, draws=0), "draws: expected at least 1"),
    )


class _Seen(models.DiscreteModel):
    """Keeps the values that it is asked for."""

    shape, context, levels = (3, 4, 4), None, 256

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def log_mass(self, v: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        self.seen.append(v)
        return torch.zeros(len(v), dtype=self.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_discrete_models_read_the_right_values_in_any_precision(dtype):
    images = _data_of(_images(20, 3, 4, 4))
    model = _Seen().to(dtype)
    training.evaluate(model, images, batch_size=20)
    assert (model.seen[0].numpy() == images.test.values).all()
    batch = _gallery._test_images(model, images, np.arange(20), "cpu")
    assert (model.values(batch.x).numpy() == images.test.values).all()


def test_discrete_models_in_half_precision(tmp_path):
    """What a model of 256 levels gives, scores and pictures."""
    images = _data_of(_images(20, 1, 8, 8))
    for name, settings in (("made", {"hidden": [8]}), ("pixelcnn", {"hidden": 4, "layers": 2}), ("vae", {"hidden": [8]})):
        torch.manual_seed(0)
        model = models.build(name, {"shape": [1, 8, 8], "levels": 256, **settings})
        expected = training.evaluate(model, images, batch_size=20).nats
        # bfloat16 has 3 digits. VAE: other noise.
        assert math.isclose(training.evaluate(model.bfloat16(), images, batch_size=20).nats, expected, rel_tol=0.02), name


def test_traversals_move_the_latents_that_the_decoder_sees(tmp_path, monkeypatch):
    """Those of the lower of two layers, also where the upper one varies more."""
    torch.manual_seed(0)
    model = models.VAE((1, 8, 8), levels=17, latent=3, upper=4, hidden=[8])
    with torch.no_grad():
        for p in model.posterior.network.parameters():
            p.mul_(20.0)
    moved, traverse = [], diagnostics.traverse
    monkeypatch.setattr(diagnostics, "traverse", lambda z, i: (moved.append(i), traverse(z, i))[1])
    _gallery.save_gallery(model, data.load("digits"), tmp_path, seed=0)
    assert sorted(moved) == [0, 1, 2]


def test_score_and_its_error_by_hand(finished):
    out, _, _ = finished
    model, digits = models.load(out / "best.ckpt"), data.load("digits")
    one, two = (training.evaluate(model, digits, "val", draws=d, batch_size=b) for d, b in ((1, 350), (2, 33)))
    batches = (data.batch_of(digits, "val", np.arange(350), seed=2**63, epoch=e) for e in (0, 1))
    nll = [64 * math.log(17) - model.log_prob(batch.x).detach().double() for batch in batches]
    for score, values in ((one, nll[0]), (two, (nll[0] + nll[1]) / 2)):
        # Float32 log-densities of about 1e2, summed in another order.
        assert math.isclose(score.nats, values.mean(), rel_tol=1e-5)
        assert math.isclose(score.nats_error, values.std() / math.sqrt(350), rel_tol=1e-4)
        assert math.isclose(score.bits_per_dim, score.nats / 64 / math.log(2), rel_tol=1e-12)


def _images(n: int, height: int, width: int, channels: int, levels: int = 256) -> Any:
    return np.random.default_rng(0).integers(0, levels, (n, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_codecs_give_back_the_pixels_and_count_their_payload(channels):
    import io
    import zlib

    from PIL import Image

    image = _images(1, 9, 7, channels)[0]
    png, webp = (_codecs.encode(image, codec) for codec in ("PNG", "WebP lossless"))
    for file in (png, webp):
        with Image.open(io.BytesIO(file)) as decoded:
            pixels = np.asarray(decoded.convert("L" if channels == 1 else "RGB"))
            assert (pixels.reshape(image.shape) == image).all()
    # Signature 8, IHDR 25, IEND 12 and 12 around the one IDAT; RIFF's header 12 and VP8L's 8, the content padded to be even.
    assert _codecs.payload(png) == len(png) - 57
    assert len(webp) - 20 - _codecs.payload(webp) in (0, 1)
    start = png.index(b"IDAT") + 4
    assert len(zlib.decompress(png[start : start + _codecs.payload(png)])) == 9 * (1 + 7 * channels), "rows and their filters"


def test_codecs_notice_a_loss(monkeypatch):
    monkeypatch.setitem(_codecs.CODECS, "JPEG", {"format": "jpeg"})
    with pytest.raises(RuntimeError, match="JPEG did not give back the pixels"):
        _codecs.encode(_images(1, 8, 8, 3)[0], "JPEG")


@pytest.mark.parametrize("shape", [(1, 4, 4, 3), (13, 4, 6, 1), (104, 5, 3, 3), (600, 200, 200, 1)])
def test_mosaics_hold_each_image_once(shape):
    images = _images(*shape)
    pictures = _codecs.mosaics(images)
    assert max(max(p.shape[:2]) for p in pictures) <= 4096
    assert len(pictures) <= 4
    corners = ((p, y, x) for p in pictures for y in range(0, p.shape[0], shape[1]) for x in range(0, p.shape[1], shape[2]))
    tiles = [picture[y : y + shape[1], x : x + shape[2]] for picture, y, x in corners]
    assert len(tiles) == len(images)
    assert all((tile == image).all() for tile, image in zip(tiles, images, strict=True))


def _data_of(values: Any, **split: Any) -> data.Dataset:
    part = data.Split(values, **split)
    return data.Dataset("made up", 256, part, part, part, ())


def test_codec_table():
    """Noise takes 8 bits a value and nothing can be saved; half of these images are black, and overlap with others."""
    values = np.concatenate([_images(4, 3, 32, 32), np.zeros((4, 3, 32, 32), np.uint8)])
    nll = np.arange(8.0) * 3 * 32 * 32 * math.log(2)
    table = training.codec_table(nll, _data_of(values, distinct=np.arange(4)), "test", "flow")
    assert table is not None
    lines = [line.rsplit(maxsplit=2) for line in table.splitlines()[1:]]
    assert [name.strip() for name in table.splitlines()[0].split("  ")[-2:]] == ["8 images", "4 that share no pixel"]
    assert lines[0] == ["flow", "3.500", "1.500"]
    figures = {name.strip(): (float(a.replace("-", "nan")), float(b)) for name, a, b in lines}
    for codec in ("PNG", "WebP lossless"):
        whole, noise = figures[f"{codec}, a file for each image"]
        assert 8.0 < noise < 8.5
        assert 4.0 < whole < 4.5
    assert math.isnan(figures["all of them in 1 file"][0])
    # Of WebP, whose rows come last.
    for name in ("all of them in 1 file", "its compressed pixels, no headers"):
        assert 8.0 < figures[name][1] < figures["WebP lossless, a file for each image"][1]


def test_codec_table_of_other_data(tmp_path):
    distinct = training.codec_table(np.ones(2), _data_of(_images(2, 1, 8, 8)), "val", "flow")
    assert distinct is not None
    assert distinct.splitlines()[0].split() == ["bits/dim,", "val", "split", "of", "made", "up", "2", "images"]
    assert training.codec_table(np.ones(2), _data_of(_images(2, 2, 8, 8)), "val", "flow") is None, "no format has two channels"
    np.save(tmp_path / "x.npy", np.zeros((30, 2)))
    assert training.codec_table(np.ones(3), data.load(f"npy:{tmp_path / 'x.npy'}"), "val", "flow") is None


@pytest.fixture(scope="module")
def conditional() -> models.FlowModel:
    torch.manual_seed(0)
    scale = {"kind": "tanh", "a": 0.1, "b": 0.0}
    model = models.RealNVP((1, 8, 8), couplings=1, hidden=8, depth=1, zero_init=False, scale=scale, context=10)
    return model.double().eval()


def test_reconstructions_are_the_images(conditional):
    batch = data.batch_of(data.load("digits"), "test", np.arange(6), seed=0, epoch=0)
    x, context = batch.x.double(), training.context_of(conditional, batch.labels)
    torch.testing.assert_close(_gallery.reconstruct(conditional, x, context), x, rtol=1e-10, atol=1e-10)


def test_pairs_share_their_label():
    labels = data.load("digits").test.labels
    pairs = _gallery.pairs(labels, 8)
    assert pairs.shape == (8, 2)
    assert (labels[pairs[:, 0]] == labels[pairs[:, 1]]).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len(set(labels[pairs[:, 0]])) == 8
    assert len(np.unique(_gallery.pairs(np.zeros(16), 8))) == 16, "no image comes twice"
    assert _gallery.pairs(np.zeros(1), 2).tolist() == [[0, 0], [0, 0]]


def test_gallery(conditional, tmp_path):
    """The pictures show what the model gives: the same noise at three temperatures, images over their reconstructions."""
    from PIL import Image

    digits = data.load("digits")
    lines = _gallery.save_gallery(conditional, digits, tmp_path, seed=3)
    samples = ["samples-0.6.png", "samples-0.8.png", "samples.png"]
    assert [line.rpartition("/")[2] for line in lines] == [*samples, "interpolations.png", "reconstructions.png"]
    assert "largest error" in lines[-1]
    context = training.context_of(conditional, torch.arange(64) % 10)
    for temperature, name in zip(_gallery.TEMPERATURES, samples, strict=True):
        torch.manual_seed(3)
        images = training.to_pixels(conditional.sample(64, context, temperature), 17)
        assert (_tiles(tmp_path / name) == images[..., 0]).all()
    tiles = _tiles(tmp_path / "reconstructions.png").reshape(4, 2, 8, 8, 8)
    real = np.round(digits.test.values[np.arange(32) * 447 // 32, 0] * (255.0 / 16)).astype(np.uint8).reshape(4, 8, 8, 8)
    assert (tiles[:, 0] == real).all()
    assert (tiles[:, 1] == real).all(), "in float64 no pixel changes"
    with Image.open(tmp_path / "interpolations.png") as picture:
        assert picture.size == (584, 584)


def _tiles(path: Path) -> Any:
    """The 8 x 8 images of a grid, each pixel eight times as large and one pixel between them."""
    from PIL import Image

    with Image.open(path) as picture:
        grid = np.asarray(picture)[::8, ::8]
    return np.stack([grid[1 + 9 * i : 9 + 9 * i, 1 + 9 * j : 9 + 9 * j] for i in range(8) for j in range(8)])


def test_curve_has_both_scales(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from flowkern.training._pictures import draw_curve

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (drawn.append(figure), Path(path).touch()))
    draw_curve({"train_nll": [(0.0, 100.0), (1.0, 60.0)], "val_nll": [(0.0, 90.0), (1.0, 70.0)]}, tmp_path / "c.png", "title", 64)
    axes = drawn[0].axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[100.0, 60.0], [90.0, 70.0]]
    right = axes.child_axes[0]
    drawn[0].draw_without_rendering()
    assert (axes.get_ylabel(), right.get_ylabel()) == ("negative log-likelihood [nats]", "bits/dim")
    assert list(right.get_ylim()) == pytest.approx([v / 64 / math.log(2) for v in axes.get_ylim()])


def test_pixels():
    v = torch.arange(17.0).view(1, 1, 1, 17)
    pixels = training.to_pixels((v + 0.5) / 17, 17)
    assert pixels.shape == (1, 1, 17, 1)
    assert (pixels[0, 0, 0, 0], pixels[0, 0, 16, 0]) == (0, 255)
    assert (np.diff(pixels.ravel().astype(int)) > 0).all()
    outside = torch.tensor([-3.0, 2.0, math.nan, math.inf]).view(1, 1, 1, 4)
    assert training.to_pixels(outside, 256).ravel().tolist() == [0, 255, 0, 255]


def test_failed_pictures_leave_the_old_one(tmp_path):
    def write() -> None:
        with training.atomic(tmp_path / "x.png") as temporary:
            temporary.write_text("half")
            raise RuntimeError("in mid-write")

    (tmp_path / "x.png").write_text("old")
    with pytest.raises(RuntimeError, match="in mid-write"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_text() == "old"


def test_comparison_restores_the_model_and_prints_a_table(finished):
    out, _, _ = finished
    table = training.compare(str(out / "best.ckpt"), "digits", rounds=1, seconds=0.01)
    assert [line.split("  ")[1].strip() for line in table.splitlines()[1:3]] == ["fused kernels", "plain torch"]
    assert "times as fast" in table
    with pytest.raises(ValueError, match=r"is for samples of shape \(1, 8, 8\)"):
        training.compare(str(out / "best.ckpt"), "photos")
