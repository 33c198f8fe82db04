"""1x1 convolutions, a step of Glow and a whole one, beside nflows and normflows.

Every variant computes the same function: weights are copied over, and results are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from flowkern import nn

from ..comparison import FLOWKERN, Comparison, Options
from ..glows import Architecture, by_normflows, conditioner, copy_weights, differs, glow, perturbed, training_step
from ..peers import installed, peer, peers_of
from ..timing import Call

__all__ = ["DEVICES", "comparisons"]

DEVICES = ("cpu",)
#: (batch, C, H, W): the levels of Glows on images of 32, 64 and 128 pixels.
SIZES = ((32, 12, 32, 32), (32, 48, 16, 16), (32, 48, 32, 32), (32, 96, 16, 16), (32, 192, 8, 8))
#: The same of the states between two steps, from the cache's size to far beyond it.
BOUNDARIES = ((32, 12, 16, 16), (32, 24, 8, 8), (16, 12, 64, 64))
QUICK = ((2, 12, 8, 8),)
BOTH = "forward+backward"


def comparisons(options: Options) -> Iterator[Comparison]:
    """Those of the convolutions, of the boundary between two steps, and of whole models."""
    for size in QUICK if options.quick else SIZES:
        case = "1x1-" + "x".join(map(str, size))
        if options.wants(case):
            yield from one_by_one(case, size)
    for size in QUICK if options.quick else BOUNDARIES:
        case = "boundary-" + "x".join(map(str, size))
        if options.wants(case):
            yield boundary(case, size, 8 if options.quick else 128)
    architecture = Architecture(steps=2, hidden=8, side=8, batch=2) if options.quick else Architecture()
    if options.wants(architecture.name) and installed("normflows"):
        yield whole_model(architecture)


# ---------------------------------------------------------------------------------------------------------------------
# 1x1 convolutions


def layers(channels: int) -> dict[str, Any]:
    """The layers that are compared, each with a weight of its own."""
    ours = {f"{FLOWKERN}-{name}": nn.InvertibleConv1x1(channels, parametrization=name) for name in ("plu", "full")}
    return {**ours, **{name: make(channels) for name, make in peers_of("glow").items()}}


@peer("glow", "nflows")
def _nflows(channels: int) -> Any:
    from nflows.transforms.conv import OneByOneConvolution

    return OneByOneConvolution(channels, identity_init=False)


@peer("glow", "normflows")
def _normflows(channels: int) -> Any:
    from normflows.flows.mixing import Invertible1x1Conv

    return _Reversed(Invertible1x1Conv(channels, use_lu=True))


class _Reversed(torch.nn.Module):
    """A layer of normflows, whose ``forward`` runs latent to data, the way round that this library has."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer.inverse(x)

    def inverse(self, z: torch.Tensor) -> Any:
        return self.layer(z)


