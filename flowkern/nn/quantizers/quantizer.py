"""``Quantizer``: vectors to codes and back."""

from typing import NamedTuple

import torch
from torch import nn

from ..._core.checks import check_codes, check_floating
from ..._core.named import Named

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class CodeUsage(NamedTuple):
    """How evenly codes are used: ``perplexity`` = exp(entropy), from 1 to K, and ``used``, the share that is used at all."""

    perplexity: torch.Tensor
    used: torch.Tensor


class Quantizer(Named, nn.Module):
    """Replaces every vector by one of finitely many, its code; derive from it to write your own.

    ``dim``, ``codes``, ``forward`` and ``decode`` are what is asked for. With a name, by ``class FSQ(Quantizer, kind="fsq")``,
    it can be saved within a model: its constructor's arguments, plain values, are then kept as attributes of those names.
    """

    dim: int  # D, the channels of x
    codes: int  # an index is from 0 to codes - 1
    channels_first: bool = False  # x is (B, D, ...) instead of (B, ..., D)
    index_shape: tuple[int, ...] = ()  # the last dimensions of an index, where a vector has more than one

    def forward(self, x: torch.Tensor) -> Triple:
        """x (B, ..., D) -> (quantized as x, index (B, ..., *index_shape) int64, loss 0-d), gradients passed on to x."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def decode(self, index: torch.Tensor) -> torch.Tensor:
        """The vectors that these indices stand for: quantized of ``forward``."""
        raise NotImplementedError(f"{type(self).__name__} has no decode")

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The index of every vector of x, as ``forward`` gives it; nothing is learned."""
        return self(x)[1]

    def usage(self, index: torch.Tensor) -> CodeUsage:
        """How evenly these indices use the codes, of this process: perplexity and share that is used, means over the
        last dimensions of an index where a vector has several.

        Raises TypeError for an index that is not int64, and ValueError for one of another shape or, where the values can be
        seen at no cost (on a CPU), with values that are no codes.
        """
        self.check_index(index)
        flat = index.reshape(-1, *(self.index_shape or (1,)))
        counts = torch.zeros(self.codes, flat.shape[1], device=index.device, dtype=torch.float64)
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float64))
        probability = counts / max(1, flat.shape[0])
        entropy = -torch.special.xlogy(probability, probability).sum(0)
        return CodeUsage(entropy.exp().mean().float(), (counts > 0).double().mean().float())

    def check_index(self, index: torch.Tensor) -> None:
        """Raises TypeError unless the index is int64, and ValueError for another last dimension or values that are no codes."""
        check_codes("index", index, self.codes, getattr(self, "codebook", index), of="the codebook")
        if self.index_shape and index.shape[-1:] != self.index_shape:
            raise ValueError(f"index: expected shape (..., {self.index_shape[0]}), got {tuple(index.shape)}")

    def channels_last(self, x: torch.Tensor) -> torch.Tensor:
        """x as (B, ..., D). Raises TypeError unless it is floating, and ValueError for another shape."""
        check_floating("x", x)
        axis = 1 if self.channels_first else -1
        if x.ndim < 2 or x.shape[axis] != self.dim:
            expected = f"(B, {self.dim}, ...), channels first" if self.channels_first else f"(B, ..., {self.dim})"
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
        return x.movedim(1, -1) if self.channels_first else x

    def as_given(self, last: torch.Tensor) -> torch.Tensor:
        """(B, ..., D) with its channels where those of x are."""
        return last.movedim(-1, 1) if self.channels_first else last
