"""Masked autoregressive flows: one direction is a pass of a MADE, the other the incremental inverse, at the price of one pass."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from ... import ops
from ..._core.checks import accumulation_dtype, has_values
from ..networks.conditioner import _check_context
from ..networks.made import MADE, Degrees, degrees_of
from .bijection import Bijection, Pair
from .permutation import Permutation

__all__ = ["Chains", "InverseAutoregressive", "MaskedAutoregressive"]

_SOFT_CLIP = ops.ScaleMap.soft_clip(1e-3)
_SIGMOID = ops.ScaleMap.sigmoid()


class _Autoregressive(Bijection):
    """The two directions of z = s(u) y + t with (u, t) = made(y); subclasses say which of them is ``forward``."""

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        context: int | None,
        activation: str,
        residual: bool,
        scale: ops.ScaleMap,
        gated: bool,
        order: str | torch.Tensor,
        degrees: Degrees | None,
        seed: int,
    ):
        super().__init__()
        # The last layer starts as nflows' and zuko's do, not at zero: scales near 1, and gradients in every layer at once.
        rule: Degrees = "sorted" if degrees is None else degrees
        self.made = MADE(features, hidden, 2, context, activation, residual, order, rule, seed)
        self.scale, self.gated = scale, gated
        self._masks: list[ops.DegreeMask] = []
        self._network: ops.AutoregressiveNetwork
        self._describe()

    def _describe(self) -> ops.AutoregressiveNetwork:
        """The static description of the MADE, anew if it was given other masks."""
        masks = self.made.masks()
        if len(masks) != len(self._masks) or any(a is not b for a, b in zip(masks, self._masks, strict=True)):
            self._masks = masks
            made, options = self.made, {"scale": self.scale, "gated": self.gated, "layout": "pair_scale_shift"}
            self._network = ops.AutoregressiveNetwork(*degrees_of(masks), made.activation, made.residual, **options)  # type: ignore[arg-type]
        return self._network

    @property
    def network(self) -> ops.AutoregressiveNetwork:
        """What ``ops.autoregressive_inverse`` is told: the degrees, the activation and the scale."""
        return self._describe()

    def parameters_of_layers(self) -> list[torch.Tensor]:
        """Weight and bias of each layer, as ``ops.autoregressive_inverse`` takes them."""
        return [t for layer in self.made.layers for t in (cast(torch.Tensor, layer.weight), cast(torch.Tensor, layer.bias))]

    def context_term(self, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor | None:
        """What the context adds to the first layer, or None. Raises ValueError for a context of a wrong shape."""
        _check_context(context, self.made.context, y.shape[0])
        if context is not None:
            context = context.to(self.made.context_layer.weight.dtype)  # type: ignore[union-attr]
        return self.made.preactivation_context(context)

    def _check(self, y: torch.Tensor) -> None:
        if y.ndim != 2 or y.shape[1] != self.made.features:
            raise ValueError(f"x: expected shape (B, {self.made.features}), got {tuple(y.shape)}")

    def parallel(self, y: torch.Tensor, context: torch.Tensor | None) -> Pair:
        """s(u) y + t, all features at once."""
        self._check(y)
        u, t = self.made(y, context).unbind(-1)
        dtype = accumulation_dtype(y, u)
        u, t, moved = u.to(dtype), t.to(dtype), y.to(dtype)
        s, log_s = self.scale(u)
        return (s * moved + ((1 - s) * t if self.gated else t)).to(y.dtype), log_s.sum(1)

    def incremental(self, z: torch.Tensor, context: torch.Tensor | None) -> Pair:
        """The y that ``parallel`` takes to z: every unit of the network once."""
        self._check(z)
        return ops.autoregressive_inverse(
            z, self.parameters_of_layers(), self._describe(), contexts=[self.context_term(z, context)]
        )

    def extra_repr(self) -> str:
        return f"scale={self.scale}, gated={self.gated}, depth={self.network.depth}, used weights={self.network.used_weights:.1%}"


class MaskedAutoregressive(_Autoregressive):
    """Masked autoregressive flow: z_i = s(u_i) x_i + t_i, where u_i and t_i see the features before x_i.

    ``forward`` (density) is one pass of a MADE; ``inverse`` (sampling) computes every unit of it once, in
    ``network.depth`` steps. logabsdet is the sum of log s(u).

    Args:
        features: D.
        hidden, context, activation, residual, order, seed: as in ``MADE``.
        scale: how u becomes s.
        degrees: of the hidden units, as in ``MADE``; None for its own.

    Attributes:
        made: the ``MADE``; its outputs are pairs (u, t).
        network: the ``ops.AutoregressiveNetwork``, with ``depth`` and ``used_weights``.

    Shapes: x and z (B, D), context (B, C), logabsdet (B,) in nats.
    Raises ValueError for what ``MADE`` refuses, and for an input of a wrong shape.

    Source: Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation" (2017), eq. 3 to 5.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (512, 512),
        *,
        context: int | None = None,
        activation: str = "relu",
        residual: bool = False,
        scale: ops.ScaleMap = _SOFT_CLIP,
        order: str | torch.Tensor = "sequential",
        degrees: Degrees | None = None,
        seed: int = 0,
    ):
        super().__init__(features, hidden, context, activation, residual, scale, False, order, degrees, seed)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.parallel(x, context)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.incremental(z, context)


