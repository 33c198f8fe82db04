"""Coupling layers: a conditioner reads the kept elements, an op of ``flowkern.ops`` transforms the others."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ... import ops
from ..._core.scale_map import check_scale, named_layout
from ..._core.split import SPLITS, FeatureMask, Split, conditioner_input
from ...ops.parts import undo_affine_coupling
from .bijection import Bijection, Pair, Replay

__all__ = ["AdditiveCoupling", "AffineCoupling"]

_SIGMOID = ops.ScaleMap.sigmoid()


def _beside(conditioner: nn.Module, split: Split) -> Split:
    """The split, its tensors where the conditioner's are: a mask is made on the host, the layer on the default device."""
    if isinstance(split, str):
        return split
    device = next((p.device for p in conditioner.parameters()), split.rank.device)
    return split if device == split.rank.device else copy.deepcopy(split).to(device)


class _Coupling(Bijection):
    split: Split  # a FeatureMask becomes a submodule, so that it moves with .to()

    def __init__(self, conditioner: nn.Module, split: Split):
        super().__init__()
        if not isinstance(split, FeatureMask) and split not in SPLITS:
            raise ValueError(f"split: unknown {split!r}; expected a FeatureMask or one of {', '.join(map(repr, SPLITS))}")
        self.conditioner = conditioner
        self.split = _beside(conditioner, split)

    def condition(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """The conditioner's output for the elements that the split keeps; the same for x and for its transform."""
        kept = conditioner_input(x, self.split)
        return self.conditioner(kept) if context is None else self.conditioner(kept, context)

    def couple(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        """The op itself, with the conditioner's output."""
        raise NotImplementedError(f"{type(self).__name__} has no couple")

    def uncouple(self, y: torch.Tensor, params: torch.Tensor, inverse: bool) -> tuple[torch.Tensor, Pair]:
        """The x, a leaf, that ``couple`` makes y of, and the result of ``couple`` as a function of x and params."""
        x = self.couple(y, params.detach(), not inverse)[0].detach().requires_grad_()
        with torch.enable_grad():
            return x, self.couple(x, params, inverse)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.couple(x, self.condition(x, context), inverse=False)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.couple(z, self.condition(z, context), inverse=True)

    def backward_step(self, y: torch.Tensor, context: torch.Tensor | None, replay: Replay, inverse: bool = False) -> torch.Tensor:
        # The kept elements are the same before and after: one evaluation of the conditioner gives the inverse, and its graph
        # the gradient. ``kept`` stands for x in that graph, because x itself is known only after it.
        kept = y.detach().requires_grad_()
        with torch.enable_grad():
            params = self.condition(kept, context)
        x, coupled = self.uncouple(y, params, inverse)
        replay.differentiate(*coupled, x, kept)
        return x.detach()


class AffineCoupling(_Coupling):
    """z = x * s(u) + t on the elements that ``split`` transforms, z = x on the others; (u, t) = conditioner(kept).

    logabsdet is the sum of log s(u) over a sample's transformed elements.

    Args:
        conditioner: any module; called as ``conditioner(kept)`` or ``conditioner(kept, context)``. ``kept`` holds the kept
            channels, or, for a checkerboard, x with zeros at the transformed pixels. It returns the ``params`` of
            ``flowkern.ops.affine_coupling``: 2 M channels for M transformed ones (2 C for a checkerboard).
        split, scale, layout, shift_first: as in ``flowkern.ops.affine_coupling``.

    Shapes: x and z (B, D) or (B, C, H, W), context (B, K), logabsdet (B,) in nats.
    Raises ValueError for an unknown split or layout, and if the conditioner's output has a wrong shape.

    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017), eq. 7 and 8.
    """

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        split: Split = "channel",
        scale: ops.ScaleMap = _SIGMOID,
        layout: str = "scale_shift",
        shift_first: bool = False,
    ):
        super().__init__(conditioner, split)
        check_scale(scale)
        self.scale = scale
        self.layout = named_layout(layout).name
        self.shift_first = shift_first

    def _settings(self) -> dict[str, Any]:
        return {"split": self.split, "scale": self.scale, "layout": self.layout, "shift_first": self.shift_first}

    def couple(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        return ops.affine_coupling(x, params, inverse=inverse, **self._settings())

    def uncouple(self, y: torch.Tensor, params: torch.Tensor, inverse: bool) -> tuple[torch.Tensor, Pair]:
        return undo_affine_coupling(y, params, inverse=inverse, **self._settings())

    def extra_repr(self) -> str:
        return f"split={self.split!r}, scale={self.scale}, layout={self.layout!r}, shift_first={self.shift_first}"


class AdditiveCoupling(_Coupling):
    """z = x + conditioner(kept) on the elements that ``split`` transforms, z = x on the others; logabsdet = 0.

    The conditioner returns M channels for M transformed ones (C for a checkerboard). Shapes and errors as for
    ``AffineCoupling``.

    Source: Dinh, Krueger and Bengio, "NICE: Non-linear Independent Components Estimation" (2015), eq. 4.
    """

    def __init__(self, conditioner: nn.Module, *, split: Split = "channel"):
        super().__init__(conditioner, split)

    def couple(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        return ops.additive_coupling(x, params, split=self.split, inverse=inverse)

    def extra_repr(self) -> str:
        return f"split={self.split!r}"
