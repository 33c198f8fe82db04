"""Two layers of latents: z_1 under z_2, both as one vector (z_1, z_2)."""

from __future__ import annotations

import torch
from torch import nn

from .base import Base, StandardNormal
from .posterior import GaussianPosterior, Posterior

__all__ = ["HierarchicalPosterior", "HierarchicalPrior"]


class HierarchicalPosterior(Posterior):
    """q(z_1 | x) q(z_2 | z_1), both diagonal Gaussians; ``network``: (N, L_1) -> (N, 2 L_2)."""

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
