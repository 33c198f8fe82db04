"""The log-odds of mixtures of logistics, z = logit F(x), F(x) = sum_k pi_k sigmoid((x - m_k) / s_k), and the x of a given z.

log dz/dx = log f(x) - log F(x) - log(1 - F(x)) with the density f, each a logarithm of a sum of exponentials. The x is sought
between the least and the largest of the components' own solutions m_k + s_k z (flowkern/_core/root.py). On a GPU that is one
launch, in which the rounds follow each other in registers; torch's operations launch over a thousand.

Source: Ho et al., "Flow++" (2019), section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._core import backend
from .._core.op import define, transformed
from .._core.root import bracketed_root
from .._core.scale_map import ScaleMap

__all__ = ["SCALES", "LogisticMixture"]

#: From the raw parameters to the s_k, which lie between 1e-3 and 1e3.
SCALES = ScaleMap.soft_clip(1e-3)

Pair = tuple[torch.Tensor, torch.Tensor]


class LogisticMixture:
    """Mixtures of logistics by their ``params`` (3 K, ...): K logits, K means and K raw log-scales."""

    def __init__(self, params: torch.Tensor):
        self.params = params
        logits, self.mean, raw = params.chunk(3)
        self.log_weight = logits.log_softmax(0)
        self.scale, self.log_scale = SCALES(raw)

    def logit(self, x: torch.Tensor) -> Pair:
        """(logit(F(x)), the logarithm of its slope) of x (...)."""
        t = (x - self.mean) / self.scale
        below, above = F.logsigmoid(t), F.logsigmoid(-t)
        log_f = (self.log_weight + below + above - self.log_scale).logsumexp(0)
        log_below, log_above = (self.log_weight + below).logsumexp(0), (self.log_weight + above).logsumexp(0)
        return log_below - log_above, log_f - log_below - log_above

    def off(self, z: torch.Tensor, x: torch.Tensor) -> Pair:
        """logit(F(x)) - z, and its slope."""
        value, log_slope = self.logit(x)
        return value - z, log_slope.exp()

    def root(self, z: torch.Tensor) -> torch.Tensor:
        """The x with logit(F(x)) = z, not differentiable."""
        with torch.no_grad():  # as a decorator it would be a method that torch.compile does not follow
            if transformed() or (z.is_cpu and backend.requested() != "triton") or backend.only_torch(z):
                return self._search(z)
            return _root(z, self.params)

    def _search(self, z: torch.Tensor) -> torch.Tensor:
        candidates = self.mean + self.scale * z
        return bracketed_root(lambda x: self.off(z, x), candidates.amin(0), candidates.amax(0))


def _torch_root(z: torch.Tensor, params: torch.Tensor, root: torch.Tensor) -> None:
    root.copy_(LogisticMixture(params)._search(z))


_root = define(
    "logistic_mixture_root(Tensor z, Tensor params) -> Tensor",
    outputs=lambda z, params: torch.empty_like(z, memory_format=torch.contiguous_format),
    torch_=_torch_root,
    fills=True,
    cpp=_torch_root,
    triton="logistic_mixture_root.forward",
)