class InverseAutoregressive(_Autoregressive):
    """Inverse autoregressive flow: x_i = s(u_i) z_i + t_i, where u_i and t_i see the features before z_i.

    ``inverse`` (sampling) is one pass of a MADE; ``forward`` (density) computes every unit of it once, in
    ``network.depth`` steps. logabsdet of ``inverse`` is the sum of log s(u).

    Args:
        gated: x = s z + (1 - s) t with s a sigmoid, which starts near z and keeps states bounded (Kingma et al., eq. 14).
        scale: None for ``soft_clip(1e-3)``, and with a gate for ``sigmoid()``. The other arguments, attributes and shapes are
            those of ``MaskedAutoregressive``.

    Raises ValueError for what ``MADE`` refuses, a gate whose scale is not a sigmoid, and an input of a wrong shape.

    Source: Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow" (2016), eq. 10 and 14.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (512, 512),
        *,
        gated: bool = False,
        context: int | None = None,
        activation: str = "relu",
        residual: bool = False,
        scale: ops.ScaleMap | None = None,
        order: str | torch.Tensor = "sequential",
        degrees: Degrees | None = None,
        seed: int = 0,
    ):
        scale = (_SIGMOID if gated else _SOFT_CLIP) if scale is None else scale
        super().__init__(features, hidden, context, activation, residual, scale, gated, order, degrees, seed)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.incremental(x, context)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.parallel(z, context)


class _Chain(Bijection):
    """Autoregressive layers and the permutations between them: their slow direction, whichever it is, in one call of the op.

    The first and the last of ``bijections`` are layers.
    """

    def __init__(self, bijections: Sequence[nn.Module]):
        super().__init__()
        # In the order of the parallel direction: for inverse autoregressive layers that is the inverse of a Compose.
        backwards = any(isinstance(b, InverseAutoregressive) for b in bijections)
        self._layers: list[_Autoregressive] = []  # a plain list: they belong to their Compose
        self._permutations: list[list[int]] = []
        pending: list[int] = []
        for bijection in reversed(bijections) if backwards else bijections:
            if isinstance(bijection, Permutation):
                order = (bijection.order.argsort() if backwards else bijection.order).tolist()
                pending = [pending[i] for i in order] if pending else order
            else:
                self._layers.append(cast(_Autoregressive, bijection))
                self._permutations.append(pending)
                pending = []
        self._found: list[ops.AutoregressiveNetwork] = []
        self._networks: list[ops.AutoregressiveNetwork] = []

    def networks(self) -> list[ops.AutoregressiveNetwork]:
        """Those of the layers with the permutations before them, in the order of the parallel direction."""
        current = [layer.network for layer in self._layers]
        if len(current) != len(self._found) or any(a is not b for a, b in zip(current, self._found, strict=True)):
            pairs = zip(current, self._permutations, strict=True)
            self._networks = [dataclasses.replace(n, permutation=tuple(p)) if p else n for n, p in pairs]
            self._found = current
        return self._networks

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self._layers[-1]._check(x)
        parameters = [t for layer in self._layers for t in layer.parameters_of_layers()]
        contexts = [layer.context_term(x, context) for layer in self._layers]
        return ops.autoregressive_inverse(x, parameters, self.networks(), contexts=contexts)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self(z, context)


class Chains:
    """The autoregressive layers of one ``Compose`` that follow each other, two or more, with or without permutations among them.

    They are found once, and again when the bijections or the orders of the permutations are others.
    """

    def __init__(self) -> None:
        self._known: dict[bool, tuple[list[Any], list[torch.Tensor], list[Bijection]]] = {}

    def joined(self, bijections: Sequence[Bijection], inverse: bool) -> Sequence[Bijection]:
        """``bijections`` in the order of ``Compose.forward``, each such run as one if ``inverse`` is its slow direction."""
        slow = MaskedAutoregressive if inverse else InverseAutoregressive
        if torch.compiler.is_compiling() or sum(type(b) is slow for b in bijections) < 2:
            return bijections
        orders = [b.order for b in bijections if isinstance(b, Permutation)]
        if not all(map(has_values, orders)):
            return bijections
        key = [*map(id, bijections), *map(_version, orders)]
        known = self._known.get(inverse)
        if known is None or known[0] != key:
            # The orders are kept, so that no other tensor can have their place in memory.
            known = self._known[inverse] = key, orders, _joined(bijections, slow)
        return known[2]


def _version(order: torch.Tensor) -> Any:
    """What tells whether an order is another one than before: its values, or where reading them waits, its own version."""
    return order.tolist() if order.is_cpu else (id(order), order._version)


def _joined(bijections: Sequence[Bijection], slow: type[_Autoregressive]) -> list[Bijection]:
    found: list[Bijection] = []
    for belongs, group in itertools.groupby(bijections, lambda b: type(b) in (slow, Permutation)):
        members = list(group)
        layers = [i for i, b in enumerate(members) if type(b) is slow]
        if belongs and len(layers) > 1:
            # Permutations before the first layer and after the last one stay what they are.
            first, last = layers[0], layers[-1] + 1
            found += [*members[:first], _Chain(members[first:last]), *members[last:]]
        else:
            found += members
    return found
