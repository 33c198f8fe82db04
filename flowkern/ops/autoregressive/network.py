"""What a masked autoregressive network looks like, and the order in which its inverse visits the units.

A network is a MADE: masked linear layers between units that have degrees. Hidden unit k sees unit j of the layer before
where degree(k) >= degree(j), the two outputs of feature i see the last hidden unit j where degree(i) > degree(j). With
the units of each layer sorted by degree, what a unit sees is a prefix of the layer before.

Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation" (2015), eq. 8 and 9.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..._core.checks import on_host
from ..._core.scale_map import ScaleMap, named_layout
from .degrees import DegreeMask

__all__ = ["ACTIVATIONS", "AutoregressiveNetwork", "Panel", "Plan", "plans", "weight_masks"]

Function = Callable[[torch.Tensor], torch.Tensor]


def _relu_slope(a: torch.Tensor, below: float) -> torch.Tensor:
    return torch.where(a > 0, torch.ones_like(a), torch.full_like(a, below))


#: The activations and their slopes; the position of one is its code in the kernels.
ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "relu": (F.relu, lambda a: _relu_slope(a, 0.0)),
    "leaky_relu": (F.leaky_relu, lambda a: _relu_slope(a, 0.01)),
    "elu": (F.elu, lambda a: torch.exp(a.clamp(max=0))),
    "gelu": (F.gelu, lambda a: torch.special.ndtr(a) + a * torch.exp(-0.5 * a * a) * (2 * math.pi) ** -0.5),
    "silu": (F.silu, lambda a: torch.sigmoid(a) * (1 + a * torch.sigmoid(-a))),
    "tanh": (torch.tanh, lambda a: 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a)),  # 1 - tanh^2 cancels
    "sigmoid": (torch.sigmoid, lambda a: torch.sigmoid(a) * torch.sigmoid(-a)),
}

#: Rows of its largest layer that a panel has, at least: enough to fill the registers of a product twice.
PANEL_ROWS = 24

_SOFT_CLIP = ScaleMap.soft_clip(1e-3)


@dataclass(frozen=True)
class AutoregressiveNetwork:
    """The static description of a masked autoregressive affine layer z = s(u) * y + t, (u, t) = network(y).

    Args:
        in_degrees: of the D features: for an ordering, the place of each feature in it, counted from 1. Equal degrees do not
            see each other.
        hidden_degrees: of the units of each hidden layer; any integers.
        activation: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"elu"``, ``"gelu"`` (with erf), ``"silu"``, ``"tanh"`` or
            ``"sigmoid"``.
        residual: the hidden layers are one and then pairs: h = layer1(y); h = h + layer3(act(layer2(act(h)))); and so on;
            the outputs are linear in the last h. Without, every hidden layer is followed by the activation. The
            layers that are added (the first, third, ...) must have the same degrees.
        scale: how u becomes s.
        layout: where u and t lie among the 2 D outputs: a name of ``ops.LAYOUTS``; ``"pair_..."`` are two neighbours for each
            feature, as ``"interleaved_..."``.
        gated: z = s * y + (1 - s) * t instead, with a sigmoid ``scale`` (Kingma et al. 2016, eq. 14).
        permutation: y[:, i] = x[:, permutation[i]] is what the layer is applied to; None for y = x.

    Attributes:
        depth: the number of sequential steps of the inverse. All features of a step depend on those of earlier
            steps alone.
        used_weights: the share of the weights that the inverse reads, each of them once.

    Raises ValueError for an unknown name, degrees that are not integers, no features, a permutation that is none, degrees
    that do not fit a residual network, and a gate whose scale is not a sigmoid.

    Sources: Germain et al., "MADE" (2015); Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density
    Estimation" (2017), eq. 3 to 5; Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow" (2016).
    """

    in_degrees: tuple[int, ...]
    hidden_degrees: tuple[tuple[int, ...], ...]
    activation: str = "relu"
    residual: bool = False
    scale: ScaleMap = _SOFT_CLIP
    layout: str = "pair_scale_shift"
    gated: bool = False
    permutation: tuple[int, ...] | None = None
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        degrees = (_integers("in_degrees", self.in_degrees), *(_integers("hidden_degrees", h) for h in self.hidden_degrees))
        permutation = None if self.permutation is None else _integers("permutation", self.permutation)
        for name, value in (("in_degrees", degrees[0]), ("hidden_degrees", degrees[1:]), ("permutation", permutation)):
            object.__setattr__(self, name, value)
        _check(self)
        # The text is what the registered ops are given: a traced graph can hold it, and one look at its hash finds the plan.
        scale = self.scale.kind, self.scale.a, self.scale.b
        fields = degrees[0], degrees[1:], self.activation, self.residual, scale, self.layout, self.gated, permutation
        object.__setattr__(self, "text", repr(fields).replace(" ", ""))

    @classmethod
    def from_text(cls, text: str) -> AutoregressiveNetwork:
        """The network whose ``text`` this is."""
        in_degrees, hidden, activation, residual, (kind, a, b), layout, gated, permutation = ast.literal_eval(text)
        return cls(in_degrees, hidden, activation, residual, ScaleMap(kind, a, b), layout, gated, permutation)

    @property
    def features(self) -> int:
        """D."""
        return len(self.in_degrees)

    @property
    def layers(self) -> int:
        """The number of linear layers, the output's included."""
        return len(self.hidden_degrees) + 1

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of features, of units in each hidden layer, and of outputs."""
        return (self.features, *map(len, self.hidden_degrees), 2 * self.features)

    @property
    def output_rows(self) -> tuple[range, range]:
        """Where u and t of the features lie among the 2 D outputs."""
        d = self.features
        halves = self.layout in ("scale_shift", "shift_scale")
        first, second = (range(d), range(d, 2 * d)) if halves else (range(0, 2 * d, 2), range(1, 2 * d, 2))
        return (first, second) if self.layout.endswith("scale_shift") else (second, first)

    def activated(self, layer: int) -> bool:
        """Whether the activation follows hidden layer ``layer`` (counted from 1): not the last one of a residual network."""
        return not (self.residual and layer == self.layers - 1)

    def added(self, layer: int) -> bool:
        """Whether hidden layer ``layer`` (counted from 1) is added to the one two layers before."""
        return self.residual and layer >= 3 and layer % 2 == 1

    @property
    def depth(self) -> int:
        return plans(self.text)[0].depth

    @property
    def used_weights(self) -> float:
        plan = plans(self.text)[0]
        used = sum(sum(layer.prefix[: layer.computed]) for layer in plan.layers[1:-1]) + 2 * sum(plan.layers[-1].prefix)
        total = sum(a * b for a, b in itertools.pairwise(self.widths))
        return used / max(1, total)


def _integers(name: str, values: Sequence[int] | torch.Tensor) -> tuple[int, ...]:
    values = values.tolist() if isinstance(values, torch.Tensor) else [*values]
    if not all(isinstance(v, int) for v in values):
        raise ValueError(f"{name}: expected integers, got {values}")
    return tuple(map(int, values))


def _check(network: AutoregressiveNetwork) -> None:
    if network.activation not in ACTIVATIONS:
        raise ValueError(f"activation: unknown name {network.activation!r}; expected one of {', '.join(map(repr, ACTIVATIONS))}")
    named_layout(network.layout)
    if not network.in_degrees:
        raise ValueError("in_degrees: expected at least one feature")
    if any(not h for h in network.hidden_degrees):
        raise ValueError("hidden_degrees: a layer has no units")
    if network.permutation is not None and sorted(network.permutation) != [*range(network.features)]:
        raise ValueError(f"permutation: expected each of 0..{network.features - 1} once, got {network.permutation}")
    if network.gated and network.scale.kind != "sigmoid":
        raise ValueError(f"gated: expected a sigmoid scale, got {network.scale}")
    if network.residual:
        if len(network.hidden_degrees) % 2 == 0:
            raise ValueError(f"residual: expected one hidden layer and then pairs, got {len(network.hidden_degrees)}")
        for i, degrees in enumerate(network.hidden_degrees[2::2]):
            if degrees != network.hidden_degrees[0]:
                raise ValueError(f"residual: hidden layer {2 * i + 2} is added to layer 0, but has other degrees")


class Layer(NamedTuple):
    """A layer of units, sorted by degree: the features as inputs, hidden units, or the features as pairs of outputs.

    A unit's stage is the step in which it can be computed: hidden units of stage t come at the start of step t, features
    at its end.
    """

    order: list[int]  # the unit at each place
    prefix: list[int]  # how many units of the layer before it sees
    ends: list[int]  # ends[t]: units of stages below t, for t = 0 .. depth

    @property
    def computed(self) -> int:
        """The units that the inverse computes: the others depend on the last features, which nothing sees."""
        return self.ends[-1]


class Panel(NamedTuple):
    """Steps [begin, end), and for each linear layer how many units before it are known at the start, and seen by all rows."""

    begin: int
    end: int
    known: list[int]


class Plan(NamedTuple):
    """The inverse's order of work: layers[0] are the features as inputs, layers[-1] those as outputs."""

    network: AutoregressiveNetwork
    depth: int
    layers: list[Layer]
    panels: list[Panel]
    source: list[int]  # the feature of x, before the permutation, at each place of layers[0]

    def groups(self, layer: int, step: int) -> list[tuple[int, int, int]]:
        """(begin, end, prefix) of the rows of a step that see the same."""
        _, prefix, ends = self.layers[layer]
        found, begin = [], ends[step]
        while begin < ends[step + 1]:
            end = min(bisect_right(prefix, prefix[begin]), ends[step + 1])
            found.append((begin, end, prefix[begin]))
            begin = end
        return found


