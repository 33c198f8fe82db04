"""What the models share: a shape, a configuration that rebuilds them, and the architectures of flows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from .. import diagnostics, nn
from .._core.checks import values_can_be_read
from .._core.split import kept_channels, moved_channels
from ..nn.bijections.bijection import Bijection
from ..nn.densities.base import as_shape, check_name, check_sizes
from ..nn.densities.likelihood import check_values

#: Builds a coupling layer from a split and the number of channels it divides.
MakeCoupling = Callable[[str, int], Bijection]

PERMUTATIONS = ("alternate", "reverse", "random")


class Picture(NamedTuple):
    """Images (n, *shape) to be shown as a grid: under which name, and what they are."""

    name: str
    images: torch.Tensor
    what: str


class Model(torch.nn.Module):
    """A density over samples of one ``shape`` that can be trained, sampled from, saved and rebuilt.

    ``config`` holds what the constructor takes, as the decorator ``model`` records it, JSON-able; ``context`` is K, or None.
    """

    shape: tuple[int, ...]
    config: dict[str, Any]
    context: int | None
    #: Fields of ``training.Plan`` by the name of a preset; see the decorator ``model``, which sets them.
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    #: Likewise of a prior that is trained over the codes of such a model; None for a model without codes.
    prior_presets: ClassVar[dict[str, dict[str, Any]] | None] = None
    #: Whether it gives probabilities to values of a finite number of ``levels``, and so needs no noise on them.
    discrete = False
    #: Whether ``log_prob`` is a bound that random numbers enter.
    stochastic = False
    #: Steps of the optimizer so far, by which an objective may warm up; the trainer sets it.
    steps = 0

    @classmethod
    def config_for(cls, levels: int | None) -> dict[str, Any]:
        """What the constructor is to be given, unless the user says otherwise, for data of so many levels (None: continuous)."""
        # The pixels of images lie at the ends of their range more often than a Gaussian can follow.
        return {"preprocess": None if levels is None else {"logit": 0.05}}

    def settle(self, **chosen: Any) -> None:
        """Write into ``config`` what the constructor chose where its caller left the choice to it."""
        self.config |= {name: value for name, value in chosen.items() if name in self.config}

    def log_prob(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, *shape), context (B, K) or None -> (B,) in nats, or a lower bound on it that the class names."""
        raise NotImplementedError(f"{type(self).__name__} has no log_prob")

    def sample(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """n samples (n, *shape); ``context`` (n, K), or (1, K) for all."""
        raise NotImplementedError(f"{type(self).__name__} has no sample")

    def objective(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """What training minimizes, (B,) in nats: -log_prob(x), unless the class says otherwise."""
        return -self.log_prob(x, context)

    def embed(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, *shape) as a point in the space of latents, of which ``render`` is the way back."""
        raise NotImplementedError(f"{type(self).__name__} has no latents")

    def render(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """What a latent stands for, (B, *shape)."""
        raise NotImplementedError(f"{type(self).__name__} has no latents")

    @property
    def has_latents(self) -> bool:
        """Whether the model has ``embed`` and ``render``."""
        return type(self).embed is not Model.embed

    @torch.no_grad()
    def interpolate(self, x0: torch.Tensor, x1: torch.Tensor, steps: int, context: torch.Tensor | None = None) -> torch.Tensor:
        """What lies on the straight line between the latents of x0 and x1, ends included.

        x0 and x1 (B, *shape), context (B, K) for both -> (B, steps, *shape). Raises ValueError for steps < 2 and other shapes.
        """
        if steps < 2:
            raise ValueError(f"steps: expected at least 2, the two ends, got {steps}")
        self.check_shape(x0, "x0")
        if x0.shape != x1.shape:
            raise ValueError(f"x1: expected shape {tuple(x0.shape)} as x0 has, got {tuple(x1.shape)}")
        z = diagnostics.interpolate(self.embed(x0, context), self.embed(x1, context), steps)
        rows = None if context is None else context.repeat_interleave(steps, 0)
        return self.render(z.flatten(0, 1), rows).unflatten(0, (len(x0), steps))

    def pictures(
        self, x: torch.Tensor, other: torch.Tensor, context: torch.Tensor | None, contexts: torch.Tensor | None
    ) -> Iterator[Picture]:
        """What the model has to show beside samples, and beside reconstructions and interpolations if it has latents.

        x and other (n, *shape) are images, each pair with one label, and context (n, K) is theirs; contexts (n^2, K) go through
        the classes.
        """
        yield from ()

    def remarks(self, x: torch.Tensor) -> list[str]:
        """Lines on what the model makes of images x (B, *shape)."""
        return []

    def log_weight(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """The logarithm of a random number with mean p(x), (B,) in nats: log_prob(x), unless that is a bound of another form."""
        return self.log_prob(x, context)

    def check_shape(self, x: torch.Tensor, name: str = "x") -> None:
        """Raises ValueError unless x is (B, *shape)."""
        if x.ndim == 0 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"{name}: expected shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")


class DiscreteModel(Model):
    """Probabilities of samples v of integers from 0 to ``levels`` - 1, as the density of x = (v + u) / levels, u in [0, 1).

    p(x) = P(v) levels^D is constant on each cell of x, so that the bound on -log P(v) that training and evaluation form from
    the density of dequantized data (Theis et al. 2016, section 3.1) is -log P(v) itself, for any u. ``levels`` is 256 at most
    if u is noise of 16 bits, as ``flowkern.data`` draws it; with u = 1/2 it may be 2^22.
    """

    discrete = True
    levels: int

    @classmethod
    def config_for(cls, levels: int | None) -> dict[str, Any]:
        if levels is None:
            raise ValueError(f"{cls.__name__} is for discrete values, and the data is continuous")
        return {"levels": levels}

    def log_mass(self, v: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """log P(v), (B,) in nats, of integers v (B, *shape)."""
        raise NotImplementedError(f"{type(self).__name__} has no log_mass")

    def check_values(self, v: torch.Tensor) -> None:
        """Raises ValueError for another shape than (B, *shape) and, on a CPU, for other values than integers in 0..levels-1."""
        self.check_shape(v)
        check_values(v, self.levels)

    def draw(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """n samples of integers, (n, *shape)."""
        raise NotImplementedError(f"{type(self).__name__} has no draw")

    def log_prob(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """The density of dequantized data x (B, *shape) in [0, 1): log P(v) + D log(levels), in nats."""
        self.check_shape(x)
        return self.log_mass(self.values(x), context) + math.prod(self.shape) * math.log(self.levels)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.log_prob(x, context)

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """The integers v of dequantized x = (v + u) / levels, int64.

        Raises ValueError, with the count, for values outside [0, 1), where they can be seen at no cost (on a CPU).
        """
        # x is rounded, by up to half of the noise's last bit: round to that bit first, or 3 / 17 * 17 would come out below 3.
        bits = (x.detach().double() * (self.levels * 2**16)).round()
        if values_can_be_read(x):
            inside = (x >= 0.0) & (x < 1.0)
            if not inside.all():
                raise ValueError(f"x: expected values in [0, 1), got {int((~inside).sum())} of {x.numel()} outside, or NaN")
        return (bits / 2**16).floor().long().clamp(0, self.levels - 1)

    @torch.no_grad()
    def sample(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """n samples (n, *shape) at the middle of their cells, (v + 1/2) / levels, float32."""
        return (self.draw(n, context, temperature).float() + 0.5) / self.levels


class FlowModel(nn.Flow, Model):
    """A flow over samples of one ``shape`` with a standard normal base, or another.

    Args:
        bijection: from samples to latents.
        config: its "shape" and "context", K of a context (B, K) or None; of a class that is no ``model``, all its arguments.
        base: the distribution of the latents; None for a standard normal.
    """

    def __init__(self, bijection: Bijection, config: dict[str, Any], base: nn.Base | None = None):
        shape = tuple(config["shape"])
        super().__init__(bijection, nn.StandardNormal(bijection.output_shape(shape)) if base is None else base, shape)
        self.context = config["context"]
        self.config = self.__dict__.get("config", config)

    def log_prob(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., *shape), context (..., K) or None -> (...) in nats, as ``nn.Flow``. Raises ValueError for other shapes."""
        if tuple(x.shape[-len(self.shape) :]) != self.shape:
            self.check_shape(x)
        return super().log_prob(x, context)

    def condition(self, context: torch.Tensor, validate_args: bool | None = None) -> nn.FlowDistribution:
        rows = self._as_context(context)
        if rows is not None and tuple(rows.shape[-1:]) != (self.context,):
            expected = "none" if self.context is None else f"shape (..., {self.context})"
            raise ValueError(f"context: expected {expected}, got shape {tuple(rows.shape)}")
        return super().condition(context, validate_args)

    def distribution(self, validate_args: bool | None = None) -> nn.FlowDistribution:
        if self.context is not None:
            raise ValueError(f"context: expected one of shape (..., {self.context}), call condition(context) instead")
        return super().distribution(validate_args)

    def embed(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        self.check_shape(x)
        return self.bijection(x, context)[0]

    def render(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.bijection.inverse(z, context)[0]


def arguments(given: dict[str, Any], *without: str) -> dict[str, Any]:
    """The arguments of a constructor by their names, but for some: of its ``locals()`` at the beginning, all but ``self``."""
    return {name: value for name, value in given.items() if name not in ("self", "__class__", *without)}


def model_shape(shape: int | Sequence[int], flatten: bool) -> tuple[tuple[int, ...], bool]:
    """(shape as a tuple, whether the architecture is for images). Raises ValueError unless it is (D,) or (C, H, W)."""
    sizes = as_shape(shape)
    if len(sizes) not in (1, 3):
        raise ValueError(f"shape: expected a number D for vectors or (C, H, W) for images, got {shape}")
    return sizes, len(sizes) == 3 and not flatten


def preprocessing(option: Mapping[str, Any] | None) -> list[Bijection]:
    """None, ``{"rescale": s}``, ``{"rescale": [s, t]}`` (x s + t) or ``{"logit": alpha}`` as a list of layers.

    Raises ValueError for anything else.
    """
    if option is None:
        return []
    if list(option) == ["rescale"]:
        constants = option["rescale"]
        return [nn.Rescale(*constants) if isinstance(constants, Sequence) else nn.Rescale(constants)]
    if list(option) == ["logit"]:
        return [nn.Logit(option["logit"])]
    raise ValueError(f'preprocess: expected None, {{"rescale": s}}, {{"rescale": [s, t]}} or {{"logit": alpha}}, got {option!r}')


def vector_bijection(make: MakeCoupling, features: int, couplings: int, permutation: str, seed: int) -> list[Bijection]:
    """Couplings on vectors: halves that take turns, or always the second half with a permutation after each.

    Raises ValueError for an unknown permutation and for fewer than two features.
    """
    check_name("permutation", permutation, PERMUTATIONS)
    if features < 2:
        raise ValueError(f"shape: a coupling needs at least 2 features, got {features}")
    layers: list[Bijection] = []
    for i in range(couplings):
        if permutation == "alternate":
            layers.append(make("channel" if i % 2 == 0 else "channel_swap", features))
            continue
        layers.append(make("channel", features))
        layers.append(nn.Permutation.reverse(features) if permutation == "reverse" else nn.Permutation.random(features, seed + i))
    return layers


def default_levels(height: int, width: int) -> int:
    """As many levels as Dinh et al. 2017 use: the last one sees 4 x 4, and every squeeze before it divides."""
    levels, side = 1, min(height, width)
    while side >= 8 and height % 2 == 0 and width % 2 == 0:
        levels, side, height, width = levels + 1, side // 2, height // 2, width // 2
    return levels


def image_bijection(make: MakeCoupling, shape: tuple[int, int, int], couplings: int, levels: int) -> nn.MultiScale:
    """The multi-scale architecture of Dinh et al. 2017, section 3.6.

    A level is ``couplings`` with alternating checkerboards, a squeeze, and ``couplings`` with alternating halves of the
    channels; then half of the channels leave. The last level has ``couplings + 1`` checkerboards alone.
    """

    def alternating(split: str, channels: int, n: int) -> list[Bijection]:
        return [make(split if i % 2 == 0 else f"{split}_swap", channels) for i in range(n)]

    channels, built = shape[0], []
    for _ in range(levels - 1):
        checkerboards = alternating("checkerboard", channels, couplings)
        built.append(nn.Compose(*checkerboards, nn.Squeeze(), *alternating("channel", 4 * channels, couplings)))
        channels *= 2
    return nn.MultiScale(*built, nn.Compose(*alternating("checkerboard", channels, couplings + 1)), shape=shape)


class CouplingFlow(FlowModel):
    """What NICE and RealNVP share: all but the layers, which ``couple(network, split)`` makes, and those ``behind``.

    The network gives ``per_value`` parameters for each value; where they are ``separate`` it is one network for each of them:
    for images a ``ResNet`` of ``depth`` blocks, else an ``MLP`` of ``depth`` hidden layers.
    """

    def __init__(
        self,
        couple: Callable[[torch.nn.Module, str], Bijection],
        per_value: int,
        shape: int | Sequence[int],
        *,
        couplings: int,
        hidden: int,
        depth: int,
        levels: int | None,
        permutation: str,
        seed: int,
        flatten: bool,
        preprocess: Mapping[str, Any] | None,
        context: int | None,
        separate: bool = False,
        behind: Sequence[Bijection] = (),
        **options: Any,
    ):
        sizes, image = model_shape(shape, flatten)

        def make(split: str, channels: int) -> Bijection:
            inputs, moved = kept_channels(split, channels), moved_channels(split, channels)
            check_sizes(0, depth=depth)
            nets: list[torch.nn.Module] = []
            for outputs in [moved] * per_value if separate else [per_value * moved]:
                if image:
                    nets.append(nn.ResNet(inputs, outputs, hidden, depth, context=context, **options))
                else:
                    nets.append(nn.MLP(inputs, outputs, itertools.repeat(hidden, depth), context=context, **options))
            return couple(nn.Parallel(*nets) if separate else nets[0], split)

        check_sizes(couplings=couplings)
        layers = preprocessing(preprocess)
        if image:
            c, h, w = sizes
            levels = default_levels(h, w) if levels is None else levels
            check_sizes(levels=levels)
            layers.append(image_bijection(make, (c, h, w), couplings, levels))
        else:
            layers += [nn.Flatten(sizes)] if len(sizes) == 3 else []
            layers += vector_bijection(make, math.prod(sizes), couplings, permutation, seed)
        super().__init__(nn.Compose(*layers, *behind), {"shape": sizes, "context": context})
