"""A normalizing flow: a bijection and a base distribution."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributions import Distribution

from ..bijections.bijection import Bijection, Pair
from ..bijections.reversible import generators
from .base import Base, Shape, any_of, as_base, as_shape
from .distribution import FlowDistribution, broadcast


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


def _check_context(context: torch.Tensor | None) -> torch.Tensor:
    """The context itself. Raises ValueError unless it is (..., K)."""
    if context is None or context.ndim == 0:
        raise ValueError(f"context: expected shape (..., K), got {'none' if context is None else tuple(context.shape)}")
    return context


def context_rows(context: torch.Tensor | None, n: int) -> torch.Tensor | None:
    """The context of n samples, (n, K) or (1, K), as (n, K); None for none. Raises ValueError for other numbers of rows."""
    if context is None:
        return None
    if context.ndim != 2 or context.shape[0] not in (1, n):
        raise ValueError(f"context: expected shape ({n}, K) or (1, K) for {n} samples, got {tuple(context.shape)}")
    return context.expand(n, -1)


@contextlib.contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """What is drawn inside comes from ``generator`` instead of torch's own for its device, which is set aside for all threads."""
    if generator is None:
        yield
        return
    torchs, which = generators(generator.device)[-1]
    before = torchs.get_rng_state(*which)
    torchs.set_rng_state(generator.get_state(), *which)
    try:
        yield
    finally:
        generator.set_state(torchs.get_rng_state(*which))
        torchs.set_rng_state(before, *which)


def _shape_of_sample(bijection: nn.Module, base: nn.Module, shape: Shape | None) -> tuple[int, ...]:
    """``shape``, or that of a latent if the bijection keeps it, or () where it is not known. Raises ValueError if it is wrong."""
    given, latent = () if shape is None else as_shape(shape), getattr(base, "shape", ())
    if not isinstance(bijection, Bijection) or not latent:
        return given
    if shape is None:
        with contextlib.suppress(ValueError):
            return latent if tuple(bijection.output_shape(latent)) == latent else ()
        return ()
    if (found := tuple(bijection.output_shape(given))) != latent:
        raise ValueError(f"shape: samples of {given} have latents of {found}, but the base is over {latent}")
    return given