@functools.lru_cache(maxsize=256)
@on_host()
def weight_masks(text: str) -> list[DegreeMask]:
    """The mask of each linear layer's weights, on the host, for the network whose text this is."""
    network = AutoregressiveNetwork.from_text(text)
    degrees = [torch.tensor(d) for d in (network.in_degrees, *network.hidden_degrees)]
    outputs = degrees[0].new_empty(2 * network.features)
    for rows in network.output_rows:
        outputs[torch.tensor(rows)] = degrees[0]
    hidden = [DegreeMask(after, before) for before, after in itertools.pairwise(degrees)]
    return [*hidden, DegreeMask(outputs, degrees[-1], strict=True)]


@functools.lru_cache(maxsize=256)
def _plan(text: str) -> Plan:
    network, masks = AutoregressiveNetwork.from_text(text), weight_masks(text)
    orders = [mask.order("columns") for mask in masks]
    prefixes = [[0] * network.features, *(mask.prefixes for mask in masks)]
    prefixes[-1] = prefixes[-1][::2]  # the two outputs of a feature see the same
    ends = _ends(network, prefixes)
    layers = [Layer(*parts) for parts in zip([*orders, orders[0]], prefixes, [*ends, ends[0]], strict=True)]
    depth = len(ends[0]) - 1
    shuffle = network.permutation or range(network.features)
    return Plan(network, depth, layers, _panels(layers, depth), [shuffle[i] for i in orders[0]])


