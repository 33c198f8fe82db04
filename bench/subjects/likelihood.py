"""``python -m bench likelihood``: the likelihood kernels beside the same formulas in plain torch, in one process.

Every result of every variant is held against float64 before it is timed: gradients, and what is computed from noise, with the
same noise. "published" is the algorithm of PixelCNN++'s code, whose values ``compat="pixelcnn++"`` reproduces. On a GPU the
cache is cleared before each call, and "copy" moves as many bytes as the op must: the ratio to it is the share of a copy's speed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flowkern import nn, ops
from flowkern._core import philox as _philox
from flowkern.ops import _dequantize, _discretized_logistic_mixture, _gaussian_kl

from ..files import slug, write_atomically
from ..memory import peak_extra_bytes
from ..provenance import provenance
from ..timing import Samples, cpu_samples, gpu_samples
from .glow import FLOWKERN, Call, Row, as_csv, line, timed

__all__ = ["main", "published"]

Shapes = tuple[tuple[int, ...], ...]
#: (batch, side, components) of colour images; shapes of latents; shapes of images to dequantize.
SIZES: dict[str, tuple[Shapes, Shapes, Shapes]] = {
    "cpu": (((32, 32, 10),), ((64, 65536), (64, 256), (64, 16)), ((64, 3, 64, 64),)),
    "cuda": (((256, 32, 10),), ((256, 65536),), ((256, 3, 256, 256),)),
}
QUICK: tuple[Shapes, Shapes, Shapes] = ((2, 4, 2),), ((4, 16),), ((2, 3, 4, 4),)
#: Which op a case is of.
OP_OF = {"mixture": "discretized_logistic_mixture", "kl": "gaussian_kl", "dequantize": "dequantize"}
#: Likelihoods without a kernel, and the elements (B, D) that they are measured on.
ELEMENTWISE: dict[str, tuple[nn.Likelihood, tuple[int, ...]]] = {
    "bernoulli": (nn.Bernoulli(), (64, 784)),
    "categorical": (nn.Categorical(17), (64, 64)),
    "gaussian": (nn.Gaussian(), (64, 784)),
}

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


def seeded(call: Callable[[], Tensors]) -> Tensors:
    """What it returns, with the same random numbers each time."""
    torch.manual_seed(1)
    return call()


def compared(
    case: str,
    direction: str,
    calls: Mapping[str, Call],
    exact: Mapping[str, Tensors],
    traffic: int,
    seconds: float,
    against: str,
    granted: Mapping[str, float] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of calls that each returned what it should, with the memory that each takes.

    ``traffic`` are the bytes that a copy moves, on a GPU. ``granted`` says which variants may be off by more than 1e-5.
    """
    device = next(iter(exact.values()))[0].device
    failures = {name: differs(seeded(call), exact[name], (granted or {}).get(name, 1e-5)) for name, call in calls.items()}
    good = {name: call for name, call in calls.items() if not failures[name]}
    memory = {name: peak_extra_bytes(call, device) / 2**20 for name, call in good.items()}
    if device.type == "cuda":
        good, against = {"copy": copy_of(traffic, device), **good}, "copy"
    good = good if against in good else {}  # nothing is timed that has nothing to be held against
    for row in timed(case, direction, good, failures, against, seconds, cold if device.type == "cuda" else cpu_samples):
        yield row | {"peak_extra_mb": memory.get(row["variant"])}


def cold(calls: Mapping[str, Call], seconds: float) -> Samples:
    """Samples on a GPU, the cache cleared before each call."""

    def never(*_: object) -> None:
        raise AssertionError("single calls are not replayed from graphs")

    return next(gpu_samples({name: [call] for name, call in calls.items()}, seconds, never, never))[1]


