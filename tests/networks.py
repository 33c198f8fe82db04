"""Masked networks, and what the tests of ``autoregressive_inverse`` and of its kernels take from a sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from comparison import Tensors

from flowkern._core.op import Sample
from flowkern.ops import AutoregressiveNetwork
from flowkern.ops.autoregressive import inverse


def made(features: int, *widths: int, **options: Any) -> AutoregressiveNetwork:
    hidden = tuple(tuple(i % max(1, features - 1) + 1 for i in range(width)) for width in widths)
    return AutoregressiveNetwork(tuple(range(1, features + 1)), hidden, **options)


def parameters_of(network: AutoregressiveNetwork, gain: float = 1.0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    found = []
    for columns, rows in itertools.pairwise(network.widths):
        found += [gain * torch.randn(rows, columns, dtype=dtype) / columns**0.5, 0.1 * torch.randn(rows, dtype=dtype)]
    return found


def contexts_of(sample: Sample) -> list[torch.Tensor | None]:
    return sample.kwargs.get("contexts", [None] * len(sample.args[2]))


def tensors_of(sample: Sample) -> list[torch.Tensor]:
    """What the registered op takes: the contexts among the parameters."""
    remaining, found = iter(sample.args[1]), []
    for network, context in zip(sample.args[2], contexts_of(sample), strict=True):
        found += [next(remaining) for _ in range(2 * network.layers)] + ([] if context is None else [context])
    return found


def density(sample: Sample) -> Tensors:
    """The pass that the op inverts."""
    return inverse.density(sample.args[0], tensors_of(sample), sample.args[2], [c is not None for c in contexts_of(sample)])


def change_batch(sample: Sample, change: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
    """The sample with ``change`` applied to z and to the contexts."""
    contexts = [None if c is None else change(c) for c in contexts_of(sample)]
    return Sample(sample.name, (change(sample.args[0]), *sample.args[1:]), {"contexts": contexts})
