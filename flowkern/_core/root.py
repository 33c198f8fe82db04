"""Where an increasing function is zero, element by element and on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["ROUNDS", "Function", "bracketed_root"]

#: Of bisection and Newton's method, each an evaluation: enough for the bracket alone to shrink to float64's rounding.
ROUNDS = 40

#: (value, slope) of an increasing function at a tensor.
Function = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def bracketed_root(function: Function, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The x with function(x) = 0, where function(low) <= 0 <= function(high).

    A fixed number of rounds, without a look at any value on the host. Each halves the bracket and then tries a step of Newton's
    from the nearer side, so that it converges like Newton's method where that does, and like bisection everywhere.
    """
    root = 0.5 * (low + high)
    for _ in range(ROUNDS):
        for middle in (True, False):
            value, slope = function(root)
            above = value > 0.0
            low, high = torch.where(above, low, root), torch.where(above, root, high)
            step = root - value / slope
            inside = (step >= low) & (step <= high)
            root = torch.where(inside, step, 0.5 * (low + high)) if middle else 0.5 * (low + high)
    value, slope = function(root)
    polished = root - value / slope
    return torch.where((polished >= low) & (polished <= high), polished, root)
