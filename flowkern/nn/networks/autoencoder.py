"""Convolutional networks from images to features of fewer pixels, and back."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn

from ..densities.base import check_share, check_sizes, image_shape
from .conditioner import ACTIVATIONS, check_context, named_activation


class _Activation(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = named_activation(name)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return ACTIVATIONS[self.name](h)

    def extra_repr(self) -> str:
        return repr(self.name)


class _Block(nn.Module):
    """h + conv_1x1(act(conv_3x3(act(h))))."""

    def __init__(self, channels: int, dropout: float, activation: str):
        super().__init__()
        check_share(dropout=dropout)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.activation = _Activation(activation)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.second(self.dropout(self.activation(self.first(self.activation(h)))))


def _blocks(channels: int, blocks: int, dropout: float, activation: str) -> list[nn.Module]:
    return [*(_Block(channels, dropout, activation) for _ in range(blocks)), _Activation(activation)]


def _check_widths(hidden: Sequence[int], blocks: int) -> None:
    check_sizes(0, blocks=blocks)
    for width in hidden:
        check_sizes(hidden=width)


def downsampling(
    inputs: int, hidden: Sequence[int], blocks: int, *, dropout: float = 0.0, activation: str = "relu"
) -> nn.Sequential:
    """A convolution of stride 2 for each width, then residual blocks: (B, inputs, H, W) -> (B, hidden[-1], h, w)."""
    _check_widths(hidden, blocks)
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise([inputs, *hidden]):
        layers += [nn.Conv2d(before, width, 4, 2, 1), _Activation(activation)]
    layers.append(nn.Conv2d(hidden[-1], hidden[-1], 3, padding=1))
    return nn.Sequential(*layers, *_blocks(hidden[-1], blocks, dropout, activation))


def upsampling(
    inputs: int, hidden: Sequence[int], outputs: int, blocks: int, *, dropout: float = 0.0, activation: str = "relu"
) -> nn.Sequential:
    """Residual blocks, then a transposed convolution for each width: (B, inputs, h, w) -> (B, outputs, H, W)."""
    _check_widths(hidden, blocks)
    layers = [nn.Conv2d(inputs, hidden[0], 3, padding=1), *_blocks(hidden[0], blocks, dropout, activation)]
    for before, width in itertools.pairwise([*hidden, hidden[-1]]):
        layers += [nn.ConvTranspose2d(before, width, 4, 2, 1), _Activation(activation)]
    return nn.Sequential(*layers, nn.Conv2d(hidden[-1], outputs, 1))


def _halved(shape: Sequence[int], steps: int) -> tuple[int, int, int]:
    """(C, H / 2^steps, W / 2^steps). Raises ValueError where that is not possible."""
    channels, height, width = image_shape(shape)
    if steps < 1 or height % (1 << steps) or width % (1 << steps):
        raise ValueError(f"hidden: expected widths, for each of which {height} x {width} pixels can be halved once, got {steps}")
    return channels, height >> steps, width >> steps


class ConvEncoder(nn.Module):
    """Images, flat or not, to a vector: (B, C, H, W) or (B, C H W) -> (B, out_features).

    Args:
        shape: (C, H, W).
        hidden: the width of each convolution of stride 2.
        blocks: residual blocks behind them.
        context: K of a context (B, K), which the last, linear layer sees too; None for a network without.
        activation, dropout: as for ``MLP``.

    Raises ValueError as ``MLP`` does, and for a height or width that cannot be halved so often.
    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), section 4.1, for the convolutions.
    """

    def __init__(
        self,
        shape: Sequence[int],
        out_features: int,
        hidden: Sequence[int] = (64, 128),
        blocks: int = 1,
        *,
        context: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.shape, self.context = tuple(shape), context
        check_sizes(context=context)
        channels, height, width = _halved(shape, len(hidden))
        self.network = downsampling(channels, hidden, blocks, dropout=dropout, activation=activation)
        self.last = nn.Linear(hidden[-1] * height * width + (context or 0), out_features)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        check_context(context, self.context, x.shape[0])
        h = self.network(x.reshape(-1, *self.shape)).flatten(1)
        return self.last(h if context is None else torch.cat([h, context.to(h.dtype)], 1))


class ConvDecoder(nn.Module):
    """A vector to maps over an image's pixels: (B, in_features) -> (B, maps, H, W).

    Args:
        shape: (C, H, W) of the image; maps: of the result, as many as ``Likelihood.maps`` says for C channels.
        hidden: the widths, beginning with those of the fewest pixels.
        blocks, activation, dropout: as for ``ConvEncoder``.
        context: K of a context (B, K), which the first, linear layer sees too; None for a network without.

    Raises ValueError as ``ConvEncoder`` does.
    """

    def __init__(
        self,
        in_features: int,
        shape: Sequence[int],
        maps: int,
        hidden: Sequence[int] = (128, 64),
        blocks: int = 1,
        *,
        context: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.context = context
        check_sizes(context=context)
        _, height, width = _halved(shape, len(hidden))
        self.inner = hidden[0], height, width
        self.first = nn.Linear(in_features + (context or 0), math.prod(self.inner))
        self.network = upsampling(hidden[0], hidden, maps, blocks, dropout=dropout, activation=activation)

    def forward(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        check_context(context, self.context, z.shape[0])
        h = self.first(z if context is None else torch.cat([z, context.to(z.dtype)], 1))
        return self.network(h.unflatten(1, self.inner))
