"""``python -m bench likelihood``: the likelihood kernels beside the same formulas in plain torch, in one process.

Every variant is held against float64 before it is timed. "published" is the algorithm of PixelCNN++'s code, whose values
``compat="pixelcnn++"`` reproduces.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flowkern import nn, ops

from .files import slug, write_atomically
from .glow import FLOWKERN, Call, Row, as_csv, line, timed
from .memory import peak_extra_bytes
from .provenance import provenance

__all__ = ["main", "published"]

Shapes = tuple[tuple[int, ...], ...]
#: (batch, side, components) of colour images; shapes of latents; shapes of images to dequantize.
MIXTURES: Shapes = ((32, 32, 10),)
LATENTS: Shapes = ((64, 65536), (64, 256), (64, 16))
IMAGES: Shapes = ((64, 3, 64, 64),)
QUICK: tuple[Shapes, ...] = ((2, 4, 2),), ((4, 16),), ((2, 3, 4, 4),)

Tensors = tuple[torch.Tensor, ...]


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


def differs(results: Tensors, exact: Tensors, granted: float = 1e-5) -> str:
    """How far the results are from those in float64, by their norms, if that is more than granted."""
    errors = [float((r.double() - e).norm() / e.norm().clamp(min=1e-30)) for r, e in zip(results, exact, strict=True)]
    return "" if max(errors) < granted else f"off by {max(errors):.1e} of the norm"


def compared(
    case: str, direction: str, calls: Mapping[str, Call], exact: Mapping[str, Tensors], seconds: float, against: str
) -> Iterator[dict[str, Any]]:
    """Rows of calls that each returned what it should, with the memory that each takes."""
    # The published algorithm subtracts nearly equal numbers, and jumps where a bin's mass passes 1e-5.
    granted = {"published": 1e-2, f"{FLOWKERN}-compat": 1e-3}
    failures = {name: differs(call(), exact[name], granted.get(name, 1e-5)) for name, call in calls.items()}
    good = {name: call for name, call in calls.items() if not failures.get(name)}
    memory = {name: peak_extra_bytes(call, torch.device("cpu")) / 2**20 for name, call in good.items()}
    for row in timed(case, direction, good, failures, against, seconds):
        yield row | {"peak_extra_mb": memory.get(row["variant"])}


def loss_and_gradient(function: Callable[..., torch.Tensor], x: torch.Tensor, params: torch.Tensor, **kwargs: Any) -> Call:
    """log_prob and the gradient of its sum."""
    leaf = params.detach().requires_grad_()

    def call() -> Tensors:
        log_prob = function(x, leaf, **kwargs)
        return log_prob.detach(), *torch.autograd.grad(log_prob.sum(), leaf)

    return call


def mixture(size: tuple[int, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of the mixture of discretized logistics."""
    batch, side, components = size
    torch.manual_seed(0)
    x = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8)
    params = torch.randn(batch, 10 * components, side, side)
    params[:, components:].unflatten(1, (3, 3, components))[:, :, 1] -= 2.0  # scales of a trained model's order
    case = f"mixture-{components}-{batch}x3x{side}x{side}"
    ours = ops.discretized_logistic_mixture
    variants: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
        "published": (published, {}),
        FLOWKERN: (ours, {}),
        f"{FLOWKERN}-compat": (ours, {"compat": "pixelcnn++"}),
    }
    exact = {name: loss_and_gradient(function, x, params.double(), **kwargs)() for name, (function, kwargs) in variants.items()}
    exact[f"{FLOWKERN}-compat"] = exact["published"]
    calls = {name: loss_and_gradient(function, x, params, **kwargs) for name, (function, kwargs) in variants.items()}
    yield from compared(case, "loss+gradient", calls, exact, seconds, "published")

    def forward(function: Callable[..., torch.Tensor], kwargs: dict[str, Any]) -> Call:
        def call() -> Tensors:
            with torch.no_grad():
                return (function(x, params, **kwargs),)

        return call

    calls = {name: forward(*variant) for name, variant in variants.items()}
    yield from compared(case, "forward", calls, {name: e[:1] for name, e in exact.items()}, seconds, "published")


