"""A flow over images of few levels, with its noise learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import nn
from ..nn.densities.base import check_name, check_sizes
from ._glow import Glow
from ._model import DiscreteModel, FlowModel
from ._realnvp import DIGITS, RealNVP
from ._registry import model

DEQUANTIZATIONS = ("variational", "uniform")
_FLOWS: dict[str, Callable[..., FlowModel]] = {"realnvp": RealNVP, "glow": Glow}


@model(
    "dequantized",
    presets={"digits": {"config": {"flow": "realnvp", "settings": DIGITS}, "lr": 3e-3, "ema": 0.998, "epochs": 300}},
)
class DequantizedFlow(DiscreteModel):
    """A flow p and a dequantization q: log P(v) >= E_q[log p((v + u) / levels) - log q(u | v)] - D log levels.

    ``log_prob`` is that bound, of one draw of u.

    Args:
        shape: (C, H, W).
        levels: how many values an element can have.
        flow: ``"realnvp"`` or ``"glow"``; ``settings``, its keyword arguments besides the shape.
        dequantization: ``"variational"``, or ``"uniform"`` for noise that is not learned.
        couplings, hidden: of the variational one.
        context: must be None.

    Raises ValueError for settings that do not fit, and unknown names.
    Source: Ho et al., "Flow++" (2019), section 3.1.
    """

    stochastic = True

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int = 256,
        flow: str = "realnvp",
        settings: Mapping[str, Any] | None = None,
        dequantization: str = "variational",
        couplings: int = 4,
        hidden: int = 32,
        context: int | None = None,
    ):
        super().__init__()
        check_name("flow", flow, _FLOWS)
        check_name("dequantization", dequantization, DEQUANTIZATIONS)
        if context is not None:
            raise ValueError(f"context: expected None, got {context}")
        check_sizes(couplings=couplings, hidden=hidden)
        self.flow = _FLOWS[flow](shape, **{"preprocess": {"logit": 0.005}, **(settings or {})})
        self.shape, self.levels, self.context = self.flow.shape, levels, None
        self.settle(settings=settings and {name: self.flow.config[name] for name in settings})
        if dequantization == "uniform":
            self.dequantization: torch.nn.Module = nn.UniformDequantization()
        else:
            self.dequantization = nn.VariationalDequantization(self.shape, levels, couplings=couplings, hidden=hidden)

    def log_mass(self, v: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """A lower bound on log P(v): (B,) in nats. Raises ValueError for other shapes and values."""
        self.check_values(v)
        u, log_q = self.dequantization(v)
        dtype = next(self.flow.parameters()).dtype
        log_p = self.flow.log_prob(((v + u) / self.levels).to(dtype))
        return log_p - math.prod(self.shape) * math.log(self.levels) - log_q

    def draw(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        return (self.flow.sample(n, None, temperature) * self.levels).floor().clamp(0, self.levels - 1).long()

    def embed(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.flow.embed(x)

    def render(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.flow.render(z)
