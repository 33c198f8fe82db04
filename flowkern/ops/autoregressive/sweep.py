"""The inverse of one masked autoregressive layer and its backward in plain torch: panel by panel, and step by step inside.

States are (features, B), so that the units of a step are rows that lie together. What is known before a panel of steps enters
by one product per layer; inside a panel the products are as small as the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..._core.checks import on_host
from ..._core.scale_map import SOFTPLUS_TAIL, ScaleMap
from .network import ACTIVATIONS, AutoregressiveNetwork, Plan, plans

__all__ = [
    "Parameters",
    "Tangent",
    "adds_to_later",
    "affine",
    "chain",
    "ends_of",
    "generate",
    "invert",
    "linearize",
    "parameter_gradients",
    "parameters_of",
    "pull_back",
    "unsorted",
]

#: Turns the outputs (places * per feature, B) of some places of the sorted features into their values (places, B).
Finish = Callable[[slice, torch.Tensor], torch.Tensor]


class Parameters(NamedTuple):
    """The tensors of one network: weights (out, in) and biases (out,) of its linear layers, and the context's term."""

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    context: torch.Tensor | None  # (B, units of the first layer after the features)

    @property
    def flat(self) -> list[torch.Tensor]:
        """All of them, the weights first."""
        return [*self.weights, *self.biases, *([] if self.context is None else [self.context])]


def parameters_of(
    tensors: Sequence[torch.Tensor], networks: Sequence[AutoregressiveNetwork], contexts: Sequence[bool]
) -> list[Parameters]:
    """The flat list of tensors by network: (weight, bias) of each layer, and then the context's term where there is one."""
    remaining, found = iter(tensors), []
    for network, context in zip(networks, contexts, strict=True):
        pairs = [(next(remaining), next(remaining)) for _ in range(network.layers)]
        found.append(Parameters([w for w, _ in pairs], [b for _, b in pairs], next(remaining) if context else None))
    return found


def chain(tensors: Sequence[torch.Tensor], text: str, contexts: Sequence[bool]) -> list[tuple[Plan, Parameters]]:
    """(plan, tensors) of each network of a chain, from what the registered ops are given."""
    found = plans(text)
    return [*zip(found, parameters_of(tensors, [plan.network for plan in found], contexts), strict=True)]


class _Sorted(NamedTuple):
    """Weights and biases with their units in the plan's order; the outputs of a feature, (u, t) or others, lie together."""

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]  # (out, 1)
    context: torch.Tensor | None  # (units, B)

    @classmethod
    def of(cls, plan: Plan, p: Parameters, dtype: torch.dtype, outputs: tuple[range, ...] | None = None) -> _Sorted:
        orders = orders_of(plan.network.text, p.weights[0].device, outputs)
        weights = [
            w.to(dtype).index_select(0, rows).index_select(1, columns)
            for w, rows, columns in zip(p.weights, orders[1:], orders[:-1], strict=True)
        ]
        biases = [b.to(dtype).index_select(0, rows)[:, None] for b, rows in zip(p.biases, orders[1:], strict=True)]
        context = None if p.context is None else p.context.to(dtype).index_select(1, orders[1]).t()
        return cls(weights, biases, context)


# Numbers are copied to a device once: a copy from the host waits for a GPU.


@functools.lru_cache(maxsize=256)
@on_host()
def orders_of(text: str, device: torch.device, outputs: tuple[range, ...] | None = None) -> list[torch.Tensor]:
    """The units at each place, by layer, as far as they are computed; of the last layer the rows of u and t by turns.

    ``outputs``: for networks with other outputs, the rows of each of them.
    """
    plan = plans(text)[0]
    rows = [of[i] for i in plan.layers[-1].order for of in outputs or plan.network.output_rows]
    orders = (*(layer.order[: layer.computed] for layer in plan.layers[:-1]), rows)
    return [torch.tensor(order).to(device) for order in orders]


@functools.lru_cache(maxsize=256)
@on_host()
def _source(text: str, device: torch.device) -> torch.Tensor:
    return torch.tensor(plans(text)[0].source).to(device)


