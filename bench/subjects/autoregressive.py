"""``python -m bench autoregressive``: the inverse of a masked autoregressive layer beside the density pass and the peers.

Every variant computes the same function: weights are copied over, and results are compared before anything is timed.
"dense" is the density pass in plain torch with the masks multiplied into the weights beforehand. Peers that are not
installed (``pip install nflows zuko``) are left out; their inverses run the network once for each feature and are sampled
only once or twice. Then the inverse with its gradients, beside those of the density pass; and how exactly both directions of
a trained MAF undo each other (``bench/subjects/roundtrip.py``).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import flowkern
from flowkern import nn, ops

from ..files import slug, write_atomically
from ..provenance import provenance
from ..timing import cpu_samples
from . import roundtrip
from .glow import FLOWKERN, Call, Row, as_csv, installed, line

__all__ = ["main"]

#: (features, hidden widths, batch).
SIZES = ((784, (1024, 1024), 64), (64, (256, 256), 64), (3072, (512, 512), 64), (3072, (512, 512), 1))
QUICK = ((24, (32, 32), 8),)
QUICK_ROUNDTRIP: dict[str, Any] = {"side": 8, "hidden": (32, 32), "steps": 5, "samples": 20}
#: Features of the picture, where the peers' inverses, of which one at the largest takes a minute, end earlier.
FEATURES, PEERS_TO = (16, 64, 256, 784, 1536, 3072), 784

Pair = tuple[torch.Tensor, torch.Tensor]


class _Peer(NamedTuple):
    """A peer's layer: both directions, and what it trains."""

    density: Callable[[torch.Tensor], Pair]
    inverse: Callable[[torch.Tensor], Pair]
    parameters: list[torch.Tensor]


def masked(layer: nn.MaskedAutoregressive) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Its weights with the masks multiplied in, and its biases."""
    layers: list[Any] = [*layer.made.layers]
    return [(one.weight * one.mask.dense()).detach() for one in layers], [one.bias.detach().clone() for one in layers]


def dense(layer: nn.MaskedAutoregressive) -> Callable[[torch.Tensor], Pair]:
    """The density pass with weights that are masked beforehand."""
    return dense_pass(layer, *masked(layer))


def dense_pass(
    layer: nn.MaskedAutoregressive, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> Callable[[torch.Tensor], Pair]:
    """The density pass of a network with these weights."""

    def run(x: torch.Tensor) -> Pair:
        h = x
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            h = torch.relu(F.linear(h, weight, bias))
        u, t = F.linear(h, weights[-1], biases[-1]).unflatten(1, (-1, 2)).unbind(-1)
        s, log_s = layer.scale(u)
        return s * x + t, log_s.sum(1)

    return run


def by_nflows(layer: nn.MaskedAutoregressive) -> _Peer:
    """nflows' layer with these weights."""
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    hidden = layer.made.hidden
    theirs = MaskedAffineAutoregressiveTransform(
        layer.made.features, hidden[0], num_blocks=len(hidden) - 1, use_residual_blocks=False
    )
    net = theirs.autoregressive_net
    _copy(layer, [net.initial_layer, *(block.linear for block in net.blocks), net.final_layer])
    return _Peer(theirs.forward, theirs.inverse, [*theirs.parameters()])


