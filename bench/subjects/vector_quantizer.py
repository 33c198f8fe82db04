"""A training step of a vector quantizer with moving averages beside vector-quantize-pytorch's.

A step is the forward in training mode, which moves the codebook, and the gradient of the input for a fixed gradient of the
output and for the commitment loss. Both start from one codebook; the peer's rotation trick, which it has on by default, and
its smoothing are switched off, and indices, losses, gradients and codebooks after several steps are compared before anything
is timed. "gemm" is the product of all inputs with all codes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from flowkern import nn
from flowkern._core import backend

from ..comparison import FLOWKERN, Comparison, Options, Tensors, peer, peers_of, running
from ..timing import Call

__all__ = ["DEVICES", "comparisons"]

DEVICES = ("cpu",)
#: (rows, codes, features).
SIZES = ((4096, 8192, 256), (4096, 8192, 64), (16384, 1024, 64))
QUICK = ((96, 64, 16),)
PEER = "vector-quantize-pytorch"
DECAY, COMMITMENT, COMPARED_STEPS = 0.99, 0.25, 3

Step = Callable[[torch.Tensor], Tensors]
Variant = tuple[Step, Callable[[], torch.Tensor]]


def comparisons(options: Options) -> Iterator[Comparison]:
    """One of each size."""
    for size in QUICK if options.quick else SIZES:
        subjects = Subjects(*size)
        if options.wants(subjects.case):
            variants = subjects.variants()
            failures = differences(subjects, variants)
            calls: dict[str, Call] = {name: partial(step, subjects.x) for name, (step, _) in variants.items()}
            calls = {"gemm": partial(torch.mm, subjects.x, subjects.codebook.t()), **calls}
            against = PEER if PEER in calls else "gemm"
            yield Comparison(subjects.case, "training step", calls, against, failures=failures)


class Subjects:
    """Quantizers of one size that start from one codebook."""

    def __init__(self, rows: int, codes: int, features: int):
        torch.manual_seed(0)
        self.case = f"{rows}x{features}-codes{codes}"
        self.x, self.gradient = torch.randn(rows, features), torch.randn(rows, features)
        self.codebook = torch.randn(codes, features)

    def ours(self, name: str) -> Variant:
        """(a step, the codebook as it is)."""
        made = nn.VectorQuantizer(self.x.shape[1], len(self.codebook), decay=DECAY, commitment=COMMITMENT, init="uniform")
        for state in (made.codebook, made.sums):
            state.copy_(self.codebook)
        return self.step(running(name, made)), lambda: made.codebook[0]

    @peer("vector_quantizer", PEER)
    def by_peer(self) -> Variant:
        """As ``ours``. Without smoothing its codes are the quotients of its averages too."""
        from vector_quantize_pytorch import VectorQuantize

        how = {"decay": DECAY, "commitment_weight": COMMITMENT, "eps": 0.0, "rotation_trick": False}
        made: Any = VectorQuantize(self.x.shape[1], len(self.codebook), **how)
        own = made._codebook
        for state in (own.embed, own.embed_avg):
            state.data.copy_(self.codebook[None])
        own.cluster_size.fill_(1.0)
        return self.step(lambda x: made(x[None])), lambda: own.embed[0]

    def step(self, forward: Step) -> Step:
        def run(x: torch.Tensor) -> Tensors:
            x = x.detach().requires_grad_()
            quantized, index, loss = forward(x)
            (gradient,) = torch.autograd.grad((quantized, loss), x, (self.gradient.view_as(quantized), torch.ones_like(loss)))
            return index.flatten(), loss.detach(), gradient

        return run

    def variants(self) -> dict[str, Variant]:
        found = {f"{FLOWKERN}-torch": self.ours("torch")}
        if backend.native is not None:
            found[f"{FLOWKERN}-cpp"] = self.ours("cpp")
        return found | {name: make(self) for name, make in peers_of("vector_quantizer").items()}


def differences(subjects: Subjects, variants: dict[str, Variant]) -> dict[str, str]:
    """What each variant has otherwise than the first, after several steps on other batches. Its empty string is a pass.

    The peer takes the nearest code by distances that are rounded: a code as near as the nearest one is no difference.
    """
    failures = dict.fromkeys(variants, "")
    for number in range(COMPARED_STEPS):
        x = subjects.x.roll(number, 0) + 0.1 * number
        before = {name: codebook().clone() for name, (_, codebook) in variants.items()}
        results = {name: step(x) for name, (step, _) in variants.items()}
        first = next(iter(results))
        for name, (index, loss, gradient) in results.items():
            same = index == results[first][0]
            ours, theirs = ((x - before[first][i]).square().sum(1) for i in (results[first][0], index))
            if not same.all() and not torch.allclose(theirs, ours, rtol=1e-5):
                failures[name] = f"step {number}: {int((~same).sum())} other codes, farther away"
            elif not torch.allclose(loss, results[first][1], rtol=1e-5):
                failures[name] = f"step {number}: loss {float(loss):.7g}, not {float(results[first][1]):.7g}"
            elif not torch.allclose(gradient[same], results[first][2][same], rtol=1e-4, atol=1e-6):
                failures[name] = f"step {number}: another gradient"
            moved, expected = variants[name][1](), variants[first][1]()
            touched = torch.cat([index[~same], results[first][0][~same]])
            alike = torch.ones(len(moved), dtype=torch.bool).index_fill_(0, touched, False)
            if not torch.allclose(moved[alike], expected[alike], rtol=1e-4, atol=1e-6):
                failures[name] = failures[name] or f"step {number}: another codebook"
    return failures
