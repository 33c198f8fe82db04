"""NICE: additive couplings and a learned diagonal scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .. import nn
from .._core.split import moved_channels
from ..nn.bijections.bijection import Bijection
from ._model import FlowModel, architecture, conditioner, model_shape
from ._realnvp import DIGITS
from ._registry import model

__all__ = ["NICE"]


@model("nice", presets={"digits": {"config": DIGITS, "lr": 3e-3, "ema": 0.998, "epochs": 300}})
class NICE(FlowModel):
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
        sizes, image = model_shape(shape, flatten)
        network: dict[str, Any] = {
            "hidden": hidden,
            "depth": depth,
            "activation": activation,
            "dropout": dropout,
            "zero_init": zero_init,
        }
        layout: dict[str, Any] = {
            "couplings": couplings,
            "levels": levels,
            "permutation": permutation,
            "seed": seed,
            "preprocess": preprocess,
        }

        def make(split: str, channels: int) -> Bijection:
            moved = moved_channels(split, channels)
            net = conditioner(split, channels, moved, image=image, context=context, **network)
            return nn.AdditiveCoupling(net, split=split)

        layers = architecture(make, sizes, image=image, **layout)
        super().__init__(nn.Compose(*layers, nn.Scaling(math.prod(sizes))), {"shape": sizes, "context": context})