def copy_of(traffic: int, device: torch.device) -> Call:
    """A copy that moves so many bytes, half of them read."""
    source = torch.ones(max(1, traffic // 8), device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def loss_and_gradient(function: Callable[..., torch.Tensor], x: torch.Tensor, params: torch.Tensor, **kwargs: Any) -> Call:
    """log_prob and the gradient of its sum."""
    leaf = params.detach().requires_grad_()

    def call() -> Tensors:
        log_prob = function(x, leaf, **kwargs)
        return log_prob.detach(), *torch.autograd.grad(log_prob.sum(), leaf)

    return call


def mixture(size: tuple[int, ...], device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of the mixture of discretized logistics."""
    batch, side, components = size
    torch.manual_seed(0)
    x = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    params = torch.randn(batch, 10 * components, side, side, device=device)
    params[:, components:].unflatten(1, (3, 3, components))[:, :, 1] -= 2.0  # scales of a trained model's order
    case = f"mixture-{components}-{batch}x3x{side}x{side}"
    ours = ops.discretized_logistic_mixture
    variants: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
        "published": (published, {}),
        FLOWKERN: (ours, {}),
        f"{FLOWKERN}-compat": (ours, {"compat": "pixelcnn++"}),
    }
    truths = {"published": published, FLOWKERN: _discretized_logistic_mixture.reference, f"{FLOWKERN}-compat": published}
    exact = {name: loss_and_gradient(function, x, params.double())() for name, function in truths.items()}
    # The published algorithm subtracts nearly equal numbers, and jumps where a bin's mass passes 1e-5.
    granted = {"published": 1e-2, f"{FLOWKERN}-compat": 1e-3}
    calls = {name: loss_and_gradient(function, x, params, **kwargs) for name, (function, kwargs) in variants.items()}
    traffic = x.nbytes + 2 * params.nbytes
    yield from compared(case, "loss+gradient", calls, exact, traffic, seconds, "published", granted)

    def forward(function: Callable[..., torch.Tensor], kwargs: dict[str, Any]) -> Call:
        def call() -> Tensors:
            with torch.no_grad():
                return (function(x, params, **kwargs),)

        return call

    calls = {name: forward(*variant) for name, variant in variants.items()}
    exact = {name: results[:1] for name, results in exact.items()}
    yield from compared(case, "forward", calls, exact, x.nbytes + params.nbytes, seconds, "published", granted)


def plain_gaussian_kl(mean: torch.Tensor, log_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As a VAE writes it."""
    return with_noise(mean, log_scale, torch.randn_like(mean))


def with_noise(mean: torch.Tensor, log_scale: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with noise that is given."""
    z = mean + log_scale.exp() * noise
    return z, (0.5 * (mean.square() + (2.0 * log_scale).exp() - 1.0) - log_scale).flatten(1).sum(1)


def latents(shape: tuple[int, ...], device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of reparameterization with its divergence."""
    torch.manual_seed(0)
    mean, log_scale, grad = (torch.randn(shape, device=device) for _ in range(3))

    def both(function: Callable[..., tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype = torch.float32) -> Call:
        inputs = [t.to(dtype).requires_grad_() for t in (mean, log_scale)]

        def call() -> Tensors:
            z, kl = function(*inputs)
            return z.detach(), kl.detach(), *torch.autograd.grad((z, kl), inputs, (grad.to(dtype), torch.ones_like(kl)))

        return call

    calls = {"eager": both(plain_gaussian_kl), FLOWKERN: both(ops.gaussian_kl)}
    exact = {
        "eager": seeded(both(lambda m, s: with_noise(m, s, torch.randn_like(mean).double()), torch.float64)),
        FLOWKERN: seeded(both(lambda m, s: _gaussian_kl.reference(m, s, _philox.as_seed(None, m.device)), torch.float64)),
    }
    # Forward two tensors are read and one written, backward three and two.
    yield from compared("kl-" + "x".join(map(str, shape)), "forward+backward", calls, exact, 8 * mean.nbytes, seconds, "eager")


def images(shape: tuple[int, ...], device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of dequantization with the logit."""
    torch.manual_seed(0)
    v, logit = torch.randint(256, shape, dtype=torch.uint8, device=device), nn.Logit(0.05)

    def plain(dtype: torch.dtype = torch.float32) -> Tensors:
        return logit((v.to(dtype) + torch.rand(shape, device=device)) / 256)

    calls: dict[str, Call] = {"eager": plain, FLOWKERN: lambda: ops.dequantize(v, alpha=0.05)}
    # In plain code the division by the number of levels is left out of the log-determinant.
    exact = {
        "eager": seeded(lambda: plain(torch.float64)),
        FLOWKERN: seeded(lambda: _dequantize.reference(v, _philox.as_seed(None, v.device), alpha=0.05, dtype=torch.float64)),
    }
    traffic = 5 * v.nbytes
    yield from compared("dequantize-" + "x".join(map(str, shape)), "forward", calls, exact, traffic, seconds, "eager")


def elementwise(name: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of a likelihood that is left to torch: what it would gain from fusion, by torch.compile."""
    likelihood, shape = ELEMENTWISE[name]
    torch.manual_seed(0)
    x = torch.randint(likelihood.levels, shape) if likelihood.discrete else torch.randn(shape)
    params = torch.randn(*shape, likelihood.params)

    def total(x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return likelihood.total(x.to(params.dtype), params)

    calls = {"eager": loss_and_gradient(total, x, params), "compiled": loss_and_gradient(torch.compile(total), x, params)}
    exact: Any = loss_and_gradient(total, x, params.double())()
    case = f"{name}-" + "x".join(map(str, shape))
    yield from compared(case, "loss+gradient", calls, dict.fromkeys(calls, exact), 0, seconds, "eager")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench likelihood", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it works, not to quote")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print each figure as a line of JSON")
    folder: dict[str, Any] = {"nargs": "?", "type": Path, "const": Path("bench/results"), "metavar": "DIR"}
    parser.add_argument("--csv", help="write likelihood-DEVICE.csv there", **folder)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    common = {"threads": arguments.threads, **provenance(arguments.device)}
    missing = {field.name: None for field in fields(Row)} | {"against": "", "failure": ""}
    rows = []
    for values in _measured(arguments.device, arguments.quick):
        rows.append(Row(**{**missing, **common, **values}))
        print(as_json(rows[-1]) if arguments.json else line(rows[-1]), flush=True)
    if arguments.csv is not None:
        path = arguments.csv / f"likelihood-{slug(common['device'])}.csv"
        write_atomically(path, as_csv(rows))
        print(f"written: {path}")
    return int(any(row.failure for row in rows))


def as_json(row: Row) -> str:
    """A row for programs, which begins with its op."""
    return json.dumps({"op": OP_OF.get(row.case.partition("-")[0], ""), **asdict(row)})


def _measured(device: str, quick: bool) -> Iterator[dict[str, Any]]:
    of_mixtures, of_latents, of_images = QUICK if quick else SIZES[device]
    seconds = 0.1 if quick else 0.5 if device == "cuda" else 10.0
    for size in of_mixtures:
        yield from mixture(size, device, seconds)
    for shape in of_latents:
        yield from latents(shape, device, seconds)
    for shape in of_images:
        yield from images(shape, device, seconds)
    if device == "cpu" and not quick:
        for name in ELEMENTWISE:
            yield from elementwise(name, seconds / 4)
