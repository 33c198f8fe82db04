"""``train``: one run, from a plan to pictures and a test score."""

import contextlib
import dataclasses
import json
import logging
import math
import signal
import sys
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from .. import models
from ..data import Dataset, load
from ..nn.densities.base import check_sizes
from ._evaluate import Score, evaluate, suited
from ._gallery import save_gallery
from ._pictures import atomic, draw_curve, read_log
from ._plan import Plan, read_run
from ._processes import alone_in, check_processes, end_with_launcher, launching
from ._task import AtomicCheckpointIO, Checkpoints, ExponentialAverage, FlowData, FlowTask, Progress, Termination

# Weights in half precision, which Lightning also offers, would round the data to fewer levels than it has.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")


def run(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    max_minutes: float | None = None,
    precision: str = "32-true",
    devices: str | int = 1,
    nodes: int = 1,
    strategy: str = "auto",
    accelerator: str = "auto",
    channels_last: bool = False,
    workers: int = 0,
    checkpoint_steps: int | None = None,
    draws: int = 20,
) -> Score | None:
    """See ``flowkern.training.train``."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: unknown name {precision!r}; expected one of {', '.join(PRECISIONS)}")
    check_sizes(nodes=nodes, draws=draws, checkpoint_steps=checkpoint_steps or None)
    check_sizes(0, workers=workers)
    check_minutes(max_minutes)
    check_processes(accelerator, devices, workers)
    end_with_launcher()
    first_rank = not getattr(rank_zero_only, "rank", 0)
    last, start = out / "last.ckpt", _start(out, resume, overwrite or not first_rank)
    before = None if start is None else read_run(start)
    data = load(plan.data, size=plan.size, report=None if first_rank else lambda line: None)
    if min(len(data.train), len(data.val), len(data.test)) < 2:
        sizes = f"{len(data.train)}, {len(data.val)}, {len(data.test)}"
        raise ValueError(f"{data.name}: expected 2 samples in each split, and so 6 in all, got {sizes}")
    if channels_last and len(data.shape) != 3:
        raise ValueError(f"channels_last: expected images (C, H, W), and {data.name} has {data.shape}")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(plan.seed)
    # Lightning would convert the model only after it has loaded the weights to resume from, rounded.
    # Of a checkpoint's configuration none is made that is larger than the weights in there.
    with contextlib.nullcontext() if before is None else models.Budget(before["state_dict"].values()):
        model = plan.build(data)
    model = model.to(torch.float64 if precision == "64-true" else torch.float32)
    data = suited(data, model)
    if before is not None:
        _check_start(out, before, data)
    if plan.autoencoder is not None and start is None:
        _take_autoencoder(model, plan.autoencoder, data)
    io = AtomicCheckpointIO()
    hardware = {"accelerator": accelerator, "devices": devices, "num_nodes": nodes, "strategy": strategy, "precision": precision}
    with contextlib.ExitStack() as held, warnings.catch_warnings():
        _quiet()
        trainer = _trainer(plan, out, hardware, io, _callbacks(plan, max_minutes, Checkpoints(out, io, checkpoint_steps)))
        if first_rank:
            held.enter_context(alone_in(out))
            if _start(out, resume, overwrite) != start:
                raise ValueError(f"{out}: another run has written there meanwhile")
            _prepare(out, start)
            if resume and start is None:
                print(f"{out} holds nothing to resume: starting anew")
            parameters = sum(p.numel() for p in model.parameters())
            print(f"{plan.model} ({parameters:,} parameters) on {plan.data} ({len(data.train)} training samples of {data.shape})")
        if before is None or not _out_of_patience(before, plan):
            try:
                task = FlowTask(model, plan, data, memory_format)
                with launching():
                    trainer.fit(task, datamodule=FlowData(data, plan, workers), ckpt_path=start)
            except SIGTERMException:
                # Lightning would leave with code 0, as if the run had ended.
                raise SystemExit(128 + signal.SIGTERM) from None
        if not trainer.is_global_zero:
            return None
        if not (out / "best.ckpt").exists():
            print(
                f"the time was over before the first validation: there is nothing to show yet, and --resume continues from {last}"
            )
            return None
        if max_minutes is not None and not has_ended(last, plan):
            print(f"stopped after {max_minutes:g} minutes of training; --resume goes on from {last}")
        return _finish(plan, data, out, draws, str(trainer.strategy.root_device))


def _start(out: Path, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to begin from, or None. Raises ValueError if ``out`` is no folder, or holds a run to be kept."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder")
    last = out / "last.ckpt"
    if last.exists() and not resume and not overwrite:
        raise ValueError(f"{out} holds a run already; --resume continues it, --overwrite starts anew")
    return last if resume and last.exists() else None


def _check_start(out: Path, before: Mapping[str, Any], data: Dataset) -> None:
    """Raises ValueError where the data or the best weights are not those that the run has come from.

    Checkpoints of versions that did not keep what identifies the data tell of its levels and classes alone.
    """
    if changes := data.changes(before["data"]):
        raise ValueError(f"{out} cannot resume: {data.name} has changed: {changes}")
    best = before["callbacks"].get("Checkpoints", {}).get("best", math.inf)
    if best == math.inf:
        return
    if not (out / "best.ckpt").exists():
        raise ValueError(f"{out} cannot resume: best.ckpt, the weights of its lowest validation NLL, {best:.2f} nats, is missing")
    models.read_checkpoint(out / "best.ckpt")


def check_minutes(max_minutes: float | None) -> None:
    """Raises ValueError unless it is a time, or None for no limit."""
    if max_minutes is not None and not max_minutes > 0.0:
        raise ValueError(f"max_minutes: expected more than 0, got {max_minutes:g}")


def _take_autoencoder(model: models.Model, checkpoint: str, data: Dataset) -> None:
    """Raises ValueError for an autoencoder of other images, or another one."""
    content = models.read_checkpoint(checkpoint)
    config = content["model"]["config"]
    shape, levels = tuple(config["shape"]), config["levels"]
    if (shape, levels) != (data.shape, data.levels):
        came = f"{data.name} has shape {data.shape} and {data.levels} levels"
        raise ValueError(f"{checkpoint} is for images of shape {shape} and {levels} levels, and {came}")
    model.load_autoencoder(content["state_dict"])  # type: ignore[operator]


def _trainer(plan: Plan, out: Path, hardware: dict[str, Any], io: AtomicCheckpointIO, callbacks: list[Any]) -> Trainer:
    """Raises ValueError for hardware that is not there, or that cannot do what is asked for."""
    try:
        return Trainer(
            **hardware,
            max_epochs=plan.epochs,
            gradient_clip_val=plan.clip or None,
            accumulate_grad_batches=plan.accumulate,
            callbacks=callbacks,
            plugins=[io],
            logger=CSVLogger(out, name="log", flush_logs_every_n_steps=1),
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            default_root_dir=out,
        )
    except (MisconfigurationException, TypeError, ImportError) as error:
        raise ValueError(f"accelerator {hardware['accelerator']!r}, devices {hardware['devices']!r}: {error}") from error


def _prepare(out: Path, start: Path | None) -> None:
    """Remove what a killed run left half written and, for a new run, what an earlier one left."""
    old = list(out.glob(".*.tmp"))
    if start is None:
        old += [out / "last.ckpt", out / "best.ckpt", *out.glob("log/version_*/metrics.csv")]
    for path in old:
        path.unlink(missing_ok=True)


def _quiet() -> None:
    """Silence what Lightning says about matters that are settled here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The data is in memory: workers cannot make it faster.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    # An autoencoder that waits for its prior.
    warnings.filterwarnings("ignore", message=".*module.s. in eval mode.*")
    warnings.filterwarnings("ignore", message=".*Experiment logs directory .* exists and is not empty.*")


