"""The transformer of Flow++: values pass through the distribution function of a mixture of logistics."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ... import ops
from ..bijections.bijection import Pair
from ..bijections.root import solve_increasing
from .transformer import Transformer, take_scale

_SOFT_CLIP = ops.ScaleMap.soft_clip(1e-3)


@dataclass(frozen=True)
class MixtureLogistic(Transformer, kind="mixture_logistic"):
    """y = s logit(F(x)) + t for each value, F(x) = sum_k pi_k sigmoid((x - m_k) / s_k).

    log|dy / dx| = log s + log f(x) - log F(x) - log(1 - F(x)) with the mixture's density f, each from sums of exponentials
    that neither overflow nor cancel. The inverse solves logit(F(x)) = (y - t) / s between the least and the largest of the
    components' own solutions m_k + s_k (y - t) / s, on the device.

    Args:
        components: K. The 2 + 3 K parameters are a raw scale, a shift, then K logits, K means and K raw log-scales.
        scale: gives s: a ``ScaleMap``, or its fields ``{"kind", "a", "b"}``. The s_k are between 1e-3 and 1e3.

    Raises ValueError for fewer than one component, TypeError for another scale.
    Source: Ho et al., "Flow++" (2019), section 3.2.
    """

    components: int
    scale: ops.ScaleMap = _SOFT_CLIP

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"components: expected at least 1, got {self.components}")
        take_scale(self)

    @property
    def params_per_feature(self) -> int:  # type: ignore[override]
        return 2 + 3 * self.components

    def forward(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        params = params.movedim(-1, 0)
        scale, log_scale = self.scale(params[0])
        shift, mixture = params[1], _Mixture(params[2:])
        if inverse:
            x = mixture.solve((x - shift) / scale)
            return x, -(mixture.logit(x)[1] + log_scale)
        z, log_slope = mixture.logit(x)
        return z * scale + shift, log_slope + log_scale


class _Mixture:
    """logit(F(x)) of mixtures of logistics, by their ``params`` (3 K, ...)."""

    def __init__(self, params: torch.Tensor):
        logits, self.mean, raw = params.chunk(3)
        self.log_weight = logits.log_softmax(0)
        self.scale, self.log_scale = _SOFT_CLIP(raw)

    def logit(self, x: torch.Tensor) -> Pair:
        """(logit(F(x)), the logarithm of its slope) of x (...)."""
        t = (x - self.mean) / self.scale
        below, above = F.logsigmoid(t), F.logsigmoid(-t)
        log_f = (self.log_weight + below + above - self.log_scale).logsumexp(0)
        log_below, log_above = (self.log_weight + below).logsumexp(0), (self.log_weight + above).logsumexp(0)
        return log_below - log_above, log_f - log_below - log_above

    def solve(self, z: torch.Tensor) -> torch.Tensor:
        """The x with logit(F(x)) = z."""

        def function(x: torch.Tensor) -> Pair:
            value, log_slope = self.logit(x)
            return value - z, log_slope.exp()

        candidates = (self.mean + self.scale * z).detach()
        return solve_increasing(function, candidates.amin(0), candidates.amax(0))
