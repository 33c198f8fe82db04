"""Peak memory and time of a training step of Glow against the number of its steps: storing, reversible, and normflows'.

All have the same weights and images; the results are compared before anything is measured. Peak memory is what torch's
allocator hands out during a step (forward, backward, Adam), above the weights, their gradients and the optimizer's state,
which any way of training has to hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from flowkern import nn

from ..comparison import FLOWKERN, Comparison, Options, peer, peers_of
from ..row import Row, plot
from .glow import Architecture, by_normflows, copy_weights, differs, glow, perturbed, training_step

__all__ = ["DEVICES", "comparisons", "draw"]

DEVICES = ("cpu",)
#: Steps over both levels.
DEPTHS = (4, 8, 16, 32, 64)
QUICK = (2, 4)
STORE, REVERSIBLE, PEER = f"{FLOWKERN}-store", f"{FLOWKERN}-reversible", "normflows"
LEVELS = 2

peer("depth", PEER)(by_normflows)


def comparisons(options: Options) -> Iterator[Comparison]:
    """Those of each depth."""
    for depth in QUICK if options.quick else DEPTHS:
        size = {"hidden": 8, "side": 8, "batch": 2} if options.quick else {}
        architecture = Architecture(levels=LEVELS, steps=depth // LEVELS, **size)
        if options.wants(architecture.name):
            yield compared(architecture)


def compared(a: Architecture) -> Comparison:
    """Training steps at one depth."""
    x, models, theirs = variants(a)
    failures = {REVERSIBLE: disagreement(models[STORE], models[REVERSIBLE], x)}
    calls = {name: training_step(model, x, keep=True) for name, model in models.items()}
    if theirs is not None:
        failures[PEER] = differs(theirs, models[STORE], x)
        calls[PEER] = training_step(theirs, x, None, keep=True)
    for call in calls.values():
        call()  # gradients and Adam's state come with the first step
    return Comparison(a.name, "training step", calls, STORE, failures=failures, seconds=20.0)


def variants(a: Architecture) -> tuple[torch.Tensor, dict[str, nn.Flow], Any]:
    """Images, this library's models by name, and the peer's or None: all the same function, initialized from the images."""
    torch.manual_seed(0)
    x = torch.rand(a.batch, 3, a.side, a.side)
    models = {STORE: glow(a, "store"), REVERSIBLE: glow(a, "reversible")}
    made = peers_of("depth").get(PEER)
    theirs = None if made is None else made(a)
    perturbed(models[STORE] if theirs is None else theirs, x)
    if theirs is not None:
        copy_weights(theirs, models[STORE])
    models[REVERSIBLE].load_state_dict(models[STORE].state_dict())
    return x, models, theirs


def disagreement(stored: nn.Flow, reversible: nn.Flow, x: torch.Tensor) -> str:
    """How reversible gradients differ from stored ones, if by more than 1e-4 of the whole gradient's size.

    One parameter's may differ by more: a ReLU whose argument is zero to rounding falls on the other side, as between
    storing in float32 and in float64.
    """
    losses = ((m, -m.log_prob(x).mean()) for m in (stored, reversible))
    exact, ours = ([g.double() for g in torch.autograd.grad(loss, [*m.parameters()])] for m, loss in losses)
    difference = sum(float((a - b).square().sum()) for a, b in zip(exact, ours, strict=True))
    error = (difference / sum(float(g.square().sum()) for g in exact)) ** 0.5
    return "" if error < 1e-4 else f"the gradient differs by {error:.1e} of its size"


def draw(rows: Sequence[Row], where: str, path: Path) -> None:
    """Memory and time against depth."""

    def depth(row: Row) -> int:
        """Of glow-LEVELSxSTEPS-..."""
        levels, steps = row.case.split("-")[1].split("x")
        return int(levels) * int(steps)

    labels = {STORE: "flowkern, storing", REVERSIBLE: "flowkern, reversible", PEER: "normflows"}
    own = {label: [row for row in rows if row.variant == variant] for variant, label in labels.items()}
    panels = {
        "peak memory, MB, of a training step": lambda row: (row.peak_extra_bytes or 0) / 2**20,
        "time, ms, of a training step": lambda row: (row.median_us or 0.0) / 1000,
    }
    lines = {name: {label: [(depth(r), y(r)) for r in own[label]] for label in own} for name, y in panels.items()}
    title = f"Glow, {rows[0].case.split('-', 2)[2]}; {where}"
    plot(path, title, "steps of flow", lines)
