"""Every op of OPS on a CUDA GPU: what can only be seen there. ``python -m bench.gpu_check`` runs these tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from comparison import (
    INVERTIBLE,
    NEEDS_GPU,
    Tensors,
    assert_accurate,
    assert_same,
    call_of,
    check,
    every_op,
    larger,
    leaves,
    outputs_of,
    results,
    samples,
    ways,
)
from torch.utils._pytree import tree_map_only

import flowkern
from flowkern import nn, ops
from flowkern._core.op import Op, Sample

pytestmark = NEEDS_GPU

DEVICE = "cuda"
every_invertible_op = pytest.mark.parametrize("op", INVERTIBLE.values(), ids=INVERTIBLE)


def images(op: Op) -> list[Sample]:
    """The samples on images that are not empty."""
    return [s for s in samples(op, device=DEVICE) if s.args[0].ndim == 4 and s.args[0].numel()]


def some(op: Op) -> list[Sample]:
    """One sample for each number of dimensions, not empty, and as large as gives all multiprocessors work."""
    found = {s.args[0].ndim: s for s in reversed(samples(op, device=DEVICE)) if s.args[0].numel()}
    return [larger(op, s, 2**20) if op.per_sample != 0 else s for s in found.values()]


# Each configuration is compiled anew; float64 and float16 differ from the others in nothing but casts.
@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float64, 4), (torch.float16, 4)])
@every_op
def test_values_and_gradients(op: Op, dtype: torch.dtype, step: int) -> None:
    for sample in samples(op, dtype, device=DEVICE)[::step]:
        check(op, sample, ["auto"])


@every_op
def test_many_programs(op: Op) -> None:
    for sample in some(op):
        check(op, sample, ["auto"])


@every_invertible_op
def test_memory_format_is_kept(op: Op) -> None:
    for sample in images(op):
        x = sample.args[0].contiguous(memory_format=torch.channels_last)
        y = op.function(x, *sample.args[1:], **sample.kwargs)[0]
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, op.reference(*sample.args, **sample.kwargs)[0], rtol=1e-4, atol=1e-5)


@every_op
def test_compile(op: Op) -> None:
    for sample in [s for s in samples(op, device=DEVICE) if s.args[0].numel()][:1]:
        torch._dynamo.reset()
        compiled = torch.compile(op.function, fullgraph=True)
        torch.testing.assert_close(results(compiled, sample), results(op.function, sample))


@every_invertible_op
def test_autocast(op: Op) -> None:
    """Under autocast a conditioner gives half-precision parameters; the log-determinant stays in float32."""
    for sample in (s for s in samples(op, device=DEVICE) if all(a.dtype is torch.float32 for a in s.args)):
        x, *rest = sample.args
        for half in (torch.bfloat16, torch.float16):
            rounded = (x, *(a.to(half) for a in rest))
            with torch.autocast(DEVICE, half):
                y, logabsdet = op.function(*rounded, **sample.kwargs)
            exact = op.reference(*(a.double() for a in rounded), **sample.kwargs)
            plain = op.reference(*rounded, **sample.kwargs)
            assert y.dtype == logabsdet.dtype == torch.float32
            assert_accurate(y, exact[0], plain[0], ulps=op.ulps)
            assert_accurate(logabsdet, exact[1], plain[1], ulps=op.ulps)


@every_op
def test_same_bits_again(op: Op) -> None:
    for sample in some(op):
        assert_same(results(op.function, sample), results(op.function, sample))


def prepared(op: Op, sample: Sample) -> tuple[list[torch.Tensor], Callable[[], Tensors]]:
    """Leaves, and a call that computes outputs and gradients of them; it has run, so that all kernels are compiled."""
    call = call_of(sample)
    outputs = outputs_of(op.function, call)
    recorded = [i for i, y in enumerate(outputs) if y.requires_grad]
    given = [torch.randn_like(outputs[i]) for i in recorded]

    def run() -> Tensors:
        outputs = outputs_of(op.function, call)
        ys = [outputs[i] for i in recorded]
        if not ys:
            return outputs
        return *outputs, *torch.autograd.grad(ys, leaves(call), given, allow_unused=True, materialize_grads=True)

    run()
    torch.cuda.synchronize()
    return leaves(call), run


@contextmanager
def no_synchronization() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_the_host_never_waits(op: Op) -> None:
    for sample in ways(op, device=DEVICE):
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
    with torch.cuda.graph(graph, stream=side):  # where what the call needs is there
        results = call()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert_same(results, call())


@every_op
def test_cuda_graph(op: Op) -> None:
    for sample in some(op):
        check_cuda_graph(*prepared(op, sample))


@every_op
def test_a_stream_of_its_own(op: Op) -> None:
    """Kernels are launched where torch's other work is: on the current stream."""
    sample = some(op)[0]
    expected = outputs_of(op.function, (sample.args, sample.kwargs))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: the inputs below come late
        late = tree_map_only(torch.Tensor, torch.clone, sample.args)
        found = outputs_of(op.function, (late, sample.kwargs))
    stream.synchronize()
    assert_same(found, expected)


