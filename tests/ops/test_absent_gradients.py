"""Gradients where some outputs have none: an absent gradient is not zero, which times infinity would be NaN.

Every subset of the outputs of every op that has several, at ordinary inputs against the reference in float64, and where
scales, determinants or x overflow against the formulas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mpmath
import pytest
import torch
from comparison import arguments, assert_accurate, output_gradients
from test_ops import samples_of
from test_scale_maps import MAPS, exact_map

import flowkern
from flowkern import OPS, ops
from flowkern._core import philox as _philox
from flowkern._core.op import Sample
from flowkern.ops import AutoregressiveNetwork, ScaleMap
from flowkern.ops import _gaussian_kl as gaussian
from flowkern.ops._plu_weight import compact_plu
from flowkern.ops.autoregressive import inverse as autoregressive

Tensors = Sequence[torch.Tensor]

BACKENDS = ["torch", "cpp"]
of_every_backend = pytest.mark.parametrize("backend", BACKENDS)
of_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def subsets(outputs: Tensors) -> Iterator[list[int]]:
    recorded = [i for i, y in enumerate(outputs) if y.requires_grad]
    for size in range(1, len(recorded) + 1):
        yield from map(list, itertools.combinations(recorded, size))


def gradients(outputs: Tensors, args: Tensors, of: list[int], **options: Any) -> Tensors:
    """Those of the outputs numbered ``of`` alone, for the suite's fixed output gradients."""
    given = [g.to(y) for y, g in zip(outputs, output_gradients(outputs), strict=True)]
    chosen = [outputs[i] for i in of], args, [given[i] for i in of]
    return torch.autograd.grad(*chosen, retain_graph=True, allow_unused=True, materialize_grads=True, **options)


