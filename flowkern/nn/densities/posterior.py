"""Approximate posteriors q(z | x): distributions of a latent whose parameters an encoder puts out."""

import math

import torch
from torch import nn

from ... import ops
from ..._core.checks import accumulation_dtype
from ..bijections.bijection import Bijection
from .base import Base, StandardNormal, normal_log_prob
from .flow import Flow

#: A log-scale is what it is from -10 to 10, and is bent beyond so that it stays within -15 and 15 and still has a gradient.
_FREE, _BEYOND = 10.0, ops.ScaleMap.soft_clip(math.exp(-5.0))


def _held(log_scale: torch.Tensor) -> torch.Tensor:
    inner = log_scale.clamp(-_FREE, _FREE)
    return inner + _BEYOND(log_scale - inner)[1]


class Posterior(nn.Module):
    """q(z | h) for an encoder's output h (B, ``inputs``); derive from it to write your own.

    ``sample_and_log_prob(h, k) -> (z, log q)``: k samples of z (k, B, L) for each row, differentiable in h (reparameterized),
    and log q(z | h) (k, B) in nats. ``kl(h) -> (B, L) | None``: KL(q || N(0, I)) per dimension where it has a closed form.
    """

    def __init__(self, features: int, inputs: int):
        super().__init__()
        self.features, self.inputs = features, inputs

    def sample_and_log_prob(self, h: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no sample_and_log_prob")

    def log_prob(self, z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """log q(z | h) of z (k, B, L): (k, B) in nats."""
        raise NotImplementedError(f"{type(self).__name__} has no log_prob")

    def forward(self, z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return self.log_prob(z, h)

    def check(self, h: torch.Tensor) -> torch.Tensor:
        """h itself. Raises ValueError for another shape than (B, ``inputs``)."""
        if h.ndim != 2 or h.shape[1] != self.inputs:
            raise ValueError(f"{type(self).__name__}: expected (B, {self.inputs}) from the encoder, got {tuple(h.shape)}")
        return h

    def mean(self, h: torch.Tensor) -> torch.Tensor:
        """A point (B, L) that stands for q(z | h)."""
        raise NotImplementedError(f"{type(self).__name__} has no mean")

    def kl(self, h: torch.Tensor) -> torch.Tensor | None:
        return None

    def extra_repr(self) -> str:
        return f"features={self.features}"


class GaussianPosterior(Posterior):
    """N(mean, diag exp(2 log_scale)) with (mean, log_scale) the halves of h (B, 2 L).

    log_scale is taken as it comes from -10 to 10; an excess v beyond counts as v / (1 + |v| / 5), within -15 and 15.

    KL(q || N(0, I)) = sum_j (mean_j^2 + exp(2 log_scale_j) - 1) / 2 - log_scale_j, in nats.
    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (2014), appendix B.
    """

    def __init__(self, features: int):
        super().__init__(features, 2 * features)

    def parameters_of(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, log_scale), each (B, L)."""
        mean, log_scale = self.check(h).to(accumulation_dtype(h)).chunk(2, 1)
        return mean, _held(log_scale)

    def sample_and_log_prob(self, h: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_scale = self.parameters_of(h)
        eps = torch.randn(k, *mean.shape, dtype=mean.dtype, device=mean.device)
        return mean + log_scale.exp() * eps, normal_log_prob(eps, 1) - log_scale.sum(-1)

    def log_prob(self, z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        mean, log_scale = self.parameters_of(h)
        eps = (z - mean) * (-log_scale).exp()
        return normal_log_prob(eps, 1) - log_scale.sum(-1)

    def mean(self, h: torch.Tensor) -> torch.Tensor:
        return self.parameters_of(h)[0]

    def sample_and_kl(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(z (B, L), KL(q || N(0, I)) (B,)) in one pass: ``ops.gaussian_kl``."""
        return ops.gaussian_kl(*self.parameters_of(h))

    def kl(self, h: torch.Tensor) -> torch.Tensor:
        mean, log_scale = self.parameters_of(h)
        return 0.5 * (mean.square() + torch.expm1(2.0 * log_scale)) - log_scale


class FlowPosterior(Posterior):
    """A diagonal Gaussian followed by a flow: z = bijection^-1(z_0, h), log q(z) = log q_0(z_0) - log|det dz / dz_0|.

    The bijection's ``inverse`` is the direction that is run: an ``InverseAutoregressive`` is fast there, ``Planar`` and
    ``Radial`` have a closed form. A bijection built with ``context`` sees what the encoder puts out beyond the Gaussian's
    2 L values: say how many, as ``context`` here too. Raises TypeError for what is no bijection.

    Source: Rezende and Mohamed, "Variational Inference with Normalizing Flows" (2015), eq. 13; Kingma et al., "Improved
    Variational Inference with Inverse Autoregressive Flow" (2016).
    """

    def __init__(self, features: int, bijection: Bijection, context: int | None = None):
        super().__init__(features, 2 * features + (context or 0))
        if not isinstance(bijection, Bijection):
            hint = "; of a Flow that is its bijection" if isinstance(bijection, Flow) else ""
            raise TypeError(f"bijection: expected a Bijection, got {type(bijection).__name__}{hint}")
        self.base, self.bijection, self.context = GaussianPosterior(features), bijection, context

    def _of_base(self, h: torch.Tensor) -> torch.Tensor:
        return self.check(h)[:, : 2 * self.features]

    def _context(self, h: torch.Tensor, k: int) -> torch.Tensor | None:
        return None if self.context is None else h[:, -self.context :].repeat(k, 1)

    def sample_and_log_prob(self, h: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        z0, log_q = self.base.sample_and_log_prob(self._of_base(h), k)
        z, logabsdet = self.bijection.inverse(z0.flatten(0, 1), self._context(h, k))
        return z.view_as(z0), log_q - logabsdet.view_as(log_q)

    def log_prob(self, z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        z0, logabsdet = self.bijection(z.flatten(0, 1), self._context(h, z.shape[0]))
        return self.base.log_prob(z0.view_as(z), self._of_base(h)) + logabsdet.view(z.shape[:2])

    def mean(self, h: torch.Tensor) -> torch.Tensor:
        return self.bijection.inverse(self.base.mean(self._of_base(h)), self._context(h, 1))[0]


class HierarchicalPosterior(Posterior):
    """q(z_1 | x) q(z_2 | z_1) of z = (z_1, z_2), both diagonal Gaussians; ``network``: (N, L_1) -> (N, 2 L_2)."""

    def __init__(self, lower: int, upper: int, network: nn.Module):
        super().__init__(lower + upper, 2 * lower)
        self.split, self.network = [lower, upper], network
        self.lower, self.upper = GaussianPosterior(lower), GaussianPosterior(upper)

    def _of_upper(self, z1: torch.Tensor) -> torch.Tensor:
        return self.network(z1.flatten(0, -2))

    def sample_and_log_prob(self, h: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        z1, log_q1 = self.lower.sample_and_log_prob(h, k)
        z2, log_q2 = self.upper.sample_and_log_prob(self._of_upper(z1))
        return torch.cat([z1, z2.view(*z1.shape[:2], -1)], -1), log_q1 + log_q2.view_as(log_q1)

    def log_prob(self, z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        z1, z2 = z.split(self.split, -1)
        log_q2 = self.upper.log_prob(z2.flatten(0, -2)[None], self._of_upper(z1))
        return self.lower.log_prob(z1, h) + log_q2.view(z.shape[:-1])

    def mean(self, h: torch.Tensor) -> torch.Tensor:
        z1 = self.lower.mean(h)
        return torch.cat([z1, self.upper.mean(self._of_upper(z1))], -1)


class HierarchicalPrior(Base):
    """p(z_2) p(z_1 | z_2): standard normal, and diagonal Gaussian with parameters from ``network``, (N, L_2) -> (N, 2 L_1)."""

    def __init__(self, lower: int, upper: int, network: nn.Module):
        super().__init__(lower + upper)
        self.split, self.network = [lower, upper], network
        self.lower, self.upper = GaussianPosterior(lower), StandardNormal(upper)

    def log_prob(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        z1, z2 = self.check(z).split(self.split, 1)
        return self.upper.log_prob(z2) + self.lower.log_prob(z1[None], self.network(z2))[0]

    def rsample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        z2 = self.upper.rsample(n, temperature)
        h = self.network(z2)
        mean = self.lower.mean(h)
        return torch.cat([mean + temperature * (self.lower.sample_and_log_prob(h)[0][0] - mean), z2], 1)
