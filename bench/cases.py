"""What is measured: for each invertible op its cases, the bytes that each must move, and the targets."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["BOTH", "CASES", "FORWARD", "NEVER_SLOWER", "Case", "Draw", "Target", "Traffic", "cases_of"]

FORWARD, BOTH = "forward", "forward+backward"
MEGABYTE = 2**20

Tensors = tuple[torch.Tensor, ...]
Draw = Callable[..., torch.Tensor]
Traffic = tuple[float, float]


@dataclass(frozen=True)
class Target:
    """Ratios to reach: times faster than eager, than torch.compile, and the speed of a copy in percent."""

    vs_eager: float | None = None
    vs_compile: float | None = None
    percent_of_copy: float | None = None


NEVER_SLOWER = Target(vs_eager=1.0)


@dataclass(frozen=True)
class Case:
    """One size of one op.

    ``inputs(draw)`` makes the tensors from ``draw(*shape, dtype=torch.float32)``, standard normal values on the
    device. ``traffic(*inputs)`` counts the bytes that the forward and the backward must move: each tensor read or
    written once, and of a cache line that is needed in part the whole. ``targets`` is keyed by (direction, pages); where it
    has no entry, the target is never to be slower than eager code.
    """

    name: str
    inputs: Callable[[Draw], Tensors]
    traffic: Callable[..., Traffic]
    kwargs: dict[str, Any] = field(default_factory=dict)
    targets: Mapping[tuple[str, str], Target] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    small: bool = False

    def target(self, direction: str, pages: str) -> Target:
        """What the fused op is to reach."""
        return self.targets.get((direction, pages), NEVER_SLOWER)


def cases_of(op: str, device: str, pattern: str = "*") -> Iterator[Case]:
    """The op's cases for a device type whose name matches the shell pattern."""
    return (case for case in CASES[op] if device in case.devices and fnmatch.fnmatch(case.name, pattern))


def size(x: torch.Tensor) -> int:
    """Bytes of the values of x."""
    return x.numel() * x.element_size()


def affine_traffic(x: torch.Tensor, params: torch.Tensor) -> Traffic:
    """Channel split: 6 per transformed value forward (x, y twice, u, t), 8 backward (x, u, du, dt, dy and dx twice)."""
    return 2 * size(x) + size(params), 2.5 * size(x) + 1.5 * size(params)


def affine_checkerboard_traffic(x: torch.Tensor, params: torch.Tensor) -> Traffic:
    """Checkerboard: kept and transformed values share every cache line, so that x and all of params count whole."""
    return 2 * size(x) + size(params), 3 * size(x) + 1.5 * size(params)


def additive_traffic(x: torch.Tensor, shift: torch.Tensor) -> Traffic:
    """Channel split: 5 values in the forward (x twice, t, y twice); the gradients are views of the given one, but for a cast."""
    cast = 0 if x.dtype == shift.dtype else size(x) / 2 + size(shift)
    return 2 * size(x) + size(shift), cast


def additive_checkerboard_traffic(x: torch.Tensor, shift: torch.Tensor) -> Traffic:
    """Checkerboard: the shift's gradient has zeros at the kept places, so that it is written."""
    return 2 * size(x) + size(shift), size(x) + size(shift)