def by_zuko(layer: nn.MaskedAutoregressive) -> _Peer:
    """zuko's layer with these weights, their order and their degrees."""
    from zuko.flows import MaskedAutoregressiveTransform

    theirs = MaskedAutoregressiveTransform(layer.made.features, hidden_features=layer.made.hidden)
    linears: list[Any] = [module for module in theirs.hyper if hasattr(module, "mask")]
    for theirs_linear, ours in zip(linears, layer.made.layers, strict=True):
        theirs_linear.mask.copy_(ours.mask.dense())  # type: ignore[operator,union-attr]
    _copy(layer, linears)
    with torch.no_grad():  # its shift comes first
        last = linears[-1]
        last.weight.copy_(last.weight.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
        last.bias.copy_(last.bias.unflatten(0, (-1, 2)).flip(1).flatten())
        last.mask.copy_(last.mask.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
    return _Peer(lambda x: theirs().call_and_ladj(x), lambda z: theirs().inv.call_and_ladj(z), [*theirs.parameters()])


def _copy(layer: nn.MaskedAutoregressive, theirs: Sequence[Any]) -> None:
    with torch.no_grad():
        for ours, other in zip(layer.made.layers, theirs, strict=True):
            other.weight.copy_(ours.weight)
            other.bias.copy_(ours.bias)


def running(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on one backend."""

    def run(*args: torch.Tensor) -> Any:
        with flowkern.backend(backend):
            return function(*args)

    return run


def differs(got: Pair, expected: Pair) -> str:
    """How far two results are apart, if that is more than rounding."""
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(got, expected, strict=True)]
    return "" if max(errors) < 1e-4 else f"differs by {max(errors):.1e} of its size"


def once(call: Call, times: int) -> list[float]:
    """Seconds of a slow call."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


@dataclasses.dataclass(frozen=True)
class _Subjects:
    """What is compared: layers of one size with the same weights, and the peers', each with the one of ours that it equals."""

    case: str
    ours: nn.MaskedAutoregressive
    peers: dict[str, tuple[_Peer, nn.MaskedAutoregressive]]
    x: torch.Tensor


def subjects(features: int, hidden: tuple[int, ...], batch: int) -> _Subjects:
    """The scale is soft_clip, as in zuko, and for nflows softplus; degrees are nflows', and our units are sorted by them."""
    torch.manual_seed(0)
    clipped = nn.MaskedAutoregressive(features, hidden, degrees="cyclic")
    softplus = nn.MaskedAutoregressive(features, hidden, degrees="cyclic", scale=ops.ScaleMap.softplus(1e-3))
    softplus.load_state_dict(clipped.state_dict())
    peers: dict[str, tuple[_Peer, nn.MaskedAutoregressive]] = {}
    if installed("nflows"):
        peers["nflows"] = by_nflows(softplus), softplus
    if installed("zuko"):
        peers["zuko"] = by_zuko(clipped), clipped
    for layer in (clipped, softplus):
        layer.made.sort_units()
    case = f"{features}-{'x'.join(map(str, hidden))}-batch{batch}"
    return _Subjects(case, clipped, peers, torch.randn(batch, features))


def density_rows(s: _Subjects, seconds: float) -> Iterator[dict[str, Any]]:
    """The density pass, and with it the gradients of x and of the parameters."""
    functions = {"dense": dense(s.ours), f"{FLOWKERN}-density": s.ours.forward}
    parameters: dict[str, list[torch.Tensor]] = {f"{FLOWKERN}-density": [*s.ours.parameters()]}
    with torch.no_grad():
        failures = {f"{FLOWKERN}-density": differs(s.ours(s.x), dense(s.ours)(s.x))}
        for name, (peer, own) in s.peers.items():
            functions[name], parameters[name] = peer.density, peer.parameters
            failures[name] = differs(peer.density(s.x), own(s.x))
        yield from rows(s.case, "density", {n: functools.partial(f, s.x) for n, f in functions.items()}, failures, seconds)
    weights, biases = masked(s.ours)
    parameters["dense"] = [t.requires_grad_() for t in (*weights, *biases)]
    functions["dense"] = dense_pass(s.ours, weights, biases)
    calls = {name: training(function, s.x, parameters[name]) for name, function in functions.items()}
    expected, got = calls["dense"]()[0], calls[f"{FLOWKERN}-density"]()[0]
    failures[f"{FLOWKERN}-density"] = differs((got, got), (expected, expected))
    yield from rows(s.case, "density forward+backward", calls, failures, seconds)


def training(function: Callable[[torch.Tensor], Pair], x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> Call:
    """The loss of maximum likelihood and its gradients."""
    inputs = [x.clone().requires_grad_(), *parameters]

    def call() -> Any:
        z, logabsdet = function(inputs[0])
        return torch.autograd.grad(0.5 * z.square().sum() - logabsdet.sum(), inputs)

    return call


def training_rows(s: _Subjects, seconds: float) -> Iterator[dict[str, Any]]:
    """The inverse and the gradients of z and of the parameters through it, beside those of the density pass."""
    z = s.ours(s.x)[0].detach()
    weights, biases = masked(s.ours)
    own, tensors = [*s.ours.parameters()], [t.requires_grad_() for t in (*weights, *biases)]
    calls = {
        "dense": training(dense_pass(s.ours, weights, biases), s.x, tensors),
        f"{FLOWKERN}-density": training(s.ours.forward, s.x, own),
    }
    backends = ("cpp", "torch") if flowkern._core.backend.native is not None else ("torch",)
    inverses = {f"{FLOWKERN}-{name}": running(name, training(s.ours.inverse, z, own)) for name in backends}
    exact = copy.deepcopy(s.ours).double()
    expected = running("torch", training(exact.inverse, exact(s.x.double())[0].detach(), [*exact.parameters()]))()
    failures = {name: differing(call(), expected) for name, call in inverses.items()}
    yield from rows(s.case, "inverse+backward", {**calls, **inverses}, failures, seconds)


def differing(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str:
    """The first of some results that is further from another than rounding."""
    return next(filter(None, (differs((a, a), (b, b)) for a, b in zip(got, expected, strict=True))), "")


@torch.no_grad()
def inverse_rows(s: _Subjects, seconds: float) -> Iterator[dict[str, Any]]:
    """The inverse, beside the density pass."""
    z = s.ours(s.x)[0]
    inverses = {f"{FLOWKERN}-{name}": running(name, s.ours.inverse) for name in ("cpp", "torch")}
    if flowkern._core.backend.native is None:
        del inverses[f"{FLOWKERN}-cpp"]
    failures = {name: differs(inverse(z), (s.x, -dense(s.ours)(s.x)[1])) for name, inverse in inverses.items()}
    slow: dict[str, list[float]] = {}
    for name, (peer, own) in s.peers.items():
        target = own(s.x)[0]
        start = time.perf_counter()
        failures[name] = differs(peer.inverse(target), own.inverse(target))
        # The first call was one sample.
        slow[name] = [time.perf_counter() - start, *once(functools.partial(peer.inverse, target), int(len(s.x) > 1))]
    calls = {name: functools.partial(f, z) for name, f in {"dense": dense(s.ours), **inverses}.items()}
    yield from rows(s.case, "inverse", calls, failures, seconds, slow)


#: What is measured of each size.
PARTS = {"density": density_rows, "inverse": inverse_rows, "training": training_rows}


def measured(
    features: int, hidden: tuple[int, ...], batch: int, parts: Iterable[str], seconds: float
) -> Iterator[dict[str, Any]]:
    """Rows of one size."""
    compared = subjects(features, hidden, batch)
    for part in parts:
        yield from PARTS[part](compared, seconds)


def over_features(quick: bool) -> Iterator[dict[str, Any]]:
    """Rows of the inverse at more and more features, with one network's widths."""
    for features in (8, 16) if quick else FEATURES:
        compared = subjects(features, (32, 32) if quick else (512, 512), 8 if quick else 64)
        if features > PEERS_TO:
            compared.peers.clear()
        yield from inverse_rows(compared, 0.2 if quick else 2.0)


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time against the number of features, both on logarithmic scales."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    panel: Any = figure.subplots()
    labels = {"nflows": "nflows", "zuko": "zuko", f"{FLOWKERN}-torch": "flowkern, torch alone", f"{FLOWKERN}-cpp": "flowkern"}
    labels["dense"] = "one density pass, dense"
    for variant, label in labels.items():
        points = [(int(row.case.split("-")[0]), row.median_ms) for row in rows if row.variant == variant and not row.failure]
        if points:
            panel.plot(*zip(*points, strict=True), marker="o", label=label, linestyle="--" if variant == "dense" else "-")
    panel.set(xlabel="features", ylabel="time of an inverse, ms", xscale="log", yscale="log")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)


def rows(
    case: str,
    direction: str,
    calls: Mapping[str, Call],
    failures: Mapping[str, str],
    seconds: float,
    slow: Mapping[str, list[float]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Interleaved samples of the calls, and those that were taken of slow ones, against "dense"."""
    samples = {**cpu_samples({n: c for n, c in calls.items() if not failures.get(n)}, seconds), **(slow or {})}
    against = statistics.median(samples["dense"])
    for name, values in samples.items():
        if failures.get(name):
            continue
        median = statistics.median(values)
        q1, _, q3 = statistics.quantiles(values, n=4) if len(values) > 1 else (median,) * 3
        yield {
            "case": case,
            "direction": direction,
            "variant": name,
            "median_ms": 1000 * median,
            "q1": 1000 * q1,
            "q3": 1000 * q3,
            "ratio": against / median,
            "against": "dense",
        }
    for name, failure in failures.items():
        if failure:
            yield {"case": case, "direction": direction, "variant": name, "failure": failure}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench autoregressive", description=__doc__)
    parser.add_argument(
        "--only", choices=(*PARTS, "roundtrip"), help="one part: roundtrip is the error of both directions of a trained MAF"
    )
    parser.add_argument("--quick", action="store_true", help="one small size: to see that it works, not to quote")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    folder: dict[str, Any] = {"nargs": "?", "type": Path, "const": Path("bench/results"), "metavar": "DIR"}
    parser.add_argument(
        "--csv", help="write autoregressive-DEVICE.csv there, and a picture of the inverse over features", **folder
    )
    arguments = parser.parse_args(argv)
    if arguments.csv is not None and arguments.only is not None:
        parser.error("--csv: the file holds all parts; leave out --only")
    torch.set_num_threads(arguments.threads)
    common = {"threads": arguments.threads, **provenance("cpu")}
    missing = {field.name: None for field in fields(Row)} | {"against": "", "failure": ""}
    sizes = QUICK if arguments.quick else SIZES

    def rows_of(values: Iterable[dict[str, Any]]) -> list[Row]:
        found = []
        for value in values:
            found.append(Row(**{**missing, **common, **value}))
            print(line(found[-1]), flush=True)
        return found

    parts = [part for part in PARTS if arguments.only in (None, part)]
    seconds = 0.2 if arguments.quick else 5.0
    found = rows_of(itertools.chain.from_iterable(measured(*size, parts, seconds) for size in sizes if parts))
    if arguments.only in (None, "roundtrip"):
        for result in roundtrip.measured(**(QUICK_ROUNDTRIP if arguments.quick else {})):
            print(result, flush=True)
    if arguments.csv is not None:
        path = arguments.csv / f"autoregressive-{slug(common['device'])}.csv"
        drawn = rows_of(over_features(arguments.quick))
        write_atomically(path, as_csv([*found, *drawn]))
        title = f"Inverse of a MADE, batch {drawn[0].case.rsplit('batch')[-1]}; {common['device']}, {arguments.threads} threads"
        draw(drawn, title, path.with_suffix(".png"))
        print(f"written: {path} and .png")
        found += drawn
    return int(any(row.failure for row in found))
