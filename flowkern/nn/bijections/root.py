"""Roots of increasing functions as functions of what they depend on: for bijections whose inverse has no closed form."""

import torch

from ..._core.root import Function, bracketed_root


def solve_increasing(function: Function, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The x with function(x) = 0, where function(low) <= 0 <= function(high), as a function of what ``function`` depends on.

    On a GPU the search takes 81 evaluations in torch's own operations, some dozen launches each. That is for functions that a
    flow solves for one scalar of a sample, as planar flows do; ``ops.parts.LogisticMixture`` has a kernel.
    """
    return followed(function, bracketed_root(function, low, high))


def followed(function: Function, root: torch.Tensor) -> torch.Tensor:
    """The root, differentiable up to three times with respect to what ``function`` depends on.

    Two steps of Newton's from where it lies make no difference to its value, but follow it to the third order (each step doubles
    the order of the error).
    """
    for _ in range(2):
        value, slope = function(root)
        root = root - (value - value.detach()) / slope
    return root
