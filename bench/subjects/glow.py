"""``python -m bench glow``: 1x1 convolutions, a step of Glow and a whole one, beside the peers, in one process.

Every variant computes the same function: weights are copied over, and results are compared before anything is timed.
Peers that are not installed (``pip install nflows normflows``) are left out.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import io
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flowkern import nn

from ..files import slug, write_atomically
from ..memory import peak_extra_bytes
from ..provenance import provenance
from ..timing import Samples, cpu_samples

__all__ = ["Row", "main"]

Call = Callable[[], Any]

#: (batch, C, H, W): the levels of Glows on images of 32, 64 and 128 pixels.
SIZES = ((32, 12, 32, 32), (32, 48, 16, 16), (32, 48, 32, 32), (32, 96, 16, 16), (32, 192, 8, 8))
#: The same of the states between two steps, from the cache's size to far beyond it.
BOUNDARIES = ((32, 12, 16, 16), (32, 24, 8, 8), (16, 12, 64, 64))
FLOWKERN = "flowkern"


@dataclass(frozen=True)
class Row:
    """One figure with where it comes from; ``failure`` says why there is none. The columns of the CSV file."""

    case: str
    direction: str
    variant: str
    median_ms: float | None
    q1: float | None
    q3: float | None
    ratio: float | None  # the time of the variant named in ``against`` over this one's
    against: str
    peak_extra_mb: float | None
    failure: str
    threads: int
    device: str
    torch: str
    triton: str
    flowkern: str
    commit: str


def installed(package: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(package) is not None


# ---------------------------------------------------------------------------------------------------------------------
# 1x1 convolutions


def layers(channels: int) -> dict[str, Any]:
    """The layers that are compared, each with a weight of its own."""
    found: dict[str, Any] = {
        f"{FLOWKERN}-{name}": nn.InvertibleConv1x1(channels, parametrization=name) for name in ("plu", "full")
    }
    if installed("nflows"):
        from nflows.transforms.conv import OneByOneConvolution

        found["nflows"] = OneByOneConvolution(channels, identity_init=False)
    if installed("normflows"):
        from normflows.flows.mixing import Invertible1x1Conv

        found["normflows"] = _Reversed(Invertible1x1Conv(channels, use_lu=True))
    return found


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


def without_grad(function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Call:
    """A call of ``function(x)`` that records no gradients."""

    def call() -> Any:
        with torch.no_grad():
            return function(x)

    return call


def convolution(x: torch.Tensor, grad: torch.Tensor) -> Call:
    """Forward and backward of a bare convolution of the same size: what has to be computed in any case."""
    channels = x.shape[1]
    weight = torch.randn(channels, channels, 1, 1).requires_grad_()
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(F.conv2d(x, weight), (x, weight), grad)


def one_by_one(size: tuple[int, int, int, int], seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of the 1x1 convolutions at one size."""
    torch.manual_seed(0)
    x, grad = torch.randn(size), torch.randn(size)
    case = "1x1-" + "x".join(map(str, size))
    candidates = layers(size[1])
    failures = {name: wrong(layer, x) for name, layer in candidates.items()}
    good = {name: layer for name, layer in candidates.items() if not failures[name]}
    both = {name: training_call(layer, x, grad) for name, layer in good.items()}
    yield from timed(case, "forward+backward", {"conv2d": convolution(x, grad), **both}, failures, "conv2d", seconds)
    forward = {f"{name}": without_grad(layer, x) for name, layer in good.items()}
    weight = torch.randn(size[1], size[1], 1, 1)
    bare = without_grad(lambda value: F.conv2d(value, weight), x)
    yield from timed(case, "forward", {"conv2d": bare, **forward}, failures, "conv2d", seconds)
    inverse = {name: without_grad(layer.inverse, x) for name, layer in good.items()}
    yield from timed(case, "inverse", {"conv2d": bare, **inverse}, failures, "conv2d", seconds)


# ---------------------------------------------------------------------------------------------------------------------
# The boundary between two steps


