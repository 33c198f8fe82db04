"""Samples of a checkpoint, as a picture or as values."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import models
from ._evaluate import context_of, usable_device
from ._pictures import atomic, is_image, save_grid, to_pixels


def save_samples(
    checkpoint: Path,
    out: Path,
    n: int = 64,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    label: str | None = None,
    device: str = "cpu",
) -> None:
    """Draw ``n`` samples and write them: to a ``.npy`` file as float32 (n, ...), to any other as a grid of images.

    ``label`` is the class, by name or number, that a conditional model draws; by default it goes through all of them.

    Raises ValueError for a checkpoint that is not whole, fewer than one sample, a temperature below 0, an unknown label, a
    label for a model that takes none, a suffix that names no image format, and a picture of samples that are no images.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 sample, got {n}")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature:g}")
    usable_device(device)
    content = models.read_checkpoint(checkpoint)
    described = content.get("data", {"levels": 256, "classes": []})
    model = models.load(checkpoint).to(device)
    picture = out.suffix != ".npy"
    if picture and (not is_image(model.shape) or described["levels"] is None):
        raise ValueError(f"{checkpoint}: samples of shape {model.shape} make no picture; expected a name that ends in .npy")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        context = context_of(model, _labels(model, described["classes"], label, n))
        x = model.sample(n, None if context is None else context.to(device), temperature)
    out.parent.mkdir(parents=True, exist_ok=True)
    if picture:
        save_grid(to_pixels(x, described["levels"]), out)
        return
    with atomic(out) as temporary, open(temporary, "wb") as file:
        np.save(file, x.float().cpu().numpy())


def _labels(model: models.Model, classes: list[Any], label: str | None, n: int) -> torch.Tensor:
    if label is None:
        return torch.arange(n) % (model.context or 1)
    if model.context is None:
        raise ValueError(f"label: the model takes none, got {label!r}")
    names = classes or [str(i) for i in range(model.context)]
    if label in names:
        return torch.full((n,), names.index(label))
    if label.isdecimal() and int(label) < model.context:
        return torch.full((n,), int(label))
    raise ValueError(f"label: unknown class {label!r}; expected one of {', '.join(names)}")
