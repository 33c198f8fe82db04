"""Two processes build a model on meta, shard it, give it memory and load it: ``python tests/nn/meta_fsdp.py FOLDER``.

Each process writes the log-densities of the sharded model. Not collected by pytest: processes are started by a script, which
test_meta.py runs.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flowkern import models

WORLD = 2

#: The kinds whose tables are in no state_dict, and which initialize themselves from data.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "maf": ("maf", {"shape": 6, "hidden": [16, 12], "layers": 3, "permutation": "random", "batch_norm": True}),
    "glow": ("glow", {"shape": (1, 8, 8), "levels": 2, "steps": 2, "hidden": 8}),
    "made": ("made", {"shape": (1, 2, 3), "hidden": [8, 8], "masks": 2, "levels": 4}),
}


def data(name: str) -> torch.Tensor:
    shape = models.build(*MODELS[name]).shape
    return torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    mesh, found = init_device_mesh("cpu", (WORLD,)), {}
    for name, (kind, config) in MODELS.items():
        with torch.device("meta"):
            model = models.build(kind, config)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        state = torch.load(Path(folder, f"{name}.pt"))
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
        with torch.no_grad():
            found[name] = model.eval()(data(name))
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(work, args=(sys.argv[1],), nprocs=WORLD, start_method="spawn")
