"""Two processes train quantizers on their shares of batches: ``python tests/nn/quantizers_ddp.py FOLDER``.

Each process writes its codebooks after every few steps. Not collected by pytest: processes are started by a script, which
test_quantizers.py runs.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from flowkern import nn

WORLD, BATCH, DIM, CODES = 2, 24, 6, 16
#: What is trained, and for how many steps.
KINDS = {"ddp": 50, "heads": 10, "cosine": 10, "few": 10, "residual": 10}

States = list[dict[str, torch.Tensor]]


class Scale(torch.nn.Module):
    """A parameter, without which DDP has nothing to do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


def quantizer(kind: str) -> torch.nn.Module:
    """Of codes that die and are revived; ``few``: with more codes than there are rows."""
    torch.manual_seed(0)
    how = {"decay": 0.7, "revive_below": 0.6}
    if kind == "residual":
        return nn.ResidualVectorQuantizer(DIM, CODES, 2, **how)
    heads, codes = 1 + (kind == "heads"), 4 * BATCH if kind == "few" else CODES
    return nn.VectorQuantizer(DIM, codes, heads=heads, cosine=kind == "cosine", **how)


def batch(step: int) -> torch.Tensor:
    return torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(step)) * 0.9**step + step / 10


def share(step: int, rank: int) -> slice:
    """Unequal ones; now and then a process has nothing, also at the first step."""
    cut = (0, 7, BATCH, 12)[step % 4]
    return slice(0, cut) if rank == 0 else slice(cut, BATCH)


def train(kind: str, rank: int | None = None) -> States:
    """The states over the steps, of the process with these shares of the batches (None: all)."""
    made = quantizer(kind)
    run, states = made, []
    if kind == "ddp":
        made = torch.nn.Sequential(Scale(), made)
        run = made if rank is None else DistributedDataParallel(made)
    for step in range(KINDS[kind]):
        x = batch(step) if rank is None else batch(step)[share(step, rank)]
        _, _, loss = run(x)
        if kind == "ddp":
            loss.backward()
        if step % 7 == 0 or step == KINDS[kind] - 1:
            states.append({name: value.clone() for name, value in made.state_dict().items()})
    return states


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.save({kind: train(kind, rank) for kind in KINDS}, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(work, args=(sys.argv[1],), nprocs=WORLD, start_method="spawn")