def _callbacks(plan: Plan, max_minutes: float | None, checkpoints: Checkpoints) -> list[Any]:
    callbacks: list[Any] = [Termination(), Progress(sys.stdout is not None and sys.stdout.isatty())]
    # Always there: Lightning wants the callbacks that a checkpoint knows when it resumes from it.
    minutes = math.inf if max_minutes is None else max_minutes
    limit = timedelta(minutes=minutes) if minutes <= timedelta.max / timedelta(minutes=1) else None
    callbacks.append(Timer(limit, verbose=False))
    if plan.patience:
        callbacks.append(EarlyStopping("val_nll", patience=plan.patience, check_finite=False))
    if plan.ema:
        callbacks.append(ExponentialAverage(plan.ema))
    return [*callbacks, checkpoints]


def _out_of_patience(content: Mapping[str, Any], plan: Plan) -> bool:
    states = content["callbacks"]
    return any(key.startswith("EarlyStopping") and state["wait_count"] >= plan.patience for key, state in states.items())


def has_ended(last: Path, plan: Plan) -> bool:
    """Whether the run that wrote this checkpoint had ended by itself, after all its epochs or for want of patience."""
    content = models.read_checkpoint(last)
    epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return epochs >= plan.epochs or _out_of_patience(content, plan)


def trained_minutes(last: Path) -> float:
    """How long the run that wrote this checkpoint had trained, as ``max_minutes`` counts it."""
    return models.read_checkpoint(last)["callbacks"]["Timer"]["time_elapsed"]["train"] / 60.0


def _finish(plan: Plan, data: Dataset, out: Path, draws: int, device: str) -> Score:
    """Pictures and the test score of the best checkpoint, on disk and in print."""
    model = models.load(out / "best.ckpt").to(device)
    log = read_log(out / "log")
    print(f"lowest validation NLL, {min(value for _, value in log['val_nll']):.2f} nats, in {out / 'best.ckpt'}")
    draw_curve(log, out / "curve.png", f"{plan.model} on {plan.data}", math.prod(data.shape))
    print(f"learning curve in {out / 'curve.png'}, its figures in {out / 'log'}")
    for line in save_gallery(model, data, out, seed=plan.seed, device=device):
        print(line)
    score = evaluate(model, data, "test", draws=draws, batch_size=plan.evaluation_batch, device=device)
    result = {"test": dataclasses.asdict(score), "plan": dataclasses.asdict(plan), "epochs": len(log.get("val_nll", []))}
    with atomic(out / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    print(f"test NLL: {score}")
    return score
