"""PixelCNN: gated masked convolutions over images of few levels or over codes, sampled with cached activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .. import nn
from .._core.checks import accumulation_dtype
from ..nn.densities.base import check_share, check_sizes, image_shape
from ..nn.densities.flow import context_rows
from ..nn.networks.conditioner import check_context
from ..nn.networks.masked_conv import Window
from ._model import DiscreteModel
from ._registry import model

Biases = list[tuple[torch.Tensor, torch.Tensor] | None]


# As many layers as see seven rows above. A narrower one with less dropout does as well.
DIGITS: dict[str, Any] = {"hidden": 48, "layers": 6, "dropout": 0.5}


@model("pixelcnn", presets={"digits": {"config": DIGITS, "lr": 2e-3, "ema": 0.998, "epochs": 60, "patience": 8}})
class PixelCNN(DiscreteModel):
    """log P(v) = sum_i log P(v_i | the values before v_i), pixel by pixel, each factor categorical, all of them from one pass.

    An embedding of the levels, ``layers`` times ``nn.GatedMaskedConv``, of which the first has a bias for each place, and two
    1x1 convolutions to the logits. The channels of a pixel come one after the other: between these two the logits of a channel
    see, beside the pixels before, the channels before.

    ``sample`` computes every activation once: row by row in the vertical stack and pixel by pixel in the horizontal one, each
    layer keeping the last rows and pixels that it needs. All positions together cost the arithmetic of one ``log_prob``.

    Args:
        shape: (C, H, W).
        levels: how many values an element can have.
        hidden: channels inside.
        layers, kernel: their number, and the width of their windows.
        dropout: on what enters a layer's convolutions, in training.
        context: K of a context (B, K), for instance one-hot labels, or None.
        condition: channels S of a map (B, S, H, W) that ``log_mass`` and ``draw`` are given, or None.

    Raises ValueError for settings that do not fit.
    Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders" (2016); the caches: Ramachandran et al.,
    "Fast Generation for Convolutional Autoregressive Models" (2017).
    """

    layers: Any  # a ModuleList, whose elements have no type

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int = 256,
        hidden: int = 64,
        layers: int = 8,
        kernel: int = 3,
        dropout: float = 0.0,
        context: int | None = None,
        condition: int | None = None,
    ):
        super().__init__()
        self.shape = channels, height, width = image_shape(shape)
        check_sizes(2, levels=levels)
        check_sizes(layers=layers, hidden=hidden, context=context, condition=condition)
        check_share(dropout=dropout)
        self.levels, self.context, self.condition = levels, context, condition
        self.embeddings = torch.nn.ModuleList(torch.nn.Embedding(levels, hidden) for _ in range(channels))
        self.place = torch.nn.Parameter(torch.zeros(4 * hidden, height, width))
        options: dict[str, Any] = {"kernel": kernel, "context": context, "condition": condition}
        self.layers = torch.nn.ModuleList(
            nn.GatedMaskedConv(hidden, strict=i == 0, dropout=dropout if i else 0.0, **options) for i in range(layers)
        )
        self.before = torch.nn.ModuleList(torch.nn.Embedding(levels, hidden) for _ in range(channels - 1))
        self.mix = torch.nn.Conv2d(hidden, channels * hidden, 1)
        self.last = torch.nn.ModuleList(torch.nn.Conv2d(hidden, levels, 1) for _ in range(channels))

    def log_mass(
        self, v: torch.Tensor, context: torch.Tensor | None = None, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """log P(v), (B,) in nats, of integers v (B, C, H, W), given context (B, K) and condition (B, S, H, W) where it has them.

        Raises ValueError for other shapes and values.
        """
        logits = self.logits(v, context, condition).to(accumulation_dtype(self.place))
        return -F.cross_entropy(logits, v, reduction="none").flatten(1).sum(1)

    def logits(self, v: torch.Tensor, context: torch.Tensor | None = None, condition: torch.Tensor | None = None) -> torch.Tensor:
        """The logits of each value given those before it: v (B, C, H, W) -> (B, levels, C, H, W), in one pass.

        Raises ValueError for other shapes and values.
        """
        self.check_values(v)
        h = v_stack = self._shown(v)
        for layer, bias in zip(self.layers, self._biases(v.shape[0], context, condition), strict=True):
            v_stack, h = layer(v_stack, h, bias)
        mixed = self._mixed(h)
        return torch.stack([self._channel_logits(mixed, v, c) for c in range(len(mixed))], 2)

    @torch.no_grad()
    def draw(
        self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """n samples of integers (n, C, H, W); the logits are divided by ``temperature``.

        ``context`` (n, K) or (1, K) for all; ``condition`` (n, S, H, W). A sample is a function of one uniform number for each
        element, drawn at once: sample i does not change with n. Raises ValueError for other shapes and temperature <= 0.
        """
        if not temperature > 0.0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        (channels, height, width), biases = self.shape, self._biases(n, context_rows(context, n), condition)
        uniform = torch.rand(n, channels, height, width, dtype=torch.float64, device=self.place.device)
        v = torch.zeros(n, channels, height, width, dtype=torch.int64, device=self.place.device)
        windows = [layer.window(n, width) for layer in self.layers]
        for i in range(height):
            told = self._vertical(windows, biases, i)
            for j in range(width):
                h = self._horizontal(windows, biases, told, i, j)
                mixed, pixel = self._mixed(h), v[:, :, i : i + 1, j : j + 1]
                for c in range(channels):
                    logits = self._channel_logits(mixed, pixel, c) / temperature
                    pixel[:, c, 0, 0] = _choose(logits.flatten(1), uniform[:, c, i, j])
                windows[0] = windows[0].with_pixel(self._shown(pixel))
            windows[0] = windows[0].with_row(self._shown(v[:, :, i : i + 1]))
        return v

    def _vertical(self, windows: list[Window], biases: Biases, i: int) -> list[torch.Tensor]:
        """Row i of the vertical stack: what each layer tells its horizontal one (n, 2 hidden, 1, W)."""
        told, row = [], None
        for k, layer in enumerate(self.layers):
            if row is not None:
                windows[k] = windows[k].with_row(row)
            row, part = layer.vertical(windows[k].rows, _at(biases[k], 0, i))
            told.append(part)
        return told

    def _horizontal(self, windows: list[Window], biases: Biases, told: list[torch.Tensor], i: int, j: int) -> torch.Tensor:
        """Pixel (i, j) of the horizontal stack: (n, hidden, 1, 1)."""
        h: Any = None
        for k, layer in enumerate(self.layers):
            if h is not None:
                windows[k] = windows[k].with_pixel(h)
            h = layer.horizontal(windows[k].pixels, h, told[k][..., j : j + 1], _at(biases[k], 1, i, j))
        return h

    def _shown(self, v: torch.Tensor) -> torch.Tensor:
        """The embedding of values (B, C, ...) as (B, hidden, ...)."""
        return torch.stack([e(v[:, c]) for c, e in enumerate(self.embeddings)]).sum(0).movedim(-1, 1)

    def _biases(self, n: int, context: torch.Tensor | None, condition: torch.Tensor | None) -> Biases:
        check_context(context, self.context, n)
        expected = None if self.condition is None else (n, self.condition, *self.shape[1:])
        if (None if condition is None else tuple(condition.shape)) != expected:
            got = "none" if condition is None else tuple(condition.shape)
            raise ValueError(f"condition: expected {'none' if expected is None else f'shape {expected}'}, got {got}")
        biases: Biases = [layer.bias(context, condition) for layer in self.layers]
        (place_v, place_h), first = self.place[None].chunk(2, 1), biases[0]
        biases[0] = (place_v, place_h) if first is None else (first[0] + place_v, first[1] + place_h)
        return biases

    def _mixed(self, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each channel's logits know of the pixels before: C of (B, hidden, ...)."""
        return self.mix(h.relu()).chunk(self.shape[0], 1)

    def _channel_logits(self, mixed: Sequence[torch.Tensor], v: torch.Tensor, c: int) -> torch.Tensor:
        """The logits of channel c (B, levels, H, W), from ``mixed`` and the channels of v (B, C, H, W) before it."""
        h = mixed[c]
        for k in range(c):
            h = h + self.before[k](v[:, k]).movedim(-1, 1)
        return self.last[c](h.relu())


def _at(biases: tuple[torch.Tensor, ...] | None, stack: int, i: int, j: int | None = None) -> torch.Tensor | None:
    """Row i, or element (i, j), of the bias (B, C, H, W) or (B, C, 1, 1) of a stack, if there is one."""
    bias = None if biases is None else biases[stack]
    if bias is None or bias.shape[2:] == (1, 1):
        return bias
    return bias[:, :, i : i + 1] if j is None else bias[:, :, i : i + 1, j : j + 1]


def _choose(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The values (B,) at which the distributions of logits (B, levels) reach ``uniform`` (B,) in [0, 1), in float64."""
    reached = logits.double().softmax(1).cumsum(1)
    return (reached <= uniform[:, None] * reached[:, -1:]).sum(1)
