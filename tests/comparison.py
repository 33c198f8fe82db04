"""The one comparison helper of the suite, and how an op's outputs and gradients are collected for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from flowkern import OPS
from flowkern._core.op import Law, Op, Sample

Tensors = tuple[torch.Tensor, ...]

#: The ops that return (y, logabsdet) and take ``inverse``, all of whose positional arguments are tensors.
INVERTIBLE = {name: op for name, op in OPS.items() if Law.INVERTIBLE in op.laws}


def assert_accurate(actual: torch.Tensor, exact: torch.Tensor, same_dtype: torch.Tensor | None = None, ulps: float = 4) -> None:
    """The error of ``actual`` against float64 is at most twice that of plain torch code in the same dtype.

    ``ulps`` units in the last place of the largest value are granted on top: a max over few values is a lottery.
    NaN and infinity must stand where they stand in ``exact``.
    """
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    actual_64, exact = actual.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    assert torch.equal(actual_64.isnan(), exact.isnan())
    assert torch.equal(actual_64.isinf(), exact.isinf())
    if not finite.any():
        return
    granted = ulps * torch.finfo(actual.dtype).eps * exact[finite].abs().max()
    if same_dtype is not None:
        granted = granted + 2 * (same_dtype.detach().double() - exact)[finite].abs().max()
    error = (actual_64 - exact)[finite].abs().max()
    assert error <= granted, f"error {error:.3e} > {granted:.3e}"


def arguments(sample: Sample, dtype: torch.dtype | None = None) -> Tensors:
    """The sample's arguments, its floating tensors as leaves that record gradients, their strides kept, in ``dtype`` if given."""

    def leaf(a: torch.Tensor) -> torch.Tensor:
        return (a.detach() if dtype is None else a.detach().to(dtype)).requires_grad_() if a.is_floating_point() else a

    return tree_map_only(torch.Tensor, leaf, sample.args)


def leaves(args: Any) -> list[torch.Tensor]:
    """The floating tensors among nested arguments."""
    return [a for a in tree_leaves(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]


def change_samples(op: Op, change: Callable[[torch.Tensor], torch.Tensor], args: Tensors) -> Tensors:
    """The arguments with ``change`` applied to those that have a batch dimension."""
    count = len(args) if op.per_sample is None else op.per_sample
    return *map(change, args[:count]), *args[count:]


def output_gradients(outputs: Sequence[torch.Tensor], seed: int = 0) -> Tensors:
    """Fixed random gradients in float64, for outputs of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs)


def outputs_and_gradients(function: Callable[..., Any], args: Tensors, kwargs: dict[str, Any]) -> tuple[Tensors, Tensors]:
    """What the function returns, and the gradients of its arguments for the fixed output gradients."""
    outputs = function(*args, **kwargs)
    return outputs, gradients(outputs, args)


def gradients(outputs: Sequence[torch.Tensor], args: Sequence[torch.Tensor], create_graph: bool = False) -> Tensors:
    """The gradients of ``args`` for the fixed output gradients; outputs without a graph are left out."""
    recorded = [(y, g.to(y)) for y, g in zip(outputs, output_gradients(outputs), strict=True) if y.requires_grad]
    ys, gs = zip(*recorded, strict=True)
    return torch.autograd.grad(ys, args, gs, create_graph=create_graph, allow_unused=True, materialize_grads=True)
