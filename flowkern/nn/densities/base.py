"""Base distributions: modules whose tensors move with ``.to()``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributions import Distribution, Independent, MixtureSameFamily, Transform, TransformedDistribution, constraints

from ..._core.checks import accumulation_dtype
from ..._core.mixture import log_sum

Shape = int | Sequence[int]


def as_shape(shape: Shape) -> tuple[int, ...]:
    """``shape`` as a tuple of ints; one number is the length of a vector. Raises ValueError for a size below 1."""
    sizes = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
    if any(n < 1 for n in sizes):
        raise ValueError(f"shape: expected sizes of at least 1, got {shape}")
    return sizes


def image_shape(shape: Shape) -> tuple[int, int, int]:
    """``shape`` as (C, H, W). Raises ValueError for any other."""
    sizes = as_shape(shape)
    if len(sizes) != 3:
        raise ValueError(f"shape: expected (C, H, W), got {sizes}")
    return sizes


def check_name(what: str, name: str, names: Iterable[str]) -> None:
    """Raises ValueError, with the names that there are, for one that is none of them."""
    if name not in names:
        raise ValueError(f"{what}: unknown name {name!r}; expected one of {', '.join(map(repr, names))}")


def check_sizes(least: int = 1, **sizes: float | None) -> None:
    """Raises ValueError, with its name, for a size below ``least``; None is none."""
    for name, size in sizes.items():
        if size is not None and not size >= least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")


def check_share(**shares: float) -> None:
    """Raises ValueError, with its name, for a number that is not in [0, 1)."""
    for name, share in shares.items():
        if not 0.0 <= share < 1.0:
            raise ValueError(f"{name}: expected at least 0 and less than 1, got {share}")


class Base(nn.Module):
    """A distribution over latents of one ``shape``; derive from it to write your own.

    ``log_prob(z, context=None)``: z (B, *shape) -> (B,) in nats, float64 if z is, else float32.
    ``rsample(n, temperature=1.0, context=None)``: (n, *shape), differentiable in the parameters.
    ``sample`` is the same without gradients. The temperature multiplies the standard deviation.
    ``log_prob`` is -inf outside of the support.
    """

    #: What the elements of z can be; None where that is not known.
    support: constraints.Constraint | None = constraints.real

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = as_shape(shape)

    @property
    def has_rsample(self) -> bool:
        """Whether ``rsample`` is there."""
        return type(self).rsample is not Base.rsample

    def check(self, z: torch.Tensor) -> torch.Tensor:
        """z in the dtype of the arithmetic. Raises ValueError for another shape than (B, *shape)."""
        if z.ndim == 0 or tuple(z.shape[1:]) != self.shape:
            expected = ", ".join(["B", *map(str, self.shape)])
            raise ValueError(f"{type(self).__name__}: expected latents of shape ({expected}), got {tuple(z.shape)}")
        return z.to(accumulation_dtype(z))

    def log_prob(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no log_prob")

    def rsample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no rsample")

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.rsample(n, temperature, context)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


def normal_log_prob(eps: torch.Tensor, dims: int) -> torch.Tensor:
    """log N(eps; 0, I), summed over the last ``dims`` dimensions."""
    log_density = -0.5 * eps.square() - 0.5 * math.log(2.0 * math.pi)
    return log_density.flatten(-dims).sum(-1) if dims else log_density


def draw_components(logits: torch.Tensor, n: int) -> torch.Tensor:
    """n indices drawn by their logits; n may be 0."""
    return torch.multinomial(logits.softmax(0), n, replacement=True) if n else logits.new_empty(0, dtype=torch.int64)


class StandardNormal(Base):
    """N(0, I) over ``shape``: log p(z) = -(|z|^2 + D log 2 pi) / 2, in nats."""

    like: torch.Tensor  # empty: it only carries the device and dtype of the samples

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.register_buffer("like", torch.empty(0), persistent=False)

    def log_prob(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return normal_log_prob(self.check(z), len(self.shape))

    def rsample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        return temperature * torch.randn(n, *self.shape, dtype=self.like.dtype, device=self.like.device)


class DiagonalNormal(Base):
    """N(loc, diag exp(2 log_scale)) over ``shape`` with learned ``loc`` and ``log_scale``, both zero at first."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.loc = nn.Parameter(torch.zeros(self.shape))
        self.log_scale = nn.Parameter(torch.zeros(self.shape))

    def log_prob(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        eps = (self.check(z) - self.loc) * (-self.log_scale).exp()
        return normal_log_prob(eps, len(self.shape)) - self.log_scale.to(eps.dtype).sum()

    def rsample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        eps = torch.randn(n, *self.shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + temperature * self.log_scale.exp() * eps


class Mixture(Base):
    """A mixture of diagonal normals, joint over the dimensions: p(z) = sum_k pi_k N(z; loc_k, diag exp(2 log_scale_k)).

    Learned: ``logits`` (K,) with pi = softmax(logits), ``loc`` and ``log_scale`` (K, *shape). ``loc`` starts standard
    normal, the others at zero. A sample draws one component for all dimensions. ``rsample`` raises NotImplementedError:
    the draw of the component has no derivative. Raises ValueError for fewer than one component.
    """

    has_rsample = False

    def __init__(self, shape: Shape, components: int):
        super().__init__(shape)
        if components < 1:
            raise ValueError(f"Mixture: components must be at least 1, got {components}")
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, *self.shape))
        self.log_scale = nn.Parameter(torch.zeros(components, *self.shape))

    def log_prob(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        eps = (self.check(z).unsqueeze(1) - self.loc) * (-self.log_scale).exp()
        log_volume = self.log_scale.to(eps.dtype).flatten(1).sum(1)
        weights = self.logits.to(eps.dtype).log_softmax(0)
        return log_sum(normal_log_prob(eps, len(self.shape)) - log_volume + weights)

    def rsample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError("Mixture: the draw of a component has no derivative; use sample")

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        component = draw_components(self.logits, n)
        eps = torch.randn(n, *self.shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc[component] + temperature * self.log_scale[component].exp() * eps

    def extra_repr(self) -> str:
        return f"shape={self.shape}, components={len(self.logits)}"


def _map_tensors(
    value: Any, function: Callable[[str, torch.Tensor], torch.Tensor | None], path: str = "", seen: frozenset[int] = frozenset()
) -> Any:
    """``value`` with ``function`` applied, in place, to the tensors inside distributions, transforms and lists of them.

    The function is told where each tensor is; where it gives None, the attribute goes.
    """
    if isinstance(value, torch.Tensor):
        return function(path, value)
    if isinstance(value, list):
        return [_map_tensors(v, function, f"{path}.{i}", seen) for i, v in enumerate(value)]
    if isinstance(value, Distribution | Transform) and id(value) not in seen:  # a transform and its inverse hold each other
        for name, entry in [*vars(value).items()]:
            vars(value)[name] = mapped = _map_tensors(entry, function, f"{path}.{name}", seen | {id(value)})
            if mapped is None and entry is not None:
                del vars(value)[name]
    return value


def any_of(elements: torch.Tensor) -> torch.Tensor:
    """Whether any element of a sample is true: (B, ...) -> (B,)."""
    return elements.flatten(1).any(1) if elements.ndim > 1 else elements


def _unchecked(value: Any) -> Any:
    """A copy of a distribution, and of those in it, that takes any value: torch's raise, and wait for a GPU to know when."""
    if isinstance(value, list):
        return [_unchecked(entry) for entry in value]
    if not isinstance(value, Distribution):
        return value
    twin = copy.copy(value)
    vars(twin).update({name: _unchecked(entry) for name, entry in vars(value).items()}, _validate_args=False)
    return twin


def _support(distribution: Distribution) -> constraints.Constraint | None:
    """What the distribution says, or None if it says nothing."""
    try:
        return distribution.support
    except NotImplementedError:
        return None


def _meets(constraint: constraints.Constraint | None, z: torch.Tensor) -> torch.Tensor:
    """Which elements, or events of the constraint's dimensions, meet it; all of them where that cannot be told."""
    if constraint is None or isinstance(constraint, type(constraints.dependent)):
        return torch.ones_like(z, dtype=torch.bool)
    return constraint.check(z)


@torch.no_grad()
def _inside(distribution: Distribution, z: torch.Tensor) -> torch.Tensor:
    """Which samples z (B, ...) lie in the support: (B,)."""
    if isinstance(distribution, Independent):
        return _inside(distribution.base_dist, z)
    if isinstance(distribution, MixtureSameFamily):  # whose support in torch is what all components have in common
        component = distribution.component_distribution
        return ~any_of(~_meets(_support(component), z.unsqueeze(-1 - len(component.event_shape))).any(-1))
    if type(distribution) is not TransformedDistribution:
        return ~any_of(~_meets(_support(distribution), z))
    inside = z.new_ones(z.shape[0], dtype=torch.bool)
    for transform in reversed(distribution.transforms):  # torch tells the last one's codomain
        inside = inside & ~any_of(~_meets(transform.codomain, z))
        z = transform.inv(z)
    return inside & _inside(distribution.base_dist, z)


def _typical(distribution: Distribution, otherwise: torch.Tensor) -> torch.Tensor:
    """A point of the support: the mean, or what the transforms make of one; ``otherwise`` where torch knows none."""
    try:
        return distribution.mean.nan_to_num()
    except NotImplementedError:
        if not isinstance(distribution, Independent | TransformedDistribution):
            return otherwise
    z = _typical(distribution.base_dist, otherwise)
    for transform in getattr(distribution, "transforms", ()) if z is not otherwise else ():
        z = transform(z)
    return z


class _Wrapped(Base):
    """A ``torch.distributions.Distribution`` as a base. Its tensors move with ``.to()``, but are constants, not parameters.

    They are in no state_dict: wherever they go they are made of those that were given, and never hold what lay there. Raises
    ValueError where these hold no values (on meta) and are to go elsewhere.
    """

    def __init__(self, distribution: Distribution):
        super().__init__(distribution.batch_shape + distribution.event_shape)
        dims = len(distribution.batch_shape)
        distribution = _unchecked(distribution)
        self.distribution: Distribution = Independent(distribution, dims) if dims else distribution
        self._given: dict[str, torch.Tensor] = {}
        _map_tensors(self.distribution, self._note)

    def _note(self, path: str, t: torch.Tensor) -> torch.Tensor:
        self._given[path] = t.detach().clone()
        return t

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Wrapped:
        super()._apply(fn, recurse)

        def move(path: str, t: torch.Tensor) -> torch.Tensor | None:
            moved, source = fn(t), self._given.get(path)
            if moved is t or moved.is_meta:
                return moved
            if source is None:
                return None  # torch computes it from the others when it is asked for
            if source.is_meta:
                raise ValueError("base: expected a distribution of tensors that hold values, got one on meta; make it on the CPU")
            return source.to(moved.device, moved.dtype)

        _map_tensors(self.distribution, move)
        return self

    @property
    def support(self) -> constraints.Constraint | None:  # type: ignore[override]
        inner = self.distribution
        while isinstance(inner, Independent):
            inner = inner.base_dist
        known = None if type(inner) is TransformedDistribution else _support(inner)
        return constraints.real if known in (constraints.real, constraints.real_vector) else None

    @property
    def has_rsample(self) -> bool:
        return self.distribution.has_rsample

    def log_prob(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        z = self.check(z)
        inside = _inside(self.distribution, z)
        # A point of the support in place of the others: torch's formulas give them anything, and gradients that are NaN.
        known = torch.where(inside.view(-1, *(1 for _ in self.shape)), z, _typical(self.distribution, z))
        log_prob = self.distribution.log_prob(known).masked_fill(~inside, -math.inf)
        return log_prob.masked_fill(any_of(z.isnan()), math.nan)

    def _draw(self, draw: Callable[[tuple[int]], torch.Tensor], n: int, temperature: float) -> torch.Tensor:
        if temperature != 1.0:
            raise ValueError(f"temperature: not defined for {self.distribution}, got {temperature}; use a base of flowkern.nn")
        return draw((n,))

    def rsample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        return self._draw(self.distribution.rsample, n, temperature)

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, context: torch.Tensor | None = None) -> torch.Tensor:
        return self._draw(self.distribution.sample, n, temperature)

    def extra_repr(self) -> str:
        return str(self.distribution)


def as_base(base: nn.Module | Distribution) -> Base:
    """``base`` as a module: a ``Distribution`` is wrapped, with all its dimensions as one event.

    Raises TypeError for anything that is neither a module with ``log_prob`` and ``sample`` nor a Distribution.
    """
    if isinstance(base, Distribution):
        return _Wrapped(base)
    if not isinstance(base, nn.Module) or not hasattr(base, "log_prob") or not hasattr(base, "sample"):
        raise TypeError(
            f"base: expected a module with log_prob and sample, or a torch.distributions.Distribution, got {type(base).__name__}"
        )
    return cast(Base, base)
