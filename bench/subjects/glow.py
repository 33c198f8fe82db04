"""1x1 convolutions, a step of Glow and a whole one, beside nflows and normflows.

Every variant computes the same function: weights are copied over, and results are compared before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from flowkern import nn

from ..comparison import FLOWKERN, Comparison, Options, peer, peers_of
from ..timing import Call

__all__ = ["DEVICES", "Architecture", "by_normflows", "comparisons", "copy_weights", "differs", "glow", "perturbed"]

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
    if options.wants(architecture.name) and "normflows" in peers_of("glow"):
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

    layer = Invertible1x1Conv(channels, use_lu=True)
    layer.forward, layer.inverse = layer.inverse, layer.forward  # which ran latent to data, the other way round
    return layer


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


# ---------------------------------------------------------------------------------------------------------------------
# Steps and whole models


@dataclass(frozen=True)
class Architecture:
    """Levels of a squeeze and ``steps`` steps each, on colour images of ``side`` pixels, with a standard normal base."""

    levels: int = 2
    steps: int = 16
    hidden: int = 128
    side: int = 32
    batch: int = 32

    @property
    def name(self) -> str:
        return f"glow-{self.levels}x{self.steps}-hidden{self.hidden}-{self.batch}x3x{self.side}x{self.side}"


def conditioner(channels: int, hidden: int) -> torch.nn.Sequential:
    """3x3, 1x1 and 3x3 convolutions, from one half of the channels to two numbers for each of the other half."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels // 2, hidden, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(hidden, hidden, 1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(hidden, channels, 3, padding=1),
    )


def glow(a: Architecture, memory: str) -> nn.Flow:
    """This library's."""
    levels, net = [], {"layout": "interleaved_shift_scale", "shift_first": True}
    for c in (12 * 2**level for level in range(a.levels)):
        steps = [nn.GlowStep(c, conditioner(c, a.hidden), **net) for _ in range(a.steps)]  # type: ignore[arg-type]
        levels.append(nn.Compose(nn.Squeeze(), *steps, memory=memory))
    shape = (3, a.side, a.side)
    return nn.Flow(nn.MultiScale(*levels, shape=shape), nn.StandardNormal(3 * a.side**2))


def by_normflows(a: Architecture) -> Any:
    """That of normflows, the levels in its order: the one nearest to the data last."""
    import normflows as nf

    bases, flows, merges = [], [], []
    for level in reversed(range(a.levels)):
        c, side = 12 * 2**level, a.side // 2 ** (level + 1)
        flows.append([*(nf.flows.GlowBlock(c, a.hidden) for _ in range(a.steps)), nf.flows.Squeeze()])
        last = level == a.levels - 1
        bases.append(nf.distributions.DiagGaussian((c if last else c // 2, side, side), trainable=False))
        if level > 0:
            merges.append(nf.flows.Merge())
    return nf.MultiscaleFlow(bases, flows, merges, class_cond=False)


@torch.no_grad()
def perturbed(model: Any, x: torch.Tensor) -> Any:
    """The model, initialized from images and with weights a little off their start."""
    model.log_prob(x, None)
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.005)
    return model


@torch.no_grad()
def copy_weights(theirs: Any, ours: Any) -> None:
    """Give this library's Glow the weights of the peer's, which runs the other way round and subtracts its shifts."""
    for step, (coupling, linear, actnorm) in _steps(theirs, ours):
        scale = torch.exp(-actnorm.s.flatten())
        step.actnorm.log_scale.copy_(-actnorm.s.flatten())
        step.actnorm.shift.copy_(-actnorm.t.flatten() * scale)
        step.actnorm.initialized.fill_(True)
        lu = linear.L.tril(-1) + linear.U.triu(1) + linear.log_S.diag()
        step.linear.matrix.lu.copy_(lu)
        step.linear.matrix.sign.copy_(linear.sign_S)
        step.linear.matrix.permutation.copy_(linear.P.argmax(1))
        step.coupling.conditioner.load_state_dict(coupling.flows[1].param_map.net.state_dict())
        last = step.coupling.conditioner[-1]
        last.weight[0::2].neg_()
        last.bias[0::2].neg_()


def _steps(theirs: Any, ours: Any) -> Iterator[tuple[Any, Any]]:
    """Each step of ours with the layers of the peer's block."""
    for level, flows in zip(ours.bijection.levels, reversed(theirs.flows), strict=True):
        steps = [b for b in level.bijections if isinstance(b, nn.GlowStep)]
        blocks = [f.flows for f in flows if hasattr(f, "flows")]
        yield from zip(steps, reversed(blocks), strict=True)


def differs(theirs: Any, ours: nn.Flow, x: torch.Tensor) -> str:
    """How the two models differ: in log-densities, or in the gradient of the parameters that both have as they are.

    The gradient is that of both in float64: in float32 a ReLU whose argument is zero to rounding may fall on the other side,
    which changes some of it by much more. The copied weights themselves are equal to the rounding of float32.
    """
    with torch.no_grad():
        expected, got = theirs.log_prob(x.contiguous(), None), ours.log_prob(x)
    error = float(((got - expected).abs() / expected.abs()).max())
    if not error < 1e-4:
        return f"log p(x) differs by {error:.1e} of its size"
    theirs, ours, x = copy.deepcopy(theirs).double(), copy.deepcopy(ours).double(), x.double()
    mine, others = zip(*_shared_parameters(theirs, ours), strict=True)
    by_them = torch.autograd.grad(theirs.log_prob(x.contiguous(), None).mean(), others)
    pairs = zip(torch.autograd.grad(ours.log_prob(x).mean(), mine), by_them, strict=True)
    squares = torch.stack([torch.stack([(a - b).square().sum(), b.square().sum()]) for a, b in pairs]).sum(0)
    error = float((squares[0] / squares[1]).sqrt())
    return "" if error < 1e-3 else f"the gradient differs by {error:.1e} of its size"


def _shared_parameters(theirs: Any, ours: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Those of the networks' first two convolutions; the third ones' have other signs."""
    for step, (coupling, _, _) in _steps(theirs, ours):
        for i in (0, 2):
            own, other = step.coupling.conditioner[i], coupling.flows[1].param_map.net[i]
            yield from zip(own.parameters(), other.parameters(), strict=True)


def training_step(model: Any, x: torch.Tensor, *context: None, autocast: bool = False, keep: bool = False) -> Call:
    """Loss, gradients and an optimizer's step, so small that the weights stay what they are; a peer takes a context.

    ``keep`` leaves the gradients allocated between steps; without it a step's memory is all its own.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-9)

    def step() -> tuple[torch.Tensor, ...]:
        if keep:
            optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = -model.log_prob(x, *context).mean()
        loss.backward()
        optimizer.step()
        if not keep:
            optimizer.zero_grad()
        return ()

    return step


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
