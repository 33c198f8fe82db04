"""Masked autoregressive layers: one direction is a pass of a MADE, the other follows the order of the features."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch

from ... import ops
from ..._core.checks import accumulation_dtype, has_values
from ..densities.base import check_name
from ..networks.conditioner import check_context
from ..networks.made import MADE, Degrees, degrees_of
from ..transformers.affine import Affine, GatedAffine
from ..transformers.transformer import Transformer, setting
from .bijection import Bijection, Joined, Pair
from .permutation import Permutation

_SOFT_CLIP = ops.ScaleMap.soft_clip(1e-3)
_SIGMOID = ops.ScaleMap.sigmoid()


class Autoregressive(Bijection):
    """Features transformed one by one, y_i = transformer(x_i; params_i), where params_i sees the features before x_i.

    All params come from one pass of a MADE. In the other direction they must be found in the order of the features:
    ``Affine`` and ``GatedAffine`` have ``ops.autoregressive_inverse``, which computes every unit of the network once; any other
    transformer takes ``made.depth`` passes, each of which gives the features that depend on known ones alone. ``Affine``
    layers that follow each other in a ``Compose``, with ``Permutation`` between them, are one call of the op.

    Args:
        features: D.
        transformer: an ``nn.Transformer``.
        direction: which of ``"forward"`` and ``"inverse"`` is the pass.
        hidden, context, activation, residual, order, seed: as in ``MADE``.
        degrees: of the hidden units, as in ``MADE``; None for its own.

    Attributes:
        made: the ``MADE``; it gives each feature the parameters that the transformer takes.
        network: the ``ops.AutoregressiveNetwork``, with ``depth`` and ``used_weights``; None for transformers without the op.

    Shapes: x and z (B, D), context (B, C), logabsdet (B,) in nats. Raises TypeError for another transformer, ValueError for an
    unknown direction, for what ``MADE`` refuses, and for an input of a wrong shape.
    """

    def __init__(
        self,
        features: int,
        transformer: Transformer,
        hidden: Sequence[int] = (512, 512),
        *,
        direction: str = "forward",
        context: int | None = None,
        activation: str = "relu",
        residual: bool = False,
        order: str | torch.Tensor = "sequential",
        degrees: Degrees | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if not isinstance(transformer, Transformer):
            raise TypeError(f"transformer: expected an nn.Transformer, got {type(transformer).__name__}")
        check_name("direction", direction, ("forward", "inverse"))
        self.direction, self.transformer = direction, transformer
        # The last layer starts as nflows' and zuko's do, not at zero: scales near 1, and gradients in every layer at once.
        rule: Degrees = "sorted" if degrees is None else degrees
        self.made = MADE(features, hidden, transformer.params_per_feature, context, activation, residual, order, rule, seed)
        self._masks: list[ops.DegreeMask] = []
        self._network: ops.AutoregressiveNetwork | None = None
        self._levels: list[list[int]] = []
        self._follow_masks()

    def _follow_masks(self) -> None:
        """Describe the MADE, anew if it was given other masks."""
        masks = self.made.masks()
        if len(masks) == len(self._masks) and all(a is b for a, b in zip(masks, self._masks, strict=True)):
            return
        self._masks, options = masks, self.transformer.network_options()
        if options is None:
            self._levels = [level.tolist() for level in self.made.levels()]
        else:
            made = self.made
            self._network = ops.AutoregressiveNetwork(*degrees_of(masks), made.activation, made.residual, **options)

    @property
    def network(self) -> ops.AutoregressiveNetwork | None:
        """What ``ops.autoregressive_inverse`` is told: the degrees, the activation and the scale."""
        self._follow_masks()
        return self._network

    @property
    def gated(self) -> bool:
        """Whether the transformer is ``GatedAffine``."""
        return isinstance(self.transformer, GatedAffine)

    def parameters_of_layers(self) -> list[torch.Tensor]:
        """Weight and bias of each layer, as ``ops.autoregressive_inverse`` takes them."""
        return [t for layer in self.made.layers for t in (cast(torch.Tensor, layer.weight), cast(torch.Tensor, layer.bias))]

    def context_term(self, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor | None:
        """What the context adds to the first layer, or None. Raises ValueError for a context of a wrong shape."""
        check_context(context, self.made.context, y.shape[0])
        if context is not None:
            context = context.to(self.made.context_layer.weight.dtype)  # type: ignore[union-attr]
        return self.made.preactivation_context(context)

    def check_shape(self, y: torch.Tensor) -> None:
        """Raises ValueError unless y is (B, D)."""
        if y.ndim != 2 or y.shape[1] != self.made.features:
            raise ValueError(f"x: expected shape (B, {self.made.features}), got {tuple(y.shape)}")

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.parallel(x, context) if self.direction == "forward" else self.incremental(x, context)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self.incremental(z, context) if self.direction == "forward" else self.parallel(z, context)

    def parallel(self, y: torch.Tensor, context: torch.Tensor | None) -> Pair:
        """The transformer on all features at once."""
        self.check_shape(y)
        params = self.made(y, context)
        dtype = accumulation_dtype(y, params)
        z, logabsdet = self.transformer.transform(y.to(dtype), params.to(dtype), inverse=False)
        return z.to(y.dtype), logabsdet

    def incremental(self, z: torch.Tensor, context: torch.Tensor | None) -> Pair:
        """The y that ``parallel`` takes to z."""
        self.check_shape(z)
        network = self.network
        if network is None:
            return self._by_passes(z, context)
        return ops.autoregressive_inverse(z, self.parameters_of_layers(), network, contexts=[self.context_term(z, context)])

    def _by_passes(self, z: torch.Tensor, context: torch.Tensor | None) -> Pair:
        """One pass of the network for each level of features. What is not known yet is zero, and seen by no result."""
        dtype = accumulation_dtype(z, *self.made.parameters())
        y, logs = z.new_zeros(z.shape, dtype=dtype), []
        for level in self._levels:
            features = torch.tensor(level, device=z.device)
            params = self.made(y, context).to(dtype).index_select(1, features)
            values, logabsdet = self.transformer.forward(z.to(dtype).index_select(1, features), params, inverse=True)
            y = y.index_copy(1, features, values)
            logs.append(logabsdet)
        return y.to(z.dtype), torch.cat(logs, 1).sum(1)

    def join(self, following: Sequence[Bijection], inverse: bool) -> Joined | None:
        if not self._joins(inverse):
            return None
        members: list[Bijection] = [self]
        layers = 1
        for i, bijection in enumerate(following, 2):
            if isinstance(bijection, Autoregressive) and bijection._joins(inverse):
                members, layers = [self, *following[: i - 1]], layers + 1
            elif type(bijection) is not Permutation or not has_values(bijection.order):
                break
        return _Chain(members) if layers > 1 else None

    def _joins(self, inverse: bool) -> bool:
        """Whether that direction is the slow one, has the op, and is what a derived class left alone."""
        own = (type(self).forward, type(self).inverse, type(self).incremental)
        plain = own == (Autoregressive.forward, Autoregressive.inverse, Autoregressive.incremental)
        return plain and self._network is not None and inverse == (self.direction == "forward")

    def extra_repr(self) -> str:
        network = self.network
        how = "" if network is None else f", depth={network.depth}, used weights={network.used_weights:.1%}"
        return f"direction={self.direction!r}, transformer={self.transformer}{how}"


class MaskedAutoregressive(Autoregressive):
    """Masked autoregressive flow: z_i = s(u_i) x_i + t_i, where u_i and t_i see the features before x_i.

    ``Autoregressive`` with ``Affine(scale)``: ``forward`` (density) is one pass of a MADE; ``inverse`` (sampling) computes every
    unit of it once, in ``network.depth`` steps. Other arguments, attributes, shapes and errors are those of ``Autoregressive``.

    Source: Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation" (2017), eq. 3 to 5.
    """

    scale = setting("scale")

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
        network: dict[str, Any] = {"context": context, "activation": activation, "residual": residual}
        super().__init__(features, Affine(scale), hidden, **network, order=order, degrees=degrees, seed=seed)


class InverseAutoregressive(Autoregressive):
    """Inverse autoregressive flow: x_i = s(u_i) z_i + t_i, where u_i and t_i see the features before z_i.

    ``Autoregressive`` with ``Affine(scale)`` the other way round: ``inverse`` (sampling) is one pass of a MADE; ``forward``
    (density) computes every unit of it once, in ``network.depth`` steps. logabsdet of ``inverse`` is the sum of log s(u).

    Args:
        gated: ``GatedAffine``, x = s z + (1 - s) t with s a sigmoid, which starts near z and keeps states bounded (eq. 14).
        scale: None for ``soft_clip(1e-3)``, and with a gate for ``sigmoid()``. The others are those of ``Autoregressive``.

    Attributes, shapes and errors are those of ``Autoregressive``; ValueError too for a gate whose scale is not a sigmoid.

    Source: Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow" (2016), eq. 10 and 14.
    """

    scale = setting("scale")

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
        if scale is None:
            scale = _SIGMOID if gated else _SOFT_CLIP
        transformer = GatedAffine(scale) if gated else Affine(scale)
        network: dict[str, Any] = {"context": context, "activation": activation, "residual": residual, "direction": "inverse"}
        super().__init__(features, transformer, hidden, **network, order=order, degrees=degrees, seed=seed)


class _Chain(Joined):
    """Autoregressive layers and the permutations between them: their slow direction, whichever it is, in one call of the op.

    The first and the last of ``members`` are layers.
    """

    def __init__(self, members: Sequence[Bijection]):
        super().__init__(members)
        # In the order of the parallel direction: for layers whose pass is ``inverse`` that is the inverse of a Compose.
        backwards = cast(Autoregressive, members[0]).direction == "inverse"
        self._layers: list[Autoregressive] = []
        self._permutations: list[list[int]] = []
        pending: list[int] = []
        for bijection in reversed(members) if backwards else members:
            if isinstance(bijection, Permutation):
                order = (bijection.order.argsort() if backwards else bijection.order).tolist()
                pending = [pending[i] for i in order] if pending else order
            else:
                self._layers.append(cast(Autoregressive, bijection))
                self._permutations.append(pending)
                pending = []
        # The orders are kept, so that no other tensor can have their place in memory.
        self._orders = [b.order for b in members if isinstance(b, Permutation)]
        self._versions = [*map(_version, self._orders)]
        self._found: list[ops.AutoregressiveNetwork] = []
        self._networks: list[ops.AutoregressiveNetwork] = []

    def is_current(self) -> bool:
        orders = [b.order for b in self.members if isinstance(b, Permutation)]
        return all(map(has_values, orders)) and [*map(_version, orders)] == self._versions

    def networks(self) -> list[ops.AutoregressiveNetwork]:
        """Those of the layers with the permutations before them, in the order of the parallel direction."""
        current = [cast(ops.AutoregressiveNetwork, layer.network) for layer in self._layers]
        if len(current) != len(self._found) or any(a is not b for a, b in zip(current, self._found, strict=True)):
            pairs = zip(current, self._permutations, strict=True)
            self._networks = [dataclasses.replace(n, permutation=tuple(p)) if p else n for n, p in pairs]
            self._found = current
        return self._networks

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self._layers[-1].check_shape(x)
        parameters = [t for layer in self._layers for t in layer.parameters_of_layers()]
        contexts = [layer.context_term(x, context) for layer in self._layers]
        return ops.autoregressive_inverse(x, parameters, self.networks(), contexts=contexts)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return self(z, context)


def _version(order: torch.Tensor) -> Any:
    """What tells whether an order is another one than before: its values, or where reading them waits, its own version."""
    return order.tolist() if order.is_cpu else (id(order), order._version)
