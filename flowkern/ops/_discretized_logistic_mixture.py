"""The log-likelihood of pixels under a mixture of discretized logistics, with its gradient in the same pass.

Source: Salimans, Karpathy, Chen and Kingma, "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood
and Other Modifications" (2017), eq. 1 to 3. A level x of L lies at 2 x / (L - 1) - 1 in units of the means, and its bin
reaches 1 / (L - 1) to both sides; the first bin is open below, the last one above. With p and m the bin's upper and lower
end, standardized, and r the posterior probability of a component at a pixel:

==================== ========================================================================================
p, m                 ((2 x + 1 - L) - (L - 1) mean +- 1) exp(-log_scale) / (L - 1)
log mass of a bin    log(sigmoid(p) - sigmoid(m)) = -softplus(-p) - softplus(m) + log(1 - exp(m - p))
of the first, last   -softplus(-p), -softplus(m)
log_prob             sum over pixels of logsumexp over components of log_softmax(logit) + sum over channels of log mass
gradient of logit    r - softmax(logit)
of mean              r exp(-log_scale) (sigmoid(m) - sigmoid(-p))
of log_scale         r (m sigmoid(m) - p sigmoid(-p) - (p - m) / (exp(p - m) - 1))
of coefficient       (1 - tanh^2) x' times that of the mean that it shifts, x' the level that it multiplies
==================== ========================================================================================

All terms of a log mass have one sign, so that nothing cancels, however narrow or broad the component.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .._core import backend
from .._core.checks import accumulation_dtype, check_floating, check_same_device, empty_as
from .._core.mixture import log_sum, mixture_parts, per_component
from .._core.op import Output, Sample, accumulated, define, normal, recording, reference_runs, register
from .._core.reference import differentiate, outside_autocast, reference_differentiates

__all__ = ["discretized_logistic_mixture", "sample_discretized_logistic_mixture"]

Pair = tuple[torch.Tensor, torch.Tensor]

COMPAT = (None, "pixelcnn++")
#: Of the published code: the least log-scale, and the mass under which it takes the density at the bin's centre.
MIN_LOG_SCALE, MIN_MASS = -7.0, 1e-5


def _log1mexp(delta: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(-delta)) for delta > 0, by whichever of two ways loses nothing, and differentiably."""
    near = delta < math.log(2.0)
    return torch.where(near, (-torch.expm1(-delta)).log(), torch.log1p(-torch.exp(-delta.masked_fill(near, 1.0))))


def _log_mass(level: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, levels: int, compat: bool) -> torch.Tensor:
    """Of the bins of the levels, in the dtype of log_scale; the mean is wider, as its distance to the bin's ends may be tiny."""
    if compat:
        log_scale = log_scale.clamp(min=MIN_LOG_SCALE)
    unit = torch.exp(-log_scale) / (levels - 1)  # half a bin
    centre = (2.0 * level + (1.0 - levels)).to(mean.dtype) - (levels - 1) * mean
    p, m = (centre + 1.0).to(unit.dtype) * unit, (centre - 1.0).to(unit.dtype) * unit
    below, above = F.logsigmoid(p), F.logsigmoid(-m)
    inside = below + above + _log1mexp(2.0 * unit)
    if compat:
        middle = centre.to(unit.dtype) * unit
        density = F.logsigmoid(middle) + F.logsigmoid(-middle) + unit.log() + math.log(2.0)
        inside = torch.where(inside > math.log(MIN_MASS), inside, density)
    return torch.where(level <= 0, below, torch.where(level >= levels - 1, above, inside))


