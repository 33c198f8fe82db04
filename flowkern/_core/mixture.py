"""Mixtures of components: the sum of their logarithms, and where a mixture of logistics has its parameters."""

from __future__ import annotations

import torch

__all__ = ["log_sum", "mixture_parts", "per_component"]


def log_sum(joint: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """logsumexp of components. Its own derivative, exp(joint - result), does not sum to 1 for huge ones."""
    top = joint.detach().amax(dim, keepdim=True).clamp(min=torch.finfo(joint.dtype).min)
    return top.squeeze(dim) + (joint - top).exp().sum(dim).log()


def per_component(channels: int) -> int:
    """Parameters of a component: its logit, and per channel a mean, a log-scale and, of colours, a coefficient."""
    return 10 if channels == 3 else 3


def mixture_parts(params: torch.Tensor, channels: int) -> tuple[torch.Tensor, ...]:
    """(logits (B, K, ...), then means, log-scales and, if there are three channels, coefficients (B, C, K, ...))."""
    components = params.shape[1] // per_component(channels)
    per_channel = params[:, components:].unflatten(1, (channels, -1, components))
    return params[:, :components], *per_channel.unbind(2)
