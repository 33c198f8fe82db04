"""The density pass of an autoregressive layer in plain torch, with weights that are masked beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import flowkern
from flowkern import nn

__all__ = ["Pair", "dense", "dense_pass", "differs", "masked", "running"]

Pair = tuple[torch.Tensor, torch.Tensor]


def masked(layer: nn.MaskedAutoregressive) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Its weights with the masks multiplied in, and its biases."""
    layers: list[Any] = [*layer.made.layers]
    return [(one.weight * one.mask.dense()).detach() for one in layers], [one.bias.detach().clone() for one in layers]


def dense(layer: nn.MaskedAutoregressive) -> Callable[[torch.Tensor], Pair]:
    """The density pass with weights that are masked beforehand."""
    return dense_pass(layer, *masked(layer))


def dense_pass(
    layer: nn.MaskedAutoregressive, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> Callable[[torch.Tensor], Pair]:
    """The density pass of a network with these weights."""

    def run(x: torch.Tensor) -> Pair:
        h = x
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            h = torch.relu(F.linear(h, weight, bias))
        u, t = F.linear(h, weights[-1], biases[-1]).unflatten(1, (-1, 2)).unbind(-1)
        s, log_s = layer.scale(u)
        return s * x + t, log_s.sum(1)

    return run


def running(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on one backend."""

    def run(*args: torch.Tensor) -> Any:
        with flowkern.backend(backend):
            return function(*args)

    return run


def differs(got: Pair, expected: Pair) -> str:
    """How far two results are apart, if that is more than rounding."""
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(got, expected, strict=True)]
    return "" if max(errors) < 1e-4 else f"differs by {max(errors):.1e} of its size"
