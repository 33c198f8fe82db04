"""Coupling layers: a conditioner reads the kept elements, a transformer maps the others by what it returns."""

import copy

import torch
from torch import nn

from ... import ops
from ..._core.split import SPLITS, FeatureMask, Split, conditioner_input
from ..transformers.affine import Additive, Affine
from ..transformers.mixture_logistic import MixtureLogistic
from ..transformers.transformer import Transformer, setting
from .bijection import Bijection, Pair, Replay

_SOFT_CLIP = ops.ScaleMap.soft_clip(1e-3)


class Coupling(Bijection):
    """z = transformer(x; conditioner(kept)) on the elements that ``split`` moves, z = x on the kept ones.

    logabsdet is the sum of the transformer's over a sample's moved elements.

    Args:
        conditioner: any module; called as ``conditioner(kept)`` or ``conditioner(kept, context)``. ``kept`` holds the kept
            channels, or, for a checkerboard, x with zeros at the moved pixels. It returns P M channels for M moved ones
            (P C for a checkerboard): the first of P parameters for each, then the second, and so on.
        transformer: an ``nn.Transformer`` with P parameters for each value.
        split: as in ``flowkern.ops.affine_coupling``.

    Shapes: x and z (B, D) or (B, C, H, W), context (B, K), logabsdet (B,) in nats.
    Raises TypeError for another transformer, ValueError for an unknown split, and if the conditioner's output has a wrong shape.
    """

    split: Split  # a FeatureMask becomes a submodule, so that it moves with .to()

    def __init__(self, conditioner: nn.Module, transformer: Transformer, *, split: Split = "channel"):
        super().__init__()
        if not isinstance(transformer, Transformer):
            raise TypeError(f"transformer: expected an nn.Transformer, got {type(transformer).__name__}")
        if not isinstance(split, FeatureMask) and split not in SPLITS:
            raise ValueError(f"split: unknown {split!r}; expected a FeatureMask or one of {', '.join(map(repr, SPLITS))}")
        if isinstance(split, FeatureMask):
            # It goes to where the conditioner is: a mask is made on the host, the layer on the default device.
            device = next((p.device for p in conditioner.parameters()), split.place.device)
            split = split if device == split.place.device else copy.deepcopy(split).to(device)
        self.conditioner, self.split, self.transformer = conditioner, split, transformer

    def condition(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """The conditioner's output for the elements that the split keeps; the same for x and for its transform."""
        kept = conditioner_input(x, self.split)
        return self.conditioner(kept) if context is None else self.conditioner(kept, context)

    def couple(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        """The transform itself, with the conditioner's output."""
        return self.transformer.couple(x, params, self.split, inverse)

    def uncouple(self, y: torch.Tensor, params: torch.Tensor, inverse: bool) -> tuple[torch.Tensor, Pair]:
        """The x, a leaf, that ``couple`` makes y of, and the result of ``couple`` as a function of x and params."""
        return self.transformer.undo(y, params, self.split, inverse)

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

    def extra_repr(self) -> str:
        named = "" if isinstance(self.transformer, nn.Module) else f", transformer={self.transformer}"
        return f"split={self.split!r}{named}"


class AffineCoupling(Coupling):
    """``Coupling`` with ``Affine``: z = x * s(u) + t on the moved elements, (u, t) = conditioner(kept).

    Args:
        conditioner: as in ``Coupling``; it returns the ``params`` of ``flowkern.ops.affine_coupling``.
        scale: the ``ScaleMap`` from u to s; that of ``Affine`` if none is given, which expands and contracts by up to 1000.
        split, layout, shift_first: as in ``flowkern.ops.affine_coupling``.

    Shapes and errors are those of ``Coupling``; TypeError for another scale and ValueError for an unknown layout besides.

    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017), eq. 7 and 8.
    """

    scale, layout, shift_first = map(setting, ("scale", "layout", "shift_first"))

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        split: Split = "channel",
        scale: ops.ScaleMap = _SOFT_CLIP,
        layout: str = "scale_shift",
        shift_first: bool = False,
    ):
        super().__init__(conditioner, Affine(scale, layout, shift_first), split=split)


class AdditiveCoupling(Coupling):
    """``Coupling`` with ``Additive``: z = x + conditioner(kept) on the moved elements; logabsdet = 0.

    Source: Dinh, Krueger and Bengio, "NICE: Non-linear Independent Components Estimation" (2015), eq. 4.
    """

    def __init__(self, conditioner: nn.Module, *, split: Split = "channel"):
        super().__init__(conditioner, Additive(), split=split)


class MixtureLogisticCoupling(Coupling):
    """``Coupling`` with ``MixtureLogistic`` of so many ``components``, the coupling of Flow++.

    Source: Ho et al., "Flow++" (2019), section 3.2.
    """

    components, scale = map(setting, ("components", "scale"))

    def __init__(self, conditioner: nn.Module, components: int, *, split: Split = "channel", scale: ops.ScaleMap = _SOFT_CLIP):
        super().__init__(conditioner, MixtureLogistic(components, scale), split=split)
