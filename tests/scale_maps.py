"""The scale maps in mpmath, from tail to tail: what every backend's s or 1 / s, log s and its slope are held against."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mpmath
import torch

from flowkern.ops import AutoregressiveNetwork, ScaleMap

MAPS = {
    "exp": ScaleMap.exp(),
    "sigmoid": ScaleMap.sigmoid(),
    "sigmoid-eps": ScaleMap.sigmoid(eps=1e-3),
    "softplus-0": ScaleMap.softplus(0.0),
    "softplus": ScaleMap.softplus(),
    "tanh": ScaleMap.tanh(1.9),
    "atan": ScaleMap.atan(1.9),
    "soft-clip": ScaleMap.soft_clip(),
}
Values = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def exact_map(scale: ScaleMap, u: Any) -> tuple[Any, Any, Any]:
    """(s, log s, slope of log s) of a number of mpmath, which is finite."""
    exp, log1p, a, b = mpmath.exp, mpmath.log1p, mpmath.mpf(scale.a), mpmath.mpf(scale.b)
    if scale.kind == "sigmoid":
        s, rest = 1 / (1 + exp(-u - a)), 1 / (1 + exp(u + a))
        return s + b, log1p(b - rest) if b else -log1p(exp(-u - a)), s * rest / (s + b)
    if scale.kind == "softplus":
        s = (max(u, 0) + log1p(exp(-abs(u)))) + a
        return s, mpmath.log(s), 1 / (1 + exp(-u)) / s
    if scale.kind == "exp":
        log_s, slope = u, mpmath.mpf(1)
    elif scale.kind == "tanh":
        log_s, slope = a * mpmath.tanh(u / a), mpmath.sech(u / a) ** 2
    elif scale.kind == "atan":
        log_s, slope = mpmath.mpf(0.636 * scale.a) * mpmath.atan(u), mpmath.mpf(0.636 * scale.a) / (1 + u * u)
    else:
        log_s, slope = u / (1 + abs(u / a)), 1 / (1 + abs(u / a)) ** 2
    return exp(log_s), log_s, slope


@functools.cache
def grid(dtype: torch.dtype) -> torch.Tensor:
    limit = 120.0 if dtype is torch.float32 else 800.0
    large = torch.logspace(-8, 38 if dtype is torch.float32 else 100, 93, dtype=torch.float64)
    dense = torch.linspace(-limit, limit, 321, dtype=torch.float64)
    tiny = torch.finfo(dtype).tiny
    return torch.cat(
        [large, -large, dense, torch.tensor([0.5413248546, -2.0, 4.9, tiny / 8, -tiny / 8], dtype=torch.float64)]
    ).to(dtype)


@functools.cache
def exact_table(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, 1 / s, log s, slope) in float64 for the grid, and the errors that a rounding of u, of a constant or of log s makes."""
    scale, u = MAPS[name], grid(dtype)
    step = mpmath.mpf(2) ** -60

    def values(u: Any) -> list[Any]:
        s, log_s, slope = exact_map(scale, u)
        return [s, 1 / s, log_s, slope]

    rows, errors = [], []
    with mpmath.workdps(80):
        for number in u.tolist():
            u0 = mpmath.mpf(number)
            here, there = values(u0), values(u0 + max(abs(u0), abs(mpmath.mpf(scale.a))) * step)
            moved = [abs(after - before) / step for before, after in zip(here, there, strict=True)]
            rounded = [abs(v) * (1 + (abs(here[2]) if i < 2 else 0)) for i, v in enumerate(here)]
            rows.append([float(v) for v in here])
            errors.append([float(r + m) for r, m in zip(rounded, moved, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).T, torch.tensor(errors, dtype=torch.float64).T


def assert_values(values: Values, name: str, dtype: torch.dtype, inverse: bool, floor: float = 0.0) -> None:
    """(s or 1 / s, log s, slope) of the grid, to 4 units in the last place and the smallest normal number.

    ``floor``: what the slope may be off besides.
    """
    exact, errors = exact_table(name, dtype)
    info = torch.finfo(dtype)
    for i, actual in zip((int(inverse), 2, 3), values, strict=True):
        assert actual.dtype is dtype
        truth, granted = exact[i], 4 * info.eps * errors[i] + info.tiny + (floor if i == 3 else 0.0)
        actual = actual.double()
        largest = truth.abs() > info.max * (1 - 1e-3)
        assert (actual[largest].abs() > info.max * (1 - 2e-3)).all()
        wrong = ~largest & ~((actual - truth).abs() <= granted)
        assert not wrong.any(), [*zip(grid(dtype)[wrong].tolist(), actual[wrong].tolist(), truth[wrong].tolist(), strict=True)]


def check_sweep(inverse: Callable[..., Any], name: str, dtype: torch.dtype) -> None:
    """1 / s and log s as the inverse of an autoregressive layer has them, whose outputs are its context."""
    u, network = grid(dtype), AutoregressiveNetwork((1,), (), scale=MAPS[name])
    context = torch.stack([u, torch.zeros_like(u)], 1)
    x, logabsdet = inverse(torch.ones_like(u)[:, None], [u.new_zeros((2, 1)), u.new_zeros(2)], [network], contexts=[context])
    assert_values((x[:, 0], -logabsdet, exact_table(name, dtype)[0][3].to(dtype)), name, dtype, True)
