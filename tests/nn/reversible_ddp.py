"""Two processes train a reversible and a storing stack under DDP: ``python tests/nn/reversible_ddp.py FOLDER``.

Each process writes the gradients that it holds after a step, of both stacks. Not collected by pytest: processes are started
by a script, which test_reversible.py runs. Annotations are not postponed: DDP reads those of the communication hook.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from flowkern import nn, ops

WORLD, STEPS, BATCH, FEATURES = 2, 12, 8, 6


def stack(memory: str) -> nn.Flow:
    torch.manual_seed(0)
    couplings = (
        nn.AffineCoupling(
            nn.MLP(3, 6, (16,), zero_init=False), split=("channel", "channel_swap")[i % 2], scale=ops.ScaleMap.tanh(0.5)
        )
        for i in range(STEPS)
    )
    return nn.Flow(nn.Compose(*couplings, memory=memory), nn.DiagonalNormal(FEATURES))


def data() -> torch.Tensor:
    return torch.randn(2, WORLD * BATCH, FEATURES, generator=torch.Generator().manual_seed(1))


def gradients(flow: torch.nn.Module, share: slice | None = None) -> dict[str, Any]:
    """Of two batches, the first accumulated without synchronization."""
    batches = data() if share is None else data()[:, share]
    if isinstance(flow, DistributedDataParallel):
        with flow.no_sync():
            (-flow(batches[0]).mean()).backward()
    else:
        (-flow(batches[0]).mean()).backward()
    (-flow(batches[1]).mean()).backward()
    return {name.removeprefix("module."): p.grad for name, p in flow.named_parameters()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    share, found = slice(rank * BATCH, (rank + 1) * BATCH), {}
    for memory in ("store", "reversible"):
        # Buckets of 1 kB: several, so that the first is reduced while later segments still compute.
        flow = DistributedDataParallel(copy.deepcopy(stack(memory)), bucket_cap_mb=0.001)
        ready, seen = [], []
        for p in flow.parameters():
            p.register_post_accumulate_grad_hook(lambda p, ready=ready: ready.append(p.shape))

        def reduced(state: Any, bucket: dist.GradBucket, ready=ready, seen=seen) -> torch.futures.Future[torch.Tensor]:
            seen.append((len(ready), len(bucket.parameters())))
            return allreduce_hook(None, bucket)

        flow.register_comm_hook(None, reduced)
        (-flow(data()[0, share]).mean()).backward()  # DDP forms its buckets after its first backward
        flow.zero_grad()
        ready.clear()
        seen.clear()
        found[memory] = gradients(flow, share)
        found[f"{memory}-buckets"] = seen
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(work, args=(sys.argv[1],), nprocs=WORLD, start_method="spawn")