def boundary(size: tuple[int, int, int, int], hidden: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of one ``GlowStep``: whole, without its network, and what one pass over a coupling and the next linear map would save.

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
    yield from timed("boundary-" + "x".join(map(str, size)), "forward+backward", calls, {}, "step", seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Samples to rows


def timed(
    case: str,
    direction: str,
    calls: Mapping[str, Call],
    failures: Mapping[str, str],
    against: str,
    seconds: float,
    sampled: Callable[[Mapping[str, Call], float], Samples] = cpu_samples,
) -> Iterator[dict[str, Any]]:
    """Rows of interleaved calls, and of those that are not timed because they compute something else."""
    samples = sampled(calls, seconds)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    for name, values in samples.items():
        q1, _, q3 = statistics.quantiles(values, n=4)
        yield {
            "case": case,
            "direction": direction,
            "variant": name,
            "median_ms": 1000 * medians[name],
            "q1": 1000 * q1,
            "q3": 1000 * q3,
            "ratio": medians[against] / medians[name],
            "against": against,
        }
    for name, failure in failures.items():
        if failure:
            yield {"case": case, "direction": direction, "variant": name, "failure": failure}


# ---------------------------------------------------------------------------------------------------------------------
# A whole Glow, with the weights of normflows'


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
    levels = []
    for level in range(a.levels):
        c = a.channels(level)
        net: dict[str, Any] = {"layout": "interleaved_shift_scale", "shift_first": True}
        levels.append(
            nn.Compose(nn.Squeeze(), *(nn.GlowStep(c, conditioner(c, a.hidden), **net) for _ in range(a.steps)), memory=memory)
        )
    shape = (3, a.side, a.side)
    return nn.Flow(nn.MultiScale(*levels, shape=shape), nn.StandardNormal(3 * a.side**2))


def peer(a: Architecture) -> Any:
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
def copy_weights(theirs: Any, ours: Any) -> None:
    """Give this library's Glow the weights of the peer's, which runs the other way round and subtracts its shifts."""
    for level, flows in zip(ours.bijection.levels, reversed(theirs.flows), strict=True):
        steps: list[Any] = [b for b in level.bijections if isinstance(b, nn.GlowStep)]
        blocks = [f for f in flows if hasattr(f, "flows")]
        for step, block in zip(steps, reversed(blocks), strict=True):
            coupling, linear, actnorm = block.flows
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


def whole_model(a: Architecture, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of training steps (forward, backward, Adam) of the same model."""
    torch.manual_seed(0)
    x = torch.rand(a.batch, 3, a.side, a.side)
    theirs = peer(a)
    with torch.no_grad():
        theirs.log_prob(x, None)
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.005)
    models = {f"{FLOWKERN}-{memory}": glow(a, memory) for memory in ("store", "reversible")}
    for model in models.values():
        copy_weights(theirs, model)
    innermost: Any = glow(a, "store")
    innermost.to(memory_format=torch.channels_last)  # networks and images with channels innermost
    copy_weights(theirs, innermost)
    models[f"{FLOWKERN}-channels-last"] = innermost
    images = {name: x.to(memory_format=torch.channels_last) if model is innermost else x for name, model in models.items()}
    failures = {name: differs(theirs, model, images[name]) for name, model in models.items()}
    steps: dict[str, Call] = {}
    for name, model in models.items():
        if not failures[name]:
            steps[name] = training_step(model, model.log_prob, images[name])
            steps[f"{name}-bf16"] = training_step(model, model.log_prob, images[name], autocast=True)
    steps["normflows"] = training_step(theirs, lambda images: theirs.log_prob(images, None), x)
    memory = {name: peak_extra_bytes(step, torch.device("cpu")) / 2**20 for name, step in steps.items()}
    for row in timed(a.name, "training step", steps, failures, "normflows", seconds):
        yield row | {"peak_extra_mb": memory.get(row["variant"])}


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
    for level, flows in zip(ours.bijection.levels, reversed(theirs.flows), strict=True):
        steps: list[Any] = [b for b in level.bijections if isinstance(b, nn.GlowStep)]
        blocks = [f for f in flows if hasattr(f, "flows")]
        for step, block in zip(steps, reversed(blocks), strict=True):
            for i in (0, 2):
                own, other = step.coupling.conditioner[i], block.flows[0].flows[1].param_map.net[i]
                yield from zip(own.parameters(), other.parameters(), strict=True)


def training_step(
    model: torch.nn.Module, log_prob: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, autocast: bool = False
) -> Call:
    """Loss, gradients and an optimizer's step, so small that the weights stay what they are."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-9)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = -log_prob(x).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # last, so that a step's memory is all its own

    return step


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench glow", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples and small sizes: to see that it works, not to quote")
    parser.add_argument("--only", choices=("1x1", "boundary", "model"), help="one part of it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    folder: dict[str, Any] = {"nargs": "?", "type": Path, "const": Path("bench/results"), "metavar": "DIR"}
    parser.add_argument("--csv", help="write glow-DEVICE.csv there", **folder)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    common = {"threads": arguments.threads, **provenance("cpu")}
    rows = []
    for values in _measured(arguments):
        missing = {field.name: None for field in fields(Row)} | {"against": "", "failure": ""}
        rows.append(Row(**{**missing, **common, **values}))
        print(line(rows[-1]), flush=True)
    if arguments.csv is not None:
        path = arguments.csv / f"glow-{slug(common['device'])}.csv"
        write_atomically(path, as_csv(rows))
        print(f"written: {path}")
    return int(any(row.failure for row in rows))


def _measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sizes = ((2, 12, 8, 8),) if arguments.quick else SIZES
    seconds = 0.2 if arguments.quick else 5.0
    if arguments.only in (None, "1x1"):
        for size in sizes:
            yield from one_by_one(size, seconds)
    if arguments.only in (None, "boundary"):
        for size in ((2, 12, 8, 8),) if arguments.quick else BOUNDARIES:
            yield from boundary(size, 8 if arguments.quick else 128, seconds)
    if arguments.only not in (None, "model"):
        return
    if not installed("normflows"):
        print("normflows is not installed: the whole model is left out", file=sys.stderr)
        return
    small = Architecture(steps=2, hidden=8, side=8, batch=2)
    yield from whole_model(small if arguments.quick else Architecture(), 0.5 if arguments.quick else 40.0)


def line(row: Row) -> str:
    """A row for people."""
    head = f"{row.case:<36}{row.direction:<26}{row.variant:<26}"
    if row.median_ms is None:
        return f"{head}FAILED: {row.failure}"
    quartiles = f"{row.median_ms:9.3f} ms  {row.q1:9.3f} .. {row.q3:9.3f}"
    memory = "" if row.peak_extra_mb is None else f"  {row.peak_extra_mb:8.1f} MB"
    return f"{head}{quartiles}  {row.ratio:5.2f}x {row.against}{memory}"


def as_csv(rows: Sequence[Row]) -> str:
    """The file's text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = asdict(row).items()
        writer.writerow({k: "" if v is None else f"{v:.4g}" if isinstance(v, float) else v for k, v in cells})
    return text.getvalue()
