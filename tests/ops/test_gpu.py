"""Every op of OPS on a CUDA GPU: what can only be seen there. ``python -m bench.gpu_check`` runs these tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import test_likelihood_ops as test_likelihood_everywhere
import torch
from comparison import INVERTIBLE, Tensors, arguments, assert_accurate, change_samples, output_gradients

import flowkern
from flowkern import nn, ops
from flowkern._core import backend as _backend
from flowkern._core.op import Op, Sample
from flowkern.ops import _masked_linear
from flowkern.ops.autoregressive import inverse as _autoregressive_inverse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEVICE = "cuda"
every_op = pytest.mark.parametrize("op", INVERTIBLE.values(), ids=INVERTIBLE)


def samples(op: Op, dtype: torch.dtype = torch.float32) -> list[Sample]:
    torch.manual_seed(0)
    return list(op.samples(DEVICE, dtype))


def images(op: Op) -> list[Sample]:
    """The samples on images that are not empty."""
    return [s for s in samples(op) if s.args[0].ndim == 4 and s.args[0].numel()]


def run(function: Callable[..., Any], args: Tensors, kwargs: dict[str, Any]) -> Tensors:
    """The outputs, and the gradients of all arguments for fixed output gradients."""
    outputs = function(*args, **kwargs)
    given = [g.to(y) for g, y in zip(output_gradients(outputs), outputs, strict=True)]
    recorded = [i for i, y in enumerate(outputs) if y.requires_grad]
    grads = torch.autograd.grad(
        [outputs[i] for i in recorded], args, [given[i] for i in recorded], allow_unused=True, materialize_grads=True
    )
    return *outputs, *grads


def larger(op: Op, sample: Sample, elements: int = 2**20) -> Sample:
    """The sample with its batch repeated, so that there is work for all multiprocessors."""
    repeats = max(1, elements // sample.args[0].numel())
    args = change_samples(op, lambda a: a.repeat(repeats, *[1] * (a.ndim - 1)), sample.args)
    return Sample(sample.name, args, sample.kwargs)


def check(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    """No result is off by more than twice what plain torch code in the same dtypes is off, against float64."""
    results = run(op.function, arguments(sample), sample.kwargs)
    exact = run(op.reference, arguments(sample, torch.float64), sample.kwargs)
    plain = run(op.reference, arguments(sample), sample.kwargs)
    for actual, truth, same_dtype in zip(results, exact, plain, strict=True):
        assert actual.device.type == DEVICE
        assert actual.dtype == same_dtype.dtype
        # In float64 the reference is the truth itself: grant its own rounding, of sums too.
        assert_accurate(actual, truth, same_dtype, ulps=64 if dtype is torch.float64 else 4)


# Each configuration is compiled anew; float64 and float16 differ from the others in nothing but casts.
@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float64, 4), (torch.float16, 4)])
@every_op
def test_values_and_gradients(op: Op, dtype: torch.dtype, step: int) -> None:
    for sample in samples(op, dtype)[::step]:
        check(op, sample, dtype)


@every_op
def test_many_programs(op: Op) -> None:
    for sample in images(op)[:6]:
        check(op, larger(op, sample), torch.float32)


@every_op
def test_memory_format_is_kept(op: Op) -> None:
    for sample in images(op):
        x = sample.args[0].contiguous(memory_format=torch.channels_last)
        y = op.function(x, *sample.args[1:], **sample.kwargs)[0]
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, op.reference(*sample.args, **sample.kwargs)[0], rtol=1e-4, atol=1e-5)


@every_op
def test_compile(op: Op) -> None:
    for sample in (samples(op)[0], *images(op)[:1]):
        torch._dynamo.reset()
        compiled = torch.compile(lambda *args, kwargs=sample.kwargs: op.function(*args, **kwargs), fullgraph=True)
        expected = run(op.function, arguments(sample), sample.kwargs)
        for a, b in zip(run(compiled, arguments(sample), {}), expected, strict=True):
            torch.testing.assert_close(a, b)


@every_op
def test_autocast(op: Op) -> None:
    """Under autocast a conditioner gives half-precision parameters; the log-determinant stays in float32."""
    for sample in (s for s in samples(op) if all(a.dtype is torch.float32 for a in s.args)):
        x, *rest = sample.args
        for half in (torch.bfloat16, torch.float16):
            rounded = (x, *(a.to(half) for a in rest))
            with torch.autocast(DEVICE, half):
                y, logabsdet = op.function(*rounded, **sample.kwargs)
            exact = op.reference(*(a.double() for a in rounded), **sample.kwargs)
            plain = op.reference(*rounded, **sample.kwargs)
            assert y.dtype == logabsdet.dtype == torch.float32
            assert_accurate(y, exact[0], plain[0])
            assert_accurate(logabsdet, exact[1], plain[1])


@every_op
def test_same_bits_again(op: Op) -> None:
    for sample in images(op)[:6]:
        several = larger(op, sample, 2**22)
        first, second = (run(op.function, arguments(several), several.kwargs) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def prepared(op: Op, sample: Sample) -> tuple[Tensors, Callable[[], Tensors]]:
    """Arguments, and a call that computes outputs and gradients of them; it has run, so that all kernels are compiled."""
    args = arguments(sample)
    outputs = op.function(*args, **sample.kwargs)
    recorded = [i for i, y in enumerate(outputs) if y.requires_grad]
    given = [g.to(outputs[i]) for i, g in enumerate(output_gradients(outputs)) if i in recorded]

    def call() -> Tensors:
        outputs = op.function(*args, **sample.kwargs)
        ys = [outputs[i] for i in recorded]
        return *outputs, *torch.autograd.grad(ys, args, given, allow_unused=True, materialize_grads=True)

    call()
    torch.cuda.synchronize()
    return args, call


@contextmanager
def no_synchronization() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_the_host_never_waits(op: Op) -> None:
    for sample in samples(op):
        _, call = prepared(op, sample)
        with no_synchronization():
            call()


def check_cuda_graph(inputs: Sequence[torch.Tensor], call: Callable[[], Sequence[torch.Tensor]]) -> None:
    """A recorded call, replayed on other inputs, gives what a call on them gives."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for replayed, direct in zip(results, call(), strict=True):
        assert torch.equal(replayed, direct)


