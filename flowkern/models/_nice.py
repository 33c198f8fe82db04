"""NICE: additive couplings and a learned diagonal scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import nn
from ._model import CouplingFlow, arguments, model_shape
from ._realnvp import DIGITS
from ._registry import model


@model("nice", presets={"digits": {"config": DIGITS, "lr": 3e-3, "ema": 0.998, "epochs": 300}})
class NICE(CouplingFlow):
    """Additive couplings, then z = h * exp(log_scale): a flow over vectors or images with a standard normal base.

    Args:
        shape: D for vectors (B, D), (C, H, W) for images (B, C, H, W).
        flatten: treat an image as a vector, row by row, as the paper does; otherwise images get the multi-scale
            architecture of RealNVP with additive couplings.
        couplings, hidden, depth, activation, dropout, zero_init, levels, permutation, seed, preprocess, context: as for
            ``RealNVP``.

    Raises ValueError for settings that do not fit the shape, and unknown names.
    Source: Dinh, Krueger and Bengio, "NICE: Non-linear Independent Components Estimation" (2015).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        couplings: int = 4,
        hidden: int = 256,
        depth: int = 2,
        activation: str = "relu",
        dropout: float = 0.0,
        zero_init: bool = True,
        levels: int | None = None,
        permutation: str = "alternate",
        seed: int = 0,
        flatten: bool = False,
        preprocess: Mapping[str, Any] | None = None,
        context: int | None = None,
    ):
        given = arguments(locals())
        sizes, _ = model_shape(shape, flatten)

        def couple(network: torch.nn.Module, split: str) -> nn.Coupling:
            return nn.AdditiveCoupling(network, split=split)

        super().__init__(couple, 1, **given, behind=[nn.Scaling(math.prod(sizes))])