class Flow(nn.Module):
    """The density log p(x) = log p_base(z) + logabsdet with (z, logabsdet) = bijection(x), in nats.

    Args:
        bijection: a ``Bijection``, data to latent.
        base: a base of ``flowkern.nn``, or a ``torch.distributions.Distribution`` whose batch and event dimensions
            together are the shape of a latent (its tensors follow ``.to()``, but are not trained).
        shape: that of a sample; None for that of a latent, if the bijection keeps shapes. Where neither is known, ``log_prob``
            takes x (B, ...) alone, and there is no ``distribution``.

    Called as a module it returns ``log_prob``, so that wrappers (data parallel, compile) see the training path.
    Raises ValueError for a shape that the bijection does not take to that of a latent.
    """

    bijection: Bijection
    base: Base
    shape: tuple[int, ...]

    def __init__(self, bijection: Bijection, base: Base | Distribution, shape: Shape | None = None):
        super().__init__()
        self.bijection = bijection
        self.base = as_base(base)
        self.shape = _shape_of_sample(bijection, self.base, shape)

    def _as_context(self, context: torch.Tensor | None) -> torch.Tensor | None:
        """The context as (..., K)."""
        return context

    def _flattened(
        self, x: torch.Tensor, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[int, ...]]:
        """x as (B, *shape), the context as (B, K), and the leading dimensions that B stands for: those of both, broadcast.

        Raises ValueError if they do not broadcast.
        """
        fits = bool(self.shape) and tuple(x.shape[-len(self.shape) :]) == self.shape
        leading = x.shape[: x.ndim - len(self.shape)] if fits else x.shape[:1]
        event = x.shape[len(leading) :]
        if len(leading) == 1 and (context is None or (context.ndim == 2 and context.shape[0] == leading[0])):
            return x, context, leading
        batch = leading
        if context is not None:
            both = broadcast(leading, _check_context(context).shape[:-1])
            if both is None:
                expected, got = (*leading, context.shape[-1]), tuple(context.shape)
                raise ValueError(f"context: expected shape {expected}, got {got}, which does not broadcast")
            batch = both
            context = context.expand(*batch, -1).reshape(math.prod(batch), context.shape[-1])
        return x.expand(*batch, *event).reshape(math.prod(batch), *event), context, batch

    def log_prob(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """log p(x | context), in nats: x (..., *shape), context (..., K) or None -> (...), leading dimensions broadcast.

        -inf outside of the support, of infinite x too; NaN for NaN. Raises ValueError if x, its latent or the context has a
        wrong shape.
        """
        rows, context, batch = self._flattened(x, self._as_context(context))
        log_prob = self._log_prob(rows, context)
        return log_prob if len(batch) == 1 else log_prob.view(batch)

    def _log_prob(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """x (B, *shape), context (B, K) or None -> (B,)."""
        infinite = x.isinf()  # networks would make NaN of them, and NaN gradients
        z, logabsdet = self.bijection(torch.where(infinite, 0, x), context)
        log_prob = self.base.log_prob(z, context) + logabsdet
        return log_prob.masked_fill(any_of(infinite), -math.inf)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.log_prob(x, context)

    def condition(self, context: torch.Tensor, validate_args: bool | None = None) -> FlowDistribution:
        """p(x | context) as a ``torch.distributions.Distribution`` with ``batch_shape`` (...) for a context (..., K).

        Raises ValueError for a context without dimensions, and where the shape of a sample is not known.
        """
        return FlowDistribution(self, _check_context(self._as_context(context)), validate_args)

    def distribution(self, validate_args: bool | None = None) -> FlowDistribution:
        """p(x) of a flow without context, as a ``torch.distributions.Distribution``.

        Raises ValueError where the shape of a sample is not known.
        """
        return FlowDistribution(self, None, validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether samples are differentiable: not where the base draws a component of a mixture, say."""
        return getattr(self.base, "has_rsample", hasattr(self.base, "rsample"))

    def _drawn(
        self,
        draw: Callable[..., torch.Tensor],
        n: int,
        context: torch.Tensor | None,
        temperature: float,
        per_context: bool,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[int, ...]]:
        """Latents (N, ...), their context (N, K) or None, and the dimensions that N stands for."""
        rows, shape = self._as_context(context), (n,)
        if not per_context:
            rows = context_rows(rows, n)
        else:
            rows = _check_context(rows)
            shape = (n, *rows.shape[:-1])
            rows = rows.expand(n, *rows.shape).reshape(math.prod(shape), rows.shape[-1])
        with drawing_from(generator):
            z = draw(math.prod(shape), temperature=temperature, context=rows)
        if generator is not None and generator.device != z.device:
            raise ValueError(f"generator: expected one on {z.device}, where the latents are drawn, got {generator.device}")
        return z, rows, shape

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: torch.Tensor | None = None,
        temperature: float = 1.0,
        *,
        per_context: bool = False,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """n samples (n, *shape), without gradients; with ``per_context`` n for each context: (n, ..., *shape).

        Args:
            n: how many.
            context: (n, K) gives sample i its row i; (1, K) serves all samples. With ``per_context``, (..., K) of any size.
            temperature: multiplies the base's standard deviation: below 1 the samples are more typical and less diverse.
            per_context: whether each context has n samples of its own.
            generator: of the random numbers, on the flow's device; None for torch's own.

        Raises ValueError for other numbers of rows, for ``per_context`` without a context, and for a generator elsewhere.
        """
        z, context, shape = self._drawn(self.base.sample, n, context, temperature, per_context, generator)
        return self.bijection.inverse(z, context)[0].unflatten(0, shape)

    def rsample(
        self,
        n: int,
        context: torch.Tensor | None = None,
        temperature: float = 1.0,
        *,
        per_context: bool = False,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """As ``sample``, differentiable in the parameters and the context.

        Raises NotImplementedError for a base that has no ``rsample``.
        """
        z, context, shape = self._drawn(self.base.rsample, n, context, temperature, per_context, generator)
        return self.bijection.inverse(z, context)[0].unflatten(0, shape)

    def sample_and_log_prob(
        self,
        n: int,
        context: torch.Tensor | None = None,
        *,
        per_context: bool = False,
        generator: torch.Generator | None = None,
    ) -> Pair:
        """(x, log p(x)) as ``rsample`` draws x, from one inverse pass: (n, *shape) and (n,) nats, or as with ``per_context``."""
        z, context, shape = self._drawn(self.base.rsample, n, context, 1.0, per_context, generator)
        x, logabsdet = self.bijection.inverse(z, context)
        return x.unflatten(0, shape), (self.base.log_prob(z, context) - logabsdet).unflatten(0, shape)

    def bits_per_dim(self, x: torch.Tensor, levels: int, context: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over x of ``flowkern.nn.bits_per_dim``: a scalar, differentiable.

        x (..., *shape) holds (v + u) / levels in [0, 1). Raises ValueError for an empty batch and, with the count, for NaN.
        """
        if x.numel() == 0:
            raise ValueError(f"bits_per_dim: x is empty, shape {tuple(x.shape)}")
        dims = math.prod(self.shape) if self.shape else x[0].numel()
        return bits_per_dim(self.log_prob(x, context), dims, levels).mean()
