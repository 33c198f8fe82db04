"""Grids of images and the learning curve."""

import contextlib
import csv
import functools
import math
import operator
import os
from pathlib import Path

import numpy as np
import torch

from ..models.checkpoint import replacing


def atomic(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[Path]:
    """A path beside ``path`` to write to; it takes the place of ``path`` when the block ends, unless it raises."""
    return replacing(Path(path), Path(path).with_name(f".{os.getpid()}.{Path(path).name}"))


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether a sample of this shape can be shown: (1, H, W) in gray or (3, H, W) in colour."""
    return len(shape) == 3 and shape[0] in (1, 3)


def to_pixels(x: torch.Tensor, levels: int) -> np.ndarray:
    """x (B, C, H, W), (v + u) / levels, as uint8 (B, H, W, C) from black for v = 0 to white for v = levels - 1."""
    v = (x.detach().float().cpu() * levels).nan_to_num(0.0).floor().clamp(0, levels - 1)
    return (v * (255.0 / (levels - 1))).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def save_grid(pixels: np.ndarray, path: str | os.PathLike[str], side: int = 64, columns: int | None = None) -> None:
    """Write uint8 (B, H, W, C) as a grid, each image enlarged without smoothing to about ``side`` pixels.

    The grid is near square if ``columns`` is None.
    Raises ValueError for a suffix that names no image format, and OSError if the file cannot be written.
    """
    from PIL import Image

    n, height, width, channels = pixels.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    rows = math.ceil(n / columns)
    gap = max(1, height // 8)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 128, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        grid[top : top + height, left : left + width] = image
    factor = max(1, side // height)
    picture = Image.fromarray(grid[:, :, 0] if channels == 1 else grid)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    with atomic(path) as temporary:
        picture.save(temporary)


def read_log(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """The CSV log of a run as name -> [(epoch, value), ...]; a resumed run replaces what it did again."""
    columns: dict[str, dict[int, tuple[float, float]]] = {}
    for path in sorted(folder.glob("version_*/metrics.csv"), key=lambda p: int(p.parent.name.removeprefix("version_"))):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for values in columns.values():
            for step in [s for s in values if rows and s >= int(rows[0]["step"])]:
                del values[step]
        for row in rows:
            for name in row.keys() - {"epoch", "step"}:
                if row[name]:
                    columns.setdefault(name, {})[int(row["step"])] = float(row["epoch"]), float(row[name])
    return {name: [values[step] for step in sorted(values)] for name, values in columns.items()}


def draw_curve(log: dict[str, list[tuple[float, float]]], path: str | os.PathLike[str], title: str, dims: int) -> None:
    """Plot the training and validation NLL over the epochs, in nats and, for samples with ``dims`` elements, in bits/dim."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    values: list[float] = []
    for name, label in (("train_nll", "training"), ("val_nll", "validation")):
        points = log.get(name, [])
        axes.plot([epoch + 1 for epoch, _ in points], [value for _, value in points], label=label)
        values += [value for _, value in points if math.isfinite(value)]
    if values:
        # The first epochs lie far above the rest.
        axes.set_ylim(min(values) - 0.05 * abs(min(values)), np.quantile(values, 0.95))
    axes.set(xlabel="epoch", ylabel="negative log-likelihood [nats]")
    # It may hold the name of a file: any characters, or none that are any.
    axes.set_title(title.encode("ascii", "backslashreplace").decode(), parse_math=False)
    axes.legend()
    bit = dims * math.log(2.0)
    to_bits = functools.partial(operator.mul, 1.0 / bit)
    to_nats = functools.partial(operator.mul, bit)
    axes.secondary_yaxis("right", functions=(to_bits, to_nats)).set_ylabel("bits/dim")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
