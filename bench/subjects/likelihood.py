"""The likelihood kernels beside the same formulas in plain torch, and the published algorithm of PixelCNN++.

Every result of every variant is held against float64 before it is timed: gradients, and what is computed from noise, with the
same noise. "published" is the algorithm of PixelCNN++'s code, whose values ``compat="pixelcnn++"`` reproduces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from flowkern import OPS, nn, ops
from flowkern._core import philox

from ..baselines import BASELINES
from ..comparison import FLOWKERN, Comparison, Options, Tensors, by_norm, seeded
from ..timing import Call

__all__ = ["comparisons", "loss_and_gradient", "published"]

Shapes = tuple[tuple[int, ...], ...]
#: (batch, side, components) of colour images; shapes of latents; shapes of images to dequantize.
SIZES: dict[str, tuple[Shapes, Shapes, Shapes]] = {
    "cpu": (((32, 32, 10),), ((64, 65536), (64, 256), (64, 16)), ((64, 3, 64, 64),)),
    "cuda": (((256, 32, 10),), ((256, 65536),), ((256, 3, 256, 256),)),
}
QUICK: tuple[Shapes, Shapes, Shapes] = ((2, 4, 2),), ((4, 16),), ((2, 3, 4, 4),)
#: Likelihoods without a kernel, and the elements (B, D) that they are measured on.
ELEMENTWISE: dict[str, tuple[nn.Likelihood, tuple[int, ...]]] = {
    "bernoulli": (nn.Bernoulli(), (64, 784)),
    "categorical": (nn.Categorical(17), (64, 64)),
    "gaussian": (nn.Gaussian(), (64, 784)),
}


def comparisons(options: Options) -> Iterator[Comparison]:
    """Those of the three ops, and on a CPU of the likelihoods that are left to torch."""
    of_mixtures, of_latents, of_images = QUICK if options.quick else SIZES[options.device]
    parts: list[tuple[str, Callable[..., Iterator[Comparison]], tuple[Any, ...]]] = [
        *((f"mixture-{k}-{batch}x3x{side}x{side}", mixture, (batch, side, k)) for batch, side, k in of_mixtures),
        *(("kl-" + "x".join(map(str, shape)), latents, shape) for shape in of_latents),
        *(("dequantize-" + "x".join(map(str, shape)), images, shape) for shape in of_images),
    ]
    if options.device == "cpu" and not options.quick:
        parts += [(f"{name}-" + "x".join(map(str, what[1])), elementwise, what) for name, what in ELEMENTWISE.items()]
    for case, part, size in parts:
        for comparison in part(case, size, options.device) if options.wants(case) else ():
            # Only on a GPU there is a copy beside the op.
            yield comparison if options.device == "cuda" else replace(comparison, traffic=None)


def published(x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """log p(x) (B,) in nats of 8-bit colour images (B, 3, H, W) by the published algorithm, step by step: eager PixelCNN++.

    Source: Salimans et al., "PixelCNN++" (2017), and its code: values in [-1, 1], channels last, log-scales of at least -7,
    the density at the bin's centre where the bin's mass is at most 1e-5.
    """
    x, params = x.permute(0, 2, 3, 1).to(params.dtype) / 127.5 - 1.0, params.permute(0, 2, 3, 1)
    components = params.shape[-1] // 10
    logits, rest = params[..., :components], params[..., components:].unflatten(-1, (3, 3 * components))
    means, log_scales, coefficients = rest.split(components, -1)
    log_scales, coefficients = log_scales.clamp(min=-7.0), coefficients.tanh()
    x = x.unsqueeze(-1).expand_as(means)
    green = means[..., 1, :] + coefficients[..., 0, :] * x[..., 0, :]
    blue = means[..., 2, :] + coefficients[..., 1, :] * x[..., 0, :] + coefficients[..., 2, :] * x[..., 1, :]
    centered = x - torch.stack([means[..., 0, :], green, blue], -2)
    precision = torch.exp(-log_scales)
    upper, lower, middle = precision * (centered + 1 / 255), precision * (centered - 1 / 255), precision * centered
    mass = upper.sigmoid() - lower.sigmoid()
    density = middle - log_scales - 2.0 * F.softplus(middle) - torch.tensor(127.5, dtype=x.dtype).log()
    inside = torch.where(mass > 1e-5, mass.clamp(min=1e-12).log(), density)
    log_probs = torch.where(x < -0.999, upper - F.softplus(upper), torch.where(x > 0.999, -F.softplus(lower), inside)).sum(-2)
    return torch.logsumexp(log_probs + logits.log_softmax(-1), -1).flatten(1).sum(1)


def loss_and_gradient(function: Callable[..., torch.Tensor], x: torch.Tensor, params: torch.Tensor, **kwargs: Any) -> Call:
    """log_prob and the gradient of its sum."""
    leaf = params.detach().requires_grad_()

    def call() -> Tensors:
        log_prob = function(x, leaf, **kwargs)
        return log_prob.detach(), *torch.autograd.grad(log_prob.sum(), leaf)

    return call


def mixture(case: str, size: tuple[int, ...], device: str) -> Iterator[Comparison]:
    """The mixture of discretized logistics, with and without its gradient."""
    batch, side, components = size
    torch.manual_seed(0)
    x = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    params = torch.randn(batch, 10 * components, side, side, device=device)
    params[:, components:].unflatten(1, (3, 3, components))[:, :, 1] -= 2.0  # scales of a trained model's order
    op, compat = OPS["discretized_logistic_mixture"], f"{FLOWKERN}-compat"
    variants: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
        "published": (published, {}),
        FLOWKERN: (ops.discretized_logistic_mixture, {}),
        compat: (ops.discretized_logistic_mixture, {"compat": "pixelcnn++"}),
    }
    truths = {"published": published, FLOWKERN: op.reference, compat: published}
    exact = {name: loss_and_gradient(function, x, params.double())() for name, function in truths.items()}
    # The published algorithm subtracts nearly equal numbers, and jumps where a bin's mass passes 1e-5.
    granted = {"published": 1e-2, compat: 1e-3}

    def forward(function: Callable[..., torch.Tensor], kwargs: dict[str, Any]) -> Call:
        alone = torch.no_grad()(function)
        return lambda: (alone(x, params, **kwargs),)

    both = {name: loss_and_gradient(function, x, params, **kwargs) for name, (function, kwargs) in variants.items()}
    alone = {name: forward(*variant) for name, variant in variants.items()}
    values = {name: results[:1] for name, results in exact.items()}
    traffic = x.nbytes + params.nbytes
    for direction, calls, truth, moved in (
        ("loss+gradient", both, exact, traffic + params.nbytes),
        ("forward", alone, values, traffic),
    ):
        check = by_norm(truth, granted)
        yield Comparison(case, direction, calls, "published", check=check, traffic=moved, seconds=10.0)


def latents(case: str, shape: tuple[int, ...], device: str) -> Iterator[Comparison]:
    """Reparameterization with its divergence. Forward two tensors are read and one written, backward three and two."""
    torch.manual_seed(0)
    mean, log_scale, grad = (torch.randn(shape, device=device) for _ in range(3))
    plain = BASELINES["gaussian_kl"](mean, log_scale)

    def both(function: Callable[..., tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype = torch.float32) -> Call:
        inputs = [t.to(dtype).requires_grad_() for t in (mean, log_scale)]

        def call() -> Tensors:
            z, kl = function(*inputs)
            return z.detach(), kl.detach(), *torch.autograd.grad((z, kl), inputs, (grad.to(dtype), torch.ones_like(kl)))

        return call

    reference = OPS["gaussian_kl"].reference
    exact = {
        "eager": seeded(both(lambda m, s: plain(m, s, torch.randn_like(mean).double()), torch.float64)),
        FLOWKERN: seeded(both(lambda m, s: reference(m, s, philox.as_seed(None, m.device)), torch.float64)),
    }
    calls = {"eager": both(plain), FLOWKERN: both(ops.gaussian_kl)}
    yield Comparison(case, "forward+backward", calls, "eager", check=by_norm(exact), traffic=8 * mean.nbytes, seconds=10.0)


def images(case: str, shape: tuple[int, ...], device: str) -> Iterator[Comparison]:
    """Dequantization with the logit."""
    torch.manual_seed(0)
    v = torch.randint(256, shape, dtype=torch.uint8, device=device)

    def plain(dtype: torch.dtype = torch.float32) -> Tensors:
        x = (v.to(dtype) + torch.rand(shape, device=device)) / 256
        z = torch.log(0.05 + 0.9 * x) - torch.log(0.05 + 0.9 * (1.0 - x))
        slope = z.abs() + 2.0 * torch.log1p(torch.exp(-z.abs())) + math.log(0.9)
        return z, slope.flatten(1).sum(1)

    reference = OPS["dequantize"].reference
    # In plain code the division by the number of levels is left out of the log-determinant.
    exact = {
        "eager": seeded(lambda: plain(torch.float64)),
        FLOWKERN: seeded(lambda: reference(v, philox.as_seed(None, v.device), alpha=0.05, dtype=torch.float64)),
    }
    calls: dict[str, Call] = {"eager": plain, FLOWKERN: lambda: ops.dequantize(v, alpha=0.05)}
    yield Comparison(case, "forward", calls, "eager", check=by_norm(exact), traffic=5 * v.nbytes, seconds=10.0)


def elementwise(case: str, what: tuple[nn.Likelihood, tuple[int, ...]], device: str) -> Iterator[Comparison]:
    """A likelihood that is left to torch: what it would gain from fusion, by torch.compile."""
    likelihood, shape = what
    torch.manual_seed(0)
    x = torch.randint(likelihood.levels, shape) if likelihood.discrete else torch.randn(shape)
    params = torch.randn(*shape, likelihood.params)

    def total(x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return likelihood.total(x.to(params.dtype), params)

    calls = {"eager": loss_and_gradient(total, x, params), "compiled": loss_and_gradient(torch.compile(total), x, params)}
    exact: Tensors = loss_and_gradient(total, x, params.double())()
    check = by_norm(dict.fromkeys(calls, exact))
    yield Comparison(case, "loss+gradient", calls, "eager", check=check, seconds=2.5)
