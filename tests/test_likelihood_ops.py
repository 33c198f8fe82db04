"""``discretized_logistic_mixture``, ``gaussian_kl`` and ``dequantize``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_accurate

import flowkern
from flowkern import _backend, ops
from flowkern.ops import _discretized_logistic_mixture as mixture

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(_backend.native is None, reason="the CPU extension is not built")

# Mixture of discretized logistics


def image(shape: tuple[int, ...], components: int = 3, levels: int = 256, dtype: torch.dtype = torch.float64) -> Any:
    """(levels with both ends among them, params)."""
    rows = (10 if shape[1] == 3 else 3) * components
    x = torch.randint(levels, shape)
    if x.numel():
        x.view(-1)[::3], x.view(-1)[::4] = 0, levels - 1
    params = torch.randn(shape[0], rows, *shape[2:], dtype=torch.float64)
    per_channel = params[:, components:].unflatten(1, (shape[1], -1, components))
    per_channel[:, :, 1] = 2.0 * per_channel[:, :, 1] - 2.0
    return x, params.to(dtype)


def published(x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """The published code's algorithm, for 8 bits: x in [-1, 1], channels last; nats per sample."""
    x, params = x.permute(0, 2, 3, 1).to(params) / 127.5 - 1.0, params.permute(0, 2, 3, 1)
    components = params.shape[-1] // 10
    logits, rest = params[..., :components], params[..., components:].unflatten(-1, (3, 3 * components))
    means, log_scales, coefficients = rest.split(components, -1)
    log_scales, coefficients = log_scales.clamp(min=-7.0), coefficients.tanh()
    x = x.unsqueeze(-1).expand_as(means)
    green = means[..., 1, :] + coefficients[..., 0, :] * x[..., 0, :]
    blue = means[..., 2, :] + coefficients[..., 1, :] * x[..., 0, :] + coefficients[..., 2, :] * x[..., 1, :]
    centered, inverse = x - torch.stack([means[..., 0, :], green, blue], -2), torch.exp(-log_scales)
    plus, minus, middle = inverse * (centered + 1 / 255), inverse * (centered - 1 / 255), inverse * centered
    delta = plus.sigmoid() - minus.sigmoid()
    density = middle - log_scales - 2.0 * F.softplus(middle) - torch.tensor(127.5).log()
    inside = torch.where(delta > 1e-5, delta.clamp(min=1e-12).log(), density)
    log_probs = torch.where(x < -0.999, plus - F.softplus(plus), torch.where(x > 0.999, -F.softplus(minus), inside)).sum(-2)
    return torch.logsumexp(log_probs + logits.log_softmax(-1), -1).flatten(1).sum(1)


def values_and_gradient(function: Any, x: torch.Tensor, params: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = params.detach().requires_grad_()
    log_prob = function(x, leaf, **kwargs)
    grad = torch.linspace(-1.0, 2.0, len(log_prob), dtype=torch.float64).to(log_prob)
    return log_prob.detach(), torch.autograd.grad(log_prob, leaf, grad)[0]


CASES: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "rgb": ((3, 3, 5, 7), 4, {}),
    "several-tiles": ((2, 3, 24, 25), 2, {}),
    "grey": ((2, 1, 5, 7), 3, {}),
    "one-bit": ((2, 1, 3, 3), 2, {"levels": 2}),
    "five-bits": ((2, 3, 3, 3), 1, {"levels": 32}),
    "sixteen-bits": ((2, 3, 3, 3), 2, {"levels": 65536}),
    "compat": ((2, 3, 5, 7), 3, {"compat": "pixelcnn++"}),
    "empty-batch": ((0, 3, 2, 2), 2, {}),
    "empty-space": ((2, 3, 0, 2), 2, {}),
}


def check_mixture(dtype: torch.dtype) -> None:
    for shape, components, kwargs in CASES.values():
        x, params = image(shape, components, kwargs.get("levels", 256), dtype)
        exact = values_and_gradient(mixture.reference, x, params.double(), **kwargs)
        plain = values_and_gradient(mixture.reference, x, params, **kwargs)
        for values in zip(values_and_gradient(ops.discretized_logistic_mixture, x, params, **kwargs), exact, plain, strict=True):
            assert_accurate(*values, ulps=64 if dtype is torch.float64 else 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixture_is_accurate_on_every_isa(dtype: torch.dtype, isa: str) -> None:
    with flowkern.backend("cpp"):
        check_mixture(dtype)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_mixture_sums_to_one_over_all_levels(backend: str) -> None:
    """The bins of all levels are everything there is, given the channels before."""
    levels = 6
    _, params = image((1, 3, 1, 1), 3, levels, torch.float32)
    grid = torch.cartesian_prod(*[torch.arange(levels)] * 3)
    with flowkern.backend(backend):
        log_prob = ops.discretized_logistic_mixture(grid[:, :, None, None], params.expand(len(grid), -1, 1, 1), levels=levels)
    torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_mixture_in_float32_is_that_in_float64_everywhere(backend: str) -> None:
    """One pixel at a time: to 1e-5, for scales from e^-20 to e^8, and levels and means that are near and far."""
    n = 20000
    x = torch.randint(256, (n, 3, 1, 1))
    x[: n // 8] = torch.tensor([0, 255])[torch.randint(2, (n // 8, 3, 1, 1))]
    params = torch.randn(n, 20, 1, 1)
    parts = params[:, 2:].unflatten(1, (3, 3, 2))
    parts[:, :, 0] = torch.where(
        torch.rand(n, 3, 2, 1, 1) < 0.5, x[:, :, None] / 127.5 - 1.0 + 0.01 * parts[:, :, 0], parts[:, :, 0]
    )
    parts[:, :, 1] = torch.empty(n, 3, 2, 1, 1).uniform_(-20.0, 8.0)
    exact, exact_gradient = values_and_gradient(mixture.reference, x, params.double())
    with flowkern.backend(backend):
        actual, gradient = values_and_gradient(ops.discretized_logistic_mixture, x, params)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0.0)
    assert gradient.isfinite().all()
    scale = exact_gradient.abs().flatten(1).max(1).values[:, None, None, None]
    assert ((gradient - exact_gradient).abs() <= 1e-3 * scale).all()
