"""VQ-VAE and VQ-VAE-2: images as maps of discrete codes, and an autoregressive prior over them."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from .. import nn
from .._core.checks import accumulation_dtype
from ..nn.densities.base import check_name, check_sizes, image_shape
from ..nn.densities.likelihood import likelihood as named_likelihood, start
from ..nn.networks.autoencoder import downsampling, upsampling
from ._model import DiscreteModel, arguments
from ._pixelcnn import PixelCNN
from ._registry import model

#: One map (B, h, w) of codes for each latent, the coarsest first.
Codes = tuple[torch.Tensor, ...]
#: What makes the quantizer of one map.
New = Callable[[], nn.Quantizer]
Size = tuple[int, int, int]

#: Of a pixel given the codes.
LIKELIHOODS = ("logistic", "categorical")

#: The share of the mean use of a code under which a code is given up and begins anew.
_REVIVE_BELOW = 0.1


class _Autoencoder(torch.nn.Module):
    """Images to codes, and codes to the parameters of the pixels' distributions, over one latent map.

    ``sizes`` are those of the maps, the coarsest first; ``residual`` are the number of blocks and the dropout in them.
    """

    def __init__(self, shape: Size, maps: int, new: New, dim: int, *, hidden: int, downsample: int, **residual: Any):
        super().__init__()
        channels, height, width = shape
        self.sizes = [(height >> downsample, width >> downsample)]
        self.encoder = downsampling(channels, (hidden,) * downsample, **residual)
        self.project = torch.nn.Conv2d(hidden, dim, 1)
        self.quantizer = new()
        self.decoder = upsampling(dim, (hidden,) * downsample, maps, **residual)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Codes, torch.Tensor]:
        """x (B, C, H, W) from -1 to 1 -> (parameters (B, maps, H, W), codes, loss of the quantizers)."""
        quantized, codes, loss = self.quantizer(self.project(self.encoder(x)))
        return self.decoder(quantized), (codes,), loss

    def decode(self, codes: Codes) -> torch.Tensor:
        """codes -> parameters (B, maps, H, W)."""
        return self.decoder(self.quantizer.decode(codes[0]))

    def quantizers(self) -> list[nn.Quantizer]:
        """Those of the maps, in their order."""
        return [self.quantizer]


class _Autoencoder2(torch.nn.Module):
    """As ``_Autoencoder``, over a top map and a bottom map that is encoded given the top one. Razavi et al. 2019, algorithm 1."""

    def __init__(
        self, shape: Size, maps: int, new: New, dim: int, *, hidden: int, downsample: int, top_downsample: int, **residual: Any
    ):
        super().__init__()
        channels, height, width = shape
        self.sizes = [(height >> n, width >> n) for n in (downsample + top_downsample, downsample)]
        self.bottom_encoder = downsampling(channels, (hidden,) * downsample, **residual)
        self.top_encoder = downsampling(hidden, (hidden,) * top_downsample, **residual)
        self.top_project = torch.nn.Conv2d(hidden, dim, 1)
        self.top_quantizer = new()
        self.top_decoder = upsampling(dim, (hidden,) * top_downsample, hidden, **residual)
        self.bottom_project = torch.nn.Conv2d(2 * hidden, dim, 1)
        self.bottom_quantizer = new()
        self.decoder = upsampling(hidden + dim, (hidden,) * downsample, maps, **residual)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Codes, torch.Tensor]:
        features = self.bottom_encoder(x)
        top, top_codes, top_loss = self.top_quantizer(self.top_project(self.top_encoder(features)))
        above = self.top_decoder(top)
        bottom, bottom_codes, bottom_loss = self.bottom_quantizer(self.bottom_project(torch.cat([features, above], 1)))
        return self.decoder(torch.cat([above, bottom], 1)), (top_codes, bottom_codes), top_loss + bottom_loss

    def decode(self, codes: Codes) -> torch.Tensor:
        above = self.top_decoder(self.top_quantizer.decode(codes[0]))
        return self.decoder(torch.cat([above, self.bottom_quantizer.decode(codes[1])], 1))

    def quantizers(self) -> list[nn.Quantizer]:
        return [self.top_quantizer, self.bottom_quantizer]


# ---------------------------------------------------------------------------------------------------------------------
# The prior and the models


class CodePrior(torch.nn.Module):
    """log P of maps of codes: a ``PixelCNN`` for the first, and for each further one a ``PixelCNN`` given the one before it.

    Args:
        sizes: (h, w) of each map, each a multiple of the one before it.
        codes: how many each map chooses from.
        context: K of a context (B, K), or None.
        network: of ``PixelCNN``: hidden, layers, kernel, dropout.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], codes: int, *, context: int | None = None, **network: Any):
        super().__init__()
        self.maps = torch.nn.ModuleList()
        self.shown = torch.nn.ModuleList()
        for i, size in enumerate(sizes):
            hidden = network.get("hidden", 64)
            condition = hidden if i else None
            self.maps.append(PixelCNN((1, *size), levels=codes, context=context, condition=condition, **network))
            if i:
                factor = size[0] // sizes[i - 1][0], size[1] // sizes[i - 1][1]
                self.shown.append(_Shown(codes, hidden, factor))

    def log_mass(self, codes: Codes, context: torch.Tensor | None = None) -> torch.Tensor:
        """log P(codes), (B,) in nats, of one map (B, h, w) for each size."""
        total = self.maps[0].log_mass(codes[0][:, None], context)  # type: ignore[operator]
        for i, show in enumerate(self.shown):
            total = total + self.maps[i + 1].log_mass(codes[i + 1][:, None], context, show(codes[i]))  # type: ignore[operator]
        return total

    @torch.no_grad()
    def draw(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> Codes:
        """n samples of every map, (n, h, w) each."""
        codes = [self.maps[0].draw(n, context, temperature)[:, 0]]  # type: ignore[operator]
        for i, show in enumerate(self.shown):
            codes.append(self.maps[i + 1].draw(n, context, temperature, show(codes[i]))[:, 0])  # type: ignore[operator]
        return tuple(codes)


class _Shown(torch.nn.Module):
    """A map of codes (B, h, w) as features (B, hidden, h f, w g) for the next map's prior."""

    def __init__(self, codes: int, hidden: int, factor: tuple[int, int]):
        super().__init__()
        self.embedding = torch.nn.Embedding(codes, hidden)
        self.network = nn.ResNet(hidden, hidden, hidden, 1, zero_init=False)
        self.factor = factor

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        h = self.network(self.embedding(codes).movedim(-1, 1))
        return h.repeat_interleave(self.factor[0], 2).repeat_interleave(self.factor[1], 3)


def _quantizers(
    given: nn.Quantizer | Mapping[str, Any] | None, dim: int, codes: int, decay: float | None, commitment: float
) -> tuple[New, int, int]:
    """What makes the quantizer of one map, its dim and its codes. Raises ValueError for one that gives no map of codes."""
    if given is None:
        revive_below = None if decay is None else _REVIVE_BELOW
        how: dict[str, Any] = {"decay": decay, "commitment": commitment, "revive_below": revive_below, "channels_first": True}
        return functools.partial(nn.VectorQuantizer, dim, codes, **how), dim, codes
    quantizer = nn.Quantizer.of(given)
    if not quantizer.channels_first or quantizer.index_shape:
        raise ValueError(f"quantizer: expected one with channels_first=True and one code for each vector, got {quantizer}")
    return functools.partial(copy.deepcopy, quantizer), quantizer.dim, quantizer.codes


class _CodeModel(DiscreteModel):
    """What VQVAE and VQVAE2 share: all but the autoencoder."""

    prior_presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"config": {"hidden": 32, "layers": 4, "dropout": 0.5}, "lr": 2e-3, "ema": 0.99, "epochs": 60, "patience": 8},
        "photos": {"config": {"hidden": 48, "layers": 8, "dropout": 0.3}, "batch_size": 32, "ema": 0.99, "epochs": 20},
    }

    def __init__(
        self,
        make: Any,
        halvings: int,
        *,
        shape: Sequence[int],
        levels: int,
        dim: int,
        codes: int,
        decay: float | None,
        commitment: float,
        quantizer: nn.Quantizer | Mapping[str, Any] | None,
        likelihood: str,
        components: int,
        prior: Mapping[str, Any] | None,
        context: int | None,
        **network: Any,
    ):
        super().__init__()
        self.shape = channels, height, width = image_shape(shape)
        check_sizes(hidden=network["hidden"], downsample=network["downsample"], dim=dim, context=context)
        check_sizes(0, blocks=network["blocks"], commitment=commitment)
        new_quantizer, dim, codes = _quantizers(quantizer, dim, codes, decay, commitment)
        self.settle(dim=dim, codes=codes)
        if height % (1 << halvings) or width % (1 << halvings):
            halved = f"{halvings} times (downsample)"
            raise ValueError(f"shape: expected a height and a width that can be halved {halved}, got {height} x {width}")
        check_name("likelihood", likelihood, LIKELIHOODS)
        if levels < 2 or codes < 2:
            raise ValueError(f"levels, codes: expected at least 2 each, got {levels} and {codes}")
        if context is not None and prior is None:
            raise ValueError("context: only the prior over the codes takes one, and there is none (prior=None)")
        self.levels, self.codes, self.context = levels, codes, context
        self.likelihood = named_likelihood(likelihood, components, levels)
        self.autoencoder = make(self.shape, self.likelihood.maps(channels), new_quantizer, dim, **network)
        start(self.autoencoder.decoder[-1], self.likelihood.bias(channels))
        self.prior = None
        if prior is not None:
            self.autoencoder.requires_grad_(False)
            self.prior = CodePrior(self.autoencoder.sizes, codes, context=context, **prior)
        self.train()

    def train(self, mode: bool = True) -> _CodeModel:
        """A model with a prior trains that alone: its autoencoder stays in evaluation mode."""
        super().train(mode)
        if self.prior is not None:
            self.autoencoder.eval()
        return self

    def encode(self, x: torch.Tensor) -> Codes:
        """x (B, C, H, W) in [0, 1) -> one map of codes (B, h, w) for each latent, the coarsest first. Without gradients."""
        self.check_shape(x)
        training = self.autoencoder.training
        self.autoencoder.eval()
        try:
            with torch.no_grad():
                return self._encoded(self.values(x))[1]
        finally:
            self.autoencoder.train(training)

    def decode(self, *codes: torch.Tensor) -> torch.Tensor:
        """The likelihood's mean for maps of codes (B, h, w), as dequantized data (B, C, H, W)."""
        return (self.likelihood.image_mean(_accumulated(self.autoencoder.decode(codes))) + 0.5) / self.levels

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W) in [0, 1) to its codes and back."""
        return self.decode(*self.encode(x))

    def embed(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """The vectors of x's codes in one row (B, L), map after map."""
        latents = [q.decode(c) for q, c in zip(self.autoencoder.quantizers(), self.encode(x), strict=True)]
        return torch.cat([z.flatten(1) for z in latents], 1)

    def render(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """The image of the codes nearest to the vectors in z (B, L)."""
        quantizers, sizes = self.autoencoder.quantizers(), self.autoencoder.sizes
        parts = z.split([q.dim * math.prod(size) for q, size in zip(quantizers, sizes, strict=True)], 1)
        maps = zip(quantizers, parts, sizes, strict=True)
        return self.decode(*(q.encode(part.unflatten(1, (q.dim, *size))) for q, part, size in maps))

    def usage(self, x: torch.Tensor) -> tuple[nn.CodeUsage, ...]:
        """How evenly the codes of x (B, C, H, W) are used: perplexity and the share that is used at all, for each map."""
        return tuple(q.usage(c) for q, c in zip(self.autoencoder.quantizers(), self.encode(x), strict=True))

    def remarks(self, x: torch.Tensor) -> list[str]:
        """How evenly the images use the codes of each map."""
        parts = []
        for codes, usage in zip(self.encode(x), self.usage(x), strict=True):
            height, width = codes.shape[1:]
            used = f"{float(usage.used):.0%} used, perplexity {float(usage.perplexity):.0f}"
            parts.append(f"{height}x{width} of {self.codes} ({used})")
        return [f"codes of {len(x)} test images: {', '.join(parts)}"]

    def log_mass(self, v: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """A lower bound on log P(v), (B,) in nats: log P(v | codes) + log P(codes), with the codes that v is encoded to.

        It is the evidence lower bound for the posterior that puts all mass on these codes. Without a prior the codes are
        uniform: log P(codes) = -(number of codes) log(codebook size).
        """
        self.check_values(v)
        self._check_context(context)
        maps, codes, _ = self._encoded(v)
        return self._bound(v, maps, codes, context)

    def objective(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """-log_prob(x) and, while there is no prior, D times the quantizers' loss, D the number of pixels' channels.

        The loss is that of van den Oord et al. 2017, equation 3, a mean over the latents, as -log_prob / D is over the image.
        """
        if self.prior is not None:
            return -self.log_prob(x, context)
        self.check_shape(x)
        v, dims = self.values(x), math.prod(self.shape)
        maps, codes, loss = self._encoded(v)
        return dims * (loss - math.log(self.levels)) - self._bound(v, maps, codes, context)

    @torch.no_grad()
    def draw(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """The mean images (n, C, H, W), integers, of codes drawn from the prior (without one: uniform codes)."""
        self._check_context(context)
        if self.prior is not None:
            codes = self.prior.draw(n, context, temperature)
        else:
            device = next(self.parameters()).device
            codes = tuple(torch.randint(self.codes, (n, *size), device=device) for size in self.autoencoder.sizes)
        return self.likelihood.image_mean(_accumulated(self.autoencoder.decode(codes))).round().long()

    def load_autoencoder(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Take the autoencoder, codebooks included, from the state of a model that has the same. Raises RuntimeError if not."""
        prefix = "autoencoder."
        self.autoencoder.load_state_dict({k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})

    def _encoded(self, v: torch.Tensor) -> tuple[torch.Tensor, Codes, torch.Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.prior is None):
            return self.autoencoder(self.likelihood.encode(v.to(next(self.parameters()).dtype)))

    def _bound(self, v: torch.Tensor, maps: torch.Tensor, codes: Codes, context: torch.Tensor | None) -> torch.Tensor:
        pixels = self.likelihood.image_log_prob(v, _accumulated(maps))
        if self.prior is not None:
            return pixels + self.prior.log_mass(codes, context)
        return pixels - sum(map(math.prod, self.autoencoder.sizes)) * math.log(self.codes)

    def _check_context(self, context: torch.Tensor | None) -> None:
        if context is not None and self.prior is None:
            raise ValueError(f"context: got shape {tuple(context.shape)}, but only the prior takes one, and there is none")


def _accumulated(maps: torch.Tensor) -> torch.Tensor:
    return maps.to(accumulation_dtype(maps))


_PRESETS: dict[str, dict[str, Any]] = {
    # Few codes, for a bound that counts them: 64 instead of 16 give sharper reconstructions, and 9 nats more. A short average:
    # codebooks are buffers, which are not averaged, and the encoder must not lag far behind them.
    "digits": {
        "config": {"hidden": 64, "downsample": 1, "dim": 16, "codes": 16, "likelihood": "categorical", "dropout": 0.1},
        "lr": 2e-3,
        "ema": 0.99,
        "epochs": 100,
    },
    # Two components: in a few minutes of training more of them are still alike.
    "photos": {
        "config": {"hidden": 64, "dim": 32, "codes": 256, "components": 2},
        "lr": 2e-3,
        "ema": 0.99,
        "batch_size": 32,
        "epochs": 20,
    },
}


@model("vqvae", presets=_PRESETS)
class VQVAE(_CodeModel):
    """Images through a map of discrete codes: strided convolutions, a quantizer, transposed convolutions.

    Trained in two stages. Without a ``prior`` the autoencoder is, with uniform codes; with one, ``train`` leaves the autoencoder
    as it is, and the prior learns the codes of the data. ``log_prob`` is a lower bound in both (see ``log_mass``).

    Args:
        shape: (C, H, W); H and W are halved ``downsample`` times.
        levels: how many values an element can have.
        hidden, blocks, dropout: channels of the encoder and the decoder, their residual blocks, and the dropout in these.
        dim, codes, decay, commitment: of ``nn.VectorQuantizer``.
        quantizer: an ``nn.Quantizer`` or its config ``{"kind", ...}``, of its own ``dim`` and ``codes``, copied for each map.
        likelihood: of a pixel given the codes: ``"logistic"``, a mixture of ``components`` discretized logistics, in which three
            channels depend on one another, or ``"categorical"``, a logit for each level of each channel.
        prior: settings of the prior, a ``PixelCNN`` over the map of codes (hidden, layers, kernel, dropout), or None.
        context: K of a context (B, K) of the prior, or None.

    Raises ValueError for settings that do not fit, and unknown names.
    Source: van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning" (2017).
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int = 256,
        hidden: int = 128,
        blocks: int = 2,
        downsample: int = 2,
        dropout: float = 0.0,
        dim: int = 64,
        codes: int = 512,
        decay: float | None = 0.99,
        commitment: float = 0.25,
        quantizer: nn.Quantizer | Mapping[str, Any] | None = None,
        likelihood: str = "logistic",
        components: int = 5,
        prior: Mapping[str, Any] | None = None,
        context: int | None = None,
    ):
        super().__init__(_Autoencoder, downsample, **arguments(locals()))


@model("vqvae2", presets=_PRESETS)
class VQVAE2(_CodeModel):
    """Images through two maps of discrete codes: a coarse one, and a fine one that is encoded and predicted given the coarse one.

    Arguments and errors as for ``VQVAE``, and:

    Args:
        downsample: how often H and W are halved for the bottom map.
        top_downsample: how often the bottom map's sides are halved for the top one.
        prior: settings of the two ``PixelCNN``, that of the bottom map given the top one.

    Source: Razavi, van den Oord and Vinyals, "Generating Diverse High-Fidelity Images with VQ-VAE-2" (2019).
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int = 256,
        hidden: int = 128,
        blocks: int = 2,
        downsample: int = 2,
        top_downsample: int = 1,
        dropout: float = 0.0,
        dim: int = 64,
        codes: int = 512,
        decay: float | None = 0.99,
        commitment: float = 0.25,
        quantizer: nn.Quantizer | Mapping[str, Any] | None = None,
        likelihood: str = "logistic",
        components: int = 5,
        prior: Mapping[str, Any] | None = None,
        context: int | None = None,
    ):
        given = arguments(locals())
        check_sizes(downsample=downsample, top_downsample=top_downsample)
        super().__init__(_Autoencoder2, downsample + top_downsample, **given)
