"""Every op with a DTensor at each of its arguments, and sharded models called past FSDP's hooks, on two processes.

Each call gives the right values, or torch's own error that names what is missing: no memory is read that is not there.
"""

from __future__ import annotations

import json
import sys
import warnings

import torch
import torch.distributed as dist
from comparison import call_of, leaves, outputs_of, places, samples
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from flowkern import OPS, models
from flowkern._core.op import Op, Sample

WORLD = 2

#: What torch says where a DTensor meets an op that it cannot shard, or a plain tensor.
SAYS = ("DTensor", "sharding strategy", "Sharding propagation", "dispatch")


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def check_refusal(error: Exception, where: str) -> None:
    """Raises unless the error says that it is about a DTensor."""
    if not any(word in str(error) for word in SAYS):
        raise AssertionError(where) from error


def call_with(op: Op, sample: Sample, place: int, placement: Replicate | Shard, mesh: object) -> str:
    """``"values"`` or ``"refused"``."""
    expected = outputs_of(op.function, call_of(sample))
    flat, spec = tree_flatten(call_of(sample))
    flat[place] = distribute_tensor(flat[place].detach(), mesh, [placement]).requires_grad_(flat[place].requires_grad)
    try:
        outputs = outputs_of(op.function, tree_unflatten(flat, spec))
        recorded = [y for y in outputs if y.requires_grad]
        if recorded:
            torch.autograd.grad(recorded, leaves(flat), [torch.ones_like(y) for y in recorded], allow_unused=True)
    except (RuntimeError, NotImplementedError, AssertionError, ValueError, TypeError) as error:
        check_refusal(error, f"{op.name} {sample.name} at {place}")
        return "refused"
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(whole(a), b)
    return "values"


def check_ops(mesh: object) -> dict[str, int]:
    counts = {"values": 0, "refused": 0}
    for op in OPS.values():
        for sample in list(samples(op, limit=300))[:4]:
            for place in places(sample):
                dims = tree_leaves((sample.args, sample.kwargs))[place].ndim
                for placement in (Replicate(), *([Shard(0)] if dims else [])):
                    counts[call_with(op, sample, place, placement, mesh)] += 1
    return counts


def check_models(mesh: object) -> None:
    """``log_prob`` of a sharded model gathers nothing: what it computes must not be garbage."""
    for name, settings, x in (
        ("maf", {"shape": 6, "layers": 2, "hidden": (8, 8)}, torch.randn(4, 6)),
        ("iaf", {"shape": 6, "layers": 2, "hidden": (8, 8)}, torch.randn(4, 6)),
        ("realnvp", {"shape": 6, "couplings": 2, "hidden": 8}, torch.randn(4, 6)),
        ("glow", {"shape": (3, 4, 4), "levels": 1, "steps": 2, "hidden": 8}, torch.rand(4, 3, 4, 4)),
    ):
        torch.manual_seed(0)
        model = models.build(name, settings)
        expected = model(x).detach()  # which initializes what waits for data
        fully_shard(model, mesh=mesh)
        try:
            actual = model.log_prob(x)
        except (RuntimeError, NotImplementedError, AssertionError, ValueError, TypeError) as error:
            check_refusal(error, name)
        else:
            torch.testing.assert_close(whole(actual), expected)
        torch.testing.assert_close(model(x), expected)


def worker(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")  # torch replicates tensors of one element, and says so at each
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    counts = check_ops(mesh)
    check_models(mesh)
    if rank == 0:
        print(json.dumps(counts))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, (sys.argv[1],), WORLD)
