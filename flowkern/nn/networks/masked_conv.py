"""Gated masked convolutions: the layer of PixelCNN, on whole maps and position by position."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


def _gate(x: torch.Tensor) -> torch.Tensor:
    """tanh(a) sigmoid(b), a and b the halves of the channels: (B, 2C, ...) -> (B, C, ...)."""
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class Window(NamedTuple):
    """The last rows and pixels of a layer's two inputs, all that the layer still needs of them.

    rows: (B, C, R, W + 2 (K // 2)), zeros at both ends of each row; pixels: (B, C, 1, R).
    """

    rows: torch.Tensor
    pixels: torch.Tensor

    def with_row(self, row: torch.Tensor) -> Window:
        """After a row (B, C, 1, W) of the vertical input; a new row of pixels begins."""
        side = (self.rows.shape[3] - row.shape[3]) // 2
        rows = torch.cat([self.rows[:, :, 1:], F.pad(row, (side, side))], 2)
        return Window(rows, torch.zeros_like(self.pixels))

    def with_pixel(self, pixel: torch.Tensor) -> Window:
        """After a pixel (B, C, 1, 1) of the horizontal input."""
        return Window(self.rows, torch.cat([self.pixels[:, :, :, 1:], pixel], 3))


class GatedMaskedConv(nn.Module):
    """A layer of the gated PixelCNN: (v, h) -> (v', h'), (B, C, H, W) each, in raster order.

    The vertical stack v at row i knows the rows above i, the horizontal stack h at (i, j) those and the pixels left of j:

        v'[i, j] = gate(conv(v[i - R + 1 .. i, j - K // 2 .. j + K // 2]) + bias)
        h'[i, j] = h[i, j] + conv_1x1(gate(conv(h[i, j - R + 1 .. j]) + conv_1x1(v' before its gate) + bias))

    with R = K // 2 + 1 and gate(a, b) = tanh(a) sigmoid(b). A ``strict`` layer, the first of a network, takes the window one
    row and one pixel earlier, and has no residual: its input is the image itself.

    ``vertical`` and ``horizontal`` compute any part of their outputs from the inputs that it needs; ``forward`` calls them
    once for the whole map, and a sampler once for each row and each pixel, with the same arithmetic.

    Args:
        channels: C.
        kernel: K, odd.
        strict: whether the layer is blind for the position itself.
        context: K' of a context (B, K') that moves the bias, or None; ``condition``: channels of a map (B, S, H, W) that does.
        dropout: on what enters the convolutions.

    Raises ValueError for an even kernel.
    Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders" (2016), section 2 and figure 2.
    """

    def __init__(
        self,
        channels: int,
        kernel: int = 3,
        *,
        strict: bool = False,
        context: int | None = None,
        condition: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd number, got {kernel}")
        self.reach, self.kernel, self.strict = kernel // 2 + 1, kernel, strict
        self.vertical_conv = nn.Conv2d(channels, 2 * channels, (self.reach, kernel))
        self.horizontal_conv = nn.Conv2d(channels, 2 * channels, (1, self.reach))
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)
        self.context = None if context is None else nn.Linear(context, 4 * channels, bias=False)
        self.condition = None if condition is None else nn.Conv2d(condition, 4 * channels, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def bias(
        self, context: torch.Tensor | None = None, condition: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What context and condition add before the gates of v and of h: (B, 2C, 1 or H, 1 or W) each, or None."""
        total = None
        if self.context is not None and context is not None:
            total = self.context(context)[:, :, None, None]
        if self.condition is not None and condition is not None:
            moved = self.condition(condition)
            total = moved if total is None else total + moved
        if total is None:
            return None
        v, h = total.chunk(2, 1)
        return v, h

    def vertical(self, padded: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """padded (B, C, n + R - 1, W + 2 (K // 2)) -> (v' (B, C, n, W), what the horizontal stack is told (B, 2C, n, W))."""
        raw = self.vertical_conv(self.dropout(padded))
        gated = _gate(raw if bias is None else raw + bias)
        return gated, self.link(raw)

    def horizontal(
        self, padded: torch.Tensor, h: torch.Tensor | None, told: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """padded (B, C, n, m + R - 1), h and told at the n x m positions -> h' (B, C, n, m); h is not needed if ``strict``."""
        raw = self.horizontal_conv(self.dropout(padded)) + told
        moved = self.out(_gate(raw if bias is None else raw + bias))
        return moved if h is None or self.strict else h + moved

    def forward(
        self, v: torch.Tensor, h: torch.Tensor, bias: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_v, of_h = (None, None) if bias is None else bias
        # A strict layer's input moves by one row and one pixel: negative padding cuts the last ones off.
        side, before, after = self.kernel // 2, self.reach - 1 + self.strict, -int(self.strict)
        moved, told = self.vertical(F.pad(v, (side, side, before, after)), of_v)
        return moved, self.horizontal(F.pad(h, (before, after)), h, told, of_h)

    def window(self, batch: int, width: int) -> Window:
        """The empty window above and left of a map of that width: zeros, as the padding is."""
        weight = self.vertical_conv.weight
        rows = weight.new_zeros(batch, weight.shape[1], self.reach, width + 2 * (self.kernel // 2))
        return Window(rows, weight.new_zeros(batch, weight.shape[1], 1, self.reach))

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, strict={self.strict}"
