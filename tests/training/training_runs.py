"""What the tests of training runs share: short runs, their ends from outside, and what two of them have in common."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("numpy", "PIL", "sklearn"):
    pytest.importorskip(package)
if importlib.util.find_spec("lightning") is None:
    pytest.skip("lightning is not installed", allow_module_level=True)

import numpy as np  # noqa: E402

from flowkern import models, training  # noqa: E402
from flowkern.training import _run  # noqa: E402
from flowkern.training._task import FlowTask  # noqa: E402


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """Runs draw none, which takes longer than the training of these tests."""
    patch.setattr(_run, "save_gallery", lambda *a, **k: [])
    patch.setattr(_run, "draw_curve", lambda *a: None)


def train(plan: training.Plan, out: Path, **options: Any) -> training.Score | None:
    """``training.train`` without the pictures, and with one draw unless told."""
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        return training.train(plan, out, **{"draws": 1, **options})


def before_each_step(patch: pytest.MonkeyPatch, act: Callable[[FlowTask, int], Any]) -> None:
    """Call ``act`` with the task and the number of the batch in its epoch before each training step."""
    step = FlowTask.training_step
    patch.setattr(FlowTask, "training_step", lambda task, batch, i: (act(task, i), step(task, batch, i))[1])


class Killed(Exception):
    """Ends a run as nothing of it expects."""


def train_until(killed: Callable[[FlowTask, int], bool], plan: training.Plan, out: Path, **options: Any) -> None:
    """Train up to the batch, of the given task and number in its epoch, before which the run is killed."""

    def kill(task: FlowTask, i: int) -> None:
        if killed(task, i):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        before_each_step(patch, kill)
        with pytest.raises(Killed):
            train(plan, out, **options)


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """The limit of a run's time counts steps."""
    from lightning.pytorch.callbacks import Timer

    def check(self: Timer, trainer: Any) -> None:
        trainer.should_stop = trainer.should_stop or (self._duration is not None and trainer.global_step >= steps)

    patch.setattr(Timer, "_check_time_remaining", check)


@contextlib.contextmanager
def signals_put_back() -> Iterator[None]:
    """What is done about SIGTERM and SIGINT is as before at the end. A shell starts background jobs with SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def vectors_plan(path: Path, values: Any, **given: Any) -> training.Plan:
    """The plan of a small NICE on vectors, which are saved there."""
    np.save(path, values)
    return training.make_plan("nice", f"npy:{path}", config={"couplings": 2, "hidden": 8}, **{"epochs": 1, **given})


def assert_refused(*cases: tuple[Callable[[], Any], str]) -> None:
    """Each call says in a ValueError what is wrong."""
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def last(out: Path) -> dict[str, Any]:
    return models.read_checkpoint(out / "last.ckpt")


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def assert_near(a: Path, b: Path, tolerance: float = 1e-9) -> None:
    """Float64 runs of a few Adam steps whose sums differ in their order alone: rounding of 1e-16.

    Adam divides a gradient by its own size and so keeps its relative error, which cancellation in a batch's sum may raise
    to 1e-12. Glow needs 1e-6: at its initialization the gradients of shifts vanish but for rounding, 1e-15, which Adam
    divides by 1e-8; that is 1e-9 of a weight in each of the first steps, and the later ones magnify it.
    """
    one, other = last(a), last(b)
    assert one["global_step"] == other["global_step"]
    assert all(value.dtype == torch.float64 for value in one["state_dict"].values() if value.is_floating_point())
    assert_same_weights(one["state_dict"], other["state_dict"], tolerance)
    logs = [training.read_log(run / "log") for run in (a, b)]
    for name in ("train_nll", "val_nll"):
        assert [v for _, v in logs[0][name]] == pytest.approx([v for _, v in logs[1][name]], rel=1e-6)
