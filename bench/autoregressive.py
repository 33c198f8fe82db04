"""``python -m bench autoregressive``: the inverse of a masked autoregressive layer beside the density pass and the peers.

Every variant computes the same function: weights are copied over, and results are compared before anything is timed.
"dense" is the density pass in plain torch with the masks multiplied into the weights beforehand. Peers that are not
installed (``pip install nflows zuko``) are left out; their inverses run the network once for each feature and are sampled
only once or twice.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import flowkern
from flowkern import nn, ops

from .files import slug, write_atomically
from .glow import FLOWKERN, Call, Row, as_csv, installed, line
from .provenance import provenance
from .timing import cpu_samples

__all__ = ["main"]

#: (features, hidden widths, batch).
SIZES = ((784, (1024, 1024), 64), (64, (256, 256), 64), (3072, (512, 512), 64), (3072, (512, 512), 1))
QUICK = ((24, (32, 32), 8),)

Pair = tuple[torch.Tensor, torch.Tensor]
Both = tuple[Callable[[torch.Tensor], Pair], Callable[[torch.Tensor], Pair]]


def dense(layer: nn.MaskedAutoregressive) -> Callable[[torch.Tensor], Pair]:
    """The density pass with weights that are masked beforehand."""
    weights = [(layer.weight * layer.mask.dense()).detach() for layer in layer.made.layers]  # type: ignore[operator,union-attr]
    biases: list[Any] = [layer.bias for layer in layer.made.layers]

    def run(x: torch.Tensor) -> Pair:
        h = x
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            h = torch.relu(F.linear(h, weight, bias))
        u, t = F.linear(h, weights[-1], biases[-1]).unflatten(1, (-1, 2)).unbind(-1)
        s, log_s = layer.scale(u)
        return s * x + t, log_s.sum(1)

    return run


def by_nflows(layer: nn.MaskedAutoregressive) -> Both:
    """nflows' layer with these weights: (density pass, inverse)."""
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    hidden = layer.made.hidden
    theirs = MaskedAffineAutoregressiveTransform(
        layer.made.features, hidden[0], num_blocks=len(hidden) - 1, use_residual_blocks=False
    )
    net = theirs.autoregressive_net
    _copy(layer, [net.initial_layer, *(block.linear for block in net.blocks), net.final_layer])
    return theirs.forward, theirs.inverse


def by_zuko(layer: nn.MaskedAutoregressive) -> Both:
    """zuko's layer with these weights, their order and their degrees: (density pass, inverse)."""
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
    return lambda x: theirs().call_and_ladj(x), lambda z: theirs().inv.call_and_ladj(z)


def _copy(layer: nn.MaskedAutoregressive, theirs: Sequence[Any]) -> None:
    with torch.no_grad():
        for ours, other in zip(layer.made.layers, theirs, strict=True):
            other.weight.copy_(ours.weight)
            other.bias.copy_(ours.bias)


def on(backend: str, function: Callable[[torch.Tensor], Pair]) -> Callable[[torch.Tensor], Pair]:
    """The function on one backend."""

    def run(x: torch.Tensor) -> Pair:
        with flowkern.backend(backend):
            return function(x)

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


def measured(features: int, hidden: tuple[int, ...], batch: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of one size: the scale that is soft_clip, as in zuko, and for nflows softplus, each beside ours with that map."""
    torch.manual_seed(0)
    case = f"{features}-{'x'.join(map(str, hidden))}-batch{batch}"
    clipped = nn.MaskedAutoregressive(features, hidden, degrees="cyclic")
    softplus = nn.MaskedAutoregressive(features, hidden, degrees="cyclic", scale=ops.ScaleMap.softplus(1e-3))
    softplus.load_state_dict(clipped.state_dict())
    x = torch.randn(batch, features)
    peers: dict[str, tuple[Both, nn.MaskedAutoregressive]] = {}
    if installed("nflows"):
        peers["nflows"] = by_nflows(softplus), softplus
    if installed("zuko"):
        peers["zuko"] = by_zuko(clipped), clipped
    with torch.no_grad():
        z = clipped(x)[0]
        density = {f"{FLOWKERN}-density": clipped.forward, **{name: both[0] for name, (both, _) in peers.items()}}
        failures = {f"{FLOWKERN}-density": differs(clipped(x), dense(clipped)(x))}
        failures |= {name: differs(both[0](x), own(x)) for name, (both, own) in peers.items()}
        yield from rows(case, "density", {"dense": dense(clipped), **density}, x, failures, seconds)

        inverses = {f"{FLOWKERN}-{name}": on(name, clipped.inverse) for name in ("cpp", "torch")}
        if flowkern._backend.native is None:
            del inverses[f"{FLOWKERN}-cpp"]
        failures = {name: differs(inverse(z), (x, -dense(clipped)(x)[1])) for name, inverse in inverses.items()}
        slow: dict[str, list[float]] = {}
        for name, (both, own) in peers.items():
            target = own(x)[0]
            start = time.perf_counter()
            failures[name] = differs(both[1](target), own.inverse(target))
            # The first call was one sample.
            slow[name] = [time.perf_counter() - start, *once(functools.partial(both[1], target), int(batch > 1))]
        yield from rows(case, "inverse", {"dense": dense(clipped), **inverses}, z, failures, seconds, slow)


def rows(
    case: str,
    direction: str,
    functions: Mapping[str, Callable[[torch.Tensor], Pair]],
    x: torch.Tensor,
    failures: Mapping[str, str],
    seconds: float,
    slow: Mapping[str, list[float]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Interleaved samples of the functions, and those that were taken of slow ones, against "dense"."""
    calls: dict[str, Call] = {n: functools.partial(f, x) for n, f in functions.items() if not failures.get(n)}
    samples = {**cpu_samples(calls, seconds), **(slow or {})}
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
    parser.add_argument("--quick", action="store_true", help="one small size: to see that it works, not to quote")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    folder: dict[str, Any] = {"nargs": "?", "type": Path, "const": Path("bench/results"), "metavar": "DIR"}
    parser.add_argument("--csv", help="write autoregressive-DEVICE.csv there", **folder)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    common = {"threads": arguments.threads, **provenance("cpu")}
    missing = {field.name: None for field in fields(Row)} | {"against": "", "failure": ""}
    sizes = QUICK if arguments.quick else SIZES
    found = []
    for values in itertools.chain.from_iterable(measured(*size, 0.2 if arguments.quick else 5.0) for size in sizes):
        found.append(Row(**{**missing, **common, **values}))
        print(line(found[-1]), flush=True)
    if arguments.csv is not None:
        path = arguments.csv / f"autoregressive-{slug(common['device'])}.csv"
        write_atomically(path, as_csv(found))
        print(f"written: {path}")
    return int(any(row.failure for row in found))
