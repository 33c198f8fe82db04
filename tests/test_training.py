"""Training runs: what they write, that they resume bit for bit, and that they fail in a clean way."""

from __future__ import annotations

import copy
import errno
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("PIL")
pytest.importorskip("sklearn")
if importlib.util.find_spec("lightning") is None:
    pytest.skip("lightning is not installed", allow_module_level=True)

from flowkern import data, models, training  # noqa: E402

#: A small flow, also as the command line takes it.
SMALL = {"flatten": True, "couplings": 2, "hidden": 8, "dropout": 0.0}
SET = [f"--set={name}={json.dumps(value)}" for name, value in SMALL.items()]


def small_plan(**given: Any) -> training.Plan:
    config = {**SMALL, **given.pop("config", {})}
    fields = {"epochs": 2, "batch_size": 250, "lr": 1e-2, "warmup": 3, "ema": 0.9, "clip": 50.0, **given}
    return training.make_plan("realnvp", "digits", config=config, **fields)


def last(out: Path) -> dict[str, Any]:
    return models.read_checkpoint(out / "last.ckpt")


def assert_same_state(a: Any, b: Any, where: str = "") -> None:
    """Nested dicts and lists with bitwise equal tensors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


TRAINED = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "epoch", "global_step")


def assert_same_run(a: Path, b: Path) -> None:
    """Equal weights, averages, optimizer and place in the run, bit for bit; and equal best weights."""
    one, other = last(a), last(b)
    for name in TRAINED:
        assert_same_state(one[name], other[name], name)
    assert_same_state(
        models.read_checkpoint(a / "best.ckpt")["state_dict"], models.read_checkpoint(b / "best.ckpt")["state_dict"]
    )


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
    assert sorted(p.name for p in out.iterdir()) == ["best.ckpt", "curve.png", "last.ckpt", "log", "result.json", "samples.png"]
    result = json.loads((out / "result.json").read_text())
    assert result["test"]["nats"] == score.nats
    assert training.Plan(**result["plan"]) == plan
    # 64 tiles of 8 x 8 with one pixel between them, eight times as large.
    with Image.open(out / "samples.png") as picture:
        assert (picture.mode, picture.size) == ("L", (584, 584))
        assert len(np.unique(np.asarray(picture))) > 10
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
    assert content["data"] == {"levels": 17, "classes": [str(i) for i in range(10)]}
    assert training.Plan(**content["plan"]) == plan
    model = models.build("realnvp", content["model"]["config"])
    model.load_state_dict(content["state_dict"])


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


def test_run_without_average_clipping_or_patience(tmp_path):
    plan = small_plan(ema=0.0, clip=0.0, patience=0, warmup=0, optimizer="adamax", epochs=1)
    training.train(plan, tmp_path, draws=1)
    assert "current_model_state" not in last(tmp_path)
    models.load(tmp_path / "last.ckpt")


def test_half_precision_run(tmp_path):
    score = training.train(small_plan(epochs=1, optimizer="adamw", weight_decay=0.1), tmp_path, draws=1, precision="bf16-mixed")
    assert score is not None
    assert math.isfinite(score.nats)
    assert {v.dtype for v in last(tmp_path)["state_dict"].values()} == {torch.float32}


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
    with pytest.raises(ValueError, match="for 10 classes, and photos"):
        training.evaluate(_reshaped(model), data.load("photos"), draws=1)


def _reshaped(model: models.FlowModel) -> models.FlowModel:
    model.shape = (3, 32, 32)
    return model


def test_continuous_data(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32))
    plan = training.make_plan("nice", f"npy:{tmp_path / 'x.npy'}", config={"couplings": 2, "hidden": 8}, epochs=2)
    score = training.train(plan, tmp_path / "run")
    # The entropy of N(0, I) in 6 dimensions is 8.51 nats; the mean over 20 samples has a standard error of 0.39.
    assert score is not None
    assert score.draws == 1
    assert abs(score.nats - 3 * math.log(2 * math.pi * math.e)) < 2.0
    assert not (tmp_path / "run" / "samples.png").exists()
    training.save_samples(tmp_path / "run" / "best.ckpt", tmp_path / "s.npy", 7)
    assert np.load(tmp_path / "s.npy").shape == (7, 6)
    with pytest.raises(ValueError, match="make no picture"):
        training.save_samples(tmp_path / "run" / "best.ckpt", tmp_path / "s.png", 7)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and resuming


def test_patience_ends_a_run_for_good(tmp_path):
    plan = small_plan(lr=1e-30, ema=0.0, patience=2, epochs=50)
    training.train(plan, tmp_path, draws=1)
    assert last(tmp_path)["epoch"] == 2, "the first epoch is the best, two more do not improve"
    training.train(training.resumed_plan(tmp_path, {}), tmp_path, resume=True, draws=1)
    assert last(tmp_path)["epoch"] == 2


def test_time_limit(tmp_path):
    training.train(small_plan(epochs=10_000), tmp_path, draws=1, max_minutes=0.02)
    assert last(tmp_path)["epoch"] < 9_999
    assert (tmp_path / "result.json").exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [3, 4, 6, 7])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch, step):
    """Killed in the middle (step 3, 6), at the last batch (7) and at the first of an epoch (4), with dropout."""
    from flowkern.training._task import FlowTask

    plan = small_plan(epochs=3, config={"dropout": 0.3})
    reference = tmp_path.parent / "uninterrupted"
    if not reference.exists():
        training.train(plan, reference, draws=1, checkpoint_steps=2)
    training_step = FlowTask.training_step

    def fail(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            raise Killed
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(FlowTask, "training_step", fail)
    out = tmp_path / "run"
    with pytest.raises(Killed):
        training.train(plan, out, draws=1, checkpoint_steps=2)
    monkeypatch.undo()
    assert last(out)["global_step"] == step - step % 2, "it did not stop where it should"
    moved = out.rename(tmp_path / "moved")
    training.train(training.resumed_plan(moved, {}), moved, resume=True, draws=1, checkpoint_steps=2)
    assert_same_run(moved, reference)
    log = training.read_log(moved / "log")
    for name, points in training.read_log(reference / "log").items():
        assert log[name] == points, name


def test_more_epochs(tmp_path):
    for name in ("a", "b"):
        training.train(small_plan(epochs=2 if name == "a" else 4), tmp_path / name, draws=1)
    training.train(training.resumed_plan(tmp_path / "a", {"epochs": 4}), tmp_path / "a", resume=True, draws=1)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert [epoch for epoch, _ in training.read_log(tmp_path / "a" / "log")["val_nll"]] == [0, 1, 2, 3]


def test_resuming_refuses_another_plan(finished):
    out, plan, _ = finished
    assert training.resumed_plan(out, {"lr": plan.lr, "config": {"hidden": 8}, "epochs": 9}) == small_plan(epochs=9)
    with pytest.raises(ValueError, match=r"cannot resume with lr 0.5 \(the run has 0.01\), config {'hidden': 9}"):
        training.resumed_plan(out, {"lr": 0.5, "config": {"hidden": 9}})


def test_a_run_is_not_overwritten_by_accident(finished):
    out, plan, _ = finished
    with pytest.raises(ValueError, match="holds a run already"):
        training.train(plan, out)


CLI = [sys.executable, "-W", "ignore", "-m", "flowkern.cli"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Several threads may share a matrix product differently from run to run, which changes its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.mark.slow
def test_kill_in_mid_write(tmp_path):
    """A process killed while it writes last.ckpt leaves the one before, from which the run ends as if nothing had been."""
    plan = training.make_plan("realnvp", "digits", config={**SMALL, "hidden": 512}, epochs=2, batch_size=125, ema=0.9)
    arguments = [*SET, "--set=hidden=512", "--epochs=2", "--batch-size=125", "--ema=0.9"]
    out = tmp_path / "killed"
    command = [*CLI, "train", "realnvp", "--data=digits", f"--out={out}", *arguments, "--checkpoint-steps=1"]
    process = subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL)
    try:
        _stop_in_mid_write(process, out)
        process.kill()
        process.wait()
    finally:
        process.kill()
    assert list(out.glob(".last.ckpt.*.tmp")), "the process was not writing"
    step = last(out)["global_step"]
    assert 1 <= step < 16
    assert training.resumed_plan(out, {}) == plan
    training.train(plan, out, resume=True, draws=1)
    training.train(plan, tmp_path / "whole", draws=1)
    assert_same_run(out, tmp_path / "whole")
    assert not list(out.glob(".last.ckpt.*.tmp"))


def _stop_in_mid_write(process: subprocess.Popen, out: Path) -> None:
    """Stop the process while it writes a later last.ckpt than the first."""
    while process.poll() is None:
        if (out / "last.ckpt").exists() and list(out.glob(".last.ckpt.*.tmp")):
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            if list(out.glob(".last.ckpt.*.tmp")):
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    pytest.fail(f"the run ended with {process.returncode} before it was stopped")


@pytest.mark.parametrize(("sent", "code", "saved"), [(signal.SIGTERM, 143, 6), (signal.SIGINT, 1, 4)])
def test_ended_from_outside(tmp_path, monkeypatch, capsys, sent, code, saved):
    """Neither looks like success, and both say how to go on. SIGTERM lets the step end that it came in."""
    from flowkern.training._task import FlowTask

    training_step = FlowTask.training_step

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 5:
            os.kill(os.getpid(), sent)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(FlowTask, "training_step", step)
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    try:
        with pytest.raises(SystemExit) as end:
            training.train(small_plan(), tmp_path, checkpoint_steps=2)
    finally:
        for s, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(s, handler)
    assert end.value.code == code
    assert "--resume continues from" in capsys.readouterr().out
    assert last(tmp_path)["global_step"] == saved


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path, monkeypatch):
    from flowkern.training._task import AtomicCheckpointIO

    saved, steps = AtomicCheckpointIO.save_checkpoint, []

    def fill(self: Any, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        steps.append(checkpoint["global_step"])
        if checkpoint["global_step"] == 3:
            # What is written beside the checkpoint now ends where no space is left.
            (tmp_path / f".last.ckpt.{os.getpid()}.tmp").symlink_to("/dev/full")
        saved(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", fill)
    with pytest.raises(OSError, match="No space left") as error:
        training.train(small_plan(), tmp_path, draws=1, checkpoint_steps=1)
    assert error.value.errno == errno.ENOSPC
    assert steps == [1, 2, 3]
    assert last(tmp_path)["global_step"] == 2
    assert [p.name for p in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"GIF89a" + raw])
def test_damaged_checkpoints_are_refused(finished, tmp_path, damage):
    out, plan, _ = finished
    (tmp_path / "last.ckpt").write_bytes(damage((out / "last.ckpt").read_bytes()))
    with pytest.raises(ValueError, match=r"last.ckpt: not a checkpoint: "):
        training.train(plan, tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"last.ckpt: not a checkpoint: "):
        training.resumed_plan(tmp_path, {})


# ---------------------------------------------------------------------------------------------------------------------
# Going wrong


def test_loss_that_is_not_finite(tmp_path, monkeypatch):
    from flowkern.training._task import FlowTask

    nll = FlowTask._nll
    monkeypatch.setattr(FlowTask, "_nll", lambda self, batch: nll(self, batch) / (0.0 if self.global_step == 5 else 1.0))
    with pytest.raises(training.Diverged, match=r"not finite at step 5 \(epoch 1\). Try a lower learning rate \(--lr\)"):
        training.train(small_plan(), tmp_path, checkpoint_steps=1)
    content = last(tmp_path)
    assert content["global_step"] == 5
    assert all(v.isfinite().all() for v in content["state_dict"].values() if v.is_floating_point())


def test_validation_that_is_not_finite(tmp_path, monkeypatch):
    from flowkern.training._task import FlowTask

    nll = FlowTask._nll
    monkeypatch.setattr(FlowTask, "_nll", lambda self, batch: nll(self, batch) / (1.0 if self.trainer.training else 0.0))
    with pytest.raises(training.Diverged, match="validation NLL is inf after epoch 0"):
        training.train(small_plan(), tmp_path)
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: unknown name 'sgd'"),
        ({"lr": 0.0}, "lr: expected more than 0"),
        ({"lr": float("nan")}, "lr: expected more than 0"),
        ({"ema": 1.0}, "ema: expected a decay below 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"preset": "x"}, "has no 'x'; expected one of default, demo, recipe"),
        ({"config": {"foo": 1}}, "realnvp has no setting 'foo'; expected one of couplings, hidden"),
    ],
)
def test_plans_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        training.make_plan("realnvp", "digits", **given)


def test_models_are_checked(tmp_path):
    with pytest.raises(ValueError, match="unknown name 'x'; expected one of nice, realnvp"):
        training.make_plan("x", "digits")
    with pytest.raises(ValueError, match="a setting has the wrong type"):
        training.train(small_plan(config={"hidden": "wide"}), tmp_path)
    np.save(tmp_path / "x.npy", np.zeros((30, 2)))
    with pytest.raises(ValueError, match="has no labels"):
        training.train(training.make_plan("nice", f"npy:{tmp_path / 'x.npy'}", conditional=True), tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


class _Uniform(torch.nn.Module):
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
    model = _Uniform()
    model.bad = 3
    with pytest.raises(ValueError, match="of 6 of 447 samples is not a number"):
        training.evaluate(model, data.load("digits"), draws=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), and photos has \(3, 32, 32\)"):
        training.evaluate(model, data.load("photos"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="draws: expected at least 1"):
        training.evaluate(model, data.load("digits"), draws=0)  # type: ignore[arg-type]


def test_score_and_its_error_by_hand(finished):
    out, _, _ = finished
    model, digits = models.load(out / "best.ckpt"), data.load("digits")
    one, two = (training.evaluate(model, digits, "val", draws=d, batch_size=b) for d, b in ((1, 350), (2, 33)))
    nll = [
        64 * math.log(17) - model.log_prob(data.batch_of(digits, "val", np.arange(350), seed=2**63, epoch=e).x).detach().double()
        for e in (0, 1)
    ]
    for score, values in ((one, nll[0]), (two, (nll[0] + nll[1]) / 2)):
        # Float32 log-densities of about 1e2, summed in another order.
        assert math.isclose(score.nats, values.mean(), rel_tol=1e-5)
        assert math.isclose(score.nats_error, values.std() / math.sqrt(350), rel_tol=1e-4)
        assert math.isclose(score.bits_per_dim, score.nats / 64 / math.log(2), rel_tol=1e-12)


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


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks


@pytest.mark.slow
def test_two_ranks_train_the_same_model(tmp_path):
    """In float64 the two sums of a batch, over one rank and over two, differ by rounding alone: 1e-16, times 8 Adam steps.

    The slices are of unequal size: 166 and 165 of 331 samples, 4 and 3 of the last 7. Adam divides a gradient by its own size and
    so keeps its relative error, which cancellation in a batch's sum may raise to 1e-12: far under the tolerance of 1e-9.
    """
    fields = {"epochs": 2, "batch_size": 331, "config": SMALL, "ema": 0.9}
    arguments = [*SET, "--epochs=2", "--batch-size=331", "--ema=0.9"]
    ranks = [
        "--devices=2",
        "--strategy=ddp",
        "--accelerator=cpu",
        "--precision=64-true",
        "--draws=1",
        f"--out={tmp_path / 'two'}",
    ]
    command = [*CLI, "train", "realnvp", "--data=digits", *arguments, *ranks]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test NLL") == 1, "only the first rank reports"
    plan = training.make_plan("realnvp", "digits", **fields)
    training.train(plan, tmp_path / "one", draws=1, precision="64-true")
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    assert one["global_step"] == two["global_step"] == 8
    for name, value in one["state_dict"].items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-9, atol=1e-9)
    logs = [training.read_log(tmp_path / name / "log") for name in ("one", "two")]
    for name in ("train_nll", "val_nll"):
        assert [v for _, v in logs[0][name]] == pytest.approx([v for _, v in logs[1][name]], rel=1e-6)
