"""One run of the trainer, on one rank or several: ``python tests/training/training_ddp.py FOLDER REQUEST``, REQUEST in JSON.

The request has the run's ``plan`` and ``options``, and in ``then`` plans of runs that follow, by name. Each rank leaves in
FOLDER its process's number, rank-N, as soon as it trains, and what it saw: its losses, its weights after the first step and at
the end, what it printed and, as a process of its own, which files it wrote. With ``poison``, [step, rank], its loss is NaN
there; with ``terminate``, rank 0 has SIGTERM at that step, amid what the ranks do together; if ``stuck``, the first rank waits
for the second one for ever. Not collected by pytest: Lightning starts the same script
for each rank, so test_ddp.py runs it.
"""

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from flowkern import training
from flowkern.training._task import FlowTask

Record = dict[str, Any]


def leave_number(folder: Path, rank: int) -> None:
    if not (folder / f"rank-{rank}").exists():
        (folder / f".rank-{rank}").write_text(str(os.getpid()))
        (folder / f".rank-{rank}").rename(folder / f"rank-{rank}")


def watch(folder: Path) -> Record:
    """Record what the trainer does in this process from here on."""
    record: Record = {"train": [], "val": [], "written": [], "first": None}
    training_step, nll = FlowTask.training_step, FlowTask._nll

    def keep(part: str, values: torch.Tensor, total: int) -> None:
        record[part].append((float(values.detach().double().sum()), len(values), total))

    def watched_nll(self: FlowTask, batch: Any) -> torch.Tensor:
        values = nll(self, batch)
        if record.get("poison") == [self.global_step, self.global_rank]:
            values = values * torch.nan
        if record.get("terminate") == self.global_step and self.global_rank == 0:
            record["terminate"] = None
            time.sleep(0.5)  # the other rank waits for this one's gradients meanwhile
            signal.raise_signal(signal.SIGTERM)
        keep("train" if self.trainer.training else "val", values, batch.total)
        return values

    def watched_step(self: FlowTask, batch: Any, batch_idx: int) -> torch.Tensor:
        leave_number(folder, self.global_rank)
        if self.global_step == 1 and record["first"] is None:
            record["first"] = {name: value.clone() for name, value in self.model.state_dict().items()}
        return training_step(self, batch, batch_idx)

    def at_end(self: FlowTask) -> None:
        record["rank"], record["state"] = self.global_rank, {k: v.clone() for k, v in self.model.state_dict().items()}

    FlowTask._nll, FlowTask.training_step, FlowTask.on_train_end = watched_nll, watched_step, at_end  # type: ignore[method-assign]

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str) or not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if Path(arguments[0]).is_relative_to(folder / "out"):
            record["written"].append(arguments[0])

    if __name__ == "__main__":
        sys.addaudithook(audit)  # which stays until the process ends
    return record


def main(folder: Path, request: dict[str, Any]) -> None:
    record = watch(folder)
    record |= {name: request.get(name) for name in ("poison", "terminate")}
    if request.get("stuck") and os.environ.get("LOCAL_RANK", "0") != "0":
        training.Plan.build = lambda *_: (leave_number(folder, 1), threading.Event().wait())  # type: ignore[method-assign,assignment]
    for name, plan in ({"out": request["plan"]} | request.get("then", {})).items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            score = training.train(training.make_plan(**plan), folder / name, draws=1, **request["options"])
        record |= {"printed": printed.getvalue(), "score": None if score is None else score.nats}
        torch.save(record, folder / f"{'' if name == 'out' else name}rank{record['rank']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
