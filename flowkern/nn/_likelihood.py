"""Likelihoods: the distribution of an element of a sample, given some parameters that a network puts out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..ops import ScaleMap

__all__ = ["LIKELIHOODS", "Bernoulli", "Categorical", "Gaussian", "GaussianMixture", "Likelihood", "likelihood"]

_SCALE = ScaleMap.soft_clip(1e-3)  # standard deviations between 1e-3 and 1e3


class Likelihood:
    """Elements x (..., D), independent given their ``params`` (..., D, K): derive from it to write your own.

    ``log_prob`` is in nats, of shape (..., D). ``temperature`` multiplies standard deviations and divides logits of values.
    ``discrete`` says whether x are integers from 0 to ``levels`` - 1 (in any dtype).
    """

    params = 1
    discrete = False

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """What a network is shown of x, about from -1 to 1."""
        return x

    def log_prob(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no log_prob")

    def sample(self, params: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no sample")

    def mean(self, params: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no mean")


def _normal(x: torch.Tensor, mean: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    scale, log_scale = _SCALE(raw)
    return -0.5 * ((x - mean) / scale).square() - log_scale - 0.5 * math.log(2.0 * math.pi)


def _drawn(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits, validate_args=False).sample()


class Gaussian(Likelihood):
    """N(mean, scale^2), ``params`` (mean, raw): scale = soft_clip(raw), from 1e-3 to 1e3."""

    params = 2

    def log_prob(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return _normal(x, *params.unbind(-1))

    def sample(self, params: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        mean, raw = params.unbind(-1)
        return mean + temperature * _SCALE(raw)[0] * torch.randn_like(mean)

    def mean(self, params: torch.Tensor) -> torch.Tensor:
        return params[..., 0]


class GaussianMixture(Likelihood):
    """A mixture of C Gaussians, ``params``: C logits, C means and C raw scales."""

    def __init__(self, components: int):
        self.params = 3 * components

    def log_prob(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        logits, mean, raw = params.chunk(3, -1)
        return (logits.log_softmax(-1) + _normal(x[..., None], mean, raw)).logsumexp(-1)

    def sample(self, params: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        logits, mean, raw = params.chunk(3, -1)
        component = _drawn(logits)[..., None]
        mean, raw = mean.gather(-1, component)[..., 0], raw.gather(-1, component)[..., 0]
        return mean + temperature * _SCALE(raw)[0] * torch.randn_like(mean)

    def mean(self, params: torch.Tensor) -> torch.Tensor:
        logits, mean, _ = params.chunk(3, -1)
        return (logits.softmax(-1) * mean).sum(-1)


class Bernoulli(Likelihood):
    """P(1) = sigmoid(params). Values between 0 and 1 count as probabilities: the cross-entropy."""

    discrete = True
    levels = 2

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def log_prob(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        logit = params[..., 0]
        return x * F.logsigmoid(logit) + (1.0 - x) * F.logsigmoid(-logit)

    def sample(self, params: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        return (params[..., 0] / temperature).sigmoid().bernoulli()

    def mean(self, params: torch.Tensor) -> torch.Tensor:
        return params[..., 0].sigmoid()


class Categorical(Likelihood):
    """One logit for each of ``levels`` values."""

    discrete = True

    def __init__(self, levels: int):
        self.params = self.levels = levels

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x / (self.levels - 1) - 1.0

    def log_prob(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return params.log_softmax(-1).gather(-1, x.long()[..., None])[..., 0]

    def sample(self, params: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        return _drawn(params / temperature).to(params.dtype)

    def mean(self, params: torch.Tensor) -> torch.Tensor:
        return params.softmax(-1) @ torch.arange(self.levels, dtype=params.dtype, device=params.device)


LIKELIHOODS = ("gaussian", "mixture", "bernoulli", "categorical")


def likelihood(name: str, components: int = 10, levels: int = 256) -> Likelihood:
    """The likelihood of that name, with so many ``components`` of a mixture or ``levels`` of a discrete one.

    Raises ValueError for an unknown name and for fewer than 1 component or 2 levels.
    """
    if components < 1 or levels < 2:
        raise ValueError(f"components, levels: expected at least 1 and 2, got {components} and {levels}")
    if name not in LIKELIHOODS:
        raise ValueError(f"output: unknown name {name!r}; expected one of {', '.join(map(repr, LIKELIHOODS))}")
    return {
        "gaussian": Gaussian(),
        "mixture": GaussianMixture(components),
        "bernoulli": Bernoulli(),
        "categorical": Categorical(levels),
    }[name]