def plain_gaussian_kl(mean: torch.Tensor, log_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As a VAE writes it."""
    z = mean + log_scale.exp() * torch.randn_like(mean)
    return z, (0.5 * (mean.square() + (2.0 * log_scale).exp() - 1.0) - log_scale).flatten(1).sum(1)


def latents(shape: tuple[int, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of reparameterization with its divergence."""
    torch.manual_seed(0)
    mean, log_scale, grad = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    inputs = mean.requires_grad_(), log_scale.requires_grad_()

    def both(function: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Call:
        def call() -> Tensors:
            z, kl = function(*inputs)
            return kl.detach(), *torch.autograd.grad((z, kl), inputs, (grad, torch.ones_like(kl)))

        return call

    # Each draws noise of its own, which reaches the gradient of log_scale alone.
    calls = {"eager": both(plain_gaussian_kl), FLOWKERN: both(ops.gaussian_kl)}
    wide = [t.detach().double() for t in inputs]
    divergence = plain_gaussian_kl(*wide)[1]

    def checked(name: str) -> Call:
        return lambda: calls[name]()[:2]

    failures = {name: differs(checked(name)(), (divergence, grad.double() + wide[0])) for name in calls}
    good = {name: call for name, call in calls.items() if not failures[name]}
    memory = {name: peak_extra_bytes(call, torch.device("cpu")) / 2**20 for name, call in good.items()}
    for row in timed("kl-" + "x".join(map(str, shape)), "forward+backward", good, failures, "eager", seconds):
        yield row | {"peak_extra_mb": memory.get(row["variant"])}


def images(shape: tuple[int, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of dequantization with the logit."""
    torch.manual_seed(0)
    v, logit = torch.randint(256, shape, dtype=torch.uint8), nn.Logit(0.05)

    def plain() -> Tensors:
        return logit((v.float() + torch.rand(shape)) / 256)

    def fused() -> Tensors:
        return ops.dequantize(v, alpha=0.05)

    calls = {"eager": plain, FLOWKERN: fused}
    # All noise lies in one bin: the results lie between those of its ends.
    low, high = logit(v.double() / 256)[0], logit((v.double() + 1) / 256)[0]
    inside = {name: bool(((call()[0] >= low - 1e-5) & (call()[0] <= high + 1e-5)).all()) for name, call in calls.items()}
    failures = {name: "" if good else "a value left its bin" for name, good in inside.items()}
    memory = {name: peak_extra_bytes(call, torch.device("cpu")) / 2**20 for name, call in calls.items()}
    good = {name: call for name, call in calls.items() if not failures[name]}
    for row in timed("dequantize-" + "x".join(map(str, shape)), "forward", good, failures, "eager", seconds):
        yield row | {"peak_extra_mb": memory.get(row["variant"])}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench likelihood", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it works, not to quote")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    folder: dict[str, Any] = {"nargs": "?", "type": Path, "const": Path("bench/results"), "metavar": "DIR"}
    parser.add_argument("--csv", help="write likelihood-DEVICE.csv there", **folder)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    common = {"threads": arguments.threads, **provenance("cpu")}
    missing = {field.name: None for field in fields(Row)} | {"against": "", "failure": ""}
    rows = []
    for values in _measured(arguments.quick):
        rows.append(Row(**{**missing, **common, **values}))
        print(line(rows[-1]), flush=True)
    if arguments.csv is not None:
        path = arguments.csv / f"likelihood-{slug(common['device'])}.csv"
        write_atomically(path, as_csv(rows))
        print(f"written: {path}")
    return int(any(row.failure for row in rows))


def _measured(quick: bool) -> Iterator[dict[str, Any]]:
    of_mixtures, of_latents, of_images = QUICK if quick else (MIXTURES, LATENTS, IMAGES)
    seconds = 0.1 if quick else 10.0
    for size in of_mixtures:
        yield from mixture(size, seconds)
    for shape in of_latents:
        yield from latents(shape, seconds)
    for shape in of_images:
        yield from images(shape, seconds)
