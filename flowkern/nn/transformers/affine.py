"""Affine and additive transformers: a scale and a shift, or a shift alone, for each value."""

from dataclasses import dataclass
from typing import Any

import torch

from ... import ops
from ..._core.scale_map import named_layout
from ..._core.split import Split
from ...ops.parts import undo_affine_coupling
from ..bijections.bijection import Pair
from .transformer import Transformer, take_scale

_SIGMOID = ops.ScaleMap.sigmoid()
_SOFT_CLIP = ops.ScaleMap.soft_clip(1e-3)


@dataclass(frozen=True)
class Affine(Transformer, kind="affine"):
    """y = x s(u) + t for each value, by the parameters (u, t); log|dy / dx| = log s(u).

    Args:
        scale: how u becomes s: a ``ScaleMap``, or its fields ``{"kind", "a", "b"}``. The default expands and contracts, by up
            to 1000; the sigmoid, default of ``ops.affine_coupling`` and Glow's own, only contracts.
        layout: of a coupling's parameters, as in ``ops.affine_coupling``; elsewhere ``...shift_scale`` means (t, u).
        shift_first: y = (x + t) s(u) instead.

    Raises TypeError for another scale, ValueError for an unknown layout.
    """

    scale: ops.ScaleMap = _SOFT_CLIP
    layout: str = "scale_shift"
    shift_first: bool = False

    params_per_feature = 2

    def __post_init__(self) -> None:
        take_scale(self)
        named_layout(self.layout)

    @property
    def _scale_comes_first(self) -> bool:
        return self.layout.endswith("scale_shift")

    def forward(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        first, second = params.unbind(-1)
        u, t = (first, second) if self._scale_comes_first else (second, first)
        if inverse:
            reciprocal, log_s = self.scale.reciprocal(u)
            return x * reciprocal - t if self.shift_first else (x - t) * reciprocal, -log_s
        s, log_s = self.scale(u)
        return (x + t) * s if self.shift_first else x * s + t, log_s

    def couple(self, x: torch.Tensor, params: torch.Tensor, split: Split, inverse: bool) -> Pair:
        how: dict[str, Any] = {"scale": self.scale, "layout": self.layout, "shift_first": self.shift_first}
        return ops.affine_coupling(x, params, split=split, inverse=inverse, **how)

    def undo(self, y: torch.Tensor, params: torch.Tensor, split: Split, inverse: bool) -> tuple[torch.Tensor, Pair]:
        how: dict[str, Any] = {"scale": self.scale, "layout": self.layout, "shift_first": self.shift_first}
        return undo_affine_coupling(y, params, split=split, inverse=inverse, **how)

    def network_options(self) -> dict[str, Any] | None:
        if self.shift_first:
            return None
        return {"scale": self.scale, "layout": "pair_scale_shift" if self._scale_comes_first else "pair_shift_scale"}


@dataclass(frozen=True)
class GatedAffine(Transformer, kind="gated_affine"):
    """y = s x + (1 - s) t for each value, by the parameters (u, t), s = s(u) a sigmoid; log|dy / dx| = log s.

    ``scale`` is as in ``Affine``. Raises ValueError for one that is no sigmoid.

    Source: Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow" (2016), eq. 14.
    """

    scale: ops.ScaleMap = _SIGMOID

    params_per_feature = 2

    def __post_init__(self) -> None:
        take_scale(self)
        if self.scale.kind != "sigmoid":
            raise ValueError(f"gated: expected a sigmoid scale, got {self.scale}")

    def forward(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        u, t = params.unbind(-1)
        s, log_s = self.scale(u)
        shift = (1 - s) * t
        if inverse:
            return (x - shift) * self.scale.reciprocal(u)[0], -log_s
        return s * x + shift, log_s

    def network_options(self) -> dict[str, Any] | None:
        return {"scale": self.scale, "layout": "pair_scale_shift", "gated": True}


@dataclass(frozen=True)
class Additive(Transformer, kind="additive"):
    """y = x + t for each value, by the one parameter t; log|dy / dx| = 0."""

    params_per_feature = 1

    def forward(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        (t,) = params.unbind(-1)
        return x - t if inverse else x + t, torch.zeros_like(x)

    def couple(self, x: torch.Tensor, params: torch.Tensor, split: Split, inverse: bool) -> Pair:
        return ops.additive_coupling(x, params, split=split, inverse=inverse)
