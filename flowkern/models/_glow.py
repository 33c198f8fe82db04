"""Glow: invertible 1x1 convolutions and affine couplings at several scales, for images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from .. import nn, ops
from .._core.checks import check_floating, has_values, host_tensor
from .._core.split import FeatureMask, kept_channels, moved_channels
from ..nn.bijections.bijection import Bijection
from ..nn.densities.base import check_sizes
from ._model import FlowModel, preprocessing
from ._registry import model, plain

# Bounded on both sides: with the sigmoid, which comes near zero, one in twenty samples of photographs was not finite.
_BOUNDED = ops.ScaleMap.tanh(1.0)

# exp(3 tanh(u / 3)): a deviation between 0.05 and 20, so that a diverging network cannot make it anything.
_DEVIATION = ops.ScaleMap.tanh(3.0)


@model(
    "glow",
    presets={
        # Chosen as RealNVP's, among models that train in two minutes on a CPU core.
        "digits": {
            "config": {"levels": 2, "steps": 8, "hidden": 48, "dropout": 0.2, "preprocess": {"logit": 0.005}},
            "lr": 3e-3,
            "ema": 0.998,
            "epochs": 300,
        },
        # Chosen on the validation bands of the photographs after three minutes on a CPU core, enough for colour and texture; most
        # comes from the bounded scale and from small batches at this learning rate. A short average, for there are few steps.
        "photos": {
            "config": {"levels": 3, "steps": 8, "hidden": 64, "preprocess": None},
            "epochs": 20,
            "batch_size": 16,
            "lr": 2e-3,
            "ema": 0.99,
        },
    },
)
class Glow(FlowModel):
    """Levels of squeeze, ``steps`` times ``nn.GlowStep``, and half of the channels out under a learned Gaussian.

    The Gaussians are N(mu, sigma) with mu and log sigma from a 3x3 convolution of the channels that stay, zero at first; that of
    the last level has one mu and sigma for each channel, which the context shifts. They are written as affine maps to standard
    normal latents, eps = (z - mu) / sigma, so that the base is a standard normal and the temperature multiplies every sigma.

    ``log_prob`` takes images with values in [0, 1], as floats and not dequantized here, and returns (B,) nats. The first forward
    in training mode, under ``no_grad`` too, sets the ActNorm layers from its batch: all of them or, if it fails, none.

    Args:
        shape: (C, H, W); H and W must divide by 2^levels.
        levels: how often the image is halved; None for as many as divide, at most 3.
        steps: of each level.
        hidden: channels of the conditioners, ``nn.ConvNet``.
        parametrization: of the 1x1 convolutions: ``"plu"``, ``"qr"``, ``"householder"`` or ``"full"``.
        scale: the ``ScaleMap`` of the couplings, or its fields ``{"kind", "a", "b"}``; Glow's own is ``ScaleMap.sigmoid()``.
        transformer: of the couplings, an ``nn.Transformer``, its config ``{"kind", ...}`` or its name, as ``"spline"``; None for
            ``nn.Affine(scale)``.
        activation, dropout: of the conditioners.
        classes: the number of classes of a class-conditional flow. The context is then either labels, integers (B,) in
            [0, classes), or a (B, classes) tensor, such as labels one-hot; for samples also (1,), or (1, classes), for all.
        context: K of any other context (B, K), or None. It goes to all conditioners and to the last Gaussian.
        memory: ``"store"``, ``"reversible"`` or ``"auto"``: what a level keeps for its backward, see ``nn.Compose``.
        preprocess: before the first level: None, ``{"rescale": s}``, ``{"rescale": [s, t]}`` or ``{"logit": alpha}``.

    Raises ValueError for settings that do not fit the shape, unknown names, and labels that are no classes; TypeError for
    images that are not floating.
    Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (2018).
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int | None = None,
        steps: int = 16,
        hidden: int = 128,
        parametrization: str = "plu",
        scale: ops.ScaleMap | Mapping[str, Any] = _BOUNDED,
        transformer: nn.Transformer | Mapping[str, Any] | str | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
        classes: int | None = None,
        context: int | None = None,
        memory: str = "store",
        preprocess: Mapping[str, Any] | None = None,
    ):
        sizes = _image_shape(shape)
        levels = _check_levels(sizes, levels)
        check_sizes(steps=steps)
        context = _context_size(classes, context)
        check_sizes(hidden=hidden, context=context)
        scale = scale if isinstance(scale, ops.ScaleMap) else ops.ScaleMap(**scale)
        other = None if transformer is None else nn.Transformer.of(transformer)
        self.settle(transformer=plain(other))
        network: dict[str, Any] = {"hidden": hidden, "activation": activation, "dropout": dropout}

        def step(channels: int) -> Bijection:
            kept, moved = kept_channels("channel", channels), moved_channels("channel", channels)
            net = nn.ConvNet(kept, (2 if other is None else other.params_per_feature) * moved, context=context, **network)
            # One with parameters has them for each coupling.
            return nn.GlowStep(channels, net, parametrization=parametrization, scale=scale, transformer=copy.deepcopy(other))

        built: list[Bijection] = []
        channels = sizes[0]
        for level in range(levels):
            channels *= 4
            gaussian = _gaussian(channels, context, last=level == levels - 1)
            built.append(nn.Compose(nn.Squeeze(), *(step(channels) for _ in range(steps)), gaussian, memory=memory))
            channels -= channels // 2
        layers = [*preprocessing(preprocess), nn.MultiScale(*built, shape=sizes)]
        super().__init__(nn.Compose(*layers), {"shape": sizes, "context": context})
        self.settle(levels=levels)
        self.classes = classes
        self._actnorms = [module for module in self.modules() if isinstance(module, nn.ActNorm)]
        for name, module in self.named_modules():
            if isinstance(module, nn.ActNorm | nn.InvertibleLinear):
                module.label = name

    def log_prob(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., C, H, W) in [0, 1], context labels (B,), (..., K) or None -> (...) in nats. Raises as ``nn.Flow``."""
        check_floating("x", x)
        return super().log_prob(x, context)

    def _log_prob(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        self._initialize_from(x, context)
        return super()._log_prob(x, context)

    def embed(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        check_floating("x", x)
        self.check_shape(x)
        context = self._as_context(context)
        self._initialize_from(x, context)
        return super().embed(x, context)

    def render(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return super().render(z, self._as_context(context))

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, C, H, W) to its latents and back: x up to rounding, which tells how well conditioned the model is."""
        return self.render(self.embed(x, context), context)

    def _as_context(self, context: torch.Tensor | None) -> torch.Tensor | None:
        """Labels one-hot, anything else as it is. Raises ValueError for labels that are no classes."""
        if self.classes is None or context is None or context.is_floating_point():
            return context
        if context.ndim != 1 or context.dtype is torch.bool:
            raise ValueError(
                f"labels: expected integers of shape (B,) for {self.classes} classes, got {context.dtype} {tuple(context.shape)}"
            )
        readable = has_values(context) and not torch.compiler.is_compiling()
        if readable and len(wrong := context[(context < 0) | (context >= self.classes)]):
            raise ValueError(
                f"labels: expected 0 to {self.classes - 1}, got {wrong[0].item()} ({len(wrong)} of {len(context)} are no classes)"
            )
        one_hot = context[:, None] == torch.arange(self.classes, device=context.device)
        return one_hot.to(next(self.parameters()).dtype)

    def _initialize_from(self, x: torch.Tensor, context: torch.Tensor | None) -> None:
        """The first forward in training sets the ActNorm layers from x."""
        if self.training and not all(layer.known for layer in self._actnorms):
            self._initialize(x, context)

    @torch._disable_dynamo
    @torch.no_grad()
    def _initialize(self, x: torch.Tensor, context: torch.Tensor | None) -> None:
        """Sets all of the ActNorm layers or none."""
        waiting = [layer for layer in self._actnorms if not layer.is_initialized()]
        if not waiting or not has_values(x):
            return
        before = [{key: value.clone() for key, value in layer.state_dict().items()} for layer in waiting]
        try:
            self.bijection(x, context)
        except BaseException:
            for layer, state in zip(waiting, before, strict=True):
                layer.load_state_dict(state)
            raise


