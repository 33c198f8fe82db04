"""The coupling of Flow++: elements pass through the distribution function of a mixture of logistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ... import ops
from ..._core.checks import accumulation_dtype
from ..._core.split import Split, moved_channels, put, restrict, take
from .bijection import Pair
from .coupling import _Coupling
from .root import solve_increasing

__all__ = ["MixtureLogisticCoupling"]

_SOFT_CLIP = ops.ScaleMap.soft_clip(1e-3)


class MixtureLogisticCoupling(_Coupling):
    """z = s logit(F(x)) + t on the elements that ``split`` transforms, F(x) = sum_k pi_k sigmoid((x - m_k) / s_k).

    log|dz / dx| = log s + log f(x) - log F(x) - log(1 - F(x)) with the mixture's density f, each from sums of exponentials
    that neither overflow nor cancel. ``inverse`` solves logit(F(x)) = (z - t) / s between the least and the largest of the
    components' own solutions m_k + s_k (z - t) / s, on the device.

    Args:
        conditioner: as for ``AffineCoupling``; it returns (2 + 3 K) M channels for M transformed ones (C for a checkerboard):
            raw scales, shifts, then K logits, K means and K raw log-scales for each.
        components: K.
        split, scale: as for ``AffineCoupling``; ``scale`` gives s. The s_k are between 1e-3 and 1e3.

    Raises ValueError for an unknown split, fewer than one component, and a conditioner's output of a wrong shape.
    Source: Ho et al., "Flow++: Improving Flow-Based Generative Models with Variational Dequantization and Architecture Design"
    (2019), section 3.2.
    """

    def __init__(self, conditioner: nn.Module, components: int, *, split: Split = "channel", scale: ops.ScaleMap = _SOFT_CLIP):
        super().__init__(conditioner, split)
        if components < 1:
            raise ValueError(f"components: expected at least 1, got {components}")
        self.components, self.scale = components, scale

    def couple(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        moved = moved_channels(self.split, x.shape[1])
        expected = ((2 + 3 * self.components) * moved, *x.shape[2:])
        if params.shape[1:] != expected:
            raise ValueError(f"params: expected shape (B, {', '.join(map(str, expected))}), got {tuple(params.shape)}")
        dtype = accumulation_dtype(x, params)
        parts = params.to(dtype).unflatten(1, (2 + 3 * self.components, moved))
        scale, log_scale = self.scale(parts[:, 0])
        shift, mixture = parts[:, 1], _Mixture(parts[:, 2:])
        inner = take(x, self.split).to(dtype)
        if inverse:
            inner = mixture.solve((inner - shift) / scale)
            z, log_slope = mixture.logit(inner)
            out, logabsdet = inner, -(log_slope + log_scale)
        else:
            z, log_slope = mixture.logit(inner)
            out, logabsdet = z * scale + shift, log_slope + log_scale
        return put(x, out.to(x.dtype), self.split), restrict(logabsdet, self.split).flatten(1).sum(1)

    def extra_repr(self) -> str:
        return f"split={self.split!r}, components={self.components}, scale={self.scale}"


class _Mixture:
    """logit(F(x)) of mixtures of logistics, by their ``params`` (B, 3 K, M, ...)."""

    def __init__(self, params: torch.Tensor):
        logits, self.mean, raw = params.chunk(3, 1)
        self.log_weight = logits.log_softmax(1)
        self.scale, self.log_scale = _SOFT_CLIP(raw)

    def logit(self, x: torch.Tensor) -> Pair:
        """(logit(F(x)), the logarithm of its slope) of x (B, M, ...)."""
        t = (x.unsqueeze(1) - self.mean) / self.scale
        below, above = F.logsigmoid(t), F.logsigmoid(-t)
        log_f = (self.log_weight + below + above - self.log_scale).logsumexp(1)
        log_below, log_above = (self.log_weight + below).logsumexp(1), (self.log_weight + above).logsumexp(1)
        return log_below - log_above, log_f - log_below - log_above

    def solve(self, z: torch.Tensor) -> torch.Tensor:
        """The x with logit(F(x)) = z."""

        def function(x: torch.Tensor) -> Pair:
            value, log_slope = self.logit(x)
            return value - z, log_slope.exp()

        candidates = (self.mean + self.scale * z.unsqueeze(1)).detach()
        return solve_increasing(function, candidates.amin(1), candidates.amax(1))
