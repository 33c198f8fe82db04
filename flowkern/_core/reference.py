"""The reference of an op: outside autocast, and differentiated where its kernels cannot be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from .op import transformed

__all__ = ["differentiate", "outside_autocast", "reference_differentiates"]

Reference = TypeVar("Reference", bound=Callable[..., Any])


def outside_autocast(reference: Reference) -> Reference:
    """A reference that autocast leaves alone: it upcasts explicitly, and its log-determinant stays in full precision."""

    @functools.wraps(reference)
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return reference(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return reference(x, *args, **kwargs)

    return cast(Reference, run)


def reference_differentiates(*grads: torch.Tensor | None) -> bool:
    """Whether a backward must be that of the reference: it is recorded for another one, or its gradients come in batches.

    Batches are those of ``is_grads_batched=True`` and of the vectorized ``torch.autograd.functional``.
    """
    if torch.compiler.is_compiling():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor
    return torch.is_grad_enabled() or transformed() or any(g is not None and batched(g) for g in grads)


def differentiate(
    reference: Callable[..., Any], inputs: Sequence[torch.Tensor], kwargs: dict[str, Any], grads: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """The gradients of ``reference(*inputs, **kwargs)`` for the given output gradients (None = zero), by autograd.

    Differentiable themselves where gradients are being recorded, for double backward.
    """
    record = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view that was made without recording says that it requires gradients, but leads nowhere.
        inputs = [x if record and x.requires_grad else x.detach().requires_grad_() for x in inputs]
        found = reference(*inputs, **kwargs)
    outputs = (found,) if isinstance(found, torch.Tensor) else found
    used = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    if not used:
        return tuple(torch.zeros_like(x) for x in inputs)
    ys, gs = zip(*used, strict=True)
    return torch.autograd.grad(ys, inputs, gs, create_graph=record, allow_unused=True, materialize_grads=True)
