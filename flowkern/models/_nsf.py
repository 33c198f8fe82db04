"""Neural spline flows: rational-quadratic splines in autoregressive layers or in couplings, for vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import nn, ops
from .._core.split import kept_channels, moved_channels
from ..nn.bijections.bijection import Bijection
from ..nn.densities.base import check_sizes
from ._autoregressive import autoregressive_bijection
from ._model import FlowModel, model_shape, preprocessing, vector_bijection
from ._registry import model


@model(
    "nsf",
    presets={
        # The logit, with this alpha, ends at 5.3: within the splines' interval.
        "digits": {
            "config": {
                "bound": 6.0,
                "layers": 5,
                "activation": "silu",
                "permutation": "random",
                "preprocess": {"logit": 0.005},
            },
            "lr": 1e-3,
            "ema": 0.998,
            "epochs": 100,
        }
    },
)
class NSF(FlowModel):
    """Neural spline flow: each value passes through a monotone rational-quadratic spline, given the values before it.

    ``layers`` times ``nn.Autoregressive`` with ``nn.RationalQuadraticSpline``, with permutations of the features between: the
    density takes one pass, and samples one pass of the network for each feature. With ``coupling=True`` both take one pass:
    ``layers`` times ``nn.Coupling``, each of which transforms half of the features. Images are vectors, row by row.

    What is outside of the interval passes unchanged: standardize columns first (``nn.Standardize``), or choose the interval.

    Args:
        shape: D for vectors (B, D), (C, H, W) for images (B, C, H, W).
        bins: K of each spline.
        bound: the interval of the splines: B for (-B, B), or (low, high).
        tails: ``"linear"``, the identity outside of it; or for values that are all inside, with a uniform base: ``"circular"``,
            whose ends are one point (angles, with bound pi), and ``"box"``. See ``ops.SplineMap``.
        coupling: couplings, which need two features at least, instead of autoregressive layers.
        layers: their number.
        hidden, activation: of the networks, ``nn.MADE`` or for couplings ``nn.MLP``.
        permutation: between two layers: ``"reverse"`` or ``"random"`` (by ``seed``, ``seed + 1``, ...); of autoregressive layers
            also ``"none"``, and of couplings ``"alternate"``, where the halves take turns and nothing is permuted.
        preprocess: before the first layer: None, ``{"rescale": s}``, ``{"rescale": [s, t]}`` or ``{"logit": alpha}``.
        context: K of a context (B, K) for a conditional flow, or None.

    Raises ValueError for settings that do not fit the shape, unknown names, and a spline that ``ops.SplineMap`` refuses.
    Source: Durkan et al., "Neural Spline Flows" (2019); the circle: Rezende et al. (2020).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        bins: int = 8,
        bound: float | Sequence[float] = 5.0,
        tails: str = "linear",
        coupling: bool = False,
        layers: int = 3,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        permutation: str = "reverse",
        seed: int = 0,
        preprocess: Mapping[str, Any] | None = None,
        context: int | None = None,
    ):
        sizes, _ = model_shape(shape, flatten=True)
        check_sizes(layers=layers, context=context)
        features = math.prod(sizes)
        spline = ops.SplineMap(bins, bound, tails)  # type: ignore[arg-type]
        transformer = nn.RationalQuadraticSpline(spline)
        network: dict[str, Any] = {"hidden": tuple(hidden), "activation": activation, "context": context}

        def couple(split: str, channels: int) -> Bijection:
            kept, moved = kept_channels(split, channels), moved_channels(split, channels)
            return nn.Coupling(nn.MLP(kept, transformer.params_per_feature * moved, **network), transformer, split=split)

        def layer() -> list[Bijection]:
            return [nn.Autoregressive(features, transformer, **network)]

        built = preprocessing(preprocess)
        if len(sizes) == 3:
            built.append(nn.Flatten(sizes))
        if coupling:
            built += vector_bijection(couple, features, layers, permutation, seed)
        else:
            built += autoregressive_bijection(layer, features, layers, permutation, seed)
        base = None if tails == "linear" else _Uniform(features, *spline.interval)
        super().__init__(nn.Compose(*built), {"shape": sizes, "context": context}, base)


class _Uniform(nn.Base):
    """Uniform on [low, high]^D, the ends and some roundings beyond them included: there splines take what lies near the ends."""

    support = None  # in units of the latents
    like: torch.Tensor  # empty: it only carries the device and dtype of the samples

    def __init__(self, features: int, low: float, high: float):
        super().__init__(features)
        self.low, self.high = low, high
        self.register_buffer("like", torch.empty(0), persistent=False)

    def log_prob(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        z = self.check(z)
        margin = 4.0 * torch.finfo(z.dtype).eps * max(abs(self.low), abs(self.high))
        inside = ((z >= self.low - margin) & (z <= self.high + margin)).all(1)
        log_prob = torch.where(inside, -math.log(self.high - self.low) * self.shape[0], -math.inf).to(z.dtype)
        return log_prob.masked_fill(z.isnan().any(1), math.nan)

    def rsample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        """The temperature, at most 1, narrows the interval around its middle. Raises ValueError for another."""
        if not 0.0 <= temperature <= 1.0:
            raise ValueError(f"temperature: expected 0 to 1 of a uniform base, got {temperature:g}")
        u = torch.rand(n, *self.shape, dtype=self.like.dtype, device=self.like.device)
        z = 0.5 * (self.low + self.high) + temperature * (self.high - self.low) * (u - 0.5)
        return z.clamp(self.low, self.high)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, low={self.low:g}, high={self.high:g}"
