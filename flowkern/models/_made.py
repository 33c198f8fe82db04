"""MADE over images of few levels: one categorical distribution for each pixel, given those before it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import nn
from ..nn.densities.base import check_sizes
from ._model import DiscreteModel, arguments, model_shape
from ._registry import model


# One wide layer does better than two.
@model("made", presets={"digits": {"config": {"hidden": [512]}, "lr": 1e-3, "ema": 0.998, "epochs": 200}})
class MADE(DiscreteModel):
    """log P(v) = sum_i log P(v_i | the values before v_i), each factor categorical, all of them from one pass.

    A thin wrapper of ``nn.MADEDensity``; an image is taken as a vector, row by row.

    Args:
        shape: D for vectors (B, D), (C, H, W) for images (B, C, H, W).
        levels: how many values an element can have.
        hidden, activation, residual: of the network, ``nn.MADE``.
        masks: how many sets of masks there are, each with an order and degrees of its own, drawn with ``seed``. Training
            takes them in turn, evaluation averages their probabilities.
        context: K of a context (B, K), or None.

    Raises ValueError for settings that do not fit, and unknown names.
    Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation" (2015).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        levels: int = 256,
        hidden: Sequence[int] = (512, 512),
        activation: str = "relu",
        residual: bool = False,
        masks: int = 1,
        seed: int = 0,
        context: int | None = None,
    ):
        given = arguments(locals(), "shape")
        super().__init__()
        self.shape, _ = model_shape(shape, flatten=True)
        check_sizes(context=context)
        self.levels, self.context = levels, context
        self.density = nn.MADEDensity(math.prod(self.shape), output="categorical", **given)

    def log_mass(self, v: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        self.check_values(v)
        return self.density.log_prob(v.flatten(1), context)

    def draw(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        return self.density.sample(n, context, temperature).long().view(n, *self.shape)
