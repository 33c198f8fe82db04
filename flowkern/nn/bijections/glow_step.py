"""The step of Glow: ActNorm, an invertible 1x1 convolution and an affine coupling."""

from typing import cast

import torch
from torch import nn

from ... import ops
from ..._core.split import Split
from ..transformers.transformer import Transformer
from .actnorm import ActNorm
from .bijection import Bijection, Pair, Replay
from .compose import Compose
from .coupling import AffineCoupling, Coupling
from .invertible_linear import InvertibleConv1x1

_SIGMOID = ops.ScaleMap.sigmoid()


class NormalizedLinear(Bijection):
    """``ActNorm`` and then ``InvertibleConv1x1`` as one linear map: z = W (s x + t) + b = (W diag(s)) x + (W t + b).

    Equal to the two layers, to rounding, in one pass over x. Shapes: x and z (B, C, H, W), logabsdet (B,).
    """

    def __init__(self, actnorm: ActNorm, linear: InvertibleConv1x1):
        super().__init__()
        if actnorm.channels != linear.channels:
            raise ValueError(f"NormalizedLinear: {actnorm.channels} channels in ActNorm, but {linear.channels} in the linear map")
        self.actnorm, self.linear = actnorm, linear

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self.actnorm.prepare(x)
        return self.linear.folded(x, inverse=False, log_scale=self.actnorm.log_scale, shift=self.actnorm.shift)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self.actnorm.check_shape(z)
        return self.linear.folded(z, inverse=True, log_scale=self.actnorm.log_scale, shift=self.actnorm.shift)

    def backward_step(self, y: torch.Tensor, context: torch.Tensor | None, replay: Replay, inverse: bool = False) -> torch.Tensor:
        if inverse:
            return super().backward_step(y, context, replay, inverse)
        return self.linear.backward_folded(y, replay, log_scale=self.actnorm.log_scale, shift=self.actnorm.shift)


class GlowStep(Compose):
    """``ActNorm``, ``InvertibleConv1x1`` and ``AffineCoupling`` in two passes over the data.

    The first two are folded into one linear map, W' = W diag(s) and b' = W t. The step equals the three layers written
    out, in values, log-determinants and gradients of both directions, to rounding: ``actnorm``, ``linear``, ``coupling``.

    Args:
        channels: C.
        conditioner: the network of the coupling, as ``AffineCoupling`` takes it.
        parametrization: of W, as ``InvertibleConv1x1`` takes it.
        scale, split, layout, shift_first: of the coupling; the scale of Glow's code, a sigmoid, if none is given.
        transformer: of the coupling, with ``split`` alone, in the place of the affine one.

    Shapes: x and z (B, C, H, W), context (B, K), logabsdet (B,) in nats. The first forward in training mode
    initializes ActNorm. Raises ValueError as the three layers do.

    Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (2018), section 3 and figure 2a.
    """

    def __init__(
        self,
        channels: int,
        conditioner: nn.Module,
        *,
        parametrization: str = "plu",
        scale: ops.ScaleMap = _SIGMOID,
        split: Split = "channel",
        layout: str = "scale_shift",
        shift_first: bool = False,
        transformer: Transformer | None = None,
    ):
        linear = NormalizedLinear(ActNorm(channels), InvertibleConv1x1(channels, parametrization))
        if transformer is None:
            affine = AffineCoupling(conditioner, split=split, scale=scale, layout=layout, shift_first=shift_first)
            super().__init__(linear, affine)
        else:
            super().__init__(linear, Coupling(conditioner, transformer, split=split))

    @property
    def actnorm(self) -> ActNorm:
        return cast(NormalizedLinear, self.bijections[0]).actnorm

    @property
    def linear(self) -> InvertibleConv1x1:
        return cast(NormalizedLinear, self.bijections[0]).linear

    @property
    def coupling(self) -> Coupling:
        return cast(Coupling, self.bijections[1])
