"""A linear layer whose weights are masked by degrees: the layer of MADE."""

from __future__ import annotations

import torch
from torch import nn

from ... import ops

__all__ = ["MaskedLinear"]


class MaskedLinear(nn.Module):
    """y = x (W * M)^T + b, M[o, i] = out_degrees[o] >= in_degrees[i] (``strict``: >): (..., I) -> (..., O).

    It starts as ``nn.Linear`` does, uniform within 1 / sqrt(I): that is also where the peers start, so that their
    hyperparameters carry over. Scaled by what each row really sees, the rows that see one input would start with weights
    up to sqrt(I) times larger, and the first features of a flow with scales far from 1.

    Args:
        in_degrees, out_degrees: (I,), (O,) integers; sorted ones save a gather.
        bias: whether there is a b.
        strict: > instead of >=, for the last layer of a MADE.

    Raises TypeError for degrees that are not integer tensors and ValueError for those that are not 1-D or hold no values, and
    for an input of a wrong shape.
    Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation" (2015), section 3.
    """

    def __init__(self, in_degrees: torch.Tensor, out_degrees: torch.Tensor, *, bias: bool = True, strict: bool = False):
        super().__init__()
        self.mask = ops.DegreeMask(out_degrees, in_degrees, strict=strict)
        shape = self.mask.out_features, self.mask.in_features
        bound = max(1, shape[1]) ** -0.5
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(shape[0]).uniform_(-bound, bound)) if bias else None
        self.mask.to(self.weight.device)  # the default one, whatever that of the degrees

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.masked_linear(x, self.weight, self.bias, self.mask)

    @torch.no_grad()
    def exchange(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Put output ``rows[i]`` and input ``columns[j]`` in the places i and j, their weights and degrees with them."""
        self.weight.copy_(self.weight[rows][:, columns])
        if self.bias is not None:
            self.bias.copy_(self.bias[rows])
        mask = self.mask
        self.mask = ops.DegreeMask(mask.out_degrees[rows], mask.in_degrees[columns], strict=mask.strict)

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}"