def linear_traffic(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Traffic:
    """x and y in the forward; dy, x and dx in the backward. What belongs to the channels alone is little beside them."""
    return 2 * size(x), 3 * size(x)


_FUSED = {
    (BOTH, "retained"): Target(3.5, 1.5, 100.0),
    (FORWARD, "cold"): Target(1.0, None, 95.0),
    (BOTH, "cold"): Target(1.0, None, 95.0),
}
_AT_COPY_SPEED = {key: target for key, target in _FUSED.items() if key[1] == "cold"}
_SMALL = ((1, 2), (4, 8), (16, 64), (64, 64), (256, 64), (64, 12, 16, 16))
_MAIN = (32, 96, 64, 64)


def _coupling_cases(
    params_per_channel: float, traffic: Callable[..., Traffic], checkerboard: Callable[..., Traffic]
) -> tuple[Case, ...]:
    """The cases of a coupling whose conditioner gives ``params_per_channel`` values per channel of x under a channel split."""

    def inputs(
        shape: tuple[int, ...], dtype: torch.dtype, of_params: torch.dtype, last: bool, factor: float
    ) -> Callable[[Draw], Tensors]:
        def make(draw: Draw) -> Tensors:
            x = draw(*shape, dtype=dtype)
            params = draw(shape[0], int(shape[1] * factor), *shape[2:], dtype=of_params)
            return tuple(a.to(memory_format=torch.channels_last) for a in (x, params)) if last else (x, params)

        return make

    def case(
        suffix: str = "",
        shape: tuple[int, ...] = _MAIN,
        dtype: torch.dtype = torch.float32,
        of_params: torch.dtype = torch.float32,
        last: bool = False,
        **rest: Any,
    ) -> Case:
        name = "x".join(map(str, shape)) + suffix
        factor = params_per_channel * (2 if rest.get("kwargs") else 1)
        return Case(name, inputs(shape, dtype, of_params, last, factor), **{"traffic": traffic, **rest})

    bfloat16 = torch.bfloat16
    return (
        case(targets=_FUSED),
        case("-channels-last", last=True, targets=_AT_COPY_SPEED),
        case("-checkerboard", kwargs={"split": "checkerboard"}, traffic=checkerboard, targets=_AT_COPY_SPEED),
        case("-bf16-params", of_params=bfloat16, targets=_AT_COPY_SPEED),
        case(shape=(128, 96, 64, 64), targets=_AT_COPY_SPEED, devices=("cuda",)),
        case("-bf16", shape=(128, 96, 64, 64), dtype=bfloat16, of_params=bfloat16, targets=_AT_COPY_SPEED, devices=("cuda",)),
        *(case(shape=shape, small=True) for shape in _SMALL),
    )


def _linear_case(shape: tuple[int, ...], suffix: str = "", last: bool = False, **rest: Any) -> Case:
    """A well-conditioned W. On a GPU it is to run at copy speed while the product is cheaper than the copy."""

    def inputs(draw: Draw) -> Tensors:
        x, weight = draw(*shape), draw(shape[1], shape[1])
        weight = torch.eye(shape[1], device=x.device).roll(1, 0) + 0.3 * weight / shape[1] ** 0.5
        return x.to(memory_format=torch.channels_last) if last else x, weight, draw(shape[1])

    return Case("x".join(map(str, shape)) + suffix, inputs, linear_traffic, **rest)


def _linear_cases() -> tuple[Case, ...]:
    at_copy_speed = {(direction, "cold"): Target(1.0, None, 90.0) for direction in (FORWARD, BOTH)}
    return (
        _linear_case((32, 48, 32, 32)),
        _linear_case((32, 48, 32, 32), "-inverse", kwargs={"inverse": True}),
        _linear_case((32, 48, 32, 32), "-channels-last", last=True),
        *(
            _linear_case(shape)
            for shape in ((32, 12, 16, 16), (32, 12, 32, 32), (32, 48, 16, 16), (32, 96, 8, 8), (32, 192, 8, 8))
        ),
        _linear_case((256, 12, 128, 128), targets=at_copy_speed, devices=("cuda",)),
        _linear_case((256, 48, 64, 64), targets=at_copy_speed, devices=("cuda",)),
        _linear_case((256, 96, 32, 32), targets=at_copy_speed, devices=("cuda",)),
        *(_linear_case(shape, small=True) for shape in ((4, 8), (64, 64), (64, 12, 16, 16))),
    )


#: Every invertible op of ``flowkern.OPS``, with what is measured of it.
CASES: dict[str, tuple[Case, ...]] = {
    "affine_coupling": _coupling_cases(1.0, affine_traffic, affine_checkerboard_traffic),
    "additive_coupling": _coupling_cases(0.5, additive_traffic, additive_checkerboard_traffic),
    "invertible_linear": _linear_cases(),
}
