"""The negative log-likelihood of a data set under a flow, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from ..data import Batch, Dataset, batch_of
from ..models import Model
from ..nn.densities.base import check_sizes

LogProb = Callable[..., torch.Tensor]


class Diverged(RuntimeError):
    """The loss of a training run is not finite any more."""


@dataclass(frozen=True)
class Score:
    """A mean negative log-likelihood: nats per sample and bits per dimension, each with its standard error."""

    nats: float
    nats_error: float
    bits_per_dim: float
    bits_per_dim_error: float
    samples: int
    draws: int

    @classmethod
    def of(cls, nll: torch.Tensor, data: Dataset, draws: int) -> Score:
        """The score of nll (N,) in nats, for samples of ``data``, each the mean over so many ``draws``."""
        nats, error = float(nll.mean()), float(nll.std() / math.sqrt(len(nll)))
        bit = math.prod(data.shape) * math.log(2.0)
        return cls(nats, error, nats / bit, error / bit, len(nll), draws)

    def __str__(self) -> str:
        return (
            f"{self.nats:.2f} +- {self.nats_error:.2f} nats, {self.bits_per_dim:.3f} +- {self.bits_per_dim_error:.3f} bits/dim "
            f"({self.samples} samples, {self.draws} draw{'s' if self.draws > 1 else ''})"
        )


def context_of(model: Model, labels: torch.Tensor | None) -> torch.Tensor | None:
    """The labels (B,) one-hot as (B, K) in the model's dtype, or None for a model without context.

    Raises ValueError if the model needs labels and there are none, and for labels out of range.
    """
    if model.context is None:
        return None
    if labels is None:
        raise ValueError("the model is conditional, and the data has no labels")
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < model.context:
        raise ValueError(f"labels: expected 0 to {model.context - 1}, got {int(labels.min())} to {int(labels.max())}")
    return torch.nn.functional.one_hot(labels, model.context).to(_dtype(model))


def usable_device(device: str) -> torch.device:
    """The device of that name. Raises ValueError, saying why, for one that torch cannot put values on here."""
    try:
        torch.zeros(1).to(device).item()
    except Exception as error:  # of any kind, by the backend that is not there
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"device: expected one that torch can use here, got {device!r}: {reason}") from error
    return torch.device(device)


def suited(data: Dataset, model: Model) -> Dataset:
    """``data`` without noise if the model is discrete."""
    return replace(data, noise=data.noise and not model.discrete)


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)


def on_device(batch: Batch, model: Model, device: str) -> Batch:
    """A batch for ``model``: in float32 if that reads integers from x, which half precision would change, else in its dtype."""
    labels = None if batch.labels is None else batch.labels.to(device)
    return batch._replace(x=batch.x.to(device, torch.float32 if model.discrete else _dtype(model)), labels=labels)


def negative_log_likelihood(log_prob: torch.Tensor, dims: int, levels: int | None) -> torch.Tensor:
    """(B,) nats: D log(levels) - log p(x) of dequantized data, -log p(x) of continuous data (levels None)."""
    return dims * math.log(levels or 1) - log_prob


# Not a seed of ``Plan``: no training run has seen this noise.
EVALUATION_SEED = 2**63


def evaluate(
    model: Model, data: Dataset, part: str = "test", *, draws: int = 20, batch_size: int = 256, device: str = "cpu"
) -> Score:
    """The mean of ``sample_nlls`` over a split, and its standard error over the samples. Raises as that does."""
    nll = sample_nlls(model, data, part, draws=draws, batch_size=batch_size, device=device)
    return Score.of(nll, data, needed_draws(model, data, draws))


def needed_draws(model: Model, data: Dataset, draws: int) -> int:
    """``draws`` where random numbers enter the bound, by noise on the data or in the model; else 1."""
    return draws if model.stochastic or (data.levels is not None and not model.discrete) else 1


def sample_nlls(
    model: Model,
    data: Dataset,
    part: str = "test",
    *,
    draws: int = 20,
    batch_size: int = 256,
    device: str = "cpu",
    bar: bool = False,
) -> torch.Tensor:
    """The negative log-likelihood of each sample of a split, (N,) in nats and float64.

    For discrete data it is the bound -log P(v) <= E_u[-log p((v + u) / levels)] + D log(levels), the expectation
    averaged over ``draws`` draws of u for each sample, always the same ones. A model whose ``log_prob`` is stochastic is
    averaged over as many draws of its own noise, which are the same ones for the same ``batch_size`` on the same kind of
    ``device``. Continuous data and other discrete models need one draw. ``bar`` shows the progress on a terminal.

    Raises ValueError for data of another shape or number of classes than the model's, fewer than one draw or sample in a
    batch, fewer than two samples, and for a likelihood that is not a number, with the count.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for nll in _draws(model, model.log_prob, data, part, draws, batch_size, device, bar):
        total, count = total + nll, count + 1
    return _checked(total / count)


