"""A VAE whose decoder is autoregressive: each pixel sees the latents and the pixels before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..nn.densities.flow import context_rows
from ._model import arguments
from ._pixelcnn import DIGITS, PixelCNN
from ._registry import model
from ._vae import VAE


@model(
    "pixelvae",
    presets={
        "digits": {
            "config": {"latent": 8, "pixelcnn": DIGITS, "objective": {"free_bits": 0.05}, "dropout": 0.2},
            "lr": 2e-3,
            "ema": 0.998,
            "epochs": 60,
            "patience": 8,
        }
    },
)
class PixelVAE(VAE):
    """``VAE`` with a ``PixelCNN`` as p(x | z), whose context is z (and the class, if there is one).

    A decoder that knows the pixels before needs few latents: without ``free_bits`` or a ``min_rate`` it may use none of them.

    Args:
        shape: (C, H, W); levels: how many values an element can have.
        pixelcnn: keyword arguments of ``PixelCNN`` besides shape, levels, context and condition.
        the others: as for ``VAE``.

    Source: Gulrajani et al., "PixelVAE: A Latent Variable Model for Natural Images" (2017).
    """

    decoder: PixelCNN

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int = 256,
        latent: int = 8,
        components: int = 16,
        network: str = "mlp",
        hidden: Sequence[int] = (256, 256),
        blocks: int = 1,
        activation: str = "leaky_relu",
        dropout: float = 0.0,
        prior: str = "standard",
        posterior: str = "gaussian",
        flow_layers: int = 3,
        flow_hidden: Sequence[int] = (256, 256),
        objective: Mapping[str, Any] | None = None,
        pixelcnn: Mapping[str, Any] | None = None,
        context: int | None = None,
    ):
        super().__init__(**arguments(locals(), "pixelcnn"), likelihood="categorical")
        fixed = sorted({"shape", "levels", "context", "condition"} & set(pixelcnn or {}))
        if fixed:
            raise ValueError(f"pixelcnn: {', '.join(fixed)} follow from the other settings")
        self.decoder = PixelCNN(shape, levels=levels, context=latent + (context or 0), **(pixelcnn or {}))

    def _new_decoder(self, *args: Any, **options: Any) -> torch.nn.Module:
        """Nothing yet: the decoder follows when all settings are known."""
        return torch.nn.Identity()

    def _seen(self, z: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """What the PixelCNN is given: z (B, L), and context (B, K)."""
        z = z.to(self.decoder.place.dtype)
        return z if context is None else torch.cat([z, context.to(z.dtype)], 1)

    def log_likelihood(self, x: torch.Tensor, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        rows = None if context is None else context.repeat(z.shape[0], 1)
        v = x.long().repeat(z.shape[0], 1, 1, 1)
        return self.decoder.log_mass(v, self._seen(z.flatten(0, 1), rows)).view(z.shape[:2])

    def draw(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """n samples of integers (n, *shape): z at that temperature, and the pixels at it too."""
        context = context_rows(context, n)
        return self.decoder.draw(n, self._seen(self.prior.sample(n, temperature=temperature), context), temperature)

    def decode(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError(
            "PixelVAE: the parameters of a pixel follow from the pixels before too; see mean, log_likelihood"
        )

    @torch.no_grad()
    def mean(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """A sample of p(x | z), (B, *shape): an autoregressive likelihood has no mean to show."""
        return self.decoder.draw(z.shape[0], self._seen(z, context)).float()
