"""The models by name, and named settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._autoregressive import IAF, MAF
from ._dequantized import DequantizedFlow
from ._glow import Glow
from ._made import MADE
from ._model import Model
from ._nice import NICE
from ._pixelcnn import PixelCNN
from ._pixelvae import PixelVAE
from ._realnvp import RealNVP
from ._vae import VAE
from ._vqvae import VQVAE, VQVAE2

__all__ = ["MODELS", "PRESETS", "build", "name_of"]

#: Every model by the name that checkpoints and the command line use.
MODELS: dict[str, type[Model]] = {
    "nice": NICE,
    "realnvp": RealNVP,
    "glow": Glow,
    "made": MADE,
    "maf": MAF,
    "dequantized": DequantizedFlow,
    "iaf": IAF,
    "vae": VAE,
    "pixelcnn": PixelCNN,
    "pixelvae": PixelVAE,
    "vqvae": VQVAE,
    "vqvae2": VQVAE2,
}

#: Named settings: (model, preset) -> keyword arguments of the model's constructor, besides the shape.
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    # The RealNVP on digits of Tomczak, "Deep Generative Modeling" (2022), for data (v + u) / 17 with v in 0..16: in raw units,
    # the second half transformed and all features reversed after each coupling, (x + t) * exp(s) with s = tanh(s-net).
    ("realnvp", "digits-recipe"): {
        "couplings": 8,
        "hidden": 256,
        "depth": 2,
        "activation": "leaky_relu",
        "zero_init": False,
        "separate": True,
        "scale": {"kind": "tanh", "a": 1.0, "b": 0.0},
        "shift_first": True,
        "permutation": "reverse",
        "flatten": True,
        "preprocess": {"rescale": 17.0},
    },
    # Chosen on the digits' validation split. The logit, with a small alpha, is what helps most: it removes the edge that
    # most pixels, being 0 or 16, lie at; then convolutions instead of an MLP; then dropout, for there are only 1000 images.
    ("realnvp", "digits"): {
        "couplings": 3,
        "hidden": 32,
        "depth": 1,
        "activation": "silu",
        "dropout": 0.3,
        "preprocess": {"logit": 0.005},
    },
    ("dequantized", "digits"): {
        "flow": "realnvp",
        "settings": {
            "couplings": 3,
            "hidden": 32,
            "depth": 1,
            "activation": "silu",
            "dropout": 0.3,
            "preprocess": {"logit": 0.005},
        },
    },
    # Chosen as above, among models that train in two minutes on a CPU core.
    ("glow", "digits"): {
        "levels": 2,
        "steps": 8,
        "hidden": 48,
        "dropout": 0.2,
        "preprocess": {"logit": 0.005},
    },
    # Chosen as above, among a few: more and narrower layers do as well, the permutations and a smooth activation help.
    ("maf", "digits"): {
        "layers": 8,
        "hidden": [128, 128],
        "activation": "silu",
        "permutation": "random",
        "preprocess": {"logit": 0.005},
    },
    # One wide layer does better than two.
    ("made", "digits"): {"hidden": [512]},
    # As many layers as see seven rows above. A narrower one with less dropout does as well.
    ("pixelcnn", "digits"): {"hidden": 48, "layers": 6, "dropout": 0.5},
    ("pixelvae", "digits"): {
        "latent": 8,
        "pixelcnn": {"hidden": 48, "layers": 6, "dropout": 0.5},
        "objective": {"free_bits": 0.05},
        "dropout": 0.2,
    },
    # Few codes, for a bound that counts them: 64 instead of 16 give sharper reconstructions, and 9 nats more.
    ("vqvae", "digits"): {"hidden": 64, "downsample": 1, "dim": 16, "codes": 16, "likelihood": "categorical", "dropout": 0.1},
    ("vqvae2", "digits"): {"hidden": 64, "downsample": 1, "dim": 16, "codes": 16, "likelihood": "categorical", "dropout": 0.1},
    # Two components: in a few minutes of training more of them are still alike.
    ("vqvae", "photos"): {"hidden": 64, "dim": 32, "codes": 256, "components": 2},
    ("vqvae2", "photos"): {"hidden": 64, "dim": 32, "codes": 256, "components": 2},
    ("vae", "photos"): {"network": "conv", "hidden": [48, 96], "latent": 64, "components": 2},
    # Chosen on the validation bands of the photographs after three minutes on a CPU core; most comes from the bounded scale
    # and, in the plan, from small batches at a learning rate of 2e-3.
    ("glow", "photos"): {"levels": 3, "steps": 8, "hidden": 64, "preprocess": None},
}


def build(name: str, config: Mapping[str, Any]) -> Model:
    """The model of that name with that configuration (its ``config``, or any keyword arguments of its constructor).

    Raises ValueError for an unknown name and for a configuration that the model refuses, TypeError for unknown keywords.
    """
    if name not in MODELS:
        raise ValueError(f"model: unknown name {name!r}; expected one of {', '.join(map(repr, MODELS))}")
    return MODELS[name](**config)


def name_of(model: Model) -> str:
    """The model's name in ``MODELS``. Raises TypeError if it has none."""
    for name, cls in MODELS.items():
        if type(model) is cls:
            return name
    raise TypeError(f"model: expected one of flowkern.models ({', '.join(MODELS)}), got {type(model).__name__}")
