"""A few calls of every op, forward and backward, to be watched by ``compute-sanitizer``.

``python -m flowkern.bench.smoke [--device cuda] [--every N]`` says when the device has answered, and what it did in the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from flowkern import OPS, ops
from flowkern.ops import _autoregressive_inverse

from .gpu_check import FINISHED, STARTED

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run every N-th sample of every op."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.smoke", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th sample")
    arguments = parser.parse_args(argv)
    assert torch.ones(3, device=arguments.device).sum().item() == 3
    print(STARTED, flush=True)
    calls = 0
    for op in OPS.values():
        for sample in list(op.samples(arguments.device, torch.float32))[:: arguments.every]:
            inputs = [a.detach().requires_grad_() for a in sample.args]
            outputs = [y for y in op.function(*inputs, **sample.kwargs) if y.requires_grad]
            torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs], allow_unused=True)
            calls += 1
    for sample in list(_autoregressive_inverse._samples(arguments.device, torch.float32))[:: arguments.every]:
        z = sample.args[0].detach().requires_grad_()
        x, logabsdet = ops.autoregressive_inverse(z, *sample.args[1:], **sample.kwargs)
        torch.autograd.grad(x.sum() + logabsdet.sum(), z)
        calls += 1
    calls += likelihoods(arguments.device)
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    print(f"{FINISHED} ({calls})", flush=True)


def likelihoods(device: str) -> int:
    """The likelihood ops, which are not in the table of ops; how many calls that were."""
    x, params = torch.randint(256, (2, 3, 5, 7), device=device), torch.randn(2, 20, 5, 7, device=device)
    mean, log_scale = torch.randn(2, 2, 100, device=device)
    with torch.no_grad():
        ops.discretized_logistic_mixture(x, params)
    for compat in (None, "pixelcnn++"):
        leaf = params.clone().requires_grad_()
        ops.discretized_logistic_mixture(x, leaf, compat=compat).sum().backward()
    for used in (slice(0, 2), slice(0, 1), slice(1, 2)):
        leaves = mean.clone().requires_grad_(), log_scale.clone().requires_grad_()
        sum(y.sum() for y in ops.gaussian_kl(*leaves)[used]).backward()
    for alpha, dtype in ((None, torch.float32), (None, torch.bfloat16), (0.05, torch.float32)):
        ops.dequantize(x, alpha=alpha, dtype=dtype)
    return 9


if __name__ == "__main__":
    main()
