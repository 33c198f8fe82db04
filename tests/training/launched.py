"""A run on two processes that goes on until it is ended from outside: ``python tests/launched.py FOLDER``.

Each rank leaves a file in FOLDER, rank-N, with its process's number, as soon as it trains. Not collected by pytest: Lightning
starts the same script for the second rank, so test_ddp.py runs it.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from flowkern import training
from flowkern.training._task import FlowTask


def main(folder: Path, where: str) -> None:
    torch.set_num_threads(1)
    step = FlowTask.training_step

    def left(rank: int) -> None:
        (folder / f".rank-{rank}").write_text(str(os.getpid()))
        (folder / f".rank-{rank}").rename(folder / f"rank-{rank}")

    def watched(self: FlowTask, batch: Any, batch_idx: int) -> torch.Tensor:
        left(self.global_rank)
        return step(self, batch, batch_idx)

    FlowTask.training_step = watched  # type: ignore[method-assign]
    if where == "start" and os.environ.get("LOCAL_RANK", "0") != "0":
        # Of a rank that the first one waits for as it is ended.
        build = training.Plan.build

        def stuck(self: training.Plan, data: Any) -> Any:
            left(1)
            threading.Event().wait()
            return build(self, data)

        training.Plan.build = stuck  # type: ignore[method-assign]
    plan = training.make_plan("realnvp", "digits", config={"flatten": True, "couplings": 2, "hidden": 8}, epochs=10**6)
    training.train(plan, folder / "out", devices=2, strategy="ddp", accelerator="cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
