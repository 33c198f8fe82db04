"""Masked networks on a GPU: the inverse of an autoregressive layer and masked linear layers, checked and timed.

``python -m flowkern.bench.subjects.networks [--device cuda] [--quick]`` prints each figure as a line of JSON. "dense" is plain
torch code with weights that are masked beforehand: of the inverse one density pass, of a layer its product.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import flowkern
from flowkern import OPS, nn, ops
from flowkern._core import backend

from ..timing import cpu_samples
from .autoregressive import dense, differs, running
from .calls import Call

__all__ = ["main"]

#: (features, hidden widths, batch) of the inverse; (batch, inputs, outputs) of a layer.
INVERSES = ((3072, (512, 512), 100), (64, (256, 256), 100))
LAYERS = ((64, 784, 1024), (4096, 1024, 1024), (1, 3072, 512))
QUICK_INVERSES, QUICK_LAYERS = ((12, (16, 16), 5),), ((3, 8, 12),)


def serving(op: str, x: torch.Tensor) -> list[str]:
    """The backends that can serve an op on this tensor's device."""
    implementations = OPS[op].kernels[0].implementations
    return [name for name in implementations if not backend.reasons(name, implementations, [x])]


def median_ms(call: Call, device: str) -> float:
    """Of a call on a GPU, its cache cleared before each; or on a CPU."""
    if device != "cuda":
        return 1000 * statistics.median(cpu_samples({"": call}, 0.05)[""])
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")


@torch.no_grad()
def inverse_rows(features: int, hidden: tuple[int, ...], batch: int, device: str) -> Iterator[dict[str, Any]]:
    """The inverse on every backend beside the dense density pass."""
    torch.manual_seed(0)
    layer = nn.MaskedAutoregressive(features, hidden).to(device)
    x = torch.randn(batch, features, device=device)
    density = dense(layer)
    z, logabsdet = density(x)
    variants = {name: running(name, layer.inverse) for name in serving("autoregressive_inverse", z)}
    failures = {name: differs(inverse(z), (x, -logabsdet)) for name, inverse in variants.items()}
    calls: dict[str, Call] = {"dense": lambda: density(x)}
    calls |= {name: lambda inverse=inverse: inverse(z) for name, inverse in variants.items()}  # type: ignore[misc]
    case = f"{features}-{'x'.join(map(str, hidden))}-batch{batch}"
    yield from rows("autoregressive_inverse", case, "forward", calls, failures, device)


def layer_rows(batch: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    """A masked layer, forward and with its gradients, on every backend beside the product with masked weights."""
    torch.manual_seed(0)
    top = min(inputs, outputs)
    degrees = [torch.arange(n, device=device) * top // n for n in (outputs, inputs)]
    mask = ops.DegreeMask(*degrees)
    leaves = [torch.randn(shape, device=device) / inputs**0.5 for shape in ((batch, inputs), (outputs, inputs), (outputs,))]
    x, weight, bias = (t.to(dtype).requires_grad_() for t in leaves)
    masked = (weight * mask.dense()).detach().requires_grad_()
    g = torch.randn(batch, outputs, device=device).to(dtype)

    def forward(name: str) -> torch.Tensor:
        if name == "dense":
            return F.linear(x, masked, bias)
        with flowkern.backend(name):
            return ops.masked_linear(x, weight, bias, mask)

    def both(name: str) -> tuple[torch.Tensor, ...]:
        y = forward(name)
        return y, *torch.autograd.grad(y, (x, masked if name == "dense" else weight, bias), g)

    names = serving("masked_linear", x)
    expected = both("dense")
    exact = (*expected[:2], expected[2] * mask.dense(), expected[3])
    allowed = 64 * torch.finfo(dtype).eps
    failures = {
        name: "" if all(_error(a, b) <= allowed for a, b in zip(both(name), exact, strict=True)) else "differs" for name in names
    }
    case = f"{batch}x{inputs}x{outputs}-{str(dtype).removeprefix('torch.')}"
    for direction, function in (("forward", forward), ("forward+backward", both)):
        calls = {name: lambda function=function, name=name: function(name) for name in ("dense", *names)}
        yield from rows("masked_linear", case, direction, calls, failures, device)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, as a share of the largest value."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def rows(
    op: str, case: str, direction: str, calls: Mapping[str, Call], failures: Mapping[str, str], device: str
) -> Iterator[dict[str, Any]]:
    """The median time of every call; where the result was wrong, what was wrong in its stead."""
    for name, call in calls.items():
        failure = failures.get(name, "")
        row = {"op": op, "case": case, "direction": direction, "variant": name, "failure": failure}
        yield row if failure else row | {"median_ms": median_ms(call, device)}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.networks", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it works")
    arguments = parser.parse_args(argv)
    device: str = arguments.device
    for inverse in QUICK_INVERSES if arguments.quick else INVERSES:
        for row in inverse_rows(*inverse, device):
            print(json.dumps(row), flush=True)
    for layer in QUICK_LAYERS if arguments.quick else LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            for row in layer_rows(*layer, dtype, device):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
