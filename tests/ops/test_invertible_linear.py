"""What is special about ``invertible_linear``: known inverses and log-determinants, singular matrices, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_accurate, assert_refused, assert_threads_do_not_matter, check, needs_native, results

from flowkern import OPS
from flowkern._core import backend as _backend
from flowkern._core.op import Sample
from flowkern.ops import invertible_linear


def matrix(channels: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A matrix with a condition number of about 4."""
    q = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
    return (q * torch.linspace(0.5, 2.0, channels, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_known_logabsdet_takes_the_gradient(inverse: bool) -> None:
    x, weight, bias = torch.randn(3, 5, 2, 4, dtype=torch.float64), matrix(5).requires_grad_(), torch.randn(5).double()
    known = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y, logabsdet = invertible_linear(x, weight, bias, inverse=inverse, logabsdet=known)
    pixels = -8 if inverse else 8
    torch.testing.assert_close(logabsdet, torch.full((3,), pixels * 0.7, dtype=torch.float64))
    by_weight, by_known = torch.autograd.grad(logabsdet.sum(), (weight, known), retain_graph=True, allow_unused=True)
    assert by_weight is None or not by_weight.any()
    assert by_known.item() == 3 * pixels
    # And the rest of weight's gradient is what it is without.
    g = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, weight, g)
    (expected,) = torch.autograd.grad(invertible_linear(x, weight, bias, inverse=inverse)[0], weight, g)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_known_inverse_changes_nothing(inverse: bool) -> None:
    x, bias = torch.randn(3, 5, 2, 4, dtype=torch.float64), torch.randn(5).double()
    weight = matrix(5).requires_grad_()
    known = torch.linalg.inv(weight.detach()).requires_grad_()

    def results(**kwargs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, logabsdet = invertible_linear(x, weight, bias, inverse=inverse, **kwargs)
        g = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)
        leaves = (weight, *kwargs.values())
        grads = torch.autograd.grad((y, logabsdet), leaves, (g, torch.ones_like(logabsdet)), allow_unused=True)
        assert all(g is None or not g.any() for g in grads[1:])
        return y, logabsdet, grads[0]

    torch.testing.assert_close(results(weight_inverse=known), results())
    with torch.no_grad():
        y, _ = invertible_linear(x, weight, bias, inverse=True, weight_inverse=2 * known)
        torch.testing.assert_close(y, 2 * invertible_linear(x, weight, bias, inverse=True)[0])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.ones(4, 4), torch.full((4, 4), float("nan"))])
def test_a_singular_matrix_shows_in_the_logabsdet(weight: torch.Tensor, inverse: bool) -> None:
    x, weight = torch.randn(2, 4, 3, 3, requires_grad=True), weight.clone().requires_grad_()
    y, logabsdet = invertible_linear(x, weight, inverse=inverse)
    assert not logabsdet.isfinite().any()
    (y.sum() + logabsdet.sum()).backward()
    assert weight.grad is not None
    assert not weight.grad.isfinite().all()


def test_bad_input_is_named() -> None:
    x, weight = torch.randn(2, 4, 3, 3), torch.eye(4)
    cases = {
        r"ValueError: weight: expected shape \(4, 4\) for x of shape \(2, 4, 3, 3\), got \(4, 5\)": (x, torch.ones(4, 5)),
        r"ValueError: bias: expected shape \(4,\) .* got \(1, 4\)": (x, weight, torch.ones(1, 4)),
        r"ValueError: weight_inverse: expected shape \(4, 4\) .* got \(3, 3\)": (x, weight, {"weight_inverse": torch.eye(3)}),
        r"ValueError: logabsdet: expected shape \(\) .* got \(1,\)": (x, weight, {"logabsdet": torch.zeros(1)}),
        r"TypeError: logabsdet: expected a tensor, got float": (x, weight, {"logabsdet": 0.0}),
        r"TypeError: weight: expected a tensor, got NoneType": (x, None),
        r"TypeError: bias: expected a floating dtype .* got torch.int64": (x, weight, torch.ones(4, dtype=torch.int64)),
    }
    assert_refused(invertible_linear, cases)


def test_both_directions_against_the_jacobian() -> None:
    x, weight, bias = torch.randn(2, 3, 2, 2, dtype=torch.float64), matrix(3), torch.randn(3, dtype=torch.float64)
    y, logabsdet = invertible_linear(x, weight, bias)
    torch.testing.assert_close(y, torch.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None])
    torch.testing.assert_close(logabsdet, 4 * torch.linalg.slogdet(weight)[1].expand(2))
    back, negated = invertible_linear(y, weight, bias, inverse=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(negated, -logabsdet)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("channels", [1, 2, 3, 7, 12, 16, 17, 24, 33, 64, 97])
def test_every_size_of_channels_and_pixels(channels: int, channels_last: bool, canaries: Any) -> None:
    """Whole and broken vectors, tiles and runs; what lies beside the outputs stays as it is."""
    for height, width in ((1, 1), (3, 5), (8, 8), (16, 20)):
        for inverse in (False, True):
            x = torch.randn(3, channels, height, width)
            x = x.to(memory_format=torch.channels_last) if channels_last else x
            sample = Sample("", (x, matrix(channels, torch.float32), torch.randn(channels)), {"inverse": inverse})
            check(OPS["invertible_linear"], sample, ["auto"], ulps=8)
    if _backend.native is not None:
        canaries.assert_alive()


@pytest.mark.parametrize("channels", [1, 5, 16, 17, 50, 100])
def test_the_factorization_is_that_of_float64(channels: int) -> None:
    weight = torch.randn(channels, channels, dtype=torch.float64)
    x = torch.randn(3, channels, dtype=torch.float64)
    y, logabsdet = invertible_linear(x, weight)
    torch.testing.assert_close(logabsdet, torch.linalg.slogdet(weight)[1].expand(3))
    torch.testing.assert_close(invertible_linear(y, weight, inverse=True)[0], x, rtol=1e-8, atol=1e-8)
    # A float32 W is factorized in float64, too.
    single = weight.float()
    actual = invertible_linear(x.float(), single, inverse=True)[1]
    torch.testing.assert_close(actual, -torch.linalg.slogdet(single.double())[1].float().expand(3), rtol=3e-7, atol=0)


def test_an_offset_far_from_zero_costs_no_digits() -> None:
    """x - b is formed before the product."""
    weight, bias = matrix(12, torch.float32), 1000 + torch.randn(12)
    for x in (bias + torch.randn(40, 12), (bias[:, None, None] + torch.randn(2, 12, 4, 8))):
        exact = invertible_linear(x.double(), weight.double(), bias.double(), inverse=True)[0]
        assert_accurate(invertible_linear(x, weight, bias, inverse=True)[0], exact)


@needs_native
@pytest.mark.parametrize("channels", [12, 96])
def test_same_bits_for_any_number_of_threads(channels: int) -> None:
    """Also where a factorization and the products of the gradient are divided among threads."""
    weight, bias = matrix(channels, torch.float32), torch.randn(channels)
    sample = Sample("", (torch.randn(8, channels, 24, 24), weight, bias), {"inverse": True})
    assert_threads_do_not_matter(lambda: results(invertible_linear, sample))


def test_the_reference_convolves_nothing_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN multiplies float32 in TF32, and the reference is what kernels are held against."""
    inputs = torch.randn(2, 3, 4, 5), torch.randn(3, 3), torch.randn(3)
    expected, _ = OPS["invertible_linear"].reference(*inputs)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.nn.functional, "conv2d", None)
    torch.testing.assert_close(OPS["invertible_linear"].reference(*inputs)[0], expected)
