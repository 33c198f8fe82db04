"""MAF and IAF: masked autoregressive layers one after the other, for vectors and for images taken as vectors."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import nn, ops
from ..nn.bijections.bijection import Bijection
from ..nn.densities.base import check_name, check_sizes
from ._model import FlowModel, arguments, model_shape, preprocessing
from ._registry import model, plain

_SOFT_CLIP = ops.ScaleMap.soft_clip(1e-3)

PERMUTATIONS = ("reverse", "random", "none")


def autoregressive_bijection(
    make: Callable[[], list[Bijection]], features: int, layers: int, permutation: str, seed: int
) -> list[Bijection]:
    """So many times what ``make`` returns, with permutations between. Raises ValueError for an unknown permutation."""
    check_name("permutation", permutation, PERMUTATIONS)
    built: list[Bijection] = []
    for i in range(layers):
        built += make()
        if permutation != "none" and i < layers - 1:
            reverse = permutation == "reverse"
            built.append(nn.Permutation.reverse(features) if reverse else nn.Permutation.random(features, seed + i))
    return built


class _AutoregressiveFlow(FlowModel):
    """What MAF and IAF share: all but the layer, which without a transformer is ``affine``, by a scale."""

    def __init__(
        self,
        affine: Callable[..., nn.Autoregressive],
        direction: str,
        shape: int | Sequence[int],
        *,
        layers: int,
        hidden: Sequence[int],
        permutation: str,
        seed: int,
        preprocess: Mapping[str, Any] | None,
        context: int | None,
        scale: ops.ScaleMap | Mapping[str, Any],
        transformer: nn.Transformer | Mapping[str, Any] | str | None,
        batch_norm: bool = False,
        base: nn.Base | None = None,
        **network: Any,
    ):
        sizes, _ = model_shape(shape, flatten=True)
        check_sizes(layers=layers, context=context)
        features = math.prod(sizes)
        how: dict[str, Any] = {"scale": scale if isinstance(scale, ops.ScaleMap) else ops.ScaleMap(**scale)}
        layer = affine
        if transformer is not None:
            transformer = nn.Transformer.of(transformer)
            self.settle(transformer=plain(transformer))
            layer, how = nn.Autoregressive, {"transformer": transformer, "direction": direction}

        def make() -> list[Bijection]:
            # A transformer with parameters has them for each layer.
            made = layer(features, hidden=tuple(hidden), context=context, **copy.deepcopy(how), **network)
            return [made, nn.BatchNormFlow(features)] if batch_norm else [made]

        built = preprocessing(preprocess)
        if len(sizes) == 3:
            built.append(nn.Flatten(sizes))
        built += autoregressive_bijection(make, features, layers, permutation, seed)
        super().__init__(nn.Compose(*built), {"shape": sizes, "context": context}, base)


@model(
    "maf",
    presets={
        # Chosen as RealNVP's, among a few: more and narrower layers do as well, the permutations and a smooth activation help.
        "digits": {
            "config": {
                "layers": 8,
                "hidden": [128, 128],
                "activation": "silu",
                "permutation": "random",
                "preprocess": {"logit": 0.005},
            },
            "lr": 1e-3,
            "ema": 0.998,
            "epochs": 200,
        }
    },
)
class MAF(_AutoregressiveFlow):
    """Masked autoregressive flow: log p(x) in one pass, and sampling for the price of one pass too.

    ``layers`` times ``nn.MaskedAutoregressive``, with permutations of the features between. Images are vectors, row by row.

    Args:
        shape: D for vectors (B, D), (C, H, W) for images (B, C, H, W).
        layers: their number.
        hidden, activation, residual: of the networks, ``nn.MADE``.
        transformer: what a layer does to a value: an ``nn.Transformer``, its config ``{"kind", ...}`` or its name, as
            ``"spline"``; None for ``nn.Affine(scale)``, the scale a ``ScaleMap`` or its fields ``{"kind", "a", "b"}``.
        permutation: ``"reverse"``, ``"random"`` (by ``seed``, ``seed + 1``, ...) or ``"none"``, between two layers.
        batch_norm: an ``nn.BatchNormFlow`` after each layer.
        components: of a base ``nn.Mixture`` (the paper's MAF MoG has one in its last layer); None for a standard normal.
        preprocess: before the first layer: None, ``{"rescale": s}``, ``{"rescale": [s, t]}`` or ``{"logit": alpha}``.
        context: K of a context (B, K) for a conditional flow, or None.

    Raises ValueError for settings that do not fit the shape, and unknown names.
    Source: Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation" (2017).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        layers: int = 5,
        hidden: Sequence[int] = (512, 512),
        activation: str = "relu",
        residual: bool = False,
        scale: ops.ScaleMap | Mapping[str, Any] = _SOFT_CLIP,
        transformer: nn.Transformer | Mapping[str, Any] | str | None = None,
        permutation: str = "reverse",
        seed: int = 0,
        batch_norm: bool = False,
        components: int | None = None,
        preprocess: Mapping[str, Any] | None = None,
        context: int | None = None,
    ):
        given = arguments(locals(), "components")
        sizes, _ = model_shape(shape, flatten=True)
        base = None if components is None else nn.Mixture(math.prod(sizes), components)
        super().__init__(nn.MaskedAutoregressive, "forward", **given, base=base)


@model("iaf")
class IAF(_AutoregressiveFlow):
    """Inverse autoregressive flow: samples and their density in one pass, log p of given x for the price of one pass too.

    ``layers`` times ``nn.InverseAutoregressive``. Arguments, errors and shapes as for ``MAF``, and:

    Args:
        gated: the update s z + (1 - s) m of the paper, with a sigmoid ``scale``: ``nn.GatedAffine``.

    Source: Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow" (2016), section 4.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        layers: int = 5,
        hidden: Sequence[int] = (512, 512),
        activation: str = "relu",
        residual: bool = False,
        scale: ops.ScaleMap | Mapping[str, Any] | None = None,
        transformer: nn.Transformer | Mapping[str, Any] | str | None = None,
        gated: bool = False,
        permutation: str = "reverse",
        seed: int = 0,
        preprocess: Mapping[str, Any] | None = None,
        context: int | None = None,
    ):
        if scale is None:
            scale = ops.ScaleMap.sigmoid() if gated else _SOFT_CLIP
            self.settle(scale=dataclasses.asdict(scale))
        given = arguments(locals(), "gated")
        super().__init__(functools.partial(nn.InverseAutoregressive, gated=gated), "inverse", **given)
