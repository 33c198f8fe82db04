"""A masked autoregressive layer, its density pass and its inverse, beside plain torch and the layers of nflows and zuko.

Every variant computes the same function: weights are copied over, and results are compared before anything is timed.
"dense" is the density pass in plain torch with the masks multiplied into the weights beforehand. The peers' inverses run the
network once for each feature and are sampled only once or twice.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from flowkern import nn, ops
from flowkern._core import backend

from ..comparison import FLOWKERN, Comparison, Options, peer, peers_of, running
from ..row import Row, plot
from ..timing import Call

__all__ = ["DEVICES", "comparisons", "dense", "differs", "draw"]

Pair = tuple[torch.Tensor, torch.Tensor]

DEVICES = ("cpu",)
BACKENDS = ("cpp", "torch") if backend.native is not None else ("torch",)
#: (features, hidden widths, batch).
SIZES = ((784, (1024, 1024), 64), (64, (256, 256), 64), (3072, (512, 512), 64), (3072, (512, 512), 1))
QUICK = ((24, (32, 32), 8),)
#: Features of the picture, where the peers' inverses, of which one at the largest takes a minute, end earlier.
FEATURES, QUICK_FEATURES, PEERS_TO = (16, 64, 256, 784, 1536), (8, 16), 784


def comparisons(options: Options) -> Iterator[Comparison]:
    """Density and inverse, each also with gradients, at each size; the inverse over the number of features."""
    for size in QUICK if options.quick else SIZES:
        compared = None
        parts = {"density": density, "density forward+backward": density_training}
        parts |= {"inverse": inverse, "inverse+backward": inverse_training}
        for direction, part in parts.items():
            if options.wants(case_of(*size), direction):
                compared = compared or subjects(*size)
                yield part(compared, direction)
    hidden, batch = ((32, 32), 8) if options.quick else ((512, 512), 64)
    for features in QUICK_FEATURES if options.quick else FEATURES:
        if options.wants(case_of(features, hidden, batch), "inverse"):
            yield inverse(subjects(features, hidden, batch, with_peers=features <= PEERS_TO), "inverse", seconds=2.0)


def masked(layer: nn.MaskedAutoregressive) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Its weights with the masks multiplied in, and its biases."""
    layers: list[Any] = [*layer.made.layers]
    return [(one.weight * one.mask.dense()).detach() for one in layers], [one.bias.detach().clone() for one in layers]


def dense(layer: nn.MaskedAutoregressive, parameters: Any = None) -> Callable[[torch.Tensor], Pair]:
    """The density pass of a network with such weights and biases, by default those of the layer, masked beforehand."""
    weights, biases = parameters or masked(layer)

    def run(x: torch.Tensor) -> Pair:
        h = x
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            h = torch.relu(F.linear(h, weight, bias))
        u, t = F.linear(h, weights[-1], biases[-1]).unflatten(1, (-1, 2)).unbind(-1)
        s, log_s = layer.scale(u)
        return s * x + t, log_s.sum(1)

    return run


def differs(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str:
    """How far some results are apart, if one is by more than rounding."""
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(got, expected, strict=True)]
    return "" if all(error < 1e-4 for error in errors) else f"differs by {max(errors):.1e} of its size"


class _Peer(NamedTuple):
    """A peer's layer: both directions, and what it trains."""

    density: Callable[[torch.Tensor], Pair]
    inverse: Callable[[torch.Tensor], Pair]
    parameters: list[torch.Tensor]


@peer("autoregressive", "nflows")
def by_nflows(layer: nn.MaskedAutoregressive) -> _Peer:
    """nflows' layer with these weights."""
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    hidden = layer.made.hidden
    shape: dict[str, Any] = {"hidden_features": hidden[0], "num_blocks": len(hidden) - 1}
    theirs = MaskedAffineAutoregressiveTransform(layer.made.features, **shape, use_residual_blocks=False)
    net = theirs.autoregressive_net
    _copy(layer, [net.initial_layer, *(block.linear for block in net.blocks), net.final_layer])
    return _Peer(theirs.forward, theirs.inverse, [*theirs.parameters()])