def importance_nlls(
    model: Model,
    data: Dataset,
    part: str = "test",
    *,
    draws: int = 1000,
    batch_size: int = 256,
    device: str = "cpu",
    bar: bool = False,
) -> torch.Tensor:
    """An estimate of -log P of each sample of a split, (N,) in nats and float64: -log mean_k w_k over so many draws.

    The weights w are those of the model's ``log_weight``, whose mean is P itself: of dequantization noise, of latents, or of
    both. The estimate is too high on average, by less the more draws there are; with one draw it is the bound. Raises as
    ``sample_nlls`` does. Source: Burda et al., "Importance Weighted Autoencoders" (2016), theorem 1.
    """
    total, count = torch.full((), -math.inf, dtype=torch.float64), 0
    for nll in _draws(model, model.log_weight, data, part, draws, batch_size, device, bar):
        total, count = torch.logaddexp(total, -nll), count + 1
    return _checked(math.log(count) - total)


def _checked(nll: torch.Tensor) -> torch.Tensor:
    if invalid := int(nll.isnan().sum()):
        raise ValueError(f"the likelihood of {invalid} of {len(nll)} samples is not a number")
    return nll


@torch.no_grad()
def _draws(
    model: Model,
    log_prob: Callable[..., torch.Tensor],
    data: Dataset,
    part: str,
    draws: int,
    batch_size: int,
    device: str,
    bar: bool,
) -> Iterator[torch.Tensor]:
    """The negative log-likelihood of each sample (N,), by one draw of all noise after the other."""
    if data.shape != model.shape:
        raise ValueError(f"the model is for samples of shape {model.shape}, and {data.name} has {data.shape}")
    if model.context not in (None, len(data.classes)):
        raise ValueError(f"the model is for {model.context} classes, and {data.name} has {len(data.classes)}")
    check_sizes(draws=draws, batch_size=batch_size)
    usable_device(device)
    n = len(getattr(data, part))
    if n < 2:
        raise ValueError(f"{data.name}: a standard error needs at least 2 samples, the {part} split has {n}")
    data = suited(data, model)
    training = model.training
    model.to(device).eval()
    try:
        needed, console = range(needed_draws(model, data, draws)), Console(stderr=True)
        for draw in track(needed, "draws", console=console, transient=True, disable=not (bar and console.is_terminal)):
            parts = []
            with torch.random.fork_rng():
                torch.manual_seed(draw)
                for start in range(0, n, batch_size):
                    samples = np.arange(start, min(start + batch_size, n))
                    batch = on_device(batch_of(data, part, samples, seed=EVALUATION_SEED, epoch=draw), model, device)
                    value = log_prob(batch.x, context_of(model, batch.labels))
                    parts.append(negative_log_likelihood(value.cpu().double(), batch.x[0].numel(), data.levels))
            yield torch.cat(parts)
    finally:
        model.train(training)
