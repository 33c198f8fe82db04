"""A few calls of every op, forward and backward, to be watched by ``compute-sanitizer``.

``python -m flowkern.bench.smoke [--device cuda] [--every N]`` says when the device has answered, and what it did in the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_leaves

from flowkern import OPS

from .gpu_check import FINISHED, STARTED

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run every N-th sample of every op, forward, and backward where the op is differentiable."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.smoke", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th sample")
    arguments = parser.parse_args(argv)
    assert torch.ones(3, device=arguments.device).sum().item() == 3
    print(STARTED, flush=True)
    calls = 0
    for op in OPS.values():
        for sample in list(op.samples(arguments.device, torch.float32))[:: arguments.every]:
            inputs = [a for a in tree_leaves(sample.args) if isinstance(a, torch.Tensor) and a.is_floating_point()]
            for a in inputs:
                a.requires_grad_()
            recorded = [y for y in tree_leaves(op.function(*sample.args, **sample.kwargs)) if y.requires_grad]
            if recorded:
                torch.autograd.grad(recorded, inputs, [torch.ones_like(y) for y in recorded], allow_unused=True)
            calls += 1
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    print(f"{FINISHED} ({calls})", flush=True)


if __name__ == "__main__":
    main()