@peer("autoregressive", "zuko")
def by_zuko(layer: nn.MaskedAutoregressive) -> _Peer:
    """zuko's layer with these weights, their order and their degrees."""
    from zuko.flows import MaskedAutoregressiveTransform

    theirs = MaskedAutoregressiveTransform(layer.made.features, hidden_features=layer.made.hidden)
    linears: list[Any] = [module for module in theirs.hyper if hasattr(module, "mask")]
    for theirs_linear, ours in zip(linears, layer.made.layers, strict=True):
        theirs_linear.mask.copy_(ours.mask.dense())  # type: ignore[operator,union-attr]
    _copy(layer, linears)
    with torch.no_grad():  # its shift comes first
        for of_outputs in (linears[-1].weight, linears[-1].bias, linears[-1].mask):
            of_outputs.copy_(of_outputs.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
    return _Peer(lambda x: theirs().call_and_ladj(x), lambda z: theirs().inv.call_and_ladj(z), [*theirs.parameters()])


def _copy(layer: nn.MaskedAutoregressive, theirs: Sequence[Any]) -> None:
    with torch.no_grad():
        for ours, other in zip(layer.made.layers, theirs, strict=True):
            other.weight.copy_(ours.weight)
            other.bias.copy_(ours.bias)


@dataclasses.dataclass(frozen=True)
class _Subjects:
    """What is compared: layers of one size with the same weights, and the peers', each with the one of ours that it equals."""

    case: str
    ours: nn.MaskedAutoregressive
    peers: dict[str, tuple[_Peer, nn.MaskedAutoregressive]]
    x: torch.Tensor


def case_of(features: int, hidden: tuple[int, ...], batch: int) -> str:
    """The name of a size."""
    return f"{features}-{'x'.join(map(str, hidden))}-batch{batch}"


def subjects(features: int, hidden: tuple[int, ...], batch: int, with_peers: bool = True) -> _Subjects:
    """The scale is soft_clip, as in zuko, and for nflows softplus; degrees are nflows', and our units are sorted by them."""
    torch.manual_seed(0)
    clipped = nn.MaskedAutoregressive(features, hidden, degrees="cyclic")
    softplus = nn.MaskedAutoregressive(features, hidden, degrees="cyclic", scale=ops.ScaleMap.softplus(1e-3))
    softplus.load_state_dict(clipped.state_dict())
    like = {"nflows": softplus, "zuko": clipped}
    found = peers_of("autoregressive") if with_peers else {}
    peers = {name: (make(like[name]), like[name]) for name, make in found.items()}
    for layer in (clipped, softplus):
        layer.made.sort_units()
    return _Subjects(case_of(features, hidden, batch), clipped, peers, torch.randn(batch, features))


@torch.no_grad()
def _failures(s: _Subjects) -> dict[str, str]:
    """What is wrong with a density pass."""
    found = {f"{FLOWKERN}-density": differs(s.ours(s.x), dense(s.ours)(s.x))}
    return found | {name: differs(theirs.density(s.x), own(s.x)) for name, (theirs, own) in s.peers.items()}


def _passes(s: _Subjects) -> dict[str, tuple[Callable[[torch.Tensor], Pair], Sequence[torch.Tensor]]]:
    """The density passes that are compared, each with what it trains."""
    weights, biases = masked(s.ours)
    return {
        "dense": (dense(s.ours, (weights, biases)), [t.requires_grad_() for t in (*weights, *biases)]),
        f"{FLOWKERN}-density": (s.ours.forward, [*s.ours.parameters()]),
        **{name: (theirs.density, theirs.parameters) for name, (theirs, _) in s.peers.items()},
    }


def density(s: _Subjects, direction: str) -> Comparison:
    """The density pass."""
    calls = {name: functools.partial(torch.no_grad()(function), s.x) for name, (function, _) in _passes(s).items()}
    return Comparison(s.case, direction, calls, "dense", failures=_failures(s))


def density_training(s: _Subjects, direction: str) -> Comparison:
    """The density pass, and the gradients of x and of the parameters."""
    calls = {name: training(function, s.x, parameters) for name, (function, parameters) in _passes(s).items()}
    expected, got = calls["dense"]()[0], calls[f"{FLOWKERN}-density"]()[0]
    failures = _failures(s) | {f"{FLOWKERN}-density": differs((got,), (expected,))}
    return Comparison(s.case, direction, calls, "dense", failures=failures)


def training(function: Callable[[torch.Tensor], Pair], x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> Call:
    """The loss of maximum likelihood and its gradients."""
    inputs = [x.clone().requires_grad_(), *parameters]

    def call() -> Any:
        z, logabsdet = function(inputs[0])
        return torch.autograd.grad(0.5 * z.square().sum() - logabsdet.sum(), inputs)

    return call


def inverse_training(s: _Subjects, direction: str) -> Comparison:
    """The inverse and the gradients of z and of the parameters through it, beside those of the density pass."""
    z = s.ours(s.x)[0].detach()
    backward = training(s.ours.inverse, z, [*s.ours.parameters()])
    inverses = {f"{FLOWKERN}-{name}": running(name, backward) for name in BACKENDS}
    exact = copy.deepcopy(s.ours).double()
    expected = running("torch", training(exact.inverse, exact(s.x.double())[0].detach(), [*exact.parameters()]))()
    failures = {name: differs(call(), expected) for name, call in inverses.items()}
    passes = {name: training(function, s.x, given) for name, (function, given) in _passes(s).items() if name not in s.peers}
    return Comparison(s.case, direction, {**passes, **inverses}, "dense", failures=failures)


@torch.no_grad()
def inverse(s: _Subjects, direction: str, seconds: float = 5.0) -> Comparison:
    """The inverse, beside the density pass."""
    z, density = s.ours(s.x)[0], dense(s.ours)
    inverses = {f"{FLOWKERN}-{name}": running(name, s.ours.inverse) for name in BACKENDS}
    failures = {name: differs(inverse(z), (s.x, -density(s.x)[1])) for name, inverse in inverses.items()}
    slow: dict[str, list[float]] = {}
    for name, (theirs, own) in s.peers.items():
        target, slow[name] = own(s.x)[0], []
        for _ in range(2 if len(s.x) > 1 else 1):
            start = time.perf_counter()
            result = theirs.inverse(target)
            slow[name].append(time.perf_counter() - start)
        failures[name] = differs(result, own.inverse(target))
    calls = {name: functools.partial(torch.no_grad()(f), z) for name, f in {"dense": density, **inverses}.items()}
    return Comparison(s.case, direction, calls, "dense", failures=failures, seconds=seconds, slow=slow)


def draw(rows: Sequence[Row], where: str, path: Path) -> None:
    """Time of an inverse against the number of features, both on logarithmic scales."""
    batch = max(int(row.case.rsplit("batch")[1]) for row in rows)
    labels = {"nflows": "nflows", "zuko": "zuko", f"{FLOWKERN}-torch": "flowkern, torch alone", f"{FLOWKERN}-cpp": "flowkern"}
    labels["dense"] = dashed = "one density pass, dense"
    widths = rows[-1].case.split("-")[1]
    own = [row for row in rows if row.direction == "inverse" and row.case.endswith(f"-{widths}-batch{batch}")]
    lines = {
        label: [(int(row.case.split("-")[0]), (row.median_us or 0.0) / 1000) for row in own if row.variant == variant]
        for variant, label in labels.items()
    }
    title = f"Inverse of a MADE, batch {batch}; {where}"
    plot(path, title, "features", {"time of an inverse, ms": lines}, log=True, dashed=(dashed,))
