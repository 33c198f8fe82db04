"""``discretized_logistic_mixture``, ``gaussian_kl`` and ``dequantize``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from comparison import assert_accurate, assert_refused, assert_same, every_dtype, needs_native
from flowkern.bench.memory import peak_extra_bytes
from flowkern.bench.subjects import likelihood
from flowkern.bench.subjects.likelihood import published

import flowkern
from flowkern import nn, ops
from flowkern._core import backend as _backend, philox as _philox
from flowkern.ops import _dequantize as dequantization, _discretized_logistic_mixture as mixture, _gaussian_kl as gaussian

of_both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)

# Mixture of discretized logistics


def image(shape: tuple[int, ...], components: int = 3, levels: int = 256, dtype: torch.dtype = torch.float64) -> Any:
    """(levels with both ends among them, params)."""
    rows = (10 if shape[1] == 3 else 3) * components
    x = torch.randint(levels, shape)
    if x.numel():
        x.view(-1)[::3], x.view(-1)[::4] = 0, levels - 1
    params = torch.randn(shape[0], rows, *shape[2:], dtype=torch.float64)
    per_channel = params[:, components:].unflatten(1, (shape[1], -1, components))
    per_channel[:, :, 1] = 2.0 * per_channel[:, :, 1] - 2.0
    return x, params.to(dtype)


def values_and_gradient(function: Any, x: torch.Tensor, params: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = params.detach().requires_grad_()
    log_prob = function(x, leaf, **kwargs)
    grad = torch.linspace(-1.0, 2.0, len(log_prob), dtype=torch.float64).to(log_prob)
    return log_prob.detach(), torch.autograd.grad(log_prob, leaf, grad)[0]


@of_both_dtypes
def test_mixture_with_an_offset(dtype: torch.dtype, where: str) -> None:
    """What all logits have in common has no say, exactly: the logits are such that adding it rounds nothing."""
    x, params = image((2, 3, 4, 8), 3, dtype=dtype)
    params[:, :3] = (4 * params[:, :3]).round() / 4
    plain = values_and_gradient(ops.discretized_logistic_mixture, x, params)
    for offset in (1e6, -1e6):
        moved = params.clone()
        moved[:, :3] += offset
        assert_same(values_and_gradient(ops.discretized_logistic_mixture, x, moved), plain)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_mixture_sums_to_one_over_all_levels(backend: str) -> None:
    """The bins of all levels are everything there is, given the channels before."""
    levels = 6
    _, params = image((1, 3, 1, 1), 3, levels, torch.float32)
    grid = torch.cartesian_prod(*[torch.arange(levels)] * 3)
    with flowkern.backend(backend):
        log_prob = ops.discretized_logistic_mixture(grid[:, :, None, None], params.expand(len(grid), -1, 1, 1), levels=levels)
    torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0))


def test_mixture_in_float32_is_that_in_float64_everywhere(anywhere: str) -> None:
    """One pixel at a time: to 1e-5, for scales from e^-20 to e^8, and levels and means that are near and far."""
    n = 10 if _backend.interpreting() else 20000
    x = torch.randint(256, (n, 3, 1, 1))
    x[: n // 8] = torch.tensor([0, 255])[torch.randint(2, (n // 8, 3, 1, 1))]
    params = torch.randn(n, 20, 1, 1)
    parts = params[:, 2:].unflatten(1, (3, 3, 2))
    parts[:, :, 0] = torch.where(
        torch.rand(n, 3, 2, 1, 1) < 0.5, x[:, :, None] / 127.5 - 1.0 + 0.01 * parts[:, :, 0], parts[:, :, 0]
    )
    parts[:, :, 1] = torch.empty(n, 3, 2, 1, 1).uniform_(-20.0, 8.0)
    exact, exact_gradient = values_and_gradient(mixture.reference, x, params.double())
    actual, gradient = values_and_gradient(ops.discretized_logistic_mixture, x, params)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0.0)
    assert gradient.isfinite().all()
    scale = exact_gradient.abs().flatten(1).max(1).values[:, None, None, None]
    assert ((gradient - exact_gradient).abs() <= 1e-3 * scale).all()


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_compat_gives_the_published_values(backend: str) -> None:
    x, params = image((4, 3, 6, 6), 5)
    params[:, 5:].unflatten(1, (3, 3, 5))[:, :, 1] *= 2.5  # also under -7
    with flowkern.backend(backend):
        actual, gradient = values_and_gradient(ops.discretized_logistic_mixture, x, params, compat="pixelcnn++")
    expected, expected_gradient = values_and_gradient(published, x, params)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=0.0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(actual, mixture.reference(x, params), rtol=1e-3)


def test_mixture_of_any_dtype_and_strides() -> None:
    x, params = image((2, 3, 6, 7), 2, dtype=torch.float32)
    expected = values_and_gradient(ops.discretized_logistic_mixture, x, params)
    for dtype in (torch.uint8, torch.int16, torch.float16):
        assert torch.equal(values_and_gradient(ops.discretized_logistic_mixture, x.to(dtype), params)[0], expected[0])
    last = params.to(memory_format=torch.channels_last)
    wide = torch.zeros(2, 20, 6, 14)
    wide[..., ::2] = params
    for strided in (last, wide[..., ::2], params.transpose(2, 3).contiguous().transpose(2, 3)):
        log_prob, gradient = values_and_gradient(ops.discretized_logistic_mixture, x, strided)
        torch.testing.assert_close(log_prob, expected[0], rtol=1e-6, atol=0.0)
        torch.testing.assert_close(gradient, expected[1])
    assert values_and_gradient(ops.discretized_logistic_mixture, x, last)[1].is_contiguous(memory_format=torch.channels_last)


def test_mixture_gradient_twice_and_never() -> None:
    x, params = image((2, 3, 3, 3), 2, dtype=torch.float32)
    leaf = params.requires_grad_()
    log_prob = ops.discretized_logistic_mixture(x, leaf)
    first = torch.autograd.grad(log_prob.sum(), leaf, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(log_prob, leaf, torch.tensor([2.0, -1.0]))[0]
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, kept * torch.tensor([2.0, -1.0]).view(2, 1, 1, 1))
    with torch.no_grad():
        assert torch.equal(ops.discretized_logistic_mixture(x, leaf), log_prob)


@needs_native
def test_mixture_keeps_nothing_but_its_gradient() -> None:
    """Above its results, loss and gradient take less than a tenth of what the published algorithm takes, eagerly."""
    x, params = image((4, 3, 16, 16), 10, dtype=torch.float32)
    extra = [
        peak_extra_bytes(likelihood.loss_and_gradient(function, x, params), torch.device("cpu"))
        for function in (ops.discretized_logistic_mixture, published)
    ]
    assert 10 * extra[0] <= extra[1]


def test_mixture_samples_follow_the_distribution() -> None:
    """Frequencies of all levels of a pixel, and of the pairs of two channels that depend on each other."""
    levels, n = 4, 40000
    for channels in (1, 3):
        _, params = image((1, channels, 1, 1), 2, levels, torch.float32)
        params[:, 2:].unflatten(1, (channels, -1, 2))[:, :, 1].clamp_(min=-1.5)
        drawn = ops.sample_discretized_logistic_mixture(params.expand(n, -1, 1, 1), channels=channels, levels=levels).flatten(1)
        grid = torch.cartesian_prod(*[torch.arange(levels)] * channels).view(-1, channels)
        expected = ops.discretized_logistic_mixture(
            grid[..., None, None], params.expand(len(grid), -1, 1, 1), levels=levels
        ).exp()
        code = (drawn.long() * levels ** torch.arange(channels - 1, -1, -1)).sum(1)
        seen = torch.bincount(code, minlength=len(grid)) / n
        assert (seen - expected).abs().max() < 5 * (0.25 / n) ** 0.5
    noise = torch.rand(2, 3, 2, 2), torch.rand(2, 3, 2, 2)
    _, params = image((2, 3, 2, 2), 3, dtype=torch.float32)
    a, b = (ops.sample_discretized_logistic_mixture(params, noise=noise, temperature=t) for t in (0.0, 1e-6))
    assert a.dtype is torch.uint8
    assert torch.equal(a, b)
    assert ops.sample_discretized_logistic_mixture(params, levels=1024).dtype is torch.int32


# Gaussian KL


@every_dtype
def test_gaussian_kl_near_the_prior(dtype: torch.dtype, anywhere: str) -> None:
    """Where log_scale is nearly 0, the divergence and its gradient are far smaller than exp(2 log_scale) and 1."""
    for magnitude in (1e-2, 1e-3, 1e-4, 1e-5):
        log_scale = (magnitude * torch.randn(2, 70, dtype=torch.float64)).to(dtype).requires_grad_()
        twice = 2.0 * log_scale.detach().double()
        rest = sum(twice**k / math.factorial(k) for k in range(2, 13))  # exp(2 log_scale) - 1 - 2 log_scale
        results = []
        for function in (ops.gaussian_kl, gaussian.reference):
            kl = function(torch.zeros_like(log_scale), log_scale, seed=torch.tensor([5]))[1]
            results.append((kl, torch.autograd.grad(kl.sum(), log_scale)[0]))
        for actual, exact, plain in zip(results[0], (0.5 * rest.sum(1), twice + rest), results[1], strict=True):
            assert_accurate(actual, exact, plain)


@of_both_dtypes
def test_gaussian_kl_to_the_last_digits(dtype: torch.dtype, where: str) -> None:
    """Element by element against mpmath, down to divergences that are far smaller than the rounding of what they are sums of."""
    step = 9 if _backend.interpreting() else 1  # a program for each
    sizes = torch.cat([torch.logspace(-12, 0, 49, dtype=torch.float64), torch.tensor([0.2499, 0.2501, 0.4999, 0.5001, 3.0, 9.0])])
    scales = torch.cat([torch.zeros(1, dtype=torch.float64), sizes, -sizes]).to(dtype)[::step]
    mean, log_scale = (
        v.reshape(-1, 1) for v in torch.meshgrid(torch.tensor([0.0, 1e-12, -1e-9, 1e-3, 2.0], dtype=dtype), scales, indexing="ij")
    )
    log_scale.requires_grad_()
    kl = ops.gaussian_kl(mean, log_scale, seed=1)[1]
    (slope,) = torch.autograd.grad(kl.sum(), log_scale)
    with mpmath.workdps(60):
        pairs = [
            (mpmath.mpf(m), mpmath.mpf(s)) for m, s in zip(mean.flatten().tolist(), log_scale.flatten().tolist(), strict=True)
        ]
        exact = torch.tensor([float((m * m + mpmath.expm1(2 * s)) / 2 - s) for m, s in pairs], dtype=torch.float64)
        exact_slope = torch.tensor([float(mpmath.expm1(2 * s)) for _, s in pairs], dtype=torch.float64)
    relative = (12 if dtype is torch.float32 else 6) * torch.finfo(dtype).eps
    torch.testing.assert_close(kl.double(), exact, rtol=relative, atol=0)
    torch.testing.assert_close(slope.flatten().double(), exact_slope, rtol=relative * 4, atol=0)


def test_gaussian_kl_far_from_the_prior() -> None:
    """Scales that underflow, a large one, and NaN."""
    for dtype in (torch.float32, torch.float64):
        log_scale = torch.tensor([-5000.0, -math.inf, 40.0, math.nan], dtype=dtype)[:, None].requires_grad_()
        results = []
        for function in (ops.gaussian_kl, gaussian.reference):
            kl = function(torch.zeros_like(log_scale), log_scale, seed=torch.tensor([1]))[1]
            results.append((kl, *torch.autograd.grad(kl.sum(), log_scale)))
        torch.testing.assert_close(*results, equal_nan=True)
        assert results[0][1][:2].flatten().tolist() == [-1.0, -1.0]


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 with Python's integers, as the paper has it."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def test_philox_is_that_of_its_authors() -> None:
    """The known answers of the authors' library, and the reference's place for each number."""
    assert philox((0, 0), (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**32 - 1
    assert philox((ones, ones), (ones, ones, ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    seed, offset = -(2**62) + 12345, 2**40 + 7
    actual = _philox.bits(torch.tensor([seed]), offset, 3, 130)
    for b, g, w, i in ((0, 0, 0, 0), (1, 0, 3, 15), (2, 1, 2, 5), (2, 2, 0, 1)):
        key = (seed % 2**32, (seed >> 32) % 2**32)
        assert actual[b, 64 * g + 16 * w + i] == philox(key, (16 * g + i, b, offset % 2**32, offset >> 32))[w]


def test_kernels_use_the_same_integers(anywhere: str) -> None:
    """Of each integer 24 bits, which ``dequantize`` keeps."""
    v = torch.zeros(3, 1000, dtype=torch.uint8)
    seed, offset = 2**62 + 99, 2**40 + 7
    x, _ = ops.dequantize(v, seed=seed, offset=offset, levels=2, dtype=torch.float64)
    bits = _philox.bits(torch.tensor([seed]), offset, 3, 1000)
    assert torch.equal((x * 2**25).long(), bits >> 8)


def test_noise_is_standard_normal() -> None:
    n = 2**18
    noise = ops.gaussian_kl(torch.zeros(4, n // 4), torch.zeros(4, n // 4), seed=1)[0].double().flatten()
    error = n**-0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(noise.pow(power).mean() - moment) < 5 * error * variance**0.5
    edges = torch.linspace(-3, 3, 25, dtype=torch.float64)
    for edge in edges:
        assert abs((noise < edge).double().mean() - torch.special.ndtr(edge)) < 5 * 0.5 * error
    for lag in (1, 16, 32, 64, n // 4):
        assert abs((noise[:-lag] * noise[lag:]).mean()) < 5 * error


def test_gaussian_kl_is_the_divergence() -> None:
    mean, log_scale = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    posterior = torch.distributions.Normal(mean, log_scale.exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(posterior, standard).sum(1)
    torch.testing.assert_close(ops.gaussian_kl(mean, log_scale)[1], expected)


# Dequantization


@every_dtype
def test_dequantize_is_its_formula(dtype: torch.dtype, anywhere: str) -> None:
    cases: list[tuple[tuple[int, ...], int]] = [((3, 5), 256), ((2, 3, 17, 19), 256), ((2, 3), 65536), ((2, 2000), 32)]
    for shape, levels in cases[: 1 if _backend.interpreting() else None]:
        v = torch.randint(levels, shape, dtype=torch.uint8 if levels <= 256 else torch.int32)
        for alpha in (None, 0.0, 0.05):
            seed = torch.tensor([11])
            # The noise is that of the dtype, whose rounding decides how near the ends values come.
            w = dequantization._noisy(v, seed, 0, torch.float64 if dtype is torch.float64 else torch.float32).double()
            exact, each = w / levels, torch.full_like(w, -math.log(levels))
            if alpha is not None:
                low, high = alpha + (1 - 2 * alpha) * exact, alpha + (1 - 2 * alpha) * (levels - w) / levels
                exact = low.log() - high.log()
                each += math.log(1 - 2 * alpha) - low.log() - high.log()
            x, logabsdet = ops.dequantize(v, levels=levels, alpha=alpha, seed=11, dtype=dtype)
            assert x.dtype is dtype
            assert_accurate(x, exact, ulps=64 if dtype is torch.float64 else 2)
            assert_accurate(logabsdet, each.flatten(1).sum(1), ulps=64)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_dequantize_stays_in_its_bin_and_off_the_ends(backend: str) -> None:
    v = torch.arange(256, dtype=torch.uint8).expand(4, 1000, 256)
    with flowkern.backend(backend):
        x, _logabsdet = ops.dequantize(v)
        z, with_logit = ops.dequantize(v, alpha=0.0)
    assert torch.equal((x * 256).floor(), v.float())
    assert x.min() > 0
    assert x.max() < 1
    assert z.isfinite().all()
    assert with_logit.isfinite().all()
    assert abs((x * 256 - v).mean() - 0.5) < 1e-3
    assert not torch.equal(*(ops.dequantize(v)[0] for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dequantize_to_half_precision(dtype: torch.dtype, anywhere: str) -> None:
    """All levels: values are rounded towards zero, so that they stay under 1, and in bins whose ends the dtype holds."""
    for levels in (256, 200):
        v = torch.arange(levels, dtype=torch.uint8).expand(4 if _backend.interpreting() else 200, levels)
        x, _ = ops.dequantize(v, levels=levels, seed=3, dtype=dtype)
        wide, _ = ops.dequantize(v, levels=levels, seed=3)
        assert x.dtype is dtype
        assert x.min() >= 0
        assert x.max() < 1
        assert (x.float() <= wide).all()
        assert ((x.view(torch.int16) + 1).view(dtype).float() > wide).all()  # the next number has the next bits
        assert levels == 200 or torch.equal((x.double() * 256).floor(), v.double())


def test_dequantize_agrees_with_the_logit_layer() -> None:
    v = torch.randint(256, (2, 3, 4, 5))
    x, of_scale = ops.dequantize(v, seed=2, dtype=torch.float64)
    z, logabsdet = ops.dequantize(v, seed=2, alpha=0.05, dtype=torch.float64)
    expected, of_logit = nn.Logit(0.05)(x)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(logabsdet, of_scale + of_logit)
    strided = v.to(torch.uint8).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(ops.dequantize(strided, seed=2, dtype=torch.float64)[0], x)


def test_bad_input_is_named() -> None:
    x, params = image((2, 3, 3, 4), 2, dtype=torch.float32)
    mean = torch.randn(2, 3)
    refused: dict[Callable[..., Any], dict[str, tuple[Any, ...]]] = {
        ops.discretized_logistic_mixture: {
            "ValueError: x: expected 1 or 3 channels, got 2": (x[:, :2], params),
            "ValueError: params: expected a multiple of 10 channels for 3 of x, got 19": (x, params[:, 1:]),
            r"ValueError: params: expected the batch and pixels of x of shape \(2, 3, 3, 3\), got \(2, 20, 3, 4\)": (
                *(x[..., 1:], params),
            ),
            r"ValueError: levels: expected 2 to 2\*\*20, got 1": (x, params, {"levels": 1}),
            r"ValueError: compat: expected None or 'pixelcnn\+\+', got 'other'": (x, params, {"compat": "other"}),
            r"ValueError: x: expected \(B, C, H, W\), got shape \(3, 3, 4\)": (x[0], params),
            "TypeError: params: expected a floating dtype .* got torch.int64": (x, params.long()),
            "TypeError: x: expected a tensor of integers, got torch.bool": (x > 1, params),
        },
        ops.sample_discretized_logistic_mixture: {
            "ValueError: temperature: expected at least 0, got -1": (params, {"temperature": -1}),
            r"ValueError: noise: expected shape \(2, 2, 3, 4\) for the components": (params, {"noise": (x[0], x[0])}),
            "ValueError: noise: expected two tensors, for the components and for the levels, got 1": (params, {"noise": (x,)}),
        },
        ops.gaussian_kl: {
            r"ValueError: log_scale: expected shape \(2, 3\) as mean has, got \(3, 2\)": (mean, mean.t()),
            "TypeError: seed: expected an int, an int64 tensor of one element, or None, got float": (mean, mean, {"seed": 0.5}),
            "ValueError: offset: expected 64 bits": (mean, mean, {"offset": 2**64}),
        },
        ops.dequantize: {
            "TypeError: v: expected a tensor of integers, got torch.float32": (mean,),
            r"ValueError: alpha: expected a number in \[0, 0.5\), got 0.5": (x, {"alpha": 0.5}),
            "TypeError: offset: expected an int, got float": (x, {"offset": 1.0}),
        },
    }
    for function, cases in refused.items():
        assert_refused(function, cases)


@pytest.mark.parametrize("log_scale", [-2.0, -12.0, -16.0, -20.0])
def test_the_gradient_of_the_mean_is_shared_out_in_full(log_scale: float) -> None:
    """Of components that are alike the gradients add up to that of one, also where log-masses of 1e8 hide log K."""

    def gradient(components: int, dtype: torch.dtype) -> torch.Tensor:
        zeros = torch.zeros(components)
        params = torch.cat([zeros, zeros + 0.3, zeros + log_scale]).view(1, -1, 1, 1).to(dtype).requires_grad_()
        ops.discretized_logistic_mixture(torch.full((1, 1, 1, 1), 100), params).sum().backward()
        return params.grad[0, components : 2 * components].sum().double()

    for backend in ("torch", "cpp"):
        with flowkern.backend(backend):
            torch.testing.assert_close(gradient(10, torch.float32), gradient(1, torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [2**64 - 1, 2**63, -1, 2**40])
def test_offsets_of_64_bits(offset: int) -> None:
    mean, v = torch.zeros(2, 70), torch.zeros(2, 70, dtype=torch.uint8)
    draws = []
    for backend in ("torch", "cpp"):
        with flowkern.backend(backend):
            draws.append((ops.gaussian_kl(mean, mean, seed=1, offset=offset)[0], ops.dequantize(v, seed=1, offset=offset)[0]))
    for ours, plain in zip(*draws, strict=True):
        torch.testing.assert_close(ours, plain)
    assert not torch.equal(draws[0][0], ops.gaussian_kl(mean, mean, seed=1, offset=offset - 1)[0])
