"""What a trained model has learned, as pictures: samples, reconstructions, and what lies between and around real images."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import Batch, Dataset, batch_of
from ..models import Model, load, read_checkpoint
from ._evaluate import EVALUATION_SEED, context_of, on_device, usable_device
from ._pictures import atomic, is_image, save_grid, to_pixels

#: Of the sample grids: lower ones give smoother and less diverse images. The last one is the model's own distribution.
TEMPERATURES = (0.6, 0.8, 1.0)

#: Rows and columns of the pictures; test images that a model makes its remarks on, at most.
_SIDE, _MANY = 8, 1024


@torch.no_grad()
def reconstruct(model: Model, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
    """x (B, ...) to its latents and back: of a flow x up to rounding."""
    return model.render(model.embed(x, context), context)


def pairs(labels: np.ndarray, n: int) -> np.ndarray:
    """(n, 2) numbers of samples with the same label, half of that label's samples apart, from one label after the other."""
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    chosen = []
    for i in range(n):
        group = groups[i % len(groups)]
        first = i * len(group) // (2 * n)
        chosen.append((group[first], group[first + len(group) // 2]))
    return np.array(chosen)


def save_gallery(model: Model, data: Dataset, out: Path, *, seed: int, device: str = "cpu") -> list[str]:
    """Write the pictures to the folder ``out``; a line on each, or none for data that is no images.

    ``samples.png`` at temperature 1 and ``samples-T.png`` at the others, from the same noise; of models with latents also
    ``interpolations.png`` and ``reconstructions.png`` of test images, dequantized; and the model's own ``pictures``.
    """
    if data.levels is None or not is_image(data.shape):
        return []
    levels, lines = data.levels, []

    def save(images: torch.Tensor, name: str, what: str) -> None:
        save_grid(to_pixels(images, levels), out / name, columns=_SIDE)
        lines.append(f"{what} in {out / name}")

    context = context_of(model, torch.arange(_SIDE**2, device=device) % max(1, len(data.classes)))
    for temperature in TEMPERATURES:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            images = model.sample(_SIDE**2, context, temperature)
        name = "samples.png" if temperature == 1.0 else f"samples-{temperature}.png"
        save(images, name, f"samples at temperature {temperature}")

    if model.has_latents:
        first, second = _pair_of_images(model, data, None if model.context is None else data.test.labels, device)
        lines_of_images = model.interpolate(first.x, second.x, _SIDE, context_of(model, first.labels))
        save(lines_of_images.flatten(0, 1), "interpolations.png", "interpolations between test images")
        samples = np.arange(_SIDE**2 // 2) * len(data.test) // (_SIDE**2 // 2)
        real = _test_images(model, data, samples, device)
        again = reconstruct(model, real.x, context_of(model, real.labels))
        rows = torch.stack([real.x.unflatten(0, (-1, _SIDE)), again.unflatten(0, (-1, _SIDE))], 1)
        error = float((again - real.x).abs().max())
        save(rows.flatten(0, 2), "reconstructions.png", f"test images over their reconstructions (largest error {error:.1e})")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        one, other = _pair_of_images(model, data, data.test.labels, device)
        for picture in model.pictures(one.x, other.x, context_of(model, one.labels), context):
            save(picture.images, picture.name, picture.what)
    return lines + model.remarks(_test_images(model, data, np.arange(min(_MANY, len(data.test))), device).x)


def _pair_of_images(model: Model, data: Dataset, labels: np.ndarray | None, device: str) -> list[Batch]:
    """Two batches of test images, each pair of which shares its label where there are ``labels``."""
    chosen = pairs(np.zeros(len(data.test)) if labels is None else labels, _SIDE)
    return [_test_images(model, data, samples, device) for samples in chosen.T]


def _test_images(model: Model, data: Dataset, samples: np.ndarray, device: str) -> Batch:
    return on_device(batch_of(data, "test", samples, seed=EVALUATION_SEED, epoch=0), model, device)


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
    content = read_checkpoint(checkpoint)
    described = content.get("data", {"levels": 256, "classes": []})
    model = load(checkpoint).to(device)
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


def _labels(model: Model, classes: list[Any], label: str | None, n: int) -> torch.Tensor:
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
