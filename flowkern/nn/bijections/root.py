"""Roots of increasing functions, element by element and on the device: for bijections whose inverse has no closed form."""

from collections.abc import Callable

import torch

_ROUNDS = 40

#: (value, slope) of an increasing function at a tensor.
Function = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def solve_increasing(function: Function, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The x with function(x) = 0, where function(low) <= 0 <= function(high).

    A fixed number of rounds, without a look at any value on the host. Each halves the bracket and then tries a step of Newton's
    from the nearer side, so that it converges like Newton's method where that does, and like bisection everywhere.

    The root is differentiable with respect to what ``function`` depends on, up to three times: two steps of Newton's from where
    it lies make no difference to its value, but follow it to the third order (each step doubles the order of the error).
    """
    with torch.no_grad():
        root = 0.5 * (low + high)
        for _ in range(_ROUNDS):
            for middle in (True, False):
                value, slope = function(root)
                above = value > 0.0
                low, high = torch.where(above, low, root), torch.where(above, root, high)
                step = root - value / slope
                inside = (step >= low) & (step <= high)
                root = torch.where(inside, step, 0.5 * (low + high)) if middle else 0.5 * (low + high)
        value, slope = function(root)
        polished = root - value / slope
        root = torch.where((polished >= low) & (polished <= high), polished, root)
    for _ in range(2):
        value, slope = function(root)
        root = root - (value - value.detach()) / slope
    return root
