"""The x at which a mixture of logistics has given log-odds. The formulas are at the top of flowkern/ops/_logistic_mixture.py.

A thread has an element, or with many components a part of one, and keeps the components in registers over all rounds: the search
reads each number once, where torch's operations read all of them a thousand times.
"""

# mypy: allow-untyped-defs
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from flowkern._core.op import KERNELS
from flowkern._core.root import ROUNDS
from flowkern.ops.parts import SCALES

from ._coupling import DTYPES, example
from .lang import exp, log1p, narrow, scale_map
from .launch import Grid, Launch, constants

__all__ = ["forward"]

STREAMING = False


@triton.jit
def log_sum(x):
    # The logarithm of the sum of exponentials over components [1, ELEMENTS].
    top = tl.max(x, 0, keep_dims=True)
    top = tl.where(top == -float("inf"), 0.0, top)
    return top + tl.log(tl.sum(exp(x - top), 0, keep_dims=True))


@triton.jit
def off(x, z, log_weight, mean, inverse, log_scale):
    # logit(F(x)) - z and its slope [1, ELEMENTS].
    t = (x - mean) * inverse
    rest = log1p(exp(-tl.abs(t)))
    below, above = tl.where(t < 0.0, t, 0.0) - rest, tl.where(t > 0.0, -t, 0.0) - rest  # log sigmoid of t and of -t
    log_below, log_above = log_sum(log_weight + below), log_sum(log_weight + above)
    log_density = log_sum(log_weight + below + above - log_scale)
    return log_below - log_above - z, exp(log_density - log_below - log_above)


@triton.jit(do_not_specialize=["N"])
def kernel(
    p_z, p_params, p_root, N, K, z_n, params_k, params_n,
    COMPONENTS: tl.constexpr, ELEMENTS: tl.constexpr, REPEATED: tl.constexpr, LARGEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]
    k = tl.arange(0, COMPONENTS)[:, None]
    m_n, m_k = n < N, k < K
    m = m_n & m_k  # [COMPONENTS, ELEMENTS]
    z = tl.load(p_z + n * z_n, mask=m_n, other=0.0).to(ACC)
    p, k = p_params + n * params_n, k.to(tl.int64)
    logit = tl.load(p + k * params_k, mask=m, other=0.0).to(ACC)
    mean = tl.load(p + (k + K) * params_k, mask=m, other=0.0).to(ACC)
    raw = tl.load(p + (k + 2 * K) * params_k, mask=m, other=0.0).to(ACC)
    logit = tl.where(m_k, logit, -float("inf"))
    log_weight = logit - log_sum(logit)
    scale, log_scale, _ = scale_map(raw, "soft_clip", LARGEST, 0.0)
    inverse = 1.0 / scale
    own = mean + scale * z  # the components' solutions
    low = tl.min(tl.where(m_k, own, float("inf")), 0, keep_dims=True)
    high = tl.max(tl.where(m_k, own, -float("inf")), 0, keep_dims=True)
    unknown = tl.max((m_k & (own != own)).to(tl.int32), 0, keep_dims=True) > 0
    low = tl.where(unknown, float("nan"), low)
    root = 0.5 * (low + high)
    for i in range(2 * REPEATED + 1):
        value, slope = off(root, z, log_weight, mean, inverse, log_scale)
        above = value > 0.0
        low, high, step = tl.where(above, low, root), tl.where(above, root, high), root - value / slope
        # A step of Newton's after each look at the middle, if it stays in the bracket; the middle again after that. One more
        # step at the end.
        other = tl.where(i == 2 * REPEATED, root, 0.5 * (low + high))
        root = tl.where((i % 2 == 0) & (step >= low) & (step <= high), step, other)
    tl.store(p_root + n, narrow(root, p_root.dtype.element_ty), mask=m_n)


@functools.lru_cache(maxsize=4096)
def _grid(elements: int, components: int, double: bool, steps: tuple[int, ...]) -> Grid:
    padded = triton.next_power_of_2(components)
    # A thread keeps so many values of each kind: it has four kinds, and some more while it computes. Many components are shared
    # among the threads of one warp, where sums need no barrier.
    warps = 1 if padded > 32 else 4
    block = max(1, min(32 * warps, 32 * warps * (4 if double else 8) // padded))
    keywords = constants(double, warps, COMPONENTS=padded, ELEMENTS=block, REPEATED=ROUNDS, LARGEST=SCALES.a)
    programs = triton.cdiv(elements, block)
    return Grid(programs, programs, (elements, components, *steps), keywords)


def _launch(z: torch.Tensor, params: torch.Tensor, root: torch.Tensor) -> Launch:
    z, params = z.reshape(-1), params.reshape(len(params), -1)
    double = torch.float64 in (z.dtype, params.dtype)
    how = _grid(len(z), len(params) // 3, double, (*z.stride(), *params.stride()))
    return Launch(kernel, (z, params, root), how)


def forward(z: torch.Tensor, params: torch.Tensor, root: torch.Tensor) -> None:
    """``flowkern::logistic_mixture_root``: fills the root."""
    if z.numel():
        _launch(z, params, root).run()


FACTORS: dict[str, Any] = {"components": (8, 1, 10, 32, 100), "dtypes": tuple(DTYPES)}


def compile_cases(components: int, dtypes: str) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS."""
    z, rows = example((4096,), DTYPES[dtypes][0], "vector"), example((4096, 3 * components), DTYPES[dtypes][1], "vector")
    yield "root", _launch(z, rows.t(), KERNELS["logistic_mixture_root"].outputs(z, rows.t()))
