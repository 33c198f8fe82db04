"""Masked networks on every backend: the inverse of an autoregressive layer and masked linear layers.

"dense" is plain torch code with weights that are masked beforehand: of the inverse one density pass, of a layer its product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from flowkern import OPS, nn, ops
from flowkern._core import backend

from ..comparison import Comparison, Options, running
from ..timing import Call
from .autoregressive import case_of, dense, differs

__all__ = ["comparisons"]

#: (features, hidden widths, batch) of the inverse; (batch, inputs, outputs) of a layer.
INVERSES = ((3072, (512, 512), 100), (64, (256, 256), 100))
LAYERS = ((64, 784, 1024), (4096, 1024, 1024), (1, 3072, 512))
QUICK_INVERSES, QUICK_LAYERS = ((12, (16, 16), 5),), ((3, 8, 12),)


def comparisons(options: Options) -> Iterator[Comparison]:
    """Those of the inverses and of the layers."""
    for features, hidden, batch in QUICK_INVERSES if options.quick else INVERSES:
        case = f"inverse-{case_of(features, hidden, batch)}"
        if options.wants(case):
            yield inverse(case, features, hidden, batch, options.device)
    for size in QUICK_LAYERS if options.quick else LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            case = f"layer-{'x'.join(map(str, size))}-{str(dtype).removeprefix('torch.')}"
            if options.wants(case):
                yield from layer(case, *size, dtype, options.device)


def serving(op: str, x: torch.Tensor) -> list[str]:
    """The backends that can serve an op on this tensor's device."""
    implementations = OPS[op].kernels[0].implementations
    return [name for name in implementations if not backend.reasons(name, implementations, [x])]


@torch.no_grad()
def inverse(case: str, features: int, hidden: tuple[int, ...], batch: int, device: str) -> Comparison:
    """The inverse on every backend beside the dense density pass."""
    torch.manual_seed(0)
    layer = nn.MaskedAutoregressive(features, hidden).to(device)
    x = torch.randn(batch, features, device=device)
    density = dense(layer)
    z, logabsdet = density(x)
    variants = {name: running(name, layer.inverse) for name in serving("autoregressive_inverse", z)}
    failures = {name: differs(inverse(z), (x, -logabsdet)) for name, inverse in variants.items()}
    calls: dict[str, Call] = {"dense": partial(density, x), **{name: partial(inverse, z) for name, inverse in variants.items()}}
    calls = {name: torch.no_grad()(call) for name, call in calls.items()}
    return Comparison(case, "inverse", calls, "dense", failures=failures, seconds=0.5)


def layer(case: str, batch: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> Iterator[Comparison]:
    """A masked layer, forward and with its gradients, on every backend beside the product with masked weights."""
    torch.manual_seed(0)
    mask = ops.DegreeMask(*(torch.arange(n, device=device) * min(inputs, outputs) // n for n in (outputs, inputs)))
    leaves = [torch.randn(shape, device=device) / inputs**0.5 for shape in ((batch, inputs), (outputs, inputs), (outputs,))]
    x, weight, bias = (t.to(dtype).requires_grad_() for t in leaves)
    masked = (weight * mask.dense()).detach().requires_grad_()
    g = torch.randn(batch, outputs, device=device).to(dtype)

    names = serving("masked_linear", x)
    forward: dict[str, Call] = {name: partial(running(name, ops.masked_linear), x, weight, bias, mask) for name in names}
    forward = {"dense": partial(F.linear, x, masked, bias), **forward}

    def with_gradients(name: str) -> tuple[torch.Tensor, ...]:
        y = forward[name]()
        return y, *torch.autograd.grad(y, (x, masked if name == "dense" else weight, bias), g)

    both: dict[str, Call] = {name: partial(with_gradients, name) for name in forward}
    expected = both["dense"]()
    exact = (*expected[:2], expected[2] * mask.dense(), expected[3])
    allowed = 64 * torch.finfo(dtype).eps
    failures = {
        name: "" if all(_error(a, b) <= allowed for a, b in zip(both[name](), exact, strict=True)) else "differs"
        for name in names
    }
    for direction, calls in (("forward", forward), ("forward+backward", both)):
        yield Comparison(case, direction, calls, "dense", failures=failures, seconds=0.5)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, as a share of the largest value."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())