def check_subsets(function: Callable[..., Any], reference: Callable[..., Any], sample: Sample) -> None:
    """The gradients of every subset against those of the reference in float64."""
    args, exact_args = arguments(sample), arguments(sample, torch.float64)
    outputs, plain = function(*args, **sample.kwargs), reference(*args, **sample.kwargs)
    exact = reference(*exact_args, **sample.kwargs)
    for of in subsets(outputs):
        values = (gradients(outputs, args, of), gradients(exact, exact_args, of), gradients(plain, args, of))
        for actual, truth, same_dtype in zip(*values, strict=True):
            assert_accurate(actual, truth, same_dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Ordinary inputs


@of_every_backend
@pytest.mark.parametrize(("op", "sample"), samples_of(torch.float32))
def test_every_subset_of_the_outputs(op: Any, sample: Sample, backend: str) -> None:
    with flowkern.backend(backend):
        check_subsets(op.function, op.reference, sample)


@of_every_backend
def test_every_subset_of_gaussian_kl(backend: str) -> None:
    seed = torch.tensor([5])
    with flowkern.backend(backend):
        check_subsets(
            lambda m, s: ops.gaussian_kl(m, s, seed=seed),
            lambda m, s: gaussian.reference(m, s, seed),
            Sample("", (torch.randn(3, 70), torch.randn(3, 70))),
        )


@of_every_backend
def test_every_subset_of_autoregressive_inverse(backend: str) -> None:
    for sample in autoregressive._samples("cpu", torch.float32):
        z, parameters, networks = sample.args
        if sample.name not in ("shuffled", "chain", "gated", "no-hidden", "residual-silu"):
            continue
        contexts = [c for c in sample.kwargs.get("contexts", ()) if c is not None]
        flags = [c is not None for c in sample.kwargs.get("contexts", [None for _ in networks])]

        def tensors_of(given: Tensors, networks: Any = networks, flags: Any = flags, n: int = len(parameters)) -> Tensors:
            rest, extra, found = iter(given[:n]), iter(given[n:]), []
            for network, flag in zip(networks, flags, strict=True):
                found += [next(rest) for _ in range(2 * network.layers)] + ([next(extra)] if flag else [])
            return found

        def function(z: torch.Tensor, *given: torch.Tensor, n: int = len(parameters), networks: Any = networks) -> Any:
            extra = iter(given[n:])
            return ops.autoregressive_inverse(z, given[:n], networks, contexts=[next(extra) if f else None for f in flags])  # noqa: B023

        with flowkern.backend(backend):
            check_subsets(
                function,
                lambda z, *g, t=tensors_of, networks=networks, f=flags: autoregressive.reference(z, t(g), networks, f),
                Sample("", (z, *parameters, *contexts)),
            )


@of_every_backend
@pytest.mark.parametrize("rotation", [False, True])
def test_every_subset_of_vector_quantize(backend: str, rotation: bool) -> None:
    x, codebook = torch.randn(7, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    with flowkern.backend(backend):
        check_subsets(
            lambda *a: ops.vector_quantize(*a, rotation=rotation),
            lambda *a: ops._vector_quantize.reference(*a, rotation=rotation),
            Sample("", (x, codebook)),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Extreme inputs

EXTREMES = [0.0, 1.0, 50.0, 88.0, 104.0, 1e4]
EXTREMES = [*EXTREMES, *(-v for v in EXTREMES[1:])]


def check_affine(name: str, dtype: torch.dtype, inverse: bool, create_graph: bool = False, floor: float = 0.0) -> None:
    """The gradients of y alone and of logabsdet alone against mpmath, wherever the scale and what it multiplies have a value.

    ``floor``: the absolute error of the slopes that autograd finds.
    """
    scale, sign, (g, k) = MAPS[name], -1 if inverse else 1, (0.75, -1.25)
    most = mpmath.mpf(torch.finfo(dtype).max)
    xs = [0.0, -1.0, 3.0, torch.inf]
    cases = [*itertools.product(EXTREMES, xs, (False, True))]
    for shift_first in (False, True):
        u, x = (torch.tensor([case[i] for case in cases], dtype=dtype) for i in (0, 1))
        moved = torch.stack([torch.zeros_like(x), x], 1).requires_grad_()
        params = torch.stack([u, torch.full_like(u, 0.5)], 1).requires_grad_()
        outputs = ops.affine_coupling(moved, params, scale=scale, inverse=inverse, shift_first=shift_first)
        grads = torch.full_like(moved, g), torch.full_like(outputs[1], k)
        found = [
            torch.autograd.grad(
                y, (moved, params), grad, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
            for y, grad in zip(outputs, grads, strict=True)
        ]
        expected, size = torch.zeros(len(cases), 3, dtype=torch.float64), torch.ones(len(cases), dtype=torch.float64)
        certain = torch.ones(len(cases), dtype=torch.bool)
        for i, (raw, value, of_y) in enumerate(cases):
            with mpmath.workdps(50):
                s, _, slope = exact_map(scale, mpmath.mpf(raw))
                if not of_y:
                    expected[i, 1] = sign * k * float(slope)
                    continue
                factor, z = (1 / s if inverse else s), value + (0.0 if shift_first is inverse else -0.5 if inverse else 0.5)
                through = g * factor
                certain[i] = math.isfinite(value) and max(factor, abs(through), abs(through * z)) < most
                if certain[i]:
                    shift = sign * (through if shift_first is not inverse else g)
                    expected[i, 0], expected[i, 2] = float(through), float(shift)
                    expected[i, 1], size[i] = sign * float(slope * through * z), abs(float(through * z))
        of_y = torch.tensor([case[2] for case in cases])
        for j, actual in enumerate(
            torch.where(of_y, a, b) for a, b in zip(*((d[0][:, 1], d[1][:, 0], d[1][:, 1]) for d in found), strict=True)
        ):
            truth = expected[:, j]
            granted = (64 + 2 * u.abs().clamp(max=1e3).double()) * torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).tiny
            granted = granted + floor * size
            assert not (certain & actual.isnan()).any()
            wrong = certain & ~((actual.double() - truth).abs() <= granted)
            assert not wrong.any(), [(cases[i], j, actual[i].item(), truth[i].item()) for i in wrong.nonzero().flatten().tolist()]


@both_ways
@of_both_dtypes
@pytest.mark.parametrize("name", MAPS)
def test_affine_coupling_on_every_isa(name: str, dtype: torch.dtype, inverse: bool, isa: str) -> None:
    with flowkern.backend("cpp"):
        check_affine(name, dtype, inverse)


@both_ways
@of_both_dtypes
@pytest.mark.parametrize("name", MAPS)
def test_affine_coupling_in_torch(name: str, dtype: torch.dtype, inverse: bool) -> None:
    floor = 4 * torch.finfo(dtype).eps
    with flowkern.backend("torch"):
        check_affine(name, dtype, inverse, floor=floor)
    check_affine(name, dtype, inverse, create_graph=True, floor=floor)


SPLITS = ("channel", "channel_swap", "checkerboard", "checkerboard_swap")


def check_affine_layouts() -> None:
    """The gradient of logabsdet alone, in whatever way the elements lie: that of x is zero everywhere."""
    infinite = torch.full((2, 4, 3, 6), torch.inf)
    for split, channels_last, dtype in itertools.product(SPLITS, (False, True), (torch.float32, torch.bfloat16)):
        x = infinite.to(dtype, memory_format=torch.channels_last) if channels_last else infinite.to(dtype)
        count = 8 if split.startswith("checkerboard") else 4
        params = torch.randn(2, count, 3, 6).requires_grad_()
        x.requires_grad_()
        _, logabsdet = ops.affine_coupling(x, params, split=split, scale=ScaleMap.tanh(2.0))
        dx, dparams = torch.autograd.grad(logabsdet.sum(), (x, params), allow_unused=True, materialize_grads=True)
        assert (dx == 0).all()
        exact = params.detach().double().requires_grad_()
        truth = OPS["affine_coupling"].reference(torch.zeros_like(x), exact, split=split, scale=ScaleMap.tanh(2.0))[1]
        torch.testing.assert_close(dparams.double(), torch.autograd.grad(truth.sum(), exact)[0], rtol=1e-5, atol=1e-6)


@of_every_backend
def test_affine_coupling_in_every_layout(backend: str) -> None:
    with flowkern.backend(backend):
        check_affine_layouts()


def check_gaussian_kl(dtype: torch.dtype) -> None:
    seed, (g, k) = torch.tensor([3]), (0.75, -1.25)
    log_scale = torch.tensor([[*EXTREMES, -torch.inf, 1e-9, -1e-9]], dtype=dtype).repeat(4, 1)
    mean = torch.tensor([0.0, -1e-9, 3.0, torch.inf], dtype=dtype)[:, None].repeat(1, log_scale.shape[1])
    args = mean.requires_grad_(), log_scale.requires_grad_()
    z, kl = ops.gaussian_kl(*args, seed=seed)
    noise = _philox.normal(seed, 0, *mean.shape, torch.float64)
    dmean, dlog_scale = torch.autograd.grad(z, args, torch.full_like(z, g), retain_graph=True)
    assert (dmean == g).all()
    scale = log_scale.detach().double().exp()
    _compare(dlog_scale, g * scale * noise, dtype)
    dmean, dlog_scale = torch.autograd.grad(kl, args, torch.full_like(kl, k))
    assert torch.equal(dmean, k * mean)
    _compare(dlog_scale, k * torch.expm1(2 * log_scale.detach().double()), dtype)


def _compare(actual: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal up to rounding; infinite where the value is too large for the dtype, and not NaN."""
    truth_in_dtype = truth.to(dtype)
    assert not actual.isnan().any()
    torch.testing.assert_close(actual.detach(), truth_in_dtype, rtol=256 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


@of_both_dtypes
def test_gaussian_kl_on_every_isa(dtype: torch.dtype, isa: str) -> None:
    with flowkern.backend("cpp"):
        check_gaussian_kl(dtype)


@of_both_dtypes
def test_gaussian_kl_in_torch(dtype: torch.dtype) -> None:
    with flowkern.backend("torch"):
        check_gaussian_kl(dtype)


def check_invertible_linear(inverse: bool) -> None:
    """An infinite x has no say in the log-determinant's gradient, a singular W no part in that of y = W x."""
    weight, bias = torch.tensor([[2.0, 1.0], [0.5, -1.0]]), torch.tensor([0.5, -0.5])
    for shape, infinite in itertools.product([(3, 2), (3, 2, 2, 2)], [torch.inf, torch.nan]):
        x = torch.full(shape, infinite)
        args = [a.clone().requires_grad_() for a in (x, weight, bias)]
        _, logabsdet = ops.invertible_linear(*args, inverse=inverse)
        dx, dweight, dbias = torch.autograd.grad(logabsdet.sum(), args, allow_unused=True, materialize_grads=True)
        assert (dx == 0).all()
        assert (dbias == 0).all()
        pixels = (-3 if inverse else 3) * math.prod(shape[2:])
        torch.testing.assert_close(dweight, pixels * weight.inverse().t())
        known = torch.tensor(0.25, requires_grad=True)
        _, logabsdet = ops.invertible_linear(*args, inverse=inverse, logabsdet=known)
        dx, dknown = torch.autograd.grad(logabsdet.sum(), (args[0], known), allow_unused=True, materialize_grads=True)
        assert (dx == 0).all()
        assert dknown == pixels
    singular = torch.tensor([[1.0, 2.0], [2.0, 4.0]], requires_grad=True)
    if not inverse:
        x = torch.randn(3, 2)
        (dweight,) = torch.autograd.grad(ops.invertible_linear(x, singular)[0].sum(), singular)
        torch.testing.assert_close(dweight, x.sum(0).expand(2, 2))


@both_ways
@of_every_backend
def test_invertible_linear(backend: str, inverse: bool) -> None:
    with flowkern.backend(backend):
        check_invertible_linear(inverse)


@of_every_backend
@of_both_dtypes
def test_autoregressive_inverse(dtype: torch.dtype, backend: str) -> None:
    """Features that no unit sees have scales of 0, and are infinite: log|det dx/dz| = -sum of u still has its gradients."""
    network = AutoregressiveNetwork((1, 2, 3), ((1, 1),), scale=ScaleMap.exp())
    weights = torch.zeros(2, 3, dtype=dtype), torch.zeros(6, 2, dtype=dtype)
    weights[0][:, 0], weights[1][:, 0] = 0.5, 0.25
    raw, shift = network.output_rows
    bias = torch.zeros(6, dtype=dtype)
    bias[raw[1]], bias[raw[2]] = -1e4, -1e4
    for samples in (2, 37):  # few, and many
        z = torch.randn(samples, 3, dtype=dtype).requires_grad_()
        args = [t.clone().requires_grad_() for t in (weights[0], torch.full((2,), 0.5, dtype=dtype), weights[1], bias)]
        x, logabsdet = ops.autoregressive_inverse(z, args, network)
        assert x[:, 1:].isinf().all()
        dz, *grads = torch.autograd.grad(logabsdet.sum(), (z, *args))
        assert dz[:, 1:].count_nonzero() == 0
        assert all(g.isfinite().all() for g in (dz, *grads))
        torch.testing.assert_close(grads[-1][list(raw)[1:]], torch.full((2,), -float(samples), dtype=dtype))
        assert (grads[-1][list(shift)[1:]] == 0).all()


def test_vector_quantize() -> None:
    """Where only the value has a gradient it passes, whatever x is."""
    x = torch.tensor([[torch.inf, 0.0], [1.0, 2.0]], requires_grad=True)
    codebook = torch.eye(2, requires_grad=True)
    quantized, _, _ = ops.vector_quantize(x, codebook)
    dx, dcodebook = torch.autograd.grad(quantized.sum(), (x, codebook), allow_unused=True, materialize_grads=True)
    assert (dx == 1).all()
    assert (dcodebook == 0).all()


def test_compact_plu() -> None:
    """The diagonal overflows: the sum of its logarithms has a gradient all the same."""
    lu = torch.full((3, 3), 1e4, requires_grad=True)
    _, total = compact_plu(lu, torch.ones(3), torch.arange(3))
    assert torch.equal(torch.autograd.grad(total, lu)[0], torch.eye(3))
