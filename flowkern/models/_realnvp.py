"""NICE and RealNVP: additive and affine couplings, for vectors and for images."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import nn, ops
from ..nn.bijections.bijection import Bijection
from ._model import CouplingFlow, arguments, model_shape
from ._registry import model, plain

_BOUNDED = ops.ScaleMap.tanh(1.0)


# Chosen on the digits' validation split. The logit, with a small alpha, is what helps most: it removes the edge that
# most pixels, being 0 or 16, lie at; then convolutions instead of an MLP; then dropout, for there are only 1000 images.
DIGITS: dict[str, Any] = {
    "couplings": 3,
    "hidden": 32,
    "depth": 1,
    "activation": "silu",
    "dropout": 0.3,
    "preprocess": {"logit": 0.005},
}

# How Tomczak, "Deep Generative Modeling" (2022) trains on digits: no averaging, no warm-up, no clipping.
RECIPE: dict[str, Any] = {"epochs": 1000, "batch_size": 64, "lr": 1e-3, "optimizer": "adamax", "patience": 20}


@model(
    "realnvp",
    presets={
        # The best NLL within about 50 epochs.
        "digits": {"config": DIGITS, "lr": 3e-3, "ema": 0.998, "epochs": 300},
        "digits-demo": {"config": DIGITS, "lr": 3e-3, "ema": 0.998, "epochs": 60, "warmup": 100, "clip": 100.0},
        # Tomczak's RealNVP, for data (v + u) / 17 with v in 0..16: in raw units, the second half transformed and all features
        # reversed after each coupling, (x + t) * exp(s) with s = tanh(s-net).
        "digits-recipe": {
            "config": {
                "couplings": 8,
                "hidden": 256,
                "depth": 2,
                "activation": "leaky_relu",
                "zero_init": False,
                "separate": True,
                "scale": {"kind": "tanh", "a": 1.0, "b": 0.0},
                "shift_first": True,
                "permutation": "reverse",
                "flatten": True,
                "preprocess": {"rescale": 17.0},
            },
            **RECIPE,
        },
    },
)
class RealNVP(CouplingFlow):
    """Affine couplings: a flow over vectors or images with a standard normal base.

    Vectors: ``couplings`` layers with an ``MLP`` each. Images: the multi-scale architecture with a ``ResNet`` each, that is
    ``couplings`` checkerboards, a squeeze, ``couplings`` on halves of the channels, half of the channels out, and so on;
    the last level has ``couplings + 1`` checkerboards.

    Args:
        shape: D for vectors (B, D), (C, H, W) for images (B, C, H, W).
        couplings: the number of couplings, for images of each kind in each level.
        hidden: the width of the networks (channels for images).
        depth: hidden layers of an MLP, residual blocks of a ResNet.
        activation: one of ``nn.ACTIVATIONS``.
        dropout: inside the networks.
        zero_init: start the networks' last layers at zero.
        separate: one network for the scales and another for the shifts (for each parameter of a value), instead of one for all.
        transformer: what a coupling does to a value: an ``nn.Transformer``, its config ``{"kind", ...}`` or its name,
            as ``"spline"``; None for ``nn.Affine`` with ``scale`` (a ``ScaleMap``, or its fields ``{"kind", "a", "b"}``) and
            ``shift_first`` ((x + t) * s instead of x * s + t), which another has no use for.
        levels: of the multi-scale architecture; None for as many as end in 4 x 4 pixels.
        permutation: of vectors: ``"alternate"`` (the halves take turns), ``"reverse"`` or ``"random"`` (the second half is
            transformed, then all features are permuted; by ``seed``, ``seed + 1``, ...).
        flatten: treat an image as a vector, row by row.
        preprocess: before the couplings: None, ``{"rescale": s}``, ``{"rescale": [s, t]}`` or ``{"logit": alpha}``.
        context: K of a context (B, K) for a conditional flow, or None.

    Raises ValueError for settings that do not fit the shape, and unknown names.
    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        couplings: int | None = None,
        hidden: int | None = None,
        depth: int = 2,
        activation: str = "relu",
        dropout: float = 0.0,
        zero_init: bool = True,
        separate: bool = False,
        scale: ops.ScaleMap | Mapping[str, Any] = _BOUNDED,
        shift_first: bool = False,
        transformer: nn.Transformer | Mapping[str, Any] | str | None = None,
        levels: int | None = None,
        permutation: str = "alternate",
        seed: int = 0,
        flatten: bool = False,
        preprocess: Mapping[str, Any] | None = None,
        context: int | None = None,
    ):
        given = arguments(locals(), "scale", "shift_first", "transformer")
        _, image = model_shape(shape, flatten)
        couplings = (3 if image else 8) if couplings is None else couplings
        hidden = (64 if image else 256) if hidden is None else hidden
        self.settle(couplings=couplings, hidden=hidden)
        scale = scale if isinstance(scale, ops.ScaleMap) else ops.ScaleMap(**scale)
        other = None if transformer is None else nn.Transformer.of(transformer)
        self.settle(transformer=plain(other))

        def couple(network: torch.nn.Module, split: str) -> Bijection:
            if other is None:
                return nn.AffineCoupling(network, split=split, scale=scale, shift_first=shift_first)
            return nn.Coupling(network, copy.deepcopy(other), split=split)  # one with parameters has them for each coupling

        given |= {"couplings": couplings, "hidden": hidden}
        super().__init__(couple, 2 if other is None else other.params_per_feature, **given)


@model("nice", presets={"digits": {"config": DIGITS, "lr": 3e-3, "ema": 0.998, "epochs": 300}})
class NICE(CouplingFlow):
    """Additive couplings, then z = h * exp(log_scale): a flow over vectors or images with a standard normal base.

    Args:
        shape: D for vectors (B, D), (C, H, W) for images (B, C, H, W).
        flatten: treat an image as a vector, row by row, as the paper does; otherwise images get RealNVP's architecture.
        The others are as for ``RealNVP``.

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
