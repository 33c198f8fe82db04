"""The Lightning side of training: the task, its data, and its callbacks."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, WeightAveraging
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.progress import BarColumn, Progress as RichProgress, TimeElapsedColumn
from torch.utils._pytree import tree_map_only

from .. import models
from ..data import Batch, Dataset, KeyedLoader, loader
from ..models.checkpoint import content_of
from ..nn.bijections.bijection import Bijection
from ._evaluate import Diverged, context_of, negative_log_likelihood
from ._plan import Plan

_OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax}

ADVICE = (
    "Try a lower learning rate (--lr), a longer warm-up (--warmup) or gradient clipping (--clip), or look for extreme values "
    "in the data"
)


def diagnosis(model: torch.nn.Module) -> str:
    """What may have made the loss of ``model`` not finite: what its layers' ``check`` says, and parameters that hold NaN."""
    found = []
    for layer in model.modules():
        try:
            if isinstance(layer, Bijection) and hasattr(layer, "check"):
                layer.check()  # type: ignore[operator]
        except ValueError as error:
            found.append(f"{error}. ")
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        found.append(f"NaN or infinity in {len(bad)} parameters, the first: {bad[0]}. ")
    return "".join(found)


class FlowData(LightningDataModule):
    """Batches that depend on the plan alone, whatever the number of ranks and workers."""

    trainer: Trainer

    def __init__(self, data: Dataset, plan: Plan, workers: int = 0):
        super().__init__()
        self.data, self.plan, self.workers = data, plan, workers

    def _loader(self, part: str) -> KeyedLoader:
        return loader(
            self.data,
            part,
            self.plan.batch_size if part == "train" else self.plan.evaluation_batch,
            seed=self.plan.seed,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            parts=self.plan.accumulate if part == "train" else 1,
            workers=self.workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def train_dataloader(self) -> KeyedLoader:
        return self._loader("train")

    def val_dataloader(self) -> KeyedLoader:
        return self._loader("val")


class FlowTask(LightningModule):
    """The loss is the mean of the model's objective over the global batch, its NLL in nats, with the dequantization counted.

    The data, the state of the flow, its log-determinants and the loss stay in float32 under autocast; ``memory_format`` is
    that of images and of the weights of convolutions.
    """

    trainer: Trainer  # type: ignore[override]
    model: models.Model

    def __init__(
        self, model: models.Model, plan: Plan, data: Dataset, memory_format: torch.memory_format = torch.contiguous_format
    ):
        super().__init__()
        self.model, self.plan = model.to(memory_format=memory_format), plan  # type: ignore[call-overload]
        self.memory_format = memory_format
        # All that is kept of the data: Lightning's weight averaging copies the whole task.
        self.levels, self.identity = data.levels, data.identity
        # The first step whose loss was not finite, or -1. It stays on the device: reading it waits for the device.
        self._bad_step = torch.tensor(-1)
        self.loss = torch.tensor(math.nan)
        self._sum, self._count = torch.tensor(0.0), 0

    def configure_optimizers(self) -> Any:
        options: dict[str, Any] = {"lr": self.plan.lr, "weight_decay": self.plan.weight_decay}
        if self.plan.optimizer != "adamax" and self.device.type in ("cpu", "cuda"):
            # One kernel for all weights. It unscales gradients itself, and Lightning then refuses to clip them under autocast.
            options["fused"] = not isinstance(self.trainer.precision_plugin, MixedPrecision)
        optimizer = _OPTIMIZERS[self.plan.optimizer](self.model.parameters(), **options)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, self.plan.warmup)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}

    def _nll(self, batch: Batch) -> torch.Tensor:
        """(B,) nats; in training what the model has in its place."""
        x, context = self._formatted(batch.x), context_of(self.model, batch.labels)
        try:
            log_prob = -self.model.objective(x, context) if self.training else self.model(x, context)
        except StopIteration as error:
            # Lightning would take it for the end of the epoch.
            raise RuntimeError(f"StopIteration in {type(self.model).__name__}: {error}") from error
        return negative_log_likelihood(log_prob, x.shape[1:].numel(), self.levels)

    def _log(self, part: str, nll: torch.Tensor, count: int) -> None:
        mean = nll / max(1, count)
        bits = mean / (math.prod(self.model.shape) * math.log(2.0))
        values = {f"{part}_nll": mean, f"{part}_bits_per_dim": bits}
        self.log_dict(values, batch_size=count, on_step=False, on_epoch=True, sync_dist=True)

    def on_train_start(self) -> None:
        self._bad_step, self._sum = self._bad_step.to(self.device), self._sum.to(self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # What is random inside the model depends on the step and the part alone, so that a resumed run repeats it.
        part = batch_idx % self.plan.accumulate
        key = np.random.SeedSequence([self.plan.seed, self.global_step, self.global_rank, part])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
        # Warm-ups inside the model count steps, not parts.
        self.model.steps = self.global_step

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        nll = self._nll(batch)
        # Gradients are averaged over ranks and parts, but their slices of the batch may differ in size.
        loss = nll.sum() * (self.trainer.world_size * self.plan.accumulate / batch.total)
        finite = loss.detach().isfinite()
        self._bad_step = torch.where(finite | (self._bad_step >= 0), self._bad_step, self.global_step)
        if loss.device.type == "cpu" or self.global_step % 50 == 0:
            self.require_finite()
        # Lightning's log takes longer than a step of a small model: one call an epoch.
        self.loss = nll.detach().mean()
        self._sum, self._count = self._sum + nll.detach().sum(), self._count + len(nll)
        return loss

    @property
    def epoch_loss(self) -> torch.Tensor:
        """The mean loss of the epoch so far, in nats."""
        return self._sum / max(1, self._count)

    def on_train_epoch_end(self) -> None:
        self._log("train", self._sum, self._count)
        self._sum, self._count = torch.zeros_like(self._sum), 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        nll = self._nll(batch)
        self._log("val", nll.sum(), len(nll))

    def require_finite(self) -> None:
        """Raise Diverged, naming the step, if a loss of this run was not finite."""
        step = int(self._bad_step)
        if step >= 0:
            found = diagnosis(self.model)
            raise Diverged(f"the loss is not finite at step {step} (epoch {self.current_epoch}). {found}{ADVICE}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the checkpoint the form of ``flowkern.models.save``, and add what the run needs to go on."""
        state = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
        checkpoint |= content_of(self.model, state)
        checkpoint |= {"data": self.identity, "plan": dataclasses.asdict(self.plan)}
        checkpoint["epoch_nll"] = [float(self._sum), self._count]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        total, self._count = checkpoint["epoch_nll"]
        self._sum = torch.tensor(total)
        checkpoint["state_dict"] = {f"model.{k}": v for k, v in checkpoint["state_dict"].items()}
        # Fused optimizers take weight and state to have the same strides, without a look.
        checkpoint["optimizer_states"] = tree_map_only(torch.Tensor, self._formatted, checkpoint["optimizer_states"])

    def _formatted(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=self.memory_format) if x.ndim == 4 else x


class ExponentialAverage(WeightAveraging):
    """Lightning's weight averaging with decay min(``decay``, (1 + t) / (10 + t)) at step t, which soon forgets the start."""

    def __init__(self, decay: float):
        # Buffers are copied: an average of integer buffers would be rounded down.
        super().__init__(use_buffers=False, multi_avg_fn=self._update)
        self.decay = decay
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Lightning converts the model to the precision of the run only after it was copied.
        if self._average_model is not None:
            trainer.precision_plugin.convert_module(self._average_model)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        self._step = step_idx or 0
        return step_idx is not None

    def _update(self, average: Any, current: Any, count: Any) -> None:
        weight = 1.0 - min(self.decay, (1.0 + self._step) / (10.0 + self._step))
        torch._foreach_lerp_(average, current, weight)


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are never half written, that can wait in memory, and that are refused if they are not whole."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, Any]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, or with ``storage_options="later"`` keep a copy for ``flush``."""
        if storage_options == "later":
            # The same dicts, lists and tuples with copies of the tensors.
            self._waiting[str(path)] = tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), checkpoint)
            return
        self._waiting.pop(str(path), None)
        models.write_atomically(checkpoint, path)

    def flush(self) -> None:
        """Write what waits."""
        while self._waiting:
            path, checkpoint = self._waiting.popitem()
            models.write_atomically(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return models.read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """``best.ckpt``, the epoch with the lowest validation NLL, and ``last.ckpt``, to resume from.

    Lightning's ModelCheckpoint records absolute paths, so that a run that was moved forgets its best score, and where
    it saves after an epoch's last batch, a resumed run leaves out that epoch's validation.

    Writing happens at the end of an epoch or, every ``steps`` steps (None: when it is due), within one. It is due after
    ``seconds``, or later if writing would take more than a twentieth of the time; till then the best state waits in memory.
    """

    def __init__(self, folder: Path, io: AtomicCheckpointIO, steps: int | None = None, seconds: float = 10.0):
        self.folder, self.io, self.steps, self.seconds = folder, io, steps, seconds
        self.best = math.inf
        self._cost = 0.0
        self._written = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def _due(self, trainer: Trainer) -> bool:
        due = time.monotonic() - self._written >= max(self.seconds, 20.0 * self._cost)
        return trainer.strategy.broadcast(due)

    def _write(self, trainer: Trainer) -> None:
        start = time.monotonic()
        self.io.flush()
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self._written = time.monotonic()
        self._cost = self._written - start

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: FlowTask, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        # After the last batch follows the validation, and then the checkpoint of the epoch. Accumulated gradients are not saved.
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # Whether the time has come takes the ranks some talk, which few steps can bear.
        due = trainer.global_step % self.steps == 0 if self.steps else trainer.global_step % 50 == 0 and self._due(trainer)
        if due:
            pl_module.require_finite()
            self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: FlowTask) -> None:  # type: ignore[override]
        pl_module.require_finite()
        score = float(trainer.callback_metrics["val_nll"])
        if not math.isfinite(score):
            raise Diverged(f"the validation NLL is {score} after epoch {trainer.current_epoch}. {ADVICE}")
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        due = ends or self.steps is not None or self._due(trainer)
        if score < self.best:
            self.best = score
            trainer.save_checkpoint(self.folder / "best.ckpt", storage_options=None if due else "later")
        if due:
            self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: FlowTask, exception: BaseException) -> None:  # type: ignore[override]
        # A full disk, where another attempt fails like the last one, looks no different from an output that nobody reads.
        with contextlib.suppress(OSError):
            self.io.flush()
        if isinstance(exception, KeyboardInterrupt | SIGTERMException) and trainer.is_global_zero:
            last = self.folder / "last.ckpt"
            then = f"--resume continues from {last}" if last.exists() else "there is no checkpoint to resume from yet"
            print(f"\ninterrupted at step {trainer.global_step}; {then}")


