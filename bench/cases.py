"""What is measured: for each op its cases, the bytes that each must move, and the targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from flowkern import ops

from .row import Target

__all__ = ["BOTH", "CASES", "FORWARD", "NEVER_SLOWER", "Case", "Draw", "Target", "Traffic", "cases_of"]

FORWARD, BOTH = "forward", "forward+backward"

Draw = Callable[..., torch.Tensor]
Traffic = tuple[float, float]
Sizes = tuple[tuple[Any, ...], ...]

NEVER_SLOWER = Target(vs_eager=1.0)


@dataclass(frozen=True)
class Case:
    """One size of one op.

    ``inputs(draw)`` makes the arguments from ``draw(*shape, dtype=torch.float32)``, standard normal values on the
    device. ``traffic(*inputs)`` counts the bytes that the forward and the backward must move: each tensor read or
    written once, and of a cache line that is needed in part the whole; None where arithmetic takes longer than a copy.
    ``constants`` are the places of floating arguments that have no gradient. ``targets`` is keyed by (direction, pages);
    where it has no entry, the target is never to be slower than eager code.
    """

    name: str
    inputs: Callable[[Draw], tuple[Any, ...]]
    traffic: Callable[..., Traffic] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    targets: Mapping[tuple[str, str], Target] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    small: bool = False
    directions: tuple[str, ...] = (FORWARD, BOTH)
    constants: tuple[int, ...] = ()
    compiles: bool = True

    def target(self, direction: str, pages: str) -> Target:
        """What the fused op is to reach."""
        return self.targets.get((direction, pages), NEVER_SLOWER)


def cases_of(op: str, device: str) -> list[Case]:
    """The op's cases for a device type."""
    return [case for case in CASES[op] if device in case.devices]


def affine_traffic(x: torch.Tensor, params: torch.Tensor) -> Traffic:
    """Channel split: 6 per transformed value forward (x, y twice, u, t), 8 backward (x, u, du, dt, dy and dx twice).

    Checkerboard: kept and transformed values share every cache line, so that x and all of params count whole.
    """
    of_x = 3.0 if params.shape[1] > x.shape[1] else 2.5
    return 2 * x.nbytes + params.nbytes, of_x * x.nbytes + 1.5 * params.nbytes


def additive_traffic(x: torch.Tensor, shift: torch.Tensor) -> Traffic:
    """Channel split: 5 values in the forward (x twice, t, y twice); the gradients are views of the given one, but for a cast.

    Checkerboard: the shift's gradient has zeros at the kept places, so that it is written.
    """
    cast = 0 if x.dtype == shift.dtype else x.nbytes / 2 + shift.nbytes
    return 2 * x.nbytes + shift.nbytes, x.nbytes + shift.nbytes if shift.shape == x.shape else cast


