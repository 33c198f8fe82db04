"""Lines against a size, as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot"]

Points = Sequence[tuple[float, float]]


def plot(
    path: Path, title: str, x: str, panels: Mapping[str, Mapping[str, Points]], log: bool = False, dashed: Sequence[str] = ()
) -> None:
    """One panel for each quantity, with a line for each label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4.0 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (quantity, lines) in zip(axes, panels.items(), strict=True):
        for label, points in lines.items():
            if points:
                xs, ys = zip(*sorted(points), strict=True)
                axis.plot(xs, ys, marker="o", label=label, linestyle="--" if label in dashed else "-")
        axis.set(xlabel=x, ylabel=quantity)
        axis.set(xscale="log", yscale="log") if log else axis.set(ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