@functools.lru_cache(maxsize=256)
@on_host()
def _prefixes(text: str, device: torch.device) -> list[torch.Tensor]:
    """How many units of the layer before each row of a linear layer sees."""
    *hidden, last = ([*layer.prefix[: layer.computed]] for layer in plans(text)[0].layers[1:])
    return [torch.tensor(prefix).to(device) for prefix in (*hidden, [n for n in last for _ in range(2)])]


def ends_of(plan: Plan, layer: int, step: int) -> int:
    """Rows of a layer with stages below ``step``; the last layer has two for each feature."""
    return plan.layers[layer].ends[step] * (2 if layer == len(plan.layers) - 1 else 1)


def affine(network: AutoregressiveNetwork, raw: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(scale, shift, log scale) of z = scale * y + shift."""
    s, log_s = network.scale(raw)
    return s, (1 - s) * t if network.gated else t, log_s


def sweep(plan: Plan, p: _Sorted, batch: int, finish: Finish) -> torch.Tensor:
    """The sorted features (features, B): every unit of the network once, when what it sees is known."""
    network, last = plan.network, plan.network.layers
    activation = ACTIVATIONS[network.activation][0]
    weights, biases, context = p
    per_feature = len(biases[-1]) // network.features
    # Before and after the activation. What is not known yet is never read.
    before = [biases[0].new_empty((layer.computed, batch)) for layer in plan.layers[:-1]]
    kept = [network.residual and i % 2 == 1 and network.activated(i) for i in range(last)]
    values = [torch.empty_like(a) if keep else a for a, keep in zip(before, kept, strict=True)]
    before.append(biases[0].new_empty((per_feature * network.features, batch)))
    for panel in plan.panels:
        for i, known in enumerate(panel.known, 1):
            several, ends = per_feature if i == last else 1, plan.layers[i].ends
            rows = slice(several * ends[panel.begin], several * ends[panel.end])
            torch.addmm(biases[i - 1][rows], weights[i - 1][rows, :known], values[i - 1][:known], out=before[i][rows])
            if i == 1 and context is not None:
                before[i][rows] += context[rows]
        for step in range(panel.begin, panel.end):
            for i in range(1, last + 1):
                several = per_feature if i == last else 1
                for begin, end, prefix in plan.groups(i, step):
                    rows, known = slice(several * begin, several * end), panel.known[i - 1]
                    if prefix > known:
                        before[i][rows].addmm_(weights[i - 1][rows, known:prefix], values[i - 1][known:prefix])
                rows = slice(plan.layers[i].ends[step], plan.layers[i].ends[step + 1])
                if i == last:
                    values[0][rows] = finish(rows, before[i][several * rows.start : several * rows.stop])
                elif rows.start < rows.stop:
                    if network.added(i):
                        before[i][rows] += before[i - 2][rows]
                    if network.activated(i):
                        values[i][rows] = activation(before[i][rows])
    return values[0]


def invert(z: torch.Tensor, plan: Plan, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
    """x (features, B) and the sum of log s (B,) from z (features, B)."""
    z, logs = z.index_select(0, orders_of(plan.network.text, z.device)[0]), []

    def solve(places: slice, outputs: torch.Tensor) -> torch.Tensor:
        s, shift, log_s = affine(plan.network, outputs[0::2], outputs[1::2])
        logs.append(log_s)
        return (z[places] - shift) / s

    y = sweep(plan, _Sorted.of(plan, parameters, z.dtype), z.shape[1], solve)
    x = torch.empty_like(z).index_copy_(0, _source(plan.network.text, z.device), y)
    return x, torch.cat(logs).sum(0)


def generate(
    plan: Plan, parameters: Parameters, dtype: torch.dtype, batch: int, finish: Callable[[list[int], torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """x (B, features) of a network with K outputs for each feature, K rows of the last layer that lie together.

    ``finish(features, outputs)`` turns the outputs (B, F, K) of the F features of a step into their values (B, F).
    """
    features, order = plan.network.features, plan.layers[0].order
    per_feature = len(parameters.biases[-1]) // features
    rows = tuple(range(k, features * per_feature, per_feature) for k in range(per_feature))

    def draw(places: slice, outputs: torch.Tensor) -> torch.Tensor:
        return finish(order[places], outputs.unflatten(0, (-1, per_feature)).permute(2, 0, 1)).t()

    y = sweep(plan, _Sorted.of(plan, parameters, dtype, rows), batch, draw)
    return unsorted(y, plan).t()


def slope_of_log(scale: ScaleMap, u: torch.Tensor) -> torch.Tensor:
    """The derivative of log s by u."""
    if scale.kind == "exp":
        return torch.ones_like(u)
    if scale.kind == "sigmoid":
        v = u + scale.a
        return torch.sigmoid(-v) if scale.b == 0 else torch.sigmoid(v) * torch.sigmoid(-v) / scale(u)[0]
    if scale.kind == "softplus":
        slope = torch.sigmoid(u) / scale(u)[0]
        return slope if scale.a > 0 else slope.masked_fill(u < SOFTPLUS_TAIL, 1.0)
    if scale.kind == "tanh":  # 1 - tanh^2 cancels
        return 4 * torch.sigmoid(2 * u / scale.a) * torch.sigmoid(-2 * u / scale.a)
    if scale.kind == "atan":
        return 0.636 * scale.a / (1 + u * u)
    return 1 / (1 + (u / scale.a).abs()) ** 2


class Tangent(NamedTuple):
    """What a pass of a network at x leaves for the sweep in reverse: all sorted, (places, B)."""

    z: torch.Tensor
    scale: torch.Tensor
    by_raw: torch.Tensor  # dz by the raw output, over the scale; by the shift
    by_shift: torch.Tensor
    from_log: torch.Tensor | None  # the gradient of the raw output by way of logabsdet, negated
    slopes: list[torch.Tensor | None]  # of the activations; None where there is none
    values: list[torch.Tensor]
    weights: list[torch.Tensor]  # with zeros where the masks hide one
    masks: list[torch.Tensor]


def linearize(x: torch.Tensor, grad_log: torch.Tensor | None, plan: Plan, p: Parameters, with_grad: bool = True) -> Tangent:
    """The pass at x (features, B). ``with_grad``: whether there is a gradient of x, or that of logabsdet alone."""
    network, last = plan.network, plan.network.layers
    ordered = _Sorted.of(plan, p, x.dtype)
    masks = [_visible(plan, i, x.device) for i in range(1, last + 1)]
    weights = [w.masked_fill(~mask, 0) for w, mask in zip(ordered.weights, masks, strict=True)]
    y = x.index_select(0, _source(plan.network.text, x.device))
    # What no unit sees has no say in the network, even where a scale of 0 has made it infinite.
    unseen = slice(max(plan.layers[1].prefix, default=0), None)
    seen = y.clone()
    seen[unseen].zero_()
    values, before = _pass(seen, network, ordered._replace(weights=weights))
    u, t = before[-1][0::2], before[-1][1::2]
    s, shift, _ = affine(network, u, t)
    z = s * y + shift
    # (s y + shift) by u is slope * s * (y - t or y); the log-determinant of the inverse is -sum log s.
    slope = slope_of_log(network.scale, u)
    by_raw = slope * (y - t if network.gated else y)
    by_shift = 1 - s if network.gated else torch.ones_like(s)
    from_log = None if grad_log is None else slope * grad_log
    if not with_grad:
        s[unseen].fill_(1)
        by_raw[unseen].zero_()
    slope_at = ACTIVATIONS[network.activation][1]
    slopes = [slope_at(a) if network.activated(i) else None for i, a in enumerate(before[1:-1], 1)]
    return Tangent(z, s, by_raw, by_shift, from_log, [None, *slopes], values, weights, masks)


def pull_back(
    x: torch.Tensor, grad: torch.Tensor | None, grad_log: torch.Tensor | None, plan: Plan, p: Parameters, needs_parameters: bool
) -> tuple[torch.Tensor, torch.Tensor, Parameters | None]:
    """From the inverse's output x back to z, with the gradients of x (features, B) and of logabsdet (B,), if there are.

    Returns z and its gradient, (features, B), and the gradients of the parameters.
    """
    at = linearize(x, grad_log, plan, p, grad is not None)
    grad = (torch.zeros_like(x) if grad is None else grad).index_select(0, _source(plan.network.text, x.device))
    solved, deltas = _sweep_back(grad, plan, at)
    found = parameter_gradients(deltas, at, plan, p) if needs_parameters else None
    return unsorted(at.z, plan), unsorted(solved, plan), found


def unsorted(v: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Of values (places, B) of the features, those of z (features, B)."""
    return torch.empty_like(v).index_copy_(0, orders_of(plan.network.text, v.device)[0], v)


def _sweep_back(grad: torch.Tensor, plan: Plan, at: Tangent) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The gradient of z, and those of every layer before the activations, the features' (unused) first."""
    network, last = plan.network, plan.network.layers
    solved = torch.empty_like(grad)
    deltas = [grad.new_zeros((ends_of(plan, i, plan.depth), grad.shape[1])) for i in range(last + 1)]
    for panel in reversed(plan.panels):
        above, ends = [], [ends_of(plan, i, panel.end) for i in range(last + 1)]
        for i in range(last):
            columns = slice(plan.layers[i].ends[panel.begin], plan.layers[i].ends[panel.end])
            above.append(at.weights[i][ends[i + 1] :, columns].t() @ deltas[i + 1][ends[i + 1] :])
        for step in reversed(range(panel.begin, panel.end)):
            for i in (0, *reversed(range(1, last))):
                columns = slice(plan.layers[i].ends[step], plan.layers[i].ends[step + 1])
                if columns.start == columns.stop:
                    continue
                rows = slice(ends_of(plan, i + 1, step + (i == 0)), ends[i + 1])
                start = plan.layers[i].ends[panel.begin]
                got = above[i][columns.start - start : columns.stop - start]
                got = torch.addmm(got, at.weights[i][rows, columns].t(), deltas[i + 1][rows])
                if i == 0:
                    entering = grad[columns] - got  # s v
                    solved[columns] = v = entering / at.scale[columns]
                    outputs = deltas[last][2 * columns.start : 2 * columns.stop]
                    by_u = at.by_raw[columns] * entering
                    outputs[0::2] = by_u if at.from_log is None else by_u + at.from_log[columns]
                    outputs[1::2] = at.by_shift[columns] * v
                else:
                    if (slope := at.slopes[i]) is not None:
                        got = got * slope[columns]
                    if adds_to_later(network, i):
                        got = got + deltas[i + 2][columns]
                    deltas[i][columns] = got
    return solved, deltas


def adds_to_later(network: AutoregressiveNetwork, layer: int) -> bool:
    """Whether hidden layer ``layer`` is added to the one two layers later."""
    return network.residual and layer + 2 < network.layers and network.added(layer + 2)


def _visible(plan: Plan, layer: int, device: torch.device) -> torch.Tensor:
    """(rows, columns) of the sorted weights: which count."""
    prefix = _prefixes(plan.network.text, device)[layer - 1]
    return torch.arange(plan.layers[layer - 1].computed, device=device) < prefix[:, None]


def _pass(y: torch.Tensor, network: AutoregressiveNetwork, p: _Sorted) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The network from features to outputs: the layers' values, and those before the activations."""
    activation = ACTIVATIONS[network.activation][0]
    values, before = [y], [y]
    for i, (weight, bias) in enumerate(zip(p.weights, p.biases, strict=True), 1):
        a = torch.addmm(bias, weight, values[-1])
        if i == 1 and p.context is not None:
            a = a + p.context
        if i < network.layers:
            if network.added(i):
                a = a + before[i - 2]
            values.append(activation(a) if network.activated(i) else a)
        before.append(a)
    return values, before


def parameter_gradients(deltas: list[torch.Tensor], at: Tangent, plan: Plan, p: Parameters) -> Parameters:
    """Those of one pass with the gradients ``deltas`` before the activations, negated, in the parameters' own order."""
    dtype, orders, weights, biases = at.z.dtype, orders_of(plan.network.text, at.z.device), [], []
    for i, mask in enumerate(at.masks, 1):
        weights.append(torch.zeros_like(p.weights[i - 1], dtype=dtype))
        weights[-1][orders[i][:, None], orders[i - 1]] = -(deltas[i] @ at.values[i - 1].t()).masked_fill_(~mask, 0)
        biases.append(torch.zeros_like(p.biases[i - 1], dtype=dtype).index_copy_(0, orders[i], -deltas[i].sum(1)))
    context = None
    if p.context is not None:
        context = torch.zeros_like(p.context, dtype=dtype).index_copy_(1, orders[1], -deltas[1].t())
    return Parameters(weights, biases, context)
