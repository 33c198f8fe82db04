"""What the tests of models share: models with random parameters and their inputs, short training, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowkern import models, ops

GLOW_SHAPE = (2, 8, 4)
#: Settings of a few Glows, all of them small.
GLOWS: dict[str, dict[str, Any]] = {
    "plain": {"levels": 2, "steps": 2, "hidden": 6},
    "one-level": {"levels": 1, "steps": 1, "hidden": 4, "parametrization": "qr"},
    "classes": {"levels": 2, "steps": 1, "hidden": 6, "classes": 3},
    "context": {"levels": 1, "steps": 2, "hidden": 6, "context": 3, "parametrization": "full", "activation": "silu"},
    "householder": {"levels": 1, "steps": 2, "hidden": 6, "parametrization": "householder"},
    "logit": {"levels": 2, "steps": 1, "hidden": 6, "preprocess": {"logit": 0.05}, "scale": ops.ScaleMap.tanh(1.0)},
    "reversible": {"levels": 2, "steps": 2, "hidden": 6, "classes": 3, "memory": "reversible"},
}
_IMAGE = {"shape": (1, 4, 4), "hidden": 4, "depth": 1, "levels": 2, "couplings": 2}
_RANDOM = {"layers": 3, "permutation": "random"}
_LOGIT, _RECIPE = {"logit": 0.05}, models.PRESETS["realnvp", "digits-recipe"]
#: name -> (model, configuration)
FLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "nice-vector": ("nice", {"shape": 5, "hidden": 8}),
    "nice-image": ("nice", _IMAGE),
    "nice-context": ("nice", {"shape": 4, "hidden": 8, "context": 2, "permutation": "random", "seed": 3}),
    "realnvp-vector": ("realnvp", {"shape": 5, "hidden": 8, "couplings": 3}),
    "realnvp-context": ("realnvp", {"shape": 4, "hidden": 8, "couplings": 3, "context": 2, "separate": True}),
    "realnvp-image": ("realnvp", _IMAGE),
    "realnvp-image-context": ("realnvp", {**_IMAGE, "shape": (2, 4, 2), "couplings": 1, "context": 3, "activation": "silu"}),
    "realnvp-logit": ("realnvp", {"shape": (1, 2, 3), "hidden": 8, "couplings": 2, "flatten": True, "preprocess": _LOGIT}),
    "realnvp-recipe": ("realnvp", {**_RECIPE, "shape": (1, 2, 4), "hidden": 8, "couplings": 2}),
    **{f"glow-{name}": ("glow", {"shape": GLOW_SHAPE, **settings}) for name, settings in GLOWS.items()},
    "nsf-vector": ("nsf", {"shape": 5, "bins": 4, "layers": 2, "hidden": [8, 6]}),
    "nsf-image-context": ("nsf", {"shape": (1, 2, 2), "hidden": [8], **_RANDOM, "context": 2, "preprocess": _LOGIT}),
    "nsf-coupling": ("nsf", {"shape": 5, "coupling": True, "bound": [-1.0, 2.0], "hidden": [8], "permutation": "alternate"}),
    "nsf-coupling-context": ("nsf", {"shape": 4, "coupling": True, "hidden": [8], **_RANDOM, "context": 2}),
    "maf-batch-norm": ("maf", {"shape": 6, "hidden": [8], **_RANDOM, "seed": 3, "components": 3, "batch_norm": True}),
    "iaf-gated": ("iaf", {"shape": 5, "layers": 2, "hidden": [8, 6], "residual": True, "activation": "elu", "gated": True}),
}
# MAF and IAF are one network in its two directions.
for kind in ("maf", "iaf"):
    FLOWS |= {
        f"{kind}-vector": (kind, {"shape": 5, "layers": 2, "hidden": [8, 6]}),
        f"{kind}-one-feature": (kind, {"shape": 1, "layers": 3, "hidden": [8, 6]}),
        f"{kind}-one-layer": (kind, {"shape": 5, "layers": 1, "hidden": [9], "permutation": "none"}),
        f"{kind}-residual": (kind, {"shape": 6, "hidden": [8, 6], **_RANDOM, "residual": True, "activation": "elu"}),
        f"{kind}-image-context": (kind, {"shape": (1, 2, 3), "hidden": [8], **_RANDOM, "context": 2, "preprocess": _LOGIT}),
    }

_VQ: dict[str, Any] = {"levels": 4, "hidden": 8, "blocks": 1, "dim": 3, "codes": 4, "downsample": 1}
_PIXELS = {"shape": (1, 2, 2), "levels": 2, "latent": 2, "hidden": [8], "pixelcnn": {"hidden": 16, "layers": 2}}
VAES: dict[str, dict[str, Any]] = {
    "categorical": {"levels": 3},
    "bernoulli": {"levels": 2, "likelihood": "bernoulli", "prior": "mixture", "components": 3},
    "logistic": {"levels": 100, "components": 2},
    "gaussian": {"prior": "vamp", "components": 3},
    "mixture": {"likelihood": "mixture", "components": 2, "prior": "realnvp", "posterior": "planar", "flow_layers": 2},
    "conditional": {"levels": 3, "context": 2, "prior": "maf", "posterior": "iaf", "flow_hidden": [8], "dropout": 0.1},
    "radial": {"levels": 3, "posterior": "radial", "flow_layers": 1},
    "flows": {"levels": 3, "prior": "iaf", "posterior": "realnvp", "flow_layers": 2, "flow_hidden": [8]},
    "additive": {"levels": 3, "prior": "nice", "posterior": "maf", "flow_layers": 2, "flow_hidden": [8]},
    "hierarchical": {"levels": 3, "upper": 2},
    "warm-up": {"levels": 3, "objective": {"warmup": 10, "free_bits": 0.1}},
}
_CONV = {"shape": (3, 8, 4), "levels": 5, "latent": 3, "components": 2, "prior": "vamp", "network": "conv", "hidden": [4, 6]}
#: All kinds of models.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **FLOWS,
    **{f"vae-{name}": ("vae", {"shape": (1, 2, 3), "latent": 3, "hidden": [16], **settings}) for name, settings in VAES.items()},
    **{f"vae-conv-{name}": ("vae", {**_CONV, "likelihood": name}) for name in ("categorical", "logistic", "gaussian")},
    "made": ("made", {"shape": (1, 2, 2), "levels": 3, "hidden": [8], "masks": 2, "context": 3}),
    "pixelcnn": ("pixelcnn", {"shape": (1, 3, 3), "levels": 4, "hidden": 6, "layers": 2, "context": 2}),
    "pixelvae": ("pixelvae", {**_PIXELS, "prior": "mixture", "components": 2}),
    "vqvae": ("vqvae", {"shape": (1, 4, 4), **_VQ}),
    "vqvae-prior": ("vqvae", {"shape": (1, 4, 4), **_VQ, "prior": {"hidden": 8, "layers": 2}}),
    "vqvae2": ("vqvae2", {"shape": (1, 4, 4), **_VQ}),
    "vqvae2-prior": ("vqvae2", {"shape": (1, 4, 4), **_VQ, "prior": {"hidden": 8, "layers": 2}}),
}


def built(name: str, batch: int = 4) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """The model in float64, an input in (0, 1), a context: initialized from data, then moved off every special value."""
    torch.manual_seed(0)
    model: Any = models.build(*CASES[name]).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, *model.shape, generator=generator, dtype=torch.float64)
    context = None
    if model.context is not None:
        context = torch.randn(batch, model.context, generator=generator, dtype=torch.float64)
    if getattr(model, "classes", None):
        context = torch.tensor([0, 2, 1, 2])
    with torch.no_grad():
        model.train().objective(x, context)
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.eval(), x, context


def one_hot(model: models.Glow, context: torch.Tensor | None) -> torch.Tensor | None:
    """What the layers of the model are given."""
    if context is None or context.is_floating_point():
        return context
    return torch.nn.functional.one_hot(context, model.classes).double()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-8) -> None:
    """In float64: some 1e4 roundings of 1e-16, amplified by condition numbers below 1e4, stay under 1e-8."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def seeded(function: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return function(*args, **options)


def log_volume(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """log|det dy/dx| of a function of each sample alone."""
    jacobian = torch.autograd.functional.jacobian(lambda batch: function(batch).flatten(1).sum(0), x)
    return torch.linalg.slogdet(jacobian.flatten(2).transpose(0, 1)).logabsdet


def fit(model: torch.nn.Module, loss: Callable[[], torch.Tensor], steps: int, lr: float = 0.01) -> list[float]:
    """The losses of so many steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss().mean()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def assert_all_graded(model: torch.nn.Module) -> None:
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def assert_refused(*cases: tuple[Any, ...]) -> None:
    """Each case is (call, pattern) or (call, pattern, error): the call raises a ValueError, or the error, with such a message."""
    for call, pattern, *error in cases:
        with pytest.raises(error[0] if error else ValueError, match=pattern):
            call()
