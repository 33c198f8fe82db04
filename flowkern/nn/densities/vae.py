"""The variational autoencoder: a decoder's likelihood under a prior, bounded with an approximate posterior."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..._core.checks import accumulation_dtype
from ..._core.mixture import log_sum
from .base import Base, StandardNormal, as_base, check_sizes, draw_components
from .flow import Flow, context_rows
from .likelihood import Likelihood
from .posterior import GaussianPosterior, Posterior

OBJECTIVES = ("elbo", "iwae", "dreg", "likelihood_ratio")


@dataclass(frozen=True)
class Objective:
    """What training a VAE minimizes, with K = ``samples`` of z for each x, and R the rate: KL(q(z|x) || p(z)), in nats.

    ==================== ============================================================================================
    kind                 value and gradient
    ==================== ============================================================================================
    ``elbo``             E_q[-log p(x|z)] + penalty(R); reparameterized (pathwise) gradient
    ``iwae``             -log mean_k w_k with w = p(x|z) p(z) / q(z|x) (Burda et al. 2016, eq. 8)
    ``dreg``             the same value; the doubly reparameterized gradient of the encoder (Tucker et al. 2019, eq. 8)
    ``likelihood_ratio`` the value of ``elbo``; the encoder's gradient as E_q[(log w) grad log q] (Williams 1992), with the
                         mean of the other samples as baseline if K > 1
    ==================== ============================================================================================

    The penalty is ``beta`` R (Higgins et al. 2017), or ``beta`` |R - ``capacity``| (Burgess et al. 2018), after R was raised to
    at least ``min_rate`` over the batch, or each dimension's to ``free_bits`` nats (Kingma et al. 2016, appendix C.8; where R has
    no closed form, and so no parts, the whole of it to L times that), and times min(1, step / ``warmup``). "Over the batch" is
    over the samples that are in memory at once: a rank's, and of these the part that is accumulated.

    Raises ValueError for unknown names, values out of range, and a penalty other than R with a kind other than ``elbo``.
    """

    kind: str = "elbo"
    samples: int = 1
    beta: float = 1.0
    capacity: float | None = None
    free_bits: float = 0.0
    min_rate: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise ValueError(f"kind: unknown objective {self.kind!r}; expected one of {', '.join(map(repr, OBJECTIVES))}")
        check_sizes(samples=self.samples)
        check_sizes(0, beta=self.beta, free_bits=self.free_bits, min_rate=self.min_rate, warmup=self.warmup)
        if self.samples != int(self.samples):
            raise ValueError(f"samples: expected a whole number, got {self.samples}")
        check_sizes(0, capacity=self.capacity)
        penalized = self.beta != 1.0 or self.capacity is not None or self.free_bits or self.min_rate or self.warmup
        if self.kind != "elbo" and penalized:
            raise ValueError(f"beta, capacity, free_bits, min_rate, warmup: they change the rate of 'elbo', not {self.kind!r}")

    def penalty(self, rate: torch.Tensor, step: int | None, features: int) -> torch.Tensor:
        """That of rates (B,), or (B, L) by dimension, of L ``features``, after so many steps (None: after the warm-up): (B,)."""
        if self.free_bits:
            least = self.free_bits if rate.ndim > 1 else self.free_bits * features
            rate = rate.mean(0, keepdim=True).clamp_min(least).expand_as(rate)
        rate = _per_sample(rate)
        if self.min_rate:
            rate = rate.mean().clamp_min(self.min_rate).expand_as(rate)
        if self.capacity is not None:
            rate = (rate - self.capacity).abs()
        warmth = 1.0 if step is None or not self.warmup else min(1.0, step / self.warmup)
        return self.beta * warmth * rate


class Evidence(NamedTuple):
    """The terms of log w = log p(x|z) + log p(z) - log q(z|x), each (K, B) in nats, and the samples z (K, B, L)."""

    reconstruction: torch.Tensor
    prior: torch.Tensor
    posterior: torch.Tensor
    z: torch.Tensor

    @property
    def log_weight(self) -> torch.Tensor:
        return self.reconstruction + self.prior - self.posterior


class VampPrior(Base):
    """A mixture of posteriors at learned pseudo-inputs, joint over the dimensions: p(z) = sum_k pi_k q(z | encoder(u_k)).

    Args:
        encoder, posterior: those of the VAE, which also owns them; who gives it others must give it another prior too.
        pseudo_inputs: (K, D), what the encoder is shown at the start; learned, as the weights pi are.

    Source: Tomczak and Welling, "VAE with a VampPrior" (2018), eq. 9.
    """

    has_rsample = False

    def __init__(self, encoder: nn.Module, posterior: Posterior, pseudo_inputs: torch.Tensor):
        super().__init__(posterior.features)
        # In a tuple: the modules belong to the VAE, and are not to be counted and stored twice.
        self._modules_of_vae = (encoder, posterior)
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.clone())
        self.logits = nn.Parameter(torch.zeros(len(pseudo_inputs)))

    def log_prob(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        encoder, posterior = self._modules_of_vae
        z, h = self.check(z), encoder(self.pseudo_inputs)
        # (B, K, L): one row of h for each component.
        log_q = posterior.log_prob(z[:, None].expand(-1, h.shape[0], -1), h)
        return log_sum(log_q + self.logits.to(log_q.dtype).log_softmax(0))

    def rsample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError("VampPrior: the draw of a component has no derivative; use sample")

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        encoder, posterior = self._modules_of_vae
        h = encoder(self.pseudo_inputs)[draw_components(self.logits, n)]
        mean = posterior.mean(h)
        return mean + temperature * (posterior.sample_and_log_prob(h)[0][0] - mean)


class VAE(nn.Module):
    """p(x) = int p(x|z) p(z) dz, with log p(x) >= E_q[log p(x|z)] - KL(q(z|x) || p(z)): the ELBO, in nats.

    Args:
        encoder: (B, D) -> (B, ``posterior.inputs``), of what ``likelihood.encode`` shows of x.
        decoder: (B, L) -> (B, D * ``likelihood.params``), or for images maps (B, ``likelihood.maps(C)``, H, W).
        likelihood: p(x|z), of independent elements.
        prior: p(z): a base of ``flowkern.nn``, a ``Flow`` over (B, L), or a ``torch.distributions.Distribution``.
        posterior: q(z|x), of L ``features``.

    Networks are called with a second argument where ``context`` is given. Called as a module it returns the ELBO, so that
    wrappers (data parallel, compile) see the training path.
    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (2014); Rezende, Mohamed and Wierstra (2014).
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: Likelihood, prior: nn.Module, posterior: Posterior):
        super().__init__()
        self.encoder, self.decoder, self.posterior = encoder, decoder, posterior
        self.likelihood, self.prior = likelihood, as_base(prior)
        latent = getattr(getattr(self.prior, "base", self.prior), "shape", None)  # that of a flow is its base's
        if latent is not None and tuple(latent) != (posterior.features,):
            raise ValueError(
                f"prior: expected latents of shape ({posterior.features},), as the posterior has, got {tuple(latent)}"
            )

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.elbo(x, context)

    def encode(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """What the posterior is given: (B, ``posterior.inputs``).

        Raises ValueError for values that x cannot have (see ``Likelihood.check``), and for an encoder of another width.
        """
        self.likelihood.check(x)
        shown = self.likelihood.encode(x.flatten(1).to(_dtype(self.encoder, x)))
        return self.posterior.check(_call(self.encoder, shown, context))

    def decode(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """The likelihood's parameters for z (B, L): (B, D, K), or maps (B, P, H, W) where the decoder has such."""
        params = _call(self.decoder, z.to(_dtype(self.decoder, z)), context)
        if params.ndim == 4:
            return params
        if params.shape[1] % self.likelihood.params:
            expected = f"a multiple of {self.likelihood.params}, the parameters of an element"
            raise ValueError(f"decoder: expected (B, {expected}), got {tuple(params.shape)}")
        return params.unflatten(1, (-1, self.likelihood.params))

    def log_likelihood(self, x: torch.Tensor, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """log p(x | z) of x (B, ...) and z (K, B, L): (K, B) in nats. Raises ValueError for a decoder of another width."""
        rows = None if context is None else context.repeat(z.shape[0], 1)
        params = self.decode(z.flatten(0, 1), rows)
        params, image = params.to(accumulation_dtype(params)), params.ndim == 4
        sample, likelihood = x.shape[1:], self.likelihood
        expected = (likelihood.maps(sample[0]), *sample[1:]) if image else (sample.numel(), likelihood.params)
        if params.shape[1:] != expected:
            got = tuple(params.shape[1:])
            raise ValueError(f"decoder: expected parameters of shape {expected} for x of {tuple(sample)}, got {got}")
        every = x.to(params.dtype).expand(z.shape[0], *x.shape).flatten(0, 1)
        total = likelihood.image_log_prob(every, params) if image else likelihood.total(every.flatten(1), params)
        return total.view(z.shape[:2])

    def evidence(self, x: torch.Tensor, context: torch.Tensor | None = None, samples: int = 1) -> Evidence:
        """The terms of the importance weights of so many samples z. Raises ValueError for fewer than one."""
        check_sizes(samples=samples)
        z, log_q = self.posterior.sample_and_log_prob(self.encode(x, context), samples)
        return self.evidence_of(x, z, log_q, context)

    def evidence_of(self, x: torch.Tensor, z: torch.Tensor, log_q: torch.Tensor, context: torch.Tensor | None = None) -> Evidence:
        """As ``evidence``, of samples z (K, B, L) that are at hand, with log q(z | x) (K, B)."""
        flat = z.flatten(0, 1)
        if isinstance(self.prior, Flow):  # whose networks are in the dtype of their parameters
            flat = flat.to(_dtype(self.prior, z))
        log_p = self.prior.log_prob(flat).view_as(log_q)
        return Evidence(self.log_likelihood(x, z, context), log_p, log_q, z)

    def elbo(self, x: torch.Tensor, context: torch.Tensor | None = None, samples: int = 1) -> torch.Tensor:
        """(B,) in nats, averaged over so many samples of z; the KL in closed form where there is one.

        Raises ValueError for fewer than one sample, and as ``encode`` and ``log_likelihood`` do.
        """
        reconstruction, rate = self._terms(x, context, samples)
        return reconstruction - _per_sample(rate)

    def _terms(
        self, x: torch.Tensor, context: torch.Tensor | None, samples: int, by_dimension: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(E_q[log p(x|z)] (B,), KL(q || p)): in closed form (B,) or (B, L), or (B,) from the samples."""
        check_sizes(samples=samples)
        h = self.encode(x, context)
        gaussian = isinstance(self.prior, StandardNormal) and isinstance(self.posterior, GaussianPosterior)
        if gaussian and samples == 1 and not by_dimension:
            z, rate = self.posterior.sample_and_kl(h)  # type: ignore[operator]
            return self.log_likelihood(x, z[None], context)[0], rate
        z, log_q = self.posterior.sample_and_log_prob(h, samples)
        closed = self.posterior.kl(h) if isinstance(self.prior, StandardNormal) else None
        if closed is not None:
            return self.log_likelihood(x, z, context).mean(0), closed
        evidence = self.evidence_of(x, z, log_q, context)
        return evidence.reconstruction.mean(0), (evidence.posterior - evidence.prior).mean(0)

    def loss(
        self, x: torch.Tensor, objective: Objective, context: torch.Tensor | None = None, step: int | None = None
    ) -> torch.Tensor:
        """(B,) in nats: what ``objective`` says, after so many steps of training; None for after its warm-up."""
        if objective.kind == "elbo":
            reconstruction, rate = self._terms(x, context, objective.samples, bool(objective.free_bits))
            return objective.penalty(rate, step, self.posterior.features) - reconstruction
        if objective.kind == "iwae":
            return -_log_mean_exp(self.evidence(x, context, objective.samples).log_weight)
        estimator = self._doubly_reparameterized if objective.kind == "dreg" else self._likelihood_ratio
        return estimator(x, context, objective.samples)

    def _doubly_reparameterized(self, x: torch.Tensor, context: torch.Tensor | None, samples: int) -> torch.Tensor:
        h = self.encode(x, context)
        z, _ = self.posterior.sample_and_log_prob(h, samples)
        # The encoder is reached through z alone: log q is that of fixed parameters.
        fixed = {name: p.detach() for name, p in self.posterior.named_parameters()}
        log_q = torch.func.functional_call(self.posterior, fixed, (z, h.detach()))
        evidence = self.evidence_of(x, z, log_q, context)
        log_weight = evidence.log_weight
        normalized = log_weight.detach().softmax(0)
        if z.requires_grad:
            # On the way to the encoder the weights come squared, to the decoder and the prior once.
            z.register_hook(lambda grad: grad * normalized[..., None])
        surrogate = -(normalized * log_weight).sum(0)
        return _with_value(surrogate, -_log_mean_exp(log_weight))

    def _likelihood_ratio(self, x: torch.Tensor, context: torch.Tensor | None, samples: int) -> torch.Tensor:
        h = self.encode(x, context)
        with torch.no_grad():
            z, _ = self.posterior.sample_and_log_prob(h, samples)
        evidence = self.evidence_of(x, z, self.posterior.log_prob(z, h), context)
        signal = evidence.log_weight.detach()
        if samples > 1:
            signal = signal - (signal.sum(0) - signal) / (samples - 1)
        surrogate = -(evidence.reconstruction + evidence.prior + signal * evidence.posterior).mean(0)
        return _with_value(surrogate, -evidence.log_weight.mean(0))

    @torch.no_grad()
    def importance_log_prob(
        self, x: torch.Tensor, context: torch.Tensor | None = None, samples: int = 1000, chunk: int = 100
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log p(x), its standard error), each (B,): log mean_k w_k over so many samples, ``chunk`` of them at a time.

        The error is std(w) / (mean(w) sqrt(samples)), to first order. On average the estimate is low (Burda et al. 2016, th. 1).
        """
        if samples < 2 or chunk < 1:
            raise ValueError(f"samples, chunk: expected at least 2 and 1, got {samples} and {chunk}")
        parts = [self.evidence(x, context, min(chunk, samples - i)).log_weight for i in range(0, samples, chunk)]
        log_weight = torch.cat(parts).double()
        log_mean = _log_mean_exp(log_weight)
        return log_mean, (log_weight - log_mean).exp().std(0) / math.sqrt(samples)

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """The likelihood's mean (B, D), or (B, C, H, W), at the posterior's, of x (B, ...)."""
        return self.mean(self.posterior.mean(self.encode(x, context)), context)

    def mean(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """The likelihood's mean (B, D), or (B, C, H, W), for z (B, L)."""
        params = self.decode(z, context)
        return self.likelihood.image_mean(params) if params.ndim == 4 else self.likelihood.mean(params)

    @torch.no_grad()
    def sample(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """n samples of x, (n, D) or (n, C, H, W); ``context`` (n, K), or (1, K) for all. ``temperature`` is that of the prior.

        Raises ValueError for a context of a wrong shape and a negative temperature.
        """
        if not temperature >= 0.0:
            raise ValueError(f"temperature: expected at least 0, got {temperature}")
        context = context_rows(context, n)
        z = self.prior.sample(n, temperature=temperature)
        params = self.decode(z, context)
        return self.likelihood.image_sample(params) if params.ndim == 4 else self.likelihood.sample(params)


def _call(network: nn.Module, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    return network(x) if context is None else network(x, context)


def _dtype(network: nn.Module, x: torch.Tensor) -> torch.dtype:
    """That of the network's parameters; of x, or float32 for integers, where it has none."""
    default = x.dtype if x.is_floating_point() else torch.float32
    return next((p.dtype for p in network.parameters()), default)


def _per_sample(rate: torch.Tensor) -> torch.Tensor:
    """(B,) of rates (B,) or (B, L)."""
    return rate.sum(1) if rate.ndim > 1 else rate


def _log_mean_exp(log_weight: torch.Tensor) -> torch.Tensor:
    return log_sum(log_weight, 0) - math.log(len(log_weight))


def _with_value(surrogate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``value`` with the gradient of ``surrogate``."""
    return value.detach() + (surrogate - surrogate.detach())