class Termination(Callback):
    """SIGTERM ends the run before its next batch, after the checkpoint of the last one.

    Lightning's own handler calls a collective wherever the signal comes, amid a step's collectives on one rank and between two
    steps on another: the ranks may then wait for each other half an hour. This one only notes the signal. A rank that another
    one starts hears of it from there: what waits for a rank that has left fails, and ``end_with_launcher`` ends it.
    """

    def __init__(self) -> None:
        self.received = False

    def _note(self, *signal_and_frame: Any) -> None:
        self.received = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)  # till Lightning puts back what was there before

    def _require_none(self) -> None:
        if self.received:
            raise SIGTERMException

    def on_train_batch_start(self, *args: Any) -> None:
        self._require_none()

    def on_validation_batch_start(self, *args: Any) -> None:
        self._require_none()


class Progress(Callback):
    """One bar over all epochs, with the loss of the last step; lines of text where the output is not a terminal."""

    def __init__(self, terminal: bool, seconds: float = 10.0):
        self.terminal, self.seconds = terminal, seconds
        self._shown = -math.inf
        self._val = ""

    def _text(self, loss: torch.Tensor, task: FlowTask) -> str:
        bits = float(loss) / (math.prod(task.model.shape) * math.log(2.0))
        return f"loss {float(loss):.2f} nats, {bits:.3f} bits/dim{self._val}"

    def on_train_start(self, trainer: Trainer, pl_module: FlowTask) -> None:  # type: ignore[override]
        columns = "epoch {task.fields[epoch]}", BarColumn(16), TimeElapsedColumn(), "{task.fields[text]}"
        self._bar = RichProgress(*columns, disable=not (self.terminal and trainer.is_global_zero))
        total = (trainer.max_epochs or 0) * int(trainer.num_training_batches) // trainer.accumulate_grad_batches
        self._id = self._bar.add_task("", total=total, completed=trainer.global_step, epoch="", text="")
        self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: FlowTask, *args: Any) -> None:  # type: ignore[override]
        # Reading the loss waits for the device.
        if self.terminal and time.monotonic() - self._shown >= 0.2:
            self._shown = time.monotonic()
            epoch, text = f"{trainer.current_epoch + 1}/{trainer.max_epochs}", self._text(pl_module.loss, pl_module)
            self._bar.update(self._id, completed=trainer.global_step, epoch=epoch, text=text)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: FlowTask) -> None:  # type: ignore[override]
        self._val = f", val {float(trainer.callback_metrics['val_nll']):.2f}"
        if not self.terminal and trainer.is_global_zero and time.monotonic() - self._shown >= self.seconds:
            self._shown = time.monotonic()
            text = self._text(pl_module.epoch_loss, pl_module)
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, step {trainer.global_step}: {text}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: FlowTask) -> None:  # type: ignore[override]
        self._bar.update(self._id, completed=trainer.global_step, text=self._text(pl_module.loss, pl_module))
        self._bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: FlowTask, exception: BaseException) -> None:  # type: ignore[override]
        if hasattr(self, "_bar"):
            self._bar.stop()
