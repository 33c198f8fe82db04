"""What a trained model has learned, as pictures: samples, reconstructions, and what lies between and around real images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .. import diagnostics
from ..data import Batch, Dataset, batch_of
from ..models import VAE, VQVAE, VQVAE2, Model
from ._evaluate import EVALUATION_SEED, context_of, data_dtype
from ._pictures import is_image, save_grid, to_pixels

__all__ = ["TEMPERATURES", "interpolate", "pairs", "reconstruct", "save_gallery"]

#: Of the sample grids: lower ones give smoother and less diverse images. The last one is the model's own distribution.
TEMPERATURES = (0.6, 0.8, 1.0)

#: Rows and columns of the pictures.
_SIDE = 8

#: Test images by which the use of codes is counted, at most.
_MANY = 1024


@torch.no_grad()
def reconstruct(model: Model, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
    """x (B, ...) to its latents and back: of a flow x up to rounding."""
    return model.render(model.embed(x, context), context)


@torch.no_grad()
def interpolate(
    model: Model, x0: torch.Tensor, x1: torch.Tensor, steps: int, context: torch.Tensor | None = None
) -> torch.Tensor:
    """What lies on the straight lines between the latents of x0 and x1 (B, ...), ends included: (B, steps, ...)."""
    z = diagnostics.interpolate(model.embed(x0, context), model.embed(x1, context), steps)
    rows = None if context is None else context.repeat_interleave(steps, 0)
    return model.render(z.flatten(0, 1), rows).unflatten(0, (len(x0), steps))


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
    ``interpolations.png`` and ``reconstructions.png`` of test images, dequantized; of VAEs ``means.png``, ``traversals.png``
    and ``analogies.png``.
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
        _save_latents(model, data, save, device)
    if isinstance(model, VAE):
        _save_means(model, context, save, seed)
        _save_directions(model, data, save, device)
    if isinstance(model, VQVAE | VQVAE2):
        lines.append(_usage(model, data, device))
    return lines


def _save_latents(model: Model, data: Dataset, save: Callable[[torch.Tensor, str, str], None], device: str) -> None:
    """Interpolations between test images, and test images from their latents."""
    labels = data.test.labels if model.context is not None and data.test.labels is not None else np.zeros(len(data.test))
    first, second = (_test_images(model, data, samples, device) for samples in pairs(labels, _SIDE).T)
    lines_of_images = interpolate(model, first.x, second.x, _SIDE, context_of(model, first.labels))
    save(lines_of_images.flatten(0, 1), "interpolations.png", "interpolations between test images")

    samples = np.arange(_SIDE**2 // 2) * len(data.test) // (_SIDE**2 // 2)
    real = _test_images(model, data, samples, device)
    again = reconstruct(model, real.x, context_of(model, real.labels))
    rows = torch.stack([real.x.unflatten(0, (-1, _SIDE)), again.unflatten(0, (-1, _SIDE))], 1)
    error = float((again - real.x).abs().max())
    save(rows.flatten(0, 2), "reconstructions.png", f"test images over their reconstructions (largest error {error:.1e})")


@torch.no_grad()
def _save_means(model: VAE, context: torch.Tensor | None, save: Callable[[torch.Tensor, str, str], None], seed: int) -> None:
    """What the decoder says of latents from the prior, without the noise that a sample of the pixels has."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        z = model.prior.sample(_SIDE**2)
        images = model.render(z.to(next(model.parameters()).dtype), context)
    save(images, "means.png", "means of p(x | z), for samples z of the prior")


@torch.no_grad()
def _save_directions(model: VAE, data: Dataset, save: Callable[[torch.Tensor, str, str], None], device: str) -> None:
    """A test image with one latent after the other moved, those that differ most between images first; and analogies.

    Of two layers of latents only the lower one is moved, which alone the decoder sees.
    """
    labels = np.zeros(len(data.test)) if data.test.labels is None else data.test.labels
    one, other = (_test_images(model, data, samples, device) for samples in pairs(labels, _SIDE).T)
    z, z_other = (model.embed(batch.x, context_of(model, batch.labels)) for batch in (one, other))
    context = context_of(model, one.labels)
    first = None if context is None else context[:1].repeat_interleave(_SIDE, 0)
    moved = [
        model.render(diagnostics.traverse(z[:1], dimension)[0], first)
        for dimension in z[:, : model.latent].var(0).argsort(descending=True)[:_SIDE].tolist()
    ]
    save(torch.cat(moved), "traversals.png", "an image with one latent in each row moved from -3 to 3")
    following = z.roll(-1, 0)
    fourth = model.render(diagnostics.analogy(z, z_other, following), None if context is None else context.roll(-1, 0))
    rows = [one.x, other.x, one.x.roll(-1, 0), fourth]
    save(torch.cat(rows), "analogies.png", "a, b, c and what is to c as b is to a, one below the other,")


def _usage(model: VQVAE | VQVAE2, data: Dataset, device: str) -> str:
    """How evenly the test images use the codes of each map."""
    batch = _test_images(model, data, np.arange(min(_MANY, len(data.test))), device)
    parts = []
    for codes, usage in zip(model.encode(batch.x), model.usage(batch.x), strict=True):
        height, width = codes.shape[1:]
        used = f"{float(usage.used):.0%} used, perplexity {float(usage.perplexity):.0f}"
        parts.append(f"{height}x{width} of {model.codes} ({used})")
    return f"codes of {len(batch.x)} test images: {', '.join(parts)}"


def _test_images(model: Model, data: Dataset, samples: np.ndarray, device: str) -> Batch:
    batch = batch_of(data, "test", samples, seed=EVALUATION_SEED, epoch=0)
    labels = None if batch.labels is None else batch.labels.to(device)
    return batch._replace(x=batch.x.to(device, data_dtype(model)), labels=labels)