def _shifted(mean: torch.Tensor, raw: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The means (B, 3, K, H, W) given the channels before, at ``position`` (B, 3, 1, H, W)."""
    t = torch.tanh(raw)
    red, green = position[:, 0], position[:, 1]
    return torch.stack([mean[:, 0], mean[:, 1] + t[:, 0] * red, mean[:, 2] + t[:, 1] * red + t[:, 2] * green], 1)


@outside_autocast
def reference(x: torch.Tensor, params: torch.Tensor, *, levels: int = 256, compat: str | None = None) -> torch.Tensor:
    """The definition in plain torch."""
    dtype = accumulation_dtype(params)
    # A narrow component turns the rounding of a mean into whole nats; MPS has no wider type.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    logits, means, log_scales, *coefficients = mixture_parts(params, x.shape[1])
    level = x.detach().to(dtype).unsqueeze(2)
    means = means.to(wide)
    if coefficients:
        position = 2.0 * level.to(wide) / (levels - 1) - 1.0
        means = _shifted(means, coefficients[0].to(wide), position)
    log_mass = _log_mass(level, means, log_scales.to(dtype), levels, compat is not None).sum(1)
    return log_sum(torch.log_softmax(logits.to(dtype), 1) + log_mass).flatten(1).sum(1)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    randn = normal(device, dtype)

    def sample(name: str, *shape: int, components: int, levels: int = 256, **kwargs: Any) -> Sample:
        x = torch.randint(levels, shape, device=device)
        params = randn(shape[0], components * per_component(shape[1]), *shape[2:])
        return Sample(name, (x, params), {"levels": levels, **kwargs})

    yield sample("colours", 2, 3, 3, 5, components=4)
    yield sample("grey", 3, 1, 4, 2, components=2)
    yield sample("few-levels", 2, 1, 3, 3, components=3, levels=4)
    yield sample("published", 2, 3, 2, 3, components=2, compat="pixelcnn++")
    yield sample("one-pixel", 1, 1, 1, 1, components=1)
    yield sample("empty-batch", 0, 3, 2, 2, components=1)
    yield sample("empty-space", 2, 3, 0, 2, components=2)
    yield sample("one-bit", 2, 1, 3, 3, components=2, levels=2)
    yield sample("five-bits", 2, 3, 3, 3, components=1, levels=32)
    yield sample("sixteen-bits", 2, 3, 3, 3, components=2, levels=65536)
    yield sample("large-image", 2, 3, 24, 25, components=5)
    x, params = sample("", 2, 3, 3, 4, components=2).args
    yield Sample("strided", (x.mT.contiguous().mT, params.to(memory_format=torch.channels_last)))


def _output(x: torch.Tensor, params: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0],), dtype=accumulation_dtype(params))


def _torch_backward(x: torch.Tensor, params: torch.Tensor, grad: torch.Tensor | None, levels: int, compat: bool) -> Pair:
    with torch.enable_grad():
        leaf = params.detach().requires_grad_()
        log_prob = reference(x, leaf, levels=levels, compat=COMPAT[compat])
    given = torch.ones_like(log_prob) if grad is None else grad
    return log_prob.detach(), torch.autograd.grad(log_prob, leaf, given)[0]


# Where rows of pixels do not lie one behind the other, flatten copies.


def _cpp_backward(x: torch.Tensor, params: torch.Tensor, *rest: Any) -> None:
    *rest, gradient = rest  # type: ignore[assignment]
    backend.call_native("discretized_logistic_mixture_backward", x.flatten(2), params.flatten(2), *rest, gradient.flatten(2))


_forward = define(
    "discretized_logistic_mixture(Tensor x, Tensor params, int levels, bool compat) -> Tensor",
    outputs=_output,
    torch_=lambda x, params, levels, compat: reference(x, params, levels=levels, compat=COMPAT[compat]),
    cpp=lambda x, params, *rest: backend.call_native("discretized_logistic_mixture", x.flatten(2), params.flatten(2), *rest),
    triton="discretized_logistic_mixture.forward",
)
# Also what runs forward on a CPU: the gradient costs little more once the values are there. Without ``grad`` that of the sum.
_backward = define(
    "discretized_logistic_mixture_backward(Tensor x, Tensor params, Tensor? grad, int levels, bool compat) -> (Tensor, Tensor)",
    outputs=lambda x, params, *_: (_output(x, params), empty_as(params)),
    torch_=_torch_backward,
    cpp=_cpp_backward,
    triton="discretized_logistic_mixture.backward",
)


class _DiscretizedLogisticMixture(torch.autograd.Function):
    """On a CPU the forward leaves the gradient of the sum; the first backward scales it in place and hands it over.

    It is computed again where it is wanted twice, where a compiler decides what is kept, and for float16, in which
    a gradient that is not yet scaled overflows. So it is on a GPU, where to scale it would take longer than to compute it:
    of P numbers a pixel 5 P would pass through memory, not 3 P.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, params: torch.Tensor, levels: int, compat: bool) -> torch.Tensor:
        ctx.save_for_backward(x, params)
        ctx.configuration = levels, compat
        ctx.gradient = None
        on_cpu = params.is_cpu and backend.requested() != "triton"
        if not on_cpu or params.dtype is torch.float16 or torch.compiler.is_compiling():
            return _forward(x, params, levels, compat)
        log_prob, ctx.gradient = _backward(x, params, None, levels, compat)
        return log_prob

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, params = ctx.saved_tensors
        levels, compat = ctx.configuration
        if reference_differentiates(grad):
            kwargs = {"levels": levels, "compat": COMPAT[compat]}
            (gradient,) = differentiate(lambda p, **k: reference(x, p, **k), (params,), kwargs, (grad,))
        elif ctx.gradient is not None:
            gradient, ctx.gradient = ctx.gradient, None
            gradient *= grad.view(-1, 1, 1, 1)
        else:
            gradient = _backward(x, params, grad, levels, compat)[1]
        return None, gradient, None, None


