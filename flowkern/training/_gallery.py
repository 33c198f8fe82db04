"""What a trained model has learned, as pictures: samples, reconstructions, and what lies between and around real images."""

from pathlib import Path

import numpy as np
import torch

from ..data import Batch, Dataset, batch_of
from ..models import Model
from ._evaluate import EVALUATION_SEED, context_of, on_device
from ._pictures import is_image, save_grid, to_pixels

#: Of the sample grids: lower ones give smoother and less diverse images. The last one is the model's own distribution.
TEMPERATURES = (0.6, 0.8, 1.0)

#: Rows and columns of the pictures.
_SIDE = 8

#: Test images that a model makes its remarks on, at most.
_MANY = 1024


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
