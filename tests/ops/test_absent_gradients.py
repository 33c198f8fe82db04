"""Extreme inputs where some outputs have no gradient: an absent gradient is not zero, which times infinity would be NaN.

Ordinary inputs are in ``test_gradients.py``, and affine couplings of every scale in ``test_scale_maps.py``.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import flowkern
from flowkern import OPS, ops
from flowkern._core import philox as _philox
from flowkern.ops import AutoregressiveNetwork, ScaleMap
from flowkern.ops._plu_weight import compact_plu

of_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
EXTREMES = [0.0, *(sign * v for v in (1.0, 50.0, 88.0, 104.0, 1e4) for sign in (1, -1))]
SPLITS = ("channel", "channel_swap", "checkerboard", "checkerboard_swap")


def test_affine_coupling_in_every_layout(where: str) -> None:
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


@of_both_dtypes
def test_gaussian_kl(dtype: torch.dtype, where: str) -> None:
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


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_invertible_linear(inverse: bool, where: str) -> None:
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


@pytest.mark.parametrize("backend", ["auto", "torch"])
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
        with flowkern.backend(backend):
            x, logabsdet = ops.autoregressive_inverse(z, args, network)
            dz, *grads = torch.autograd.grad(logabsdet.sum(), (z, *args))
        assert x[:, 1:].isinf().all()
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