@every_op
def test_cuda_graph(op: Op) -> None:
    for sample in (samples(op)[0], *images(op)[:4]):
        args, call = prepared(op, larger(op, sample))
        check_cuda_graph(args, call)


@every_op
def test_a_stream_of_its_own(op: Op) -> None:
    """Kernels are launched where torch's other work is: on the current stream."""
    sample = larger(op, images(op)[0])
    expected = op.function(*sample.args, **sample.kwargs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: the inputs below come late
        late = tuple(a.clone() for a in sample.args)
        results = op.function(*late, **sample.kwargs)
    stream.synchronize()
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


#: Over 2**31 elements in one sample, and in all samples together.
SHAPES = {"one-sample": (1, 2, 2**15, 2**15 + 8), "many-samples": (2**20 + 16, 2**11)}


def part(a: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A piece along the axis that is long: samples, or the lines of an image."""
    return (a[start:stop] if a.ndim == 2 else a[:, :, start:stop]).detach()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("op", [op for op in INVERTIBLE.values() if op.per_sample is None], ids=lambda op: op.name)
def test_more_than_2_to_the_31_elements(op: Op, shape: tuple[int, ...]) -> None:
    """Elements past 2**31 are read and written where they lie."""
    plain = (s.args for s in samples(op) if not any(s.kwargs.values()))
    x, *rest = next(args for args in plain if args[0].ndim == len(shape) and args[0].shape[1] % 2 == 0)
    shapes = [(shape[0], a.shape[1] * shape[1] // x.shape[1], *shape[2:]) for a in rest]
    needed = 2 * sum(4 * torch.Size(s).numel() for s in (shape, *shapes)) + 2**31
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")
    args = tuple(torch.randn(s, dtype=torch.bfloat16, device=DEVICE).requires_grad_() for s in (shape, *shapes))
    y, logabsdet = op.function(*args)
    assert y.numel() > 2**31
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, args, grad)
    length = shape[0] if len(shape) == 2 else shape[2]
    for start in (0, length // 2 - 8, length - 16):
        pieces = tuple(part(a, start, start + 16).requires_grad_() for a in args)
        expected, expected_logabsdet = op.reference(*pieces)
        torch.testing.assert_close(part(y, start, start + 16), expected.detach())
        for a, b in zip(grads, torch.autograd.grad(expected, pieces, part(grad, start, start + 16)), strict=True):
            torch.testing.assert_close(part(a, start, start + 16), b)
        if len(shape) == 2:
            torch.testing.assert_close(logabsdet[start : start + 16], expected_logabsdet)
    if len(shape) == 4:
        sums = [op.reference(*(part(a, i, i + 2**11) for a in args))[1].double() for i in range(0, length, 2**11)]
        torch.testing.assert_close(logabsdet.double(), torch.stack(sums).sum(0), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Masked networks, which are no ops of the table: they return other things, or take lists


def test_the_cuda_extension_serves_this_gpu() -> None:
    """Nothing falls back in silence: with the extension, the sweep is one launch."""
    if _backend.native_cuda is None:
        pytest.skip(_backend._native_cuda_reason)
    text = flowkern.explain(ops.autoregressive_inverse, torch.randn(2, 3, device=DEVICE))
    assert "cuda   serves" in text, text


def test_the_autoregressive_inverse_is_that_of_plain_torch() -> None:
    """Every activation, residual or not, every scale, and chains: the backend that serves against the torch sweep, both here."""
    torch.manual_seed(0)
    for sample in _autoregressive_inverse._samples(DEVICE, torch.float32):
        z = sample.args[0].detach().requires_grad_()
        results = []
        for backend in ("auto", "torch"):
            with flowkern.backend(backend):
                x, logabsdet = ops.autoregressive_inverse(z, *sample.args[1:], **sample.kwargs)
                (grad,) = torch.autograd.grad(x.sum() + logabsdet.sum(), z)
            results.append((x.detach(), logabsdet.detach(), grad))
        for actual, expected in zip(*results, strict=True):
            assert actual.is_cuda
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4, msg=lambda text, s=sample: f"{s.name}: {text}")


@pytest.mark.parametrize(("features", "hidden"), [(3072, (512, 512)), (64, (256, 256))])
def test_a_layer_is_inverted(features: int, hidden: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.MaskedAutoregressive(features, hidden).to(DEVICE)
    x = torch.randn(100, features, device=DEVICE)
    with torch.no_grad():
        z, logabsdet = layer(x)
        back, negative = layer.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(negative, -logabsdet, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 4, 3), (70, 200, 100), (300, 784, 1024)])
def test_masked_linear(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, inputs, outputs = size
    torch.manual_seed(0)
    for ordered, strict in ((True, False), (True, True), (False, False)):
        degrees = [torch.randint(0, 1 + inputs, (n,)) for n in (outputs, inputs)]
        out, into = (d.sort()[0] if ordered else d for d in degrees)
        mask = ops.DegreeMask(out, into, strict=strict).to(DEVICE)
        leaves = [torch.randn(shape, device=DEVICE).to(dtype) for shape in ((batch, inputs), (outputs, inputs), (outputs,))]
        g = torch.randn(batch, outputs, device=DEVICE)

        def results(function: Callable[..., Any], to: torch.dtype, leaves: Any = leaves, mask: Any = mask, g: Any = g) -> Tensors:
            given = [t.to(to).requires_grad_() for t in leaves]
            y = function(*given, mask)
            return y, *torch.autograd.grad(y, given, g.to(dtype).to(y.dtype))

        exact = results(_masked_linear.reference, torch.float64)
        actual, plain = (results(function, dtype) for function in (ops.masked_linear, _masked_linear.reference))
        for values in zip(actual, exact, plain, strict=True):
            assert_accurate(*values, ulps=64 if dtype is torch.float64 else 4)
        assert (actual[2][~mask.dense()] == 0).all()
        again = results(ops.masked_linear, dtype)
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods, which are no ops of the table either: their checks make tensors on the default device


@pytest.fixture
def on_device() -> Iterator[None]:
    with torch.device(DEVICE), flowkern.backend("triton"):
        yield


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_likelihoods(dtype: torch.dtype) -> None:
    test_likelihood_everywhere.check_mixture(dtype, ["rgb", "several-tiles", "grey", "compat", "empty-space"])
    test_likelihood_everywhere.check_gaussian_kl(dtype, [(2, 100), (3, 5000), (0, 4)])
    test_likelihood_everywhere.check_gaussian_kl_near_the_prior(dtype)
    test_likelihood_everywhere.check_dequantize(dtype, [((2, 3, 17, 19), 256), ((2, 3), 65536), ((2, 0), 2)])
    if dtype.itemsize == 2:
        test_likelihood_everywhere.check_bins_of_half_precision(dtype)


@pytest.mark.usefixtures("on_device")
def test_likelihoods_everywhere_and_their_noise() -> None:
    test_likelihood_everywhere.check_everywhere("triton", 20000)
    test_likelihood_everywhere.check_philox()


def test_dequantized_values_stay_in_their_bins_and_off_the_ends() -> None:
    for levels in (256, 200):
        v = torch.arange(levels, dtype=torch.uint8, device=DEVICE).expand(2**14, levels)
        x, _ = ops.dequantize(v, levels=levels)
        assert x.min() > 0
        assert x.max() < 1
        assert levels == 200 or torch.equal((x * 256).floor(), v.float())


def likelihoods() -> tuple[Tensors, Callable[[], Tensors]]:
    """Leaves, and a call that computes all three ops and their gradients; it has run, so that all kernels are compiled."""
    torch.manual_seed(0)
    x, seed = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, device=DEVICE), torch.tensor([3], device=DEVICE)
    leaves = tuple(torch.randn(shape, device=DEVICE).requires_grad_() for shape in ((4, 100, 32, 32), (4, 9000), (4, 9000)))

    def call() -> Tensors:
        log_prob = ops.discretized_logistic_mixture(x, leaves[0])
        z, kl = ops.gaussian_kl(*leaves[1:], seed=seed)
        given = torch.ones_like(log_prob), torch.ones_like(z), torch.ones_like(kl)
        return log_prob, z, kl, *ops.dequantize(x, seed=seed), *torch.autograd.grad((log_prob, z, kl), leaves, given)

    call()
    ops.gaussian_kl(*leaves[1:])  # the seed is drawn on the device
    torch.cuda.synchronize()
    return leaves, call


def test_likelihoods_never_wait_and_repeat_their_bits() -> None:
    leaves, call = likelihoods()
    with no_synchronization():
        first, second = call(), call()
        ops.gaussian_kl(*leaves[1:])
        ops.dequantize(torch.zeros(2, 100, dtype=torch.uint8, device=DEVICE), alpha=0.05)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_likelihoods_in_a_cuda_graph() -> None:
    leaves, call = likelihoods()
    check_cuda_graph(leaves, call)