def _image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if isinstance(shape, int) or len(shape) != 3 or any(n < 1 for n in shape):
        raise ValueError(f"shape: Glow is for images (C, H, W), got {shape}")
    c, h, w = (int(n) for n in shape)
    return c, h, w


def _check_levels(shape: tuple[int, int, int], levels: int | None) -> int:
    """How often H and W are halved. Raises ValueError if that is not possible, or if there is nothing to halve."""
    _, h, w = shape
    possible = min((n & -n).bit_length() - 1 for n in (h, w))
    if not possible:
        raise ValueError(f"shape: Glow halves the image at least once, but {h} x {w} has an odd side")
    if levels is None:
        return min(3, possible)
    if levels < 1:
        raise ValueError(f"levels: expected at least 1, got {levels}")
    if levels > possible:
        raise ValueError(
            f"levels: {levels} of them need a height and width divisible by 2^{levels}, got {h} x {w}; at most {possible} fit"
        )
    return levels


def _context_size(classes: int | None, context: int | None) -> int | None:
    if classes is None:
        return context
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, or None for an unconditional flow, got {classes}")
    if context not in (None, classes):
        raise ValueError(f"context: with {classes} classes it is {classes} or None, got {context}")
    return classes


class _Gaussian(torch.nn.Conv2d):
    """-log sigma and -mu of the channels that leave, from those that stay; zero at first."""

    def __init__(self, channels: int):
        super().__init__(kept_channels("channel", channels), 2 * moved_channels("channel", channels), 3, padding=1)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(cast(torch.Tensor, self.bias))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x)


class _LastGaussian(torch.nn.Module):
    """-log sigma and -mu for each channel, shifted linearly by the context; zero at first."""

    def __init__(self, channels: int, context: int | None):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(2 * channels))
        self.weight = None if context is None else torch.nn.Parameter(torch.zeros(2 * channels, context))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        params = self.bias.expand(x.shape[0], -1)
        if self.weight is not None and context is not None:
            params = torch.nn.functional.linear(context.to(self.weight.dtype), self.weight, self.bias)
        return params[:, :, None, None].expand(-1, -1, *x.shape[2:])


def _gaussian(channels: int, context: int | None, last: bool) -> Bijection:
    """eps = (z - mu) / sigma on the channels that leave: all of them after the last level."""
    split = FeatureMask(host_tensor("split", [True] * channels)) if last else "channel"
    net = _LastGaussian(channels, context) if last else _Gaussian(channels)
    return nn.AffineCoupling(net, split=split, scale=_DEVIATION, shift_first=True)