def linear_traffic(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Traffic:
    """x and y in the forward; dy, x and dx in the backward. What belongs to the channels alone is little beside them."""
    return 2 * x.nbytes, 3 * x.nbytes


_FUSED = {
    (BOTH, "retained"): Target(3.5, 1.5, 100.0),
    (FORWARD, "cold"): Target(1.0, None, 95.0),
    (BOTH, "cold"): Target(1.0, None, 95.0),
}
_AT_COPY_SPEED = {key: target for key, target in _FUSED.items() if key[1] == "cold"}
_VECTORS = ((1, 2), (4, 8), (16, 64), (64, 64), (256, 64))
_SMALL = (*_VECTORS, (64, 12, 16, 16))
_GPU: dict[str, Any] = {"devices": ("cuda",)}


def _by_size(
    inputs: Callable[..., tuple[Any, ...]], small: Sizes = (), large: Sizes = (), name: str = "", suffix: str = "", **rest: Any
) -> tuple[Case, ...]:
    """A case for each size, whose arguments ``inputs(draw, *size)`` makes; ``name`` is a format for a size, if not AxBxC."""

    def case(size: tuple[Any, ...]) -> Case:
        called = name.format(*size) if name else "x".join(map(str, size))
        return Case(called + suffix, lambda draw: inputs(draw, *size), small=size in small, **rest)

    return tuple(map(case, (*small, *large)))


def _coupling_cases(params_per_channel: float, traffic: Callable[..., Traffic]) -> tuple[Case, ...]:
    """The cases of a coupling whose conditioner gives ``params_per_channel`` values per channel of x under a channel split."""

    float32, bfloat16 = torch.float32, torch.bfloat16

    def inputs(
        draw: Draw, *shape: int, factor: float = params_per_channel, dtypes: Any = (float32, float32), last: bool = False
    ) -> tuple[torch.Tensor, ...]:
        params = (shape[0], int(shape[1] * factor), *shape[2:])
        given = draw(*shape, dtype=dtypes[0]), draw(*params, dtype=dtypes[1])
        return tuple(a.to(memory_format=torch.channels_last) for a in given) if last else given

    def large(suffix: str = "", shape: tuple[int, ...] = (32, 96, 64, 64), rest: Any = None, **how: Any) -> tuple[Case, ...]:
        rest = {"traffic": traffic, "targets": _AT_COPY_SPEED, **(rest or {})}
        return _by_size(partial(inputs, **how), large=(shape,), suffix=suffix, **rest)

    return (
        *large(rest={"targets": _FUSED}),
        *large("-channels-last", last=True),
        *large("-checkerboard", rest={"kwargs": {"split": "checkerboard"}}, factor=2 * params_per_channel),
        *large("-bf16-params", dtypes=(float32, bfloat16)),
        *large(shape=(128, 96, 64, 64), rest=_GPU),
        *large("-bf16", (128, 96, 64, 64), _GPU, dtypes=(bfloat16, bfloat16)),
        *_by_size(inputs, _SMALL, traffic=traffic),
    )


def _linear_cases() -> tuple[Case, ...]:
    """A well-conditioned W. On a GPU it is to run at copy speed while the product is cheaper than the copy."""

    def inputs(draw: Draw, *shape: int, last: bool = False) -> tuple[torch.Tensor, ...]:
        x, weight = draw(*shape), draw(shape[1], shape[1])
        weight = torch.eye(shape[1], device=x.device).roll(1, 0) + 0.3 * weight / shape[1] ** 0.5
        return x.to(memory_format=torch.channels_last) if last else x, weight, draw(shape[1])

    cases = partial(_by_size, traffic=linear_traffic)
    main, others = (32, 48, 32, 32), ((32, 12, 16, 16), (32, 12, 32, 32), (32, 48, 16, 16), (32, 96, 8, 8), (32, 192, 8, 8))
    at_copy_speed = {(direction, "cold"): Target(1.0, None, 90.0) for direction in (FORWARD, BOTH)}
    return (
        *cases(inputs, large=(main,)),
        *cases(inputs, large=(main,), suffix="-inverse", kwargs={"inverse": True}),
        *cases(partial(inputs, last=True), large=(main,), suffix="-channels-last"),
        *cases(inputs, large=others),
        *cases(inputs, large=((256, 12, 128, 128), (256, 48, 64, 64), (256, 96, 32, 32)), targets=at_copy_speed, **_GPU),
        *cases(inputs, _SMALL),
    )


def _plu_cases() -> tuple[Case, ...]:
    def inputs(draw: Draw, channels: int, _: int) -> tuple[torch.Tensor, ...]:
        lower, upper = (draw(channels, channels) / channels**0.5 for _ in range(2))
        sign, permutation = torch.ones_like(lower[0]), torch.arange(channels, device=lower.device).flip(0)
        return lower, upper, 0.1 * draw(channels), sign, permutation

    sizes = tuple((channels, channels) for channels in (2, 8, 12, 48, 96, 192))
    return _by_size(inputs, sizes[:4], sizes[4:], traffic=lambda lower, *_: (3 * lower.nbytes, 5 * lower.nbytes), constants=(3,))


def _levels(draw: Draw, *shape: int) -> torch.Tensor:
    """Integers of 8 bits, among them both ends."""
    return (128.0 + 64.0 * draw(*shape)).clamp(0.0, 255.0).to(torch.uint8)


def _image_cases(suffix: str = "", **kwargs: float) -> tuple[Case, ...]:
    rest: dict[str, Any] = {"traffic": lambda v: (5 * v.nbytes, 0), "kwargs": kwargs, "directions": (FORWARD,)}
    return _by_size(lambda draw, *shape: (_levels(draw, *shape),), _VECTORS, ((64, 3, 64, 64),), suffix=suffix, **rest)


def _mixture_cases() -> tuple[Case, ...]:
    """Scales of a trained model's order."""

    def inputs(draw: Draw, batch: int, side: int, components: int) -> tuple[torch.Tensor, ...]:
        params = draw(batch, 10 * components, side, side)
        params[:, components:].unflatten(1, (3, 3, components))[:, :, 1] -= 2.0
        return _levels(draw, batch, 3, side, side), params

    rest: dict[str, Any] = {"traffic": lambda x, params: (x.nbytes + params.nbytes, params.nbytes)}
    cases = partial(_by_size, inputs, name="{0}x3x{1}x{1}-mixture{2}", **rest)
    small = ((1, 1, 2), (4, 2, 2), (16, 4, 5), (64, 4, 5))
    return *cases(small=small, large=((32, 32, 10),)), *cases(large=((256, 32, 10),), **_GPU)


def _code_cases(directions: tuple[str, ...], large: Sizes) -> tuple[Case, ...]:
    """Rows, features and codes."""

    def inputs(draw: Draw, rows: int, features: int, codes: int) -> tuple[torch.Tensor, ...]:
        return draw(rows, features), draw(codes, features)

    small = ((1, 2, 4), (4, 8, 16), (16, 64, 64), (64, 64, 256), (256, 64, 512))
    return _by_size(inputs, small, large, "{}x{}-codes{}", directions=directions)


def _masked_cases() -> tuple[Case, ...]:
    """Rows, inputs and outputs, sorted by degree."""

    def inputs(draw: Draw, rows: int, columns: int, outputs: int) -> tuple[Any, ...]:
        x, weight, bias = draw(rows, columns), draw(outputs, columns) / columns**0.5, draw(outputs)
        degrees = [torch.arange(n, device=x.device) * min(columns, outputs) // n for n in (outputs, columns)]
        return x, weight, bias, ops.DegreeMask(*degrees)

    small = tuple((rows, n, n) for rows, n in _VECTORS)
    return _by_size(inputs, small, ((64, 784, 1024), (4096, 1024, 1024), (1, 3072, 512)))


def _spline_cases() -> tuple[Case, ...]:
    """Values, features and bins, in zuko's convention. The parameters are those of a network after some training."""

    def inputs(draw: Draw, batch: int, features: int, bins: int) -> tuple[torch.Tensor, ...]:
        return draw(batch, features), 0.5 * draw(batch, features, 3 * bins - 1)

    rest: dict[str, Any] = {"traffic": lambda x, params: (2 * x.nbytes + params.nbytes, 3 * x.nbytes + 2 * params.nbytes)}
    small = ((1, 2, 8), (4, 8, 8), (256, 5, 8))
    return _by_size(inputs, small, ((64, 768, 8), (10000, 64, 8)), "{}x{}-bins{}", **rest)


def _autoregressive_cases() -> tuple[Case, ...]:
    """Plain code takes a pass for each feature; compiled, all passes are one graph, which takes minutes to make of many."""

    def inputs(draw: Draw, batch: int, features: int, *hidden: int) -> tuple[Any, ...]:
        degrees = tuple(tuple(i * max(1, features - 1) // n + 1 for i in range(n)) for n in hidden)
        scale = ops.ScaleMap.exp()
        network = ops.AutoregressiveNetwork(tuple(range(1, features + 1)), degrees, scale=scale)
        parameters = []
        for columns, rows in itertools.pairwise(network.widths):
            parameters += [0.5 * draw(rows, columns) / columns**0.5, 0.3 * draw(rows)]
        return draw(batch, features), parameters, [network]

    small = ((16, 64, 64, 64), (64, 64, 64, 64), (256, 64, 64, 64))
    return (
        *_by_size(inputs, ((1, 2, 16), (4, 8, 32)), name="{}x{}-hidden{}"),
        *_by_size(inputs, small, ((64, 64, 256, 256), (64, 256, 512, 512)), "{}x{}-hidden{}x{}", compiles=False),
    )


#: Every op of ``flowkern.OPS``, with what is measured of it.
CASES: dict[str, tuple[Case, ...]] = {
    "affine_coupling": _coupling_cases(1.0, affine_traffic),
    "additive_coupling": _coupling_cases(0.5, additive_traffic),
    "invertible_linear": _linear_cases(),
    "plu_weight": _plu_cases(),
    "gaussian_kl": _by_size(
        lambda draw, *shape: (draw(*shape), draw(*shape)),
        _VECTORS,
        ((64, 65536),),
        traffic=lambda x, _: (3 * x.nbytes, 5 * x.nbytes),
    ),
    "dequantize": tuple(itertools.chain(*zip(_image_cases(), _image_cases("-logit", alpha=0.05), strict=True))),
    "discretized_logistic_mixture": _mixture_cases(),
    "masked_linear": _masked_cases(),
    "autoregressive_inverse": _autoregressive_cases(),
    "rational_quadratic_spline": _spline_cases(),
    "nearest_code": _code_cases((FORWARD,), ((16384, 64, 1024), (16384, 256, 8192), (64, 256, 65536))),
    "vector_quantize": _code_cases((FORWARD, BOTH), ((16384, 64, 1024), (4096, 256, 8192))),
}
