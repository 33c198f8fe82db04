"""Residual vector quantizers: codes of what the codes before them left."""

from typing import Any

import torch
from torch import nn

from ..._core.checks import check_codes
from ...ops.parts import pass_gradient
from .quantizer import Quantizer, Triple
from .vector import VectorQuantizer


class ResidualVectorQuantizer(Quantizer, kind="residual_vector"):
    """A sum of codes, each level quantizing what the levels before it left: forward(x) -> (quantized, index, loss).

    With r_1 = x, c_l the code of level l nearest to r_l and r_(l+1) = r_l - c_l, quantized is the sum of the c_l, and loss the
    sum of the losses of the levels. The gradient of quantized passes to x once, straight or rotated, not once per level.

    Args: dim, codes; levels, how many; the others are those of ``VectorQuantizer``, for each level.

    Shapes: x and quantized (B, ..., D), or (B, D, ...) with ``channels_first``; index (B, ..., levels), int64; loss 0-d.
    Raises ValueError and TypeError as ``VectorQuantizer`` does, and ValueError for no levels.

    Source: Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec" (2021), algorithm 1.
    """

    def __init__(
        self,
        dim: int,
        codes: int,
        levels: int,
        *,
        decay: float | None = 0.99,
        commitment: float = 0.25,
        init: str = "kmeans",
        revive_below: float | None = None,
        rotation: bool = False,
        channels_first: bool = False,
    ):
        super().__init__()
        if levels < 1:
            raise ValueError(f"ResidualVectorQuantizer: levels must be at least 1, got {levels}")
        self.dim, self.codes, self.rotation, self.channels_first = dim, codes, rotation, channels_first
        self.index_shape = (levels,)
        self._how = {"decay": decay, "commitment": commitment, "init": init, "revive_below": revive_below}
        self.levels = nn.ModuleList(VectorQuantizer(dim, codes, **self._how) for _ in range(levels))  # type: ignore[arg-type]

    @property
    def codebook(self) -> torch.Tensor:
        """That of the first level."""
        return self.levels[0].codebook  # type: ignore[return-value]

    def settings(self) -> dict[str, Any]:
        own = {"dim": self.dim, "codes": self.codes, "levels": len(self.levels)}
        return own | self._how | {"rotation": self.rotation, "channels_first": self.channels_first}

    def forward(self, x: torch.Tensor) -> Triple:
        last = self.channels_last(x)
        residual, total = last, torch.zeros_like(last)
        indices, losses = [], []
        for level in self.levels:
            quantized, index, loss = level(residual)
            residual, total = residual - quantized.detach(), total + quantized.detach()
            indices.append(index)
            losses.append(loss)
        quantized = pass_gradient(last, total, rotation=self.rotation)
        return self.as_given(quantized), torch.stack(indices, -1), torch.stack(losses).sum()

    def decode(self, index: torch.Tensor) -> torch.Tensor:
        """The sums of the codes of these indices, (..., levels) or, for those of the first levels alone, fewer.

        Raises TypeError and ValueError as ``VectorQuantizer.decode`` does.
        """
        check_codes("index", index, self.codes, self.codebook, of="the codebook")
        if index.ndim < 1 or not 1 <= index.shape[-1] <= len(self.levels):
            raise ValueError(f"index: expected shape (..., {len(self.levels)}) or fewer levels, got {tuple(index.shape)}")
        parts = [level.decode(i) for level, i in zip(self.levels, index.unbind(-1), strict=False)]  # type: ignore[operator]
        return self.as_given(sum(parts[1:], parts[0]))
