"""The additive transformer: a shift for each value."""

from dataclasses import dataclass

import torch

from ... import ops
from ..._core.split import Split
from ..bijections.bijection import Pair
from .transformer import Transformer


@dataclass(frozen=True)
class Additive(Transformer, kind="additive"):
    """y = x + t for each value, by the one parameter t; log|dy / dx| = 0."""

    params_per_feature = 1

    def forward(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        (t,) = params.unbind(-1)
        return x - t if inverse else x + t, torch.zeros_like(x)

    def couple(self, x: torch.Tensor, params: torch.Tensor, split: Split, inverse: bool) -> Pair:
        return ops.additive_coupling(x, params, split=split, inverse=inverse)