#: Over 2**31 elements in one sample, and in all samples together.
SHAPES = {"one-sample": (1, 2, 2**15, 2**15 + 8), "many-samples": (2**20 + 16, 2**11)}


def part(a: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A piece along the axis that is long: samples, or the lines of an image."""
    return (a[start:stop] if a.ndim == 2 else a[:, :, start:stop]).detach()


@pytest.mark.vast
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("op", [op for op in INVERTIBLE.values() if op.per_sample is None], ids=lambda op: op.name)
def test_more_than_2_to_the_31_elements(op: Op, shape: tuple[int, ...]) -> None:
    """Elements past 2**31 are read and written where they lie."""
    plain = (s.args for s in samples(op, device=DEVICE) if not any(s.kwargs.values()))
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


def test_the_cuda_kernels_serve_this_gpu() -> None:
    """Nothing falls back in silence: with NVRTC, the sweep is one launch."""
    text = flowkern.explain(ops.autoregressive_inverse, torch.randn(2, 3, device=DEVICE))
    assert "cuda   serves" in text, text


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
def test_large_masked_linear(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for ordered, strict in ((True, False), (True, True), (False, False)):
        degrees = [torch.randint(0, 785, (n,)) for n in (1024, 784)]
        out, into = (d.sort()[0] if ordered else d for d in degrees)
        mask = ops.DegreeMask(out, into, strict=strict).to(DEVICE)
        tensors = [torch.randn(shape, device=DEVICE).to(dtype) for shape in ((300, 784), (1024, 784), (1024,))]
        sample = Sample("", (*tensors, mask))
        check(flowkern.OPS["masked_linear"], sample, ["auto"])
        first, again = (results(ops.masked_linear, sample) for _ in range(2))
        assert (first[2][~mask.dense()] == 0).all()
        assert_same(first, again)


def test_dequantized_values_stay_in_their_bins_and_off_the_ends() -> None:
    for levels in (256, 200):
        v = torch.arange(levels, dtype=torch.uint8, device=DEVICE).expand(2**14, levels)
        x, _ = ops.dequantize(v, levels=levels)
        assert x.min() > 0
        assert x.max() < 1
        assert levels == 200 or torch.equal((x * 256).floor(), v.float())


def test_seeds_are_drawn_without_waiting() -> None:
    mean, v = torch.randn(4, 9000, device=DEVICE), torch.zeros(2, 100, dtype=torch.uint8, device=DEVICE)
    ops.gaussian_kl(mean, mean)  # compiles
    ops.dequantize(v, alpha=0.05)
    torch.cuda.synchronize()
    with no_synchronization():
        ops.gaussian_kl(mean, mean)
        ops.dequantize(v, alpha=0.05)
