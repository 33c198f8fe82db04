"""A whole Glow, and that of normflows with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flowkern import nn

from .timing import Call

__all__ = ["Architecture", "by_normflows", "conditioner", "copy_weights", "differs", "glow", "perturbed", "training_step"]


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

    def channels(self, level: int) -> int:
        """Of the steps of a level, 0 nearest to the data."""
        return 12 * 2**level


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
    for c in map(a.channels, range(a.levels)):
        steps = [nn.GlowStep(c, conditioner(c, a.hidden), **net) for _ in range(a.steps)]  # type: ignore[arg-type]
        levels.append(nn.Compose(nn.Squeeze(), *steps, memory=memory))
    shape = (3, a.side, a.side)
    return nn.Flow(nn.MultiScale(*levels, shape=shape), nn.StandardNormal(3 * a.side**2))


def by_normflows(a: Architecture) -> Any:
    """That of normflows, the levels in its order: the one nearest to the data last."""
    import normflows as nf

    bases, flows, merges = [], [], []
    for level in reversed(range(a.levels)):
        c, side = a.channels(level), a.side // 2 ** (level + 1)
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
