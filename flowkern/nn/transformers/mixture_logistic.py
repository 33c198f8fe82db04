"""The transformer of Flow++: values pass through the distribution function of a mixture of logistics."""

from dataclasses import dataclass

import torch

from ... import ops
from ...ops.parts import LogisticMixture
from ..bijections.bijection import Pair
from ..bijections.root import followed
from .transformer import Transformer, take_scale

_SOFT_CLIP = ops.ScaleMap.soft_clip(1e-3)


@dataclass(frozen=True)
class MixtureLogistic(Transformer, kind="mixture_logistic"):
    """y = s logit(F(x)) + t for each value, F(x) = sum_k pi_k sigmoid((x - m_k) / s_k).

    log|dy / dx| = log s + log f(x) - log F(x) - log(1 - F(x)) with the mixture's density f, each from sums of exponentials
    that neither overflow nor cancel. The inverse solves logit(F(x)) = (y - t) / s between the least and the largest of the
    components' own solutions m_k + s_k (y - t) / s, on the device: on a GPU by one kernel.

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
        shift, mixture = params[1], LogisticMixture(params[2:])
        if inverse:
            z = (x - shift) / scale
            x = followed(lambda x: mixture.off(z, x), mixture.root(z))
            return x, -(mixture.logit(x)[1] + log_scale)
        z, log_slope = mixture.logit(x)
        return z * scale + shift, log_slope + log_scale
