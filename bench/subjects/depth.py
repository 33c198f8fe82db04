"""``python -m bench.subjects.depth``: peak memory and time of a training step of Glow against the number of its steps.

Storing, reversible, and normflows' (if it is installed), with the same weights on the same images; the results are compared
before anything is measured. Peak memory is what torch's allocator hands out during a step (forward, backward, Adam), above
the weights, their gradients and the optimizer's state, which any way of training has to hold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from flowkern import nn

from ..files import slug, write_atomically
from ..memory import peak_extra_bytes
from ..provenance import provenance
from ..timing import cpu_samples
from .calls import Call
from .glow import FLOWKERN, Architecture, Row, as_csv, copy_weights, differs, glow, installed, line, peer

__all__ = ["main"]

#: Steps over both levels.
DEPTHS = (4, 8, 16, 32, 64)
STORE, REVERSIBLE, PEER = f"{FLOWKERN}-store", f"{FLOWKERN}-reversible", "normflows"
LEVELS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if a result was wrong."""
    arguments = _parser().parse_args(argv)
    if any(depth < LEVELS or depth % LEVELS for depth in arguments.depths):
        _parser().error(f"--depths: expected multiples of {LEVELS}, the steps over {LEVELS} levels, got {arguments.depths}")
    torch.set_num_threads(arguments.threads)
    if not installed(PEER):
        print(f"{PEER} is not installed: it is left out", file=sys.stderr)
    common = {"threads": arguments.threads, **provenance("cpu")}
    missing = {field.name: None for field in fields(Row)} | {"against": "", "failure": ""}
    rows: list[tuple[int, Row]] = []
    for depth in arguments.depths:
        size = {"hidden": 8, "side": 8, "batch": 2} if arguments.quick else {}
        architecture = Architecture(levels=LEVELS, steps=depth // LEVELS, **size)
        for values in measured(architecture, 0.2 if arguments.quick else arguments.seconds):
            rows.append((depth, Row(**{**missing, **common, **values})))
            print(line(rows[-1][1]), flush=True)
    if arguments.out is not None:
        name = f"depth-{slug(common['device'])}"
        write_atomically(arguments.out / f"{name}.csv", as_csv([row for _, row in rows]))
        title = f"Glow, {LEVELS} levels, hidden {architecture.hidden}, {architecture.batch} images of {architecture.side} pixels"
        draw(rows, f"{title}; {common['device']}, {arguments.threads} threads", arguments.out / f"{name}.png")
        print(f"written: {arguments.out / name}.csv and .png")
    return int(any(row.failure for _, row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.subjects.depth", description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS), help="steps over both levels (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few samples of a small model: to see that it works, not to quote")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each depth (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    out: dict[str, Any] = {"nargs": "?", "type": Path, "const": Path("bench/results"), "metavar": "DIR"}
    parser.add_argument("--out", help="write depth-DEVICE.csv and .png there (bench/results if no folder is named)", **out)
    return parser


def measured(a: Architecture, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of one depth: memory first, then times, all variants in turn."""
    x, models, theirs = variants(a)
    failures = {REVERSIBLE: disagreement(models[STORE], models[REVERSIBLE], x)}
    calls: dict[str, Call] = {name: training_call(model, model.log_prob, x) for name, model in models.items()}
    if theirs is not None:
        failures[PEER] = differs(theirs, models[STORE], x)
        calls[PEER] = training_call(theirs, lambda images: theirs.log_prob(images, None), x)
    where = {"case": a.name, "direction": "training step"}
    calls = {name: call for name, call in calls.items() if not failures.get(name)}
    for call in calls.values():
        call()  # gradients and Adam's state come with the first step
    memory = {name: peak_extra_bytes(call, torch.device("cpu")) / 2**20 for name, call in calls.items()}
    samples = cpu_samples(calls, seconds)
    base = statistics.median(samples[STORE])
    for name, values in samples.items():
        q1, median, q3 = (1000 * q for q in statistics.quantiles(values, n=4, method="inclusive"))
        figures = {"median_ms": median, "q1": q1, "q3": q3, "ratio": 1000 * base / median, "against": STORE}
        yield where | figures | {"variant": name, "peak_extra_mb": memory[name]}
    for name, failure in failures.items():
        if failure:
            yield where | {"variant": name, "failure": failure}


def training_call(model: torch.nn.Module, log_prob: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Call:
    """A training step whose gradients stay allocated, so small that the weights stay what they are."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-9)

    def step() -> tuple[torch.Tensor, ...]:
        optimizer.zero_grad(set_to_none=False)
        (-log_prob(x).mean()).backward()
        optimizer.step()
        return ()

    return step


def variants(a: Architecture) -> tuple[torch.Tensor, dict[str, nn.Flow], Any]:
    """Images, this library's models by name, and the peer's or None: all the same function, initialized from the images."""
    torch.manual_seed(0)
    x = torch.rand(a.batch, 3, a.side, a.side)
    models = {STORE: glow(a, "store"), REVERSIBLE: glow(a, "reversible")}
    theirs = peer(a) if installed(PEER) else None
    source = models[STORE] if theirs is None else theirs
    with torch.no_grad():
        source.log_prob(x, None)
        for p in source.parameters():
            p.add_(torch.randn_like(p), alpha=0.005)
    if theirs is not None:
        copy_weights(theirs, models[STORE])
    models[REVERSIBLE].load_state_dict(models[STORE].state_dict())
    return x, models, theirs


def disagreement(stored: nn.Flow, reversible: nn.Flow, x: torch.Tensor) -> str:
    """How reversible gradients differ from stored ones, if by more than 1e-4 of the whole gradient's size.

    One parameter's may differ by more: a ReLU whose argument is zero to rounding falls on the other side, as between
    storing in float32 and in float64.
    """
    exact, ours = ([g.double() for g in _gradients(m, x)] for m in (stored, reversible))
    difference = sum(float((a - b).square().sum()) for a, b in zip(exact, ours, strict=True))
    error = (difference / sum(float(g.square().sum()) for g in exact)) ** 0.5
    return "" if error < 1e-4 else f"the gradient differs by {error:.1e} of its size"


def _gradients(model: nn.Flow, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(-model.log_prob(x).mean(), [*model.parameters()])


def draw(rows: Sequence[tuple[int, Row]], title: str, path: Path) -> None:
    """Memory and time against depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Any] = [*figure.subplots(1, 2)]
    labels = {STORE: "flowkern, storing", REVERSIBLE: "flowkern, reversible", PEER: "normflows"}
    for panel, column, quantity in zip(panels, ("peak_extra_mb", "median_ms"), ("peak memory, MB", "time, ms"), strict=True):
        for variant, label in labels.items():
            points = [(depth, getattr(row, column)) for depth, row in rows if row.variant == variant and not row.failure]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", label=label)
        panel.set(xlabel="steps of flow", ylabel=f"{quantity} of a training step", ylim=(0, None))
        panel.set_xticks(sorted({depth for depth, _ in rows}))
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
