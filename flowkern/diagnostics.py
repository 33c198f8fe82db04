"""What a trained VAE has learned: where its rate goes, which latents it uses, and pictures of them.

Everything here is a function of a ``nn.VAE`` and data x (N, ...), as the model's likelihood takes it, and raises TypeError for
a model that has no encoder, posterior and evidence as that one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .nn import VAE, Objective

__all__ = ["Surgery", "active_units", "analogy", "elbo_surgery", "gradient_variance", "interpolate", "traverse"]


@dataclass(frozen=True)
class Surgery:
    """The terms of the mean ELBO of n samples, in nats: elbo = reconstruction - mutual_information - marginal_kl.

    ``mutual_information`` is that of the sample's number i and z under q(i, z) = q(z | x_i) / n, at most log n;
    ``marginal_kl`` is KL(q(z) || p(z)) of the aggregated posterior q(z) = mean_i q(z | x_i), which a better prior lowers.
    """

    reconstruction: float
    mutual_information: float
    marginal_kl: float
    log_n: float

    @property
    def elbo(self) -> float:
        return self.reconstruction - self.mutual_information - self.marginal_kl

    def __str__(self) -> str:
        return (
            f"ELBO {self.elbo:.2f} nats = reconstruction {self.reconstruction:.2f} - mutual information of index and code "
            f"{self.mutual_information:.2f} (at most log n = {self.log_n:.2f}) - marginal KL {self.marginal_kl:.2f}"
        )


@torch.no_grad()
def elbo_surgery(vae: VAE, x: torch.Tensor, context: torch.Tensor | None = None, *, draws: int = 10, chunk: int = 64) -> Surgery:
    """The terms of the ELBO of x (n, ...), by so many ``draws`` of z for each sample.

    Every z is weighed under the posteriors of all n samples, ``chunk`` values of z at a time: n^2 ``draws`` densities.
    Raises ValueError for fewer than one sample or draw.
    Source: Hoffman and Johnson, "ELBO surgery: yet another way to carve up the variational evidence lower bound" (2016).
    """
    _check_vae(vae)
    if len(x) < 1 or draws < 1 or chunk < 1:
        raise ValueError(f"expected at least 1 sample, draw and row in a chunk, got {len(x)}, {draws} and {chunk}")
    h = vae.encode(x, context)
    totals = torch.zeros(3, dtype=torch.float64)
    for _ in range(draws):
        # The posteriors of h alone: an encoder with dropout would give others.
        evidence = vae.evidence_of(x, *vae.posterior.sample_and_log_prob(h), context)
        marginal = torch.cat([_aggregated(vae, part, h) for part in evidence.z[0].split(chunk)])
        terms = evidence.reconstruction[0], evidence.posterior[0] - marginal, marginal - evidence.prior[0]
        totals += torch.stack([term.double().mean() for term in terms]).cpu()
    reconstruction, information, marginal_kl = (totals / draws).tolist()
    return Surgery(reconstruction, information, marginal_kl, math.log(len(x)))


def _check_vae(vae: VAE) -> None:
    if not all(hasattr(vae, name) for name in ("encoder", "encode", "posterior", "evidence_of", "loss")):
        raise TypeError(f"vae: expected a flowkern.nn.VAE, got {type(vae).__name__}")


def _aggregated(vae: VAE, z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """log q(z) = log mean_i q(z | h_i) of z (M, L): (M,)."""
    log_q = vae.posterior.log_prob(z[:, None].expand(-1, len(h), -1), h)
    return log_q.logsumexp(1) - math.log(len(h))


@torch.no_grad()
def active_units(
    vae: VAE, x: torch.Tensor, context: torch.Tensor | None = None, *, threshold: float = 0.01
) -> tuple[int, torch.Tensor]:
    """(how many, the variances (L,)): a latent is active if the variance over x of its posterior's point exceeds ``threshold``.

    Raises ValueError for fewer than two samples.
    Source: Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders" (2016), section 5.2.
    """
    _check_vae(vae)
    if len(x) < 2:
        raise ValueError(f"x: a variance needs at least 2 samples, got {len(x)}")
    variance = vae.posterior.mean(vae.encode(x, context)).var(0)
    return int((variance > threshold).sum()), variance


def gradient_variance(
    vae: VAE, x: torch.Tensor, estimators: dict[str, Objective], context: torch.Tensor | None = None, *, draws: int = 100
) -> dict[str, float]:
    """The variance of each estimator's gradient with respect to the encoder, summed over its parameters.

    ``estimators`` are ``nn.Objective`` by any name: the pathwise (``elbo``) and the likelihood-ratio gradient, for instance,
    estimate the same and differ in this. Raises ValueError for fewer than two draws.
    """
    _check_vae(vae)
    if draws < 2:
        raise ValueError(f"draws: a variance needs at least 2, got {draws}")
    parameters = [p for p in vae.encoder.parameters() if p.requires_grad]
    found = {}
    for name, objective in estimators.items():
        rows = []
        for _ in range(draws):
            loss = vae.loss(x, objective, context).mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in gradients]))
        found[name] = float(torch.stack(rows).var(0).sum())
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Points in the space of latents; ``Model.render`` turns them into images.


def traverse(z: torch.Tensor, dimension: int, low: float = -3.0, high: float = 3.0, steps: int = 8) -> torch.Tensor:
    """z (B, L) with one of its dimensions replaced by ``steps`` values from low to high: (B, steps, L)."""
    if not -z.shape[1] <= dimension < z.shape[1]:
        raise ValueError(f"dimension: expected one of {z.shape[1]}, got {dimension}")
    moved = z[:, None].repeat(1, steps, 1)
    moved[:, :, dimension] = torch.linspace(low, high, steps, dtype=z.dtype, device=z.device)
    return moved


def interpolate(z0: torch.Tensor, z1: torch.Tensor, steps: int = 8, *, spherical: bool = False) -> torch.Tensor:
    """From z0 to z1 (B, ...), ends included: (B, steps, ...), on a straight line or, if ``spherical``, along a great circle.

    Parallel and opposite latents, which no or many such circles join, are joined by a straight line in both cases.

    Source of the latter: White, "Sampling Generative Networks" (2016), section 2.1.
    """
    weight = torch.linspace(0.0, 1.0, steps, dtype=z0.dtype, device=z0.device).view(1, steps, *[1] * (z0.ndim - 1))
    if not spherical:
        return torch.lerp(z0[:, None], z1[:, None], weight)
    a, b = z0.flatten(1), z1.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(a, b).clamp(-1.0, 1.0)
    angle = cosine.acos().view(-1, 1, *[1] * (z0.ndim - 1))
    straight = (angle < 1e-4) | (angle > math.pi - 1e-2)
    sine = torch.where(straight, 1.0, angle.sin())
    curved = (((1 - weight) * angle).sin() * z0[:, None] + (weight * angle).sin() * z1[:, None]) / sine
    return torch.where(straight, torch.lerp(z0[:, None], z1[:, None], weight), curved)


def analogy(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """What is to c as b is to a: c + (b - a), of latents of one shape, or of the means of groups of latents."""
    return c + (b - a)