def _check(params: torch.Tensor, channels: int, levels: int, compat: str | None) -> None:
    check_floating("params", params)
    if params.ndim != 4:
        raise ValueError(f"params: expected (B, P, H, W), got shape {tuple(params.shape)}")
    if channels not in (1, 3):
        raise ValueError(f"x: expected 1 or 3 channels, got {channels}")
    rows = per_component(channels)
    if params.shape[1] == 0 or params.shape[1] % rows:
        raise ValueError(f"params: expected a multiple of {rows} channels for {channels} of x, got {params.shape[1]}")
    if not 2 <= levels <= 2**20:
        raise ValueError(f"levels: expected 2 to 2**20, got {levels}")
    if compat not in COMPAT:
        raise ValueError(f"compat: expected None or 'pixelcnn++', got {compat!r}")


def discretized_logistic_mixture(
    x: torch.Tensor, params: torch.Tensor, *, levels: int = 256, compat: str | None = None
) -> torch.Tensor:
    """log p(x) of images of integers under a mixture of discretized logistics at each pixel.

    p(pixel) = sum over K components of softmax(logits) times the product over channels of the mass that a logistic
    distribution has in the bin of the channel's level. The mean of green is shifted by tanh(coefficient) times red, that of
    blue by red and green, so that channels depend on each other.

    Args:
        x: (B, C, H, W), C = 3 or 1, with integers from 0 to levels - 1, of any integer or floating dtype; it has no gradient.
            Its values are not looked at: the data's loader and ``nn.Likelihood.check`` do that.
        params: the network's output in the published layout. C = 3: (B, 10 K, H, W), K logits, and for each channel K means, K
            log-scales and K coefficients (of green on red; of blue on red; of blue on green). C = 1: (B, 3 K, H, W), K logits, K
            means, K log-scales. Means are in units where level 0 is -1 and level L - 1 is 1.
        levels: how many levels there are: 256 for 8 bits.
        compat: ``"pixelcnn++"`` gives the values of the published code, for its checkpoints: log-scales of at least -7, and where
            the mass of an inner bin is at most 1e-5, the density at its centre times its width.

    Returns:
        log_prob of shape (B,) in nats: float64 if params is, else float32. Its gradient with respect to params is finite for
        log-scales down to -20 (as far as the dtype of params reaches).

    Raises:
        TypeError: params that are not floating, or x of a boolean or complex dtype.
        ValueError: a wrong shape, device, number of levels or compat; the message says what was expected.

    Source: Salimans et al., "PixelCNN++" (2017), eq. 1 to 3, with the first and last bin open as there; the published code
    differs by what ``compat`` says.
    """
    if not isinstance(x, torch.Tensor) or x.dtype is torch.bool or x.is_complex():
        raise TypeError(f"x: expected a tensor of integers, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != 4:
        raise ValueError(f"x: expected (B, C, H, W), got shape {tuple(x.shape)}")
    _check(params, x.shape[1], levels, compat)
    check_same_device("params", params, x)
    if (x.shape[0], *x.shape[2:]) != (params.shape[0], *params.shape[2:]):
        raise ValueError(f"params: expected the batch and pixels of x of shape {tuple(x.shape)}, got {tuple(params.shape)}")
    if reference_runs(params):
        return reference(x, params, levels=levels, compat=compat)
    level = x.detach().to(accumulation_dtype(params))
    if recording(params):
        return _DiscretizedLogisticMixture.apply(level, params, levels, compat is not None)
    return _forward(level, params, levels, compat is not None)


register(discretized_logistic_mixture, reference, _samples, (_forward, _backward), outputs=(Output("log_prob", accumulated),))


def sample_discretized_logistic_mixture(
    params: torch.Tensor,
    *,
    channels: int = 3,
    levels: int = 256,
    temperature: float = 1.0,
    compat: str | None = None,
    generator: torch.Generator | None = None,
    noise: Pair | None = None,
) -> torch.Tensor:
    """Images drawn from the mixture of ``discretized_logistic_mixture``, channel after channel.

    A pixel's component is argmax of logit + temperature * Gumbel noise; a channel's level is that in whose bin
    mean + temperature * exp(log_scale) * logit(u) lies, and the means of the next channels depend on it. So at temperature 1
    samples follow the mixture exactly (the published code conditions on the value before it is rounded, which does not).

    It is torch's operations everywhere, on a GPU 53 launches for three channels and 27 for one: a decoder draws all pixels of
    its images at once, so that they come once a batch, behind its whole network.

    Args:
        params: as for ``discretized_logistic_mixture``.
        channels: 3, or 1.
        levels: how many there are.
        temperature: at least 0; 0 gives the level nearest to the mean of the most probable component.
        compat: as for ``discretized_logistic_mixture``.
        generator: of the uniform noise.
        noise: the uniform numbers themselves, in (0, 1): (B, K, H, W) for the components, (B, C, H, W) for the levels.

    Returns:
        (B, C, H, W): uint8 for up to 256 levels, else int32.

    Raises:
        TypeError, ValueError: as ``discretized_logistic_mixture``; also for a negative temperature.
    """
    _check(params, channels, levels, compat)
    if not temperature >= 0.0:
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    logits, means, log_scales, *coefficients = mixture_parts(params.detach().to(accumulation_dtype(params)), channels)
    shapes = logits.shape, (params.shape[0], channels, *params.shape[2:])
    if noise is not None and len(noise) != 2:
        raise ValueError(f"noise: expected two tensors, for the components and for the levels, got {len(noise)}")
    drawn_noise = noise or tuple(torch.rand(shape, generator=generator, device=params.device) for shape in shapes)
    for what, u, shape in zip(("components", "levels"), drawn_noise, shapes, strict=True):
        if u.shape != shape:
            raise ValueError(f"noise: expected shape {tuple(shape)} for the {what}, got {tuple(u.shape)}")
        check_same_device("noise", u, params, of="params")
    inside = torch.finfo(torch.float32).eps / 4  # torch.rand may return 0
    of_component, of_level = (u.to(logits).clamp(inside, 1.0 - inside) for u in drawn_noise)
    chosen = (logits - temperature * torch.log(-torch.log(of_component))).argmax(1, keepdim=True).unsqueeze(1)

    def of_chosen(parts: torch.Tensor) -> torch.Tensor:
        return parts.gather(2, chosen.expand(-1, channels, -1, -1, -1)).squeeze(2)

    mean, log_scale = of_chosen(means), of_chosen(log_scales)
    log_scale = log_scale if compat is None else log_scale.clamp(min=MIN_LOG_SCALE)
    deviation = temperature * log_scale.exp() * torch.logit(of_level)
    t = torch.tanh(of_chosen(coefficients[0])) if coefficients else None
    position: list[torch.Tensor] = []
    drawn: list[torch.Tensor] = []
    for c in range(channels):
        shift = sum(t[:, c - 1 + j] * before for j, before in enumerate(position)) if t is not None else 0.0
        continuous = mean[:, c] + shift + deviation[:, c]
        drawn.append(((continuous + 1.0) * ((levels - 1) / 2)).round().clamp(0, levels - 1))
        position.append(2.0 * drawn[-1] / (levels - 1) - 1.0)
    return torch.stack(drawn, 1).to(torch.uint8 if levels <= 256 else torch.int32)
