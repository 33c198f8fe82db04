"""A normalizing flow: a bijection and a base distribution."""

import math

import torch
from torch import nn
from torch.distributions import Distribution

from ..bijections.bijection import Bijection, Pair
from .base import Base, as_base


def bits_per_dim(log_prob: torch.Tensor, dims: int, levels: int) -> torch.Tensor:
    """Bits per dimension of discrete data with ``levels`` values, from the density of x = (v + u) / levels, u uniform on [0, 1).

    (D log levels - log p(x)) / (D log 2), an upper bound on -log2 P(v) / D. (The density of v + u is p(x) / levels^D.)

    Args:
        log_prob: log p(x) in nats, any shape.
        dims: D, the number of elements of a sample.
        levels: how many values an element can have; 256 for 8-bit images.

    Raises ValueError if ``levels`` or ``dims`` is below 1, and, with the count, if a log-probability is NaN.
    Source: Theis, van den Oord and Bethge, "A note on the evaluation of generative models" (2016), section 3.1.
    """
    if levels < 1 or dims < 1:
        raise ValueError(f"bits_per_dim: dims and levels must be at least 1, got {dims} and {levels}")
    if invalid := int(log_prob.isnan().sum()):
        raise ValueError(f"bits_per_dim: {invalid} of {log_prob.numel()} log-probabilities are NaN")
    return (dims * math.log(levels) - log_prob) / (dims * math.log(2.0))


def context_rows(context: torch.Tensor | None, n: int) -> torch.Tensor | None:
    """The context of n samples, (n, K) or (1, K), as (n, K); None for none. Raises ValueError for other numbers of rows."""
    if context is None:
        return None
    if context.ndim != 2 or context.shape[0] not in (1, n):
        raise ValueError(f"context: expected shape ({n}, K) or (1, K) for {n} samples, got {tuple(context.shape)}")
    return context.expand(n, -1)


class Flow(nn.Module):
    """The density log p(x) = log p_base(z) + logabsdet with (z, logabsdet) = bijection(x), in nats.

    Args:
        bijection: a ``Bijection``, data to latent.
        base: a base of ``flowkern.nn``, or a ``torch.distributions.Distribution`` whose batch and event dimensions
            together are the shape of a latent (its tensors follow ``.to()``, but are not trained).

    Called as a module it returns ``log_prob``, so that wrappers (data parallel, compile) see the training path.
    """

    bijection: Bijection
    base: Base
    _rows = staticmethod(context_rows)

    def __init__(self, bijection: Bijection, base: Base | Distribution):
        super().__init__()
        self.bijection = bijection
        self.base = as_base(base)

    def log_prob(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, ...), context (B, K) or None -> (B,) in nats. Raises ValueError if x or its latent has a wrong shape."""
        z, logabsdet = self.bijection(x, context)
        return self.base.log_prob(z, context) + logabsdet

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.log_prob(x, context)

    @torch.no_grad()
    def sample(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """n samples (n, ...), without gradients.

        ``context`` (n, K) gives sample i its row i; (1, K) serves all samples. ``temperature`` multiplies the base's standard
        deviation: below 1 the samples are more typical and less diverse. Raises ValueError for other numbers of rows.
        """
        context = self._rows(context, n)
        return self.bijection.inverse(self.base.sample(n, temperature, context), context)[0]

    def rsample(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """As ``sample``, differentiable in the parameters and the context.

        Raises NotImplementedError for a base that has no ``rsample``.
        """
        context = self._rows(context, n)
        return self.bijection.inverse(self.base.rsample(n, temperature, context), context)[0]

    def sample_and_log_prob(self, n: int, context: torch.Tensor | None = None) -> Pair:
        """(x, log p(x)): n samples (n, ...) and (n,) nats from one inverse pass, differentiable as ``rsample`` is."""
        context = self._rows(context, n)
        z = self.base.rsample(n, context=context)
        x, logabsdet = self.bijection.inverse(z, context)
        return x, self.base.log_prob(z, context) - logabsdet

    @torch.no_grad()
    def bits_per_dim(self, x: torch.Tensor, levels: int, context: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over x of ``flowkern.nn.bits_per_dim``: a scalar.

        x (B, ...) holds (v + u) / levels in [0, 1). Raises ValueError for an empty batch and, with the count, for NaN.
        """
        if x.numel() == 0:
            raise ValueError(f"bits_per_dim: x is empty, shape {tuple(x.shape)}")
        return bits_per_dim(self.log_prob(x, context), x[0].numel(), levels).mean()
