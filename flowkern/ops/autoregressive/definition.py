"""Masked autoregressive affine layers and their inverse in plain torch: the definition, which every kernel is held against."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..._core.checks import accumulation_dtype
from ..._core.reference import outside_autocast
from .network import ACTIVATIONS, AutoregressiveNetwork, plans
from .sweep import Parameters, affine, parameters_of

__all__ = ["density", "masks", "network_outputs", "reference"]

Pair = tuple[torch.Tensor, torch.Tensor]
Tensors = Sequence[torch.Tensor]
Networks = Sequence[AutoregressiveNetwork]


def masks(network: AutoregressiveNetwork, device: torch.device) -> list[torch.Tensor]:
    """(out, in) for each linear layer: which weights count."""
    degrees = [torch.tensor(d, device=device) for d in (network.in_degrees, *network.hidden_degrees)]
    hidden = [after[:, None] >= before for before, after in itertools.pairwise(degrees)]
    visible = degrees[0][:, None] > degrees[-1]
    output = visible.new_empty((2 * network.features, len(degrees[-1])), dtype=torch.bool)
    for rows in network.output_rows:
        output[torch.tensor(rows, device=device)] = visible
    return [*hidden, output]


def network_outputs(network: AutoregressiveNetwork, y: torch.Tensor, p: Parameters) -> Pair:
    """(u, t) of features y (B, D) by one pass, all of one dtype."""
    activation, dtype = ACTIVATIONS[network.activation][0], y.dtype
    value, before = y, [y]
    for i, (weight, bias, mask) in enumerate(zip(p.weights, p.biases, masks(network, y.device), strict=True), 1):
        masked = torch.where(mask, weight.to(dtype), torch.zeros((), dtype=dtype, device=y.device))
        a = value @ masked.t() + bias.to(dtype)
        if i == 1 and p.context is not None:
            a = a + p.context.to(dtype)
        if network.added(i):
            a = a + before[i - 2]
        before.append(a)
        value = activation(a) if i < network.layers and network.activated(i) else a
    raw, shift = (torch.tensor(rows, device=y.device) for rows in network.output_rows)
    return value.index_select(1, raw), value.index_select(1, shift)


@outside_autocast
def reference(z: torch.Tensor, tensors: Tensors, networks: Networks, contexts: Sequence[bool]) -> Pair:
    """The definition in plain torch: the network is run once for each step, with zeros for what is not known yet."""
    dtype = accumulation_dtype(z, *tensors)
    x, logabsdet = z.to(dtype), z.new_zeros(z.shape[0], dtype=dtype)
    # Converted once for all passes, so that the gradients of the passes add up before they are rounded.
    given = parameters_of([t.to(dtype) for t in tensors], networks, contexts)
    for network, p in reversed([*zip(networks, given, strict=True)]):
        plan = plans(network.text)[0]
        steps = torch.empty(network.features, dtype=torch.int64, device=z.device)
        for step in range(plan.depth):
            features = plan.layers[0].order[plan.layers[0].ends[step] : plan.layers[0].ends[step + 1]]
            steps[features] = step
        y = torch.zeros_like(x)
        for step in range(plan.depth):
            raw, t = network_outputs(network, y, p)
            _, shift, log_s = affine(network, raw, t)
            y = torch.where(steps == step, (x - shift) * network.scale.reciprocal(raw)[0], y)
            logabsdet = logabsdet - torch.where(steps == step, log_s, torch.zeros_like(log_s)).sum(1)
        if network.permutation is not None:
            y = torch.empty_like(y).index_copy(1, torch.tensor(network.permutation, device=z.device), y)
        x = y
    return x.to(z.dtype), logabsdet


def density(x: torch.Tensor, tensors: Tensors, networks: Networks, contexts: Sequence[bool]) -> Pair:
    """z and sum log s of x: what the op inverts, in plain torch, in the accumulation dtype; differentiable."""
    dtype = accumulation_dtype(x, *tensors)
    z, total = x.to(dtype), x.new_zeros(x.shape[0], dtype=dtype)
    for network, p in zip(networks, parameters_of(tensors, networks, contexts), strict=True):
        if network.permutation is not None:
            z = z.index_select(1, torch.tensor(network.permutation, device=z.device))
        s, shift, log_s = affine(network, *network_outputs(network, z, p))
        z, total = s * z + shift, total + log_s.sum(1)
    return z, total
