"""The CPU launcher of ``autoregressive_inverse``: plans as tables, and the products that give the gradients of weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..._core import backend
from ..._core.checks import accumulation_dtype, on_host
from .network import ACTIVATIONS, Plan, plans, weight_masks
from .sweep import Parameters, chain

__all__ = ["backward", "forward"]

Tensors = Sequence[torch.Tensor]


def forward(z: torch.Tensor, tensors: Tensors, text: str, contexts: Sequence[bool], *outputs: torch.Tensor) -> None:
    """The op's forward, into x and logabsdet: one call for the whole chain."""
    described = [_described(plan, p) for plan, p in chain(tensors, text, contexts)]
    backend.call_native("autoregressive_inverse", described, z, *outputs)


def backward(x: torch.Tensor, tensors: Tensors, *rest: Any) -> None:
    """The op's backward, into dz and, if needed, the gradients of the tensors: a sweep for each network of the chain."""
    grad, grad_logabsdet, text, contexts, needs_parameters, dz, outputs = rest
    networks, dtype = chain(tensors, text, contexts), accumulation_dtype(x, *tensors)
    wanted = [p for _, p in chain(outputs, text, contexts)] if needs_parameters else [None for _ in networks]
    for (plan, p), into in zip(networks, wanted, strict=True):
        z = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        v = dz if plan is networks[-1][0] and dz.dtype is dtype else torch.empty_like(z)
        values, grads = ([], []) if into is None else _kept(plan, x.shape[0], z)
        call = [_described(plan, p)], grad, grad_logabsdet, x, z, v
        backend.call_native("autoregressive_inverse_backward", *call, values, grads)
        if into is not None:
            _parameter_gradients(plan, p, values, grads, into)
        x, grad = z, v
    if v is not dz:
        dz.copy_(v)


def _kept(plan: Plan, batch: int, like: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Room for what each linear layer sees, and for the gradients of what it gives; zeros for units that are not computed.

    The former lie sample by sample, the latter unit by unit: as the products read them.
    """
    *seen, _ = plan.network.widths
    _, *given = plan.network.widths
    return [like.new_zeros((batch, n)) for n in seen], [like.new_zeros((n, batch)).t() for n in given]


def _parameter_gradients(plan: Plan, p: Parameters, values: Tensors, grads: Tensors, into: Parameters) -> None:
    """Those of the masked linear layers."""
    for i, mask in enumerate(weight_masks(plan.network.text)):
        into_layer = into.weights[i], into.biases[i]
        given = grads[i], values[i], p.weights[i], p.biases[i]
        backend.call_native("masked_linear_backward", *given, *mask.indices, False, True, True, None, *into_layer)
    if into.context is not None:
        into.context.copy_(grads[0])


def _described(plan: Plan, p: Parameters) -> tuple[Any, ...]:
    """A network as the extension takes it."""
    tensors = [t for pair in zip(p.weights, p.biases, strict=True) for t in pair]
    return tensors, p.context, _table(plan.network.text), plan.network.scale.a, plan.network.scale.b


@functools.lru_cache(maxsize=256)
def _table(text: str) -> torch.Tensor:
    """A plan as the kernels read it: numbers, widths, then order, prefix and ends of each layer, the source, and the panels."""
    (plan,) = plans(text)
    network, layers = plan.network, plan.layers
    rows = [part for rows in network.output_rows for part in (rows.start, rows.step)]
    kind = [*ACTIVATIONS].index(network.activation), network.scale.code, int(network.residual), int(network.gated)
    numbers = [network.layers, plan.depth, len(plan.panels), *kind, *rows, *(len(layer.order) for layer in layers)]
    for layer in layers:
        numbers += [*layer.order, *layer.prefix, *layer.ends]
    numbers += plan.source
    for panel in plan.panels:
        numbers += [panel.begin, panel.end, *panel.known]
    with on_host():  # as the extension reads them; not on a default device, for they are kept
        return torch.tensor(numbers, dtype=torch.int32)