def _ends(network: AutoregressiveNetwork, prefixes: list[list[int]]) -> list[list[int]]:
    """Layer.ends of the features and of the hidden layers: every step takes all units that see known ones alone."""
    known = [0] * network.layers
    ends = [[0] for _ in known]
    while known[0] < network.features:
        for i in range(1, len(known)):
            known[i] = bisect_right(prefixes[i], known[i - 1])
            if network.added(i):
                known[i] = min(known[i], known[i - 2])
        known[0] = bisect_right(prefixes[-1], known[-1])
        for places, place in zip(ends, known, strict=True):
            places.append(place)
    return ends


def _panels(layers: list[Layer], depth: int) -> list[Panel]:
    panels, begin = [], 0
    while begin < depth:
        end = begin + 1
        while end < depth and max(layer.ends[end] - layer.ends[begin] for layer in layers) < PANEL_ROWS:
            end += 1
        known = []
        for before, layer in itertools.pairwise(layers):
            first = layer.ends[begin]
            known.append(min(before.ends[begin], layer.prefix[first]) if first < layer.ends[end] else 0)
        panels.append(Panel(begin, end, known))
        begin = end
    return panels


def plans(text: str) -> list[Plan]:
    """The plans of networks whose texts are joined by line ends."""
    return [_plan(line) for line in text.split("\n")]