def wrong(layer: Any, x: torch.Tensor) -> str:
    """What is wrong with the layer: it must be linear with the log-determinant that it says, and its inverse undo it."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    with torch.no_grad():
        y, logabsdet = layer(x)
        basis = torch.eye(channels)[None, :, :, None]
        zero = layer(torch.zeros_like(basis))[0]
        weight = (layer(basis)[0] - zero)[0, :, :, 0].double()
        expected = torch.einsum("ij,bjhw->bihw", weight, x.double()) + zero[:, :, :1].double()
        exact = pixels * torch.linalg.slogdet(weight)[1]
        back = layer.inverse(y)[0]
    errors = {
        "y": (y - expected).abs().max() / expected.abs().max(),
        "logabsdet": (logabsdet.double() - exact).abs().max() / max(1.0, pixels * channels * 0.01),
        "inverse": (back - x).abs().max() / x.abs().max(),
    }
    return ", ".join(f"{name} is off by {float(error):.1e}" for name, error in errors.items() if not error < 2e-4)


def training_call(layer: Any, x: torch.Tensor, grad: torch.Tensor) -> Call:
    """Forward and backward of a layer that returns (y, logabsdet)."""
    inputs = [x.clone().requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]

    def call() -> Any:
        y, logabsdet = layer(inputs[0])
        return torch.autograd.grad((y, logabsdet.sum()), inputs, (grad, torch.ones(())))

    return call


def one_by_one(case: str, size: tuple[int, ...]) -> Iterator[Comparison]:
    """The 1x1 convolutions at one size."""
    torch.manual_seed(0)
    x, grad, weight = torch.randn(size), torch.randn(size), torch.randn(size[1], size[1], 1, 1)
    found = layers(size[1])
    failures = {name: wrong(layer, x) for name, layer in found.items()}
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    without_grad = torch.no_grad()
    bare = without_grad(lambda: F.conv2d(x, weight))

    def convolution() -> Any:
        """Of the same size, forward and backward: what has to be computed in any case."""
        return torch.autograd.grad(F.conv2d(*leaves), leaves, grad)

    directions: dict[str, tuple[Call, dict[str, Call]]] = {
        BOTH: (convolution, {name: training_call(layer, x, grad) for name, layer in found.items()}),
        "forward": (bare, {name: partial(without_grad(layer.forward), x) for name, layer in found.items()}),
        "inverse": (bare, {name: partial(without_grad(layer.inverse), x) for name, layer in found.items()}),
    }
    for direction, (conv2d, calls) in directions.items():
        yield Comparison(case, direction, {"conv2d": conv2d, **calls}, "conv2d", failures=failures)


def boundary(case: str, size: tuple[int, ...], hidden: int) -> Comparison:
    """One ``GlowStep``: whole, without its network, and what one pass over a coupling and the next linear map would save.

    Fused, the coupling's result would be neither written nor read again, nor would its gradient: two copies of the state.
    """
    torch.manual_seed(0)
    x, grad, copies = torch.randn(size), torch.randn(size), (torch.empty(size), torch.empty(size))
    step = nn.GlowStep(size[1], conditioner(size[1], hidden))
    step(x)
    linear, coupling = step.bijections[0], step.coupling
    inputs = [t.requires_grad_() for t in (x.clone(), torch.randn(size))] + [*linear.parameters()]

    def without_network() -> Any:
        y, first = linear(inputs[0])
        z, second = coupling.transformer.couple(y, inputs[1], coupling.split, inverse=False)
        return torch.autograd.grad((z, (first + second).sum()), inputs, (grad, torch.ones(())))

    calls = {
        "step": training_call(step, x, grad),
        "step-without-network": without_network,
        "two-copies": lambda: [to.copy_(x) for to in copies],
    }
    return Comparison(case, BOTH, calls, "step")


def whole_model(a: Architecture) -> Comparison:
    """Training steps (forward, backward, Adam) of the same model."""
    torch.manual_seed(0)
    x = torch.rand(a.batch, 3, a.side, a.side)
    theirs = perturbed(by_normflows(a), x)
    models = {f"{FLOWKERN}-{memory}": glow(a, memory) for memory in ("store", "reversible")}
    innermost: Any = glow(a, "store")
    innermost.to(memory_format=torch.channels_last)  # networks and images with channels innermost
    models[f"{FLOWKERN}-channels-last"] = innermost
    images = {name: x.to(memory_format=torch.channels_last) if model is innermost else x for name, model in models.items()}
    failures: dict[str, str] = {}
    steps: dict[str, Call] = {}
    for name, model in models.items():
        copy_weights(theirs, model)
        failures[name] = failures[f"{name}-bf16"] = differs(theirs, model, images[name])
        for suffix, autocast in (("", False), ("-bf16", True)):
            steps[name + suffix] = training_step(model, images[name], autocast=autocast)
    steps["normflows"] = training_step(theirs, x, None)
    return Comparison(a.name, "training step", steps, "normflows", failures=failures, seconds=40.0)
