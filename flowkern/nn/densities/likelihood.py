"""Likelihoods: the distribution of an element of a sample, given some parameters that a network puts out."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ... import ops
from ..._core.checks import values_can_be_read
from ..._core.mixture import log_sum, mixture_parts
from ...ops import ScaleMap
from .base import check_name


def check_values(x: torch.Tensor, levels: int, whole: bool = True) -> None:
    """Raises ValueError, with the count, for values that are not from 0 to levels - 1, or not ``whole`` where they must be.

    Only where looking costs nothing: on a CPU, outside compilers.
    """
    if not values_can_be_read(x):
        return
    valid = (x >= 0) & (x <= levels - 1)
    if whole and x.is_floating_point():
        valid &= x == x.round()
    if not valid.all():
        what = "integers" if whole else "values"
        raise ValueError(f"x: expected {what} from 0 to {levels - 1}, got {int((~valid).sum())} of {x.numel()} others, or NaN")


_SCALE = ScaleMap.soft_clip(1e-3)  # standard deviations between 1e-3 and 1e3


class Likelihood:
    """Elements x (..., D), independent given their ``params`` (..., D, K): derive from it to write your own.

    ``log_prob`` is in nats, of shape (..., D). ``temperature`` multiplies standard deviations and divides logits of values.
    ``discrete`` says whether x are integers from 0 to ``levels`` - 1 (in any dtype).

    Images x (B, C, H, W) may have their parameters as ``maps(C)`` maps (B, maps, H, W) instead, as convolutions put them out:
    ``image_log_prob``, ``image_sample`` and ``image_mean`` take those. They are the elements' own, channel by channel, unless
    the class says that channels depend on one another.
    """

    params = 1
    discrete = False
    levels = 0  # of a discrete one

    def check(self, x: torch.Tensor) -> None:
        """Raises ValueError for values that have no probability, where they can be seen at no cost (on a CPU)."""

    def bias(self, channels: int | None = None) -> torch.Tensor | None:
        """What the biases of a network's last layer may start from: (``params``,) for elements, (``maps(channels)``,) for images.

        None for whatever they are.
        """
        return None

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """What a network is shown of x, about from -1 to 1."""
        return x

    def log_prob(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no log_prob")

    def total(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """The sum of ``log_prob`` over the elements: (...)."""
        return self.log_prob(x, params).sum(-1)

    def sample(self, params: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no sample")

    def mean(self, params: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no mean")

    def maps(self, channels: int) -> int:
        """How many maps there are for images of so many channels."""
        return channels * self.params

    def image_log_prob(self, x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), maps (B, maps(C), H, W) -> (B,), in nats."""
        return self.log_prob(x, self._elements(maps)).flatten(1).sum(1)

    def image_sample(self, maps: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """(B, C, H, W)."""
        return self.sample(self._elements(maps), temperature)

    def image_mean(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W)."""
        return self.mean(self._elements(maps))

    def _elements(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C K, H, W) -> (B, C, H, W, K)."""
        return maps.unflatten(1, (-1, self.params)).movedim(2, -1)


def _normal(x: torch.Tensor, mean: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    scale, log_scale = _SCALE(raw)
    return -0.5 * ((x - mean) / scale).square() - log_scale - 0.5 * math.log(2.0 * math.pi)


def _drawn(logits: torch.Tensor) -> torch.Tensor:
    """Indices (...) drawn by their logits (..., C)."""
    return logits.softmax(-1).flatten(0, -2).multinomial(1).view(logits.shape[:-1])


class Gaussian(Likelihood):
    """N(mean, scale^2), ``params`` (mean, raw): scale = soft_clip(raw), from 1e-3 to 1e3."""

    params = 2

    def log_prob(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return _normal(x, *params.unbind(-1))

    def sample(self, params: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        mean, raw = params.unbind(-1)
        return mean + temperature * _SCALE(raw)[0] * torch.randn_like(mean)

    def mean(self, params: torch.Tensor) -> torch.Tensor:
        return params[..., 0]


class GaussianMixture(Likelihood):
    """A mixture of C Gaussians, ``params``: C logits, C means and C raw scales."""

    def __init__(self, components: int):
        self.params = 3 * components

    def log_prob(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        logits, mean, raw = params.chunk(3, -1)
        return log_sum(logits.log_softmax(-1) + _normal(x[..., None], mean, raw), -1)

    def sample(self, params: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        logits, mean, raw = params.chunk(3, -1)
        component = _drawn(logits)[..., None]
        mean, raw = mean.gather(-1, component)[..., 0], raw.gather(-1, component)[..., 0]
        return mean + temperature * _SCALE(raw)[0] * torch.randn_like(mean)

    def mean(self, params: torch.Tensor) -> torch.Tensor:
        logits, mean, _ = params.chunk(3, -1)
        return (logits.softmax(-1) * mean).sum(-1)


class Bernoulli(Likelihood):
    """P(1) = sigmoid(params). Values between 0 and 1 count as probabilities: the cross-entropy. Others have probability zero."""

    discrete = True
    levels = 2

    def check(self, x: torch.Tensor) -> None:
        check_values(x, 2, whole=False)

    def log_prob(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        logit = params[..., 0]
        x = x.to(logit.dtype).expand_as(logit)
        log_prob = -F.binary_cross_entropy_with_logits(logit, x.clamp(0.0, 1.0), reduction="none")
        return log_prob.masked_fill((x < 0.0) | (x > 1.0), -math.inf)

    def sample(self, params: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        return (params[..., 0] / temperature).sigmoid().bernoulli()

    def mean(self, params: torch.Tensor) -> torch.Tensor:
        return params[..., 0].sigmoid()


class _OfLevels(Likelihood):
    """Of integers from 0 to ``levels`` - 1, shown from -1 to 1."""

    discrete = True

    def check(self, x: torch.Tensor) -> None:
        check_values(x, self.levels)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x / (self.levels - 1) - 1.0


class Categorical(_OfLevels):
    """One logit for each of ``levels`` values; no other value has a probability."""

    def __init__(self, levels: int):
        self.params = self.levels = levels

    def log_prob(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        index = x.long().clamp(0, self.levels - 1)
        log_prob = params.log_softmax(-1).gather(-1, index[..., None])[..., 0]
        return log_prob.masked_fill(index != x, -math.inf).masked_fill(x.isnan(), math.nan)

    def sample(self, params: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        return _drawn(params / temperature).to(params.dtype)

    def mean(self, params: torch.Tensor) -> torch.Tensor:
        return params.softmax(-1) @ torch.arange(self.levels, dtype=params.dtype, device=params.device)


class DiscretizedLogisticMixture(_OfLevels):
    """The mass of C logistics in the cells of ``levels`` values, ``params``: C logits, C means (from -1 to 1) and C log-scales.

    Of images with three channels and their parameters as 10 C maps, a pixel's channels depend on one another. ``mean`` is exact
    up to the rounding to levels: that of a logistic held in [-1, 1] is -1 + s (softplus((m + 1) / s) - softplus((m - 1) / s)).
    That of a channel which depends on others is taken at their means.

    The maps are as in ``ops.discretized_logistic_mixture``. Source: Salimans et al., "PixelCNN++" (2017), section 2.1.
    """

    def __init__(self, components: int, levels: int):
        self.params, self.levels, self.components = 3 * components, levels, components

    def bias(self, channels: int | None = None) -> torch.Tensor:
        # Components apart and not too broad: where all begin alike they learn to be alike for long.
        zeros = torch.zeros(self.components)
        mean = torch.linspace(-0.8, 0.8, self.components) if self.components > 1 else zeros
        part = torch.stack([mean, torch.full_like(zeros, -2.0)])
        if channels == 3:
            return torch.cat([zeros, torch.cat([part, zeros[None]]).repeat(3, 1).flatten()])
        return torch.cat([zeros, part.flatten()]).repeat(channels or 1)

    def log_prob(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return self.total(x[..., None], params[..., None, :])

    def total(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        pixels = x.reshape(-1, 1, 1, x.shape[-1])
        return ops.discretized_logistic_mixture(pixels, _as_maps(params), levels=self.levels).view(x.shape[:-1])

    def sample(self, params: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        return self._drawn_pixels(_as_maps(params), 1, temperature).view(params.shape[:-1])

    def mean(self, params: torch.Tensor) -> torch.Tensor:
        logits, mean, log_scale = params.chunk(3, -1)
        return self._level((logits.softmax(-1) * _clamped_mean(mean, log_scale)).sum(-1))

    def maps(self, channels: int) -> int:
        return 10 * self.components if channels == 3 else channels * self.params

    def image_log_prob(self, x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        if maps.shape[1] == self.maps(3):
            return ops.discretized_logistic_mixture(x, maps, levels=self.levels)
        each = ops.discretized_logistic_mixture(x.flatten(0, 1)[:, None], self._channels(maps), levels=self.levels)
        return each.view(x.shape[:2]).sum(1)

    def image_sample(self, maps: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        if maps.shape[1] == self.maps(3):
            return self._drawn_pixels(maps, 3, temperature)
        return self._drawn_pixels(self._channels(maps), 1, temperature).view(maps.shape[0], -1, *maps.shape[2:])

    def image_mean(self, maps: torch.Tensor) -> torch.Tensor:
        if maps.shape[1] != self.maps(3):
            return super().image_mean(maps)
        logits, mean, log_scale, raw = mixture_parts(maps, 3)
        t = raw.tanh()
        red = _clamped_mean(mean[:, 0], log_scale[:, 0])
        green = _clamped_mean(mean[:, 1] + t[:, 0] * red, log_scale[:, 1])
        blue = _clamped_mean(mean[:, 2] + t[:, 1] * red + t[:, 2] * green, log_scale[:, 2])
        return self._level((torch.stack([red, green, blue], 1) * logits.softmax(1)[:, None]).sum(2))

    def _drawn_pixels(self, maps: torch.Tensor, channels: int, temperature: float) -> torch.Tensor:
        drawn = ops.sample_discretized_logistic_mixture(maps, channels=channels, levels=self.levels, temperature=temperature)
        return drawn.to(maps.dtype)

    def _channels(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C 3 K, H, W) -> (B C, 3 K, H, W)."""
        return maps.unflatten(1, (-1, self.params)).flatten(0, 1)

    def _level(self, position: torch.Tensor) -> torch.Tensor:
        """-1 to 1 as a level, which need not be whole."""
        return (0.5 * (position + 1.0) * (self.levels - 1)).clamp(0.0, self.levels - 1.0)


def _clamped_mean(mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """That of a logistic variable held between -1 and 1."""
    scale = log_scale.exp()
    held = scale * (F.softplus((mean + 1.0) / scale) - F.softplus((mean - 1.0) / scale)) - 1.0
    # Of broad ones the difference cancels, and the sigmoid that it integrates is as good as straight.
    return torch.where(log_scale > 4.0, torch.tanh(0.5 * mean / scale), held)


def _as_maps(params: torch.Tensor) -> torch.Tensor:
    """(..., D, K) as (N, K, 1, D)."""
    return params.reshape(-1, *params.shape[-2:]).movedim(-1, 1).unsqueeze(2)


def start(layer: nn.Linear | nn.Conv2d, bias: torch.Tensor | None) -> None:
    """Let the biases of a network's last layer be those of ``Likelihood.bias``, again and again if there are more."""
    if bias is not None and layer.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(bias.repeat(len(layer.bias) // len(bias)))


def likelihood(name: str, components: int = 10, levels: int = 256) -> Likelihood:
    """The likelihood of that name, with so many ``components`` of a mixture or ``levels`` of a discrete one.

    Raises ValueError for an unknown name and for fewer than 1 component or 2 levels.
    """
    if components < 1 or levels < 2:
        raise ValueError(f"components, levels: expected at least 1 and 2, got {components} and {levels}")
    named = {
        "gaussian": Gaussian(),
        "mixture": GaussianMixture(components),
        "bernoulli": Bernoulli(),
        "categorical": Categorical(levels),
        "logistic": DiscretizedLogisticMixture(components, levels),
    }
    check_name("output", name, named)
    return named[name]
