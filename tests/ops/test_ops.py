"""Every invertible op of OPS through the same checks. Adding an op adds it here by being in the table."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from comparison import INVERTIBLE, arguments, assert_accurate, change_samples, gradients, outputs_and_gradients
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import flowkern
from flowkern import ops
from flowkern._core import backend as _backend
from flowkern._core.op import Op, Sample

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(_backend.native is None, reason="the CPU extension is not built")


def samples_of(dtype: torch.dtype = torch.float64) -> list[Any]:
    return [pytest.param(op, s, id=f"{op.name}-{s.name}") for op in INVERTIBLE.values() for s in seeded_samples(op, dtype)]


def seeded_samples(op: Op, dtype: torch.dtype) -> list[Sample]:
    torch.manual_seed(0)
    return list(op.samples("cpu", dtype))


def small(params: list[Any], limit: int = 64) -> list[Any]:
    sizes = [[a.numel() for a in p.values[1].args] for p in params]
    return [p for p, numbers in zip(params, sizes, strict=True) if numbers[0] > 0 and sum(numbers) <= limit]


def check(op: Op, dtype: torch.dtype) -> None:
    """Values and gradients of all samples against float64, no worse than twice the same-dtype reference."""
    for sample in seeded_samples(op, dtype):
        args = arguments(sample)
        outputs, grads = outputs_and_gradients(op.function, args, sample.kwargs)
        exact = outputs_and_gradients(op.reference, arguments(sample, torch.float64), sample.kwargs)
        plain = outputs_and_gradients(op.reference, arguments(sample), sample.kwargs)
        for actual, truth, same_dtype in zip((*outputs, *grads), sum(exact, ()), sum(plain, ()), strict=True):
            # In float64 the reference is the truth itself: grant its own rounding, of sums too.
            assert_accurate(actual, truth, same_dtype, ulps=64 if dtype is torch.float64 else 4)
        for leaf, grad in zip(args, grads, strict=True):
            assert grad.dtype == leaf.dtype
        assert outputs[0].dtype == args[0].dtype
        assert outputs[1].dtype == (torch.float64 if torch.float64 in {a.dtype for a in args} else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", INVERTIBLE.values(), ids=INVERTIBLE)
def test_every_isa_is_accurate(op: Op, dtype: torch.dtype, isa: str) -> None:
    with flowkern.backend("cpp"):
        check(op, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", INVERTIBLE.values(), ids=INVERTIBLE)
def test_torch_backend_is_accurate(op: Op, dtype: torch.dtype) -> None:
    with flowkern.backend("torch"):
        check(op, dtype)


@needs_native
@pytest.mark.parametrize(("op", "sample"), samples_of(torch.float32))
def test_registered_torch_kernels_agree(op: Op, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch implementations behind the registered ops, which a traced graph meets on a machine without kernels."""
    fused = outputs_and_gradients(op.function, arguments(sample), sample.kwargs)
    monkeypatch.setattr(_backend, "native", None)
    monkeypatch.setattr(_backend, "only_torch", lambda x: False)
    plain = outputs_and_gradients(op.function, arguments(sample), sample.kwargs)
    same_dtype = outputs_and_gradients(op.reference, arguments(sample), sample.kwargs)
    exact = outputs_and_gradients(op.reference, arguments(sample, torch.float64), sample.kwargs)
    for a, b, c, truth in zip(sum(fused, ()), sum(plain, ()), sum(same_dtype, ()), sum(exact, ()), strict=True):
        assert_accurate(b, truth, c)
        assert a.stride() == b.stride() or a.numel() < 2


@needs_native
@pytest.mark.parametrize(("op", "sample"), samples_of(torch.float32))
def test_outputs_are_written_whole_and_nothing_else(op: Op, sample: Sample, canaries: Any) -> None:
    for value in sum(outputs_and_gradients(op.function, arguments(sample), sample.kwargs), ()):
        assert not value.isnan().any()
    canaries.assert_alive()


@pytest.mark.parametrize(("op", "sample"), small(samples_of()))
def test_gradients_and_double_gradients(op: Op, sample: Sample) -> None:
    if any(a.dtype is not torch.float64 for a in sample.args):
        pytest.skip("finite differences need float64 throughout")
    args = tuple(a.clone().requires_grad_() for a in (a.detach() for a in sample.args))

    def function(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(y for y in op.function(*args, **sample.kwargs) if y.requires_grad)

    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


@pytest.mark.parametrize(("op", "sample"), samples_of())
def test_double_gradients_match_the_reference(op: Op, sample: Sample) -> None:
    def double(function: Any) -> tuple[torch.Tensor, ...]:
        args = arguments(sample)
        first = gradients(function(*args, **sample.kwargs), args, create_graph=True)
        if not any(g.requires_grad for g in first):
            return first  # linear in every argument
        return gradients(first, args)

    for actual, exact in zip(double(op.function), double(op.reference), strict=True):
        torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize(("op", "sample"), samples_of())
def test_inverse_is_exact(op: Op, sample: Sample) -> None:
    x, *rest = (a.double() for a in sample.args)
    inverse = not sample.kwargs.get("inverse", False)
    y, logabsdet = op.function(x, *rest, **sample.kwargs)
    back, back_logabsdet = op.function(y, *rest, **{**sample.kwargs, "inverse": inverse})
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back_logabsdet, -logabsdet)


@pytest.mark.parametrize(("op", "sample"), small(samples_of()))
def test_logabsdet_is_that_of_the_jacobian(op: Op, sample: Sample) -> None:
    x, *rest = (a.double() for a in sample.args)
    _, logabsdet = op.function(x, *rest, **sample.kwargs)
    for i in range(x.shape[0]):
        first, *one = change_samples(op, lambda a, i=i: a[i : i + 1], (x, *rest))

        def flat(v: torch.Tensor, shape: torch.Size = first.shape, one: list[torch.Tensor] = one) -> torch.Tensor:
            return op.function(v.view(shape), *one, **sample.kwargs)[0].flatten()

        jacobian = torch.autograd.functional.jacobian(flat, x[i].flatten().contiguous())
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logabsdet[i])


@pytest.mark.parametrize(("op", "sample"), small(samples_of()))
def test_func_transforms(op: Op, sample: Sample) -> None:
    args = tuple(a.detach().double().contiguous() for a in sample.args)

    def loss(function: Any, *args: torch.Tensor) -> torch.Tensor:
        y, logabsdet = function(*args, **sample.kwargs)
        return (y**2).sum() + (logabsdet**2).sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        actual, expected = (transform(lambda a, f=f: loss(f, a, *args[1:]))(args[0]) for f in (op.function, op.reference))
        torch.testing.assert_close(actual, expected)
    stacked = tuple(torch.stack([a, 2 * a]) for a in args)
    actual = torch.vmap(lambda *a: op.function(*a, **sample.kwargs))(*stacked)
    for i in range(2):
        expected = op.function(*(a[i] for a in stacked), **sample.kwargs)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a[i], b)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[0], torch.ones_like(args[0]))
        tangent = torch.autograd.forward_ad.unpack_dual(op.function(dual, *args[1:], **sample.kwargs)[0]).tangent
    torch.testing.assert_close(
        tangent,
        torch.func.jvp(lambda a: op.reference(a, *args[1:], **sample.kwargs)[0], (args[0],), (torch.ones_like(args[0]),))[1],
    )


def recorded_calls(op: Op, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...]]]:
    """The registered torch ops that one forward and backward calls, with their arguments."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    for kernel in op.kernels:
        monkeypatch.setitem(kernel.__dict__, "run", lambda *a, k=kernel: (calls.append((k.overload, a)), k.overload(*a))[1])
    outputs_and_gradients(op.function, arguments(sample), sample.kwargs)
    monkeypatch.undo()
    return calls


@needs_native
@pytest.mark.parametrize(("op", "sample"), samples_of(torch.float32))
def test_opcheck(op: Op, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded_calls(op, sample, monkeypatch)
    assert len(calls) == len(op.kernels)
    for overload, args in calls:
        detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(overload, detached, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def check_compiled(op: Op, sample: Sample, **options: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: op.function(*args, **sample.kwargs), fullgraph=True, **options)
    expected = outputs_and_gradients(op.function, arguments(sample), sample.kwargs)
    actual = outputs_and_gradients(compiled, arguments(sample), {})
    for a, b in zip(sum(actual, ()), sum(expected, ()), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        for a, b in zip(compiled(*sample.args), expected[0], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("op", "sample"), samples_of(torch.float32))
def test_compile_static(op: Op, sample: Sample) -> None:
    check_compiled(op, sample, dynamic=False, backend="aot_eager")


# One sample per way through the Python code; a dynamic compilation takes seconds.
DYNAMIC = {"vector", "image", "checkerboard", "feature-mask", "channels-last", "layout-pair_scale_shift-inverse"}


@pytest.mark.parametrize(("op", "sample"), [p for p in samples_of(torch.float32) if p.values[1].name in DYNAMIC])
def test_compile_dynamic(op: Op, sample: Sample) -> None:
    check_compiled(op, sample, dynamic=True, backend="aot_eager")


@pytest.mark.parametrize("op", INVERTIBLE.values(), ids=INVERTIBLE)
def test_compile_with_inductor(op: Op) -> None:
    check_compiled(op, next(s for s in seeded_samples(op, torch.float32) if s.name.startswith("image")))


@needs_native
@pytest.mark.parametrize("op", INVERTIBLE.values(), ids=INVERTIBLE)
def test_compiled_graphs_hold_the_fused_ops(op: Op) -> None:
    torch._dynamo.reset()
    targets: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    sample = seeded_samples(op, torch.float32)[0]
    compiled = torch.compile(
        lambda *args: op.function(*args, **sample.kwargs),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=record, bw_compiler=record),
    )
    outputs_and_gradients(compiled, arguments(sample), {})
    for kernel in op.kernels:
        assert targets.count(f"flowkern.{kernel.name}.default") == 1


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("op", INVERTIBLE.values(), ids=INVERTIBLE)
def test_autocast_keeps_logabsdet_in_float32(op: Op, backend: str) -> None:
    for sample in seeded_samples(op, torch.float32):
        with flowkern.backend(backend):
            expected = op.function(*sample.args, **sample.kwargs)
            with torch.autocast("cpu", torch.bfloat16):
                actual = op.function(*sample.args, **sample.kwargs)
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


@needs_native
@pytest.mark.parametrize(("op", "sample"), samples_of(torch.float32))
def test_same_bits_for_any_number_of_threads(op: Op, sample: Sample) -> None:
    # Enough samples that the work is divided among threads.
    repeats = max(1, 40000 // max(1, sample.args[0].numel()))
    args = change_samples(op, lambda a: a.repeat(repeats, *[1] * (a.ndim - 1)), sample.args)
    large = Sample(sample.name, args, sample.kwargs)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(sum(outputs_and_gradients(op.function, arguments(large), large.kwargs), ()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("op", "sample"), samples_of(torch.float32))
def test_any_strides_of_the_gradients(op: Op, sample: Sample) -> None:
    args = arguments(sample)
    y, logabsdet = op.function(*args, **sample.kwargs)
    for grad in (torch.ones(()).expand(y.shape), torch.randn([*reversed(y.shape)]).permute(*reversed(range(y.ndim)))):
        actual = torch.autograd.grad(y, args, grad, retain_graph=True)
        plain = torch.autograd.grad(op.reference(*args, **sample.kwargs)[0], args, grad.contiguous())
        exact_args = arguments(sample, torch.float64)
        exact = torch.autograd.grad(op.reference(*exact_args, **sample.kwargs)[0], exact_args, grad.double())
        for values in zip(actual, exact, plain, strict=True):
            assert_accurate(*values)
    if logabsdet.requires_grad:
        actual = torch.autograd.grad(logabsdet.sum(), args, allow_unused=True, materialize_grads=True)
        expected = torch.autograd.grad(
            op.reference(*args, **sample.kwargs)[1].sum(), args, allow_unused=True, materialize_grads=True
        )
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("op", "sample"), samples_of(torch.float32))
def test_memory_format_is_kept(op: Op, sample: Sample) -> None:
    x = sample.args[0]
    y, _ = op.function(*sample.args, **sample.kwargs)
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize(("op", "sample"), small(samples_of(torch.float32), limit=1000))
def test_nan_stays_in_its_sample(op: Op, sample: Sample) -> None:
    for i, argument in enumerate(sample.args[: op.per_sample]):
        for place in {0, argument[0].numel() - 1} if argument.numel() else ():
            poisoned = argument.detach().clone(memory_format=torch.contiguous_format)
            poisoned[0].view(-1)[place] = float("nan")
            args = (*sample.args[:i], poisoned, *sample.args[i + 1 :])
            for actual, expected in zip(op.function(*args, **sample.kwargs), op.reference(*args, **sample.kwargs), strict=True):
                assert torch.equal(actual.isnan(), expected.isnan())
                assert not actual[1:].isnan().any()


@pytest.mark.parametrize("op", INVERTIBLE.values(), ids=INVERTIBLE)
def test_bad_input_is_named(op: Op) -> None:
    x, *rest = next(iter(seeded_samples(op, torch.float32))).args
    second = list(inspect.signature(op.function).parameters)[1]
    with pytest.raises(TypeError, match=r"x: expected a floating dtype .* got torch.int64"):
        op.function(x.long(), *rest)
    with pytest.raises(TypeError, match=f"{second}: expected a floating dtype"):
        op.function(x, *(a.long() for a in rest))
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        op.function([1.0], *rest)
    with pytest.raises(ValueError, match=f"{second}: expected device cpu .* got meta"):
        op.function(x, *(a.to("meta") for a in rest))
    with pytest.raises(ValueError, match=rf"{second}: expected shape .* got \({len(rest[0])}, 1"):
        op.function(x, rest[0][:, :1].repeat(1, 17), *rest[1:])
    with pytest.raises(ValueError, match=r"x: expected \(B, C\) or \(B, C, H, W\)"):
        op.function(x[0], *rest)


def calls() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of every public function of ``flowkern.ops``, with every tensor that it takes."""
    x, square, index = torch.randn(4, 6), torch.eye(6), torch.tensor([0, 1, 4, 2])
    mask, seed = {"split": ops.FeatureMask(torch.arange(6) % 2 == 0)}, {"seed": torch.tensor([3])}
    network = ops.AutoregressiveNetwork(tuple(range(1, 7)), ((1, 2, 3, 4),))
    parameters = [p for i, o in itertools.pairwise(network.widths) for p in (torch.randn(o, i), torch.randn(o))]
    context = torch.randn(4, network.widths[1])
    noise = [torch.rand(2, 2, 3, 3), torch.rand(2, 1, 3, 3)]
    return {
        "additive_coupling": ((x, x[:, :3]), mask),
        "affine_coupling": ((x, x), mask),
        "autoregressive_inverse": ((x, parameters, network), {"contexts": [context]}),
        "dequantize": ((torch.arange(8).reshape(2, 4),), seed),
        "discretized_logistic_mixture": ((torch.zeros(2, 1, 3, 3), torch.randn(2, 6, 3, 3)), {}),
        "ema_update": ((x, index, torch.ones(5), torch.ones(5, 6)), {"decay": 0.9}),
        "gaussian_kl": ((x, x), seed),
        "invertible_linear": ((x, square, x[0]), {"weight_inverse": square, "logabsdet": torch.zeros(())}),
        "masked_linear": ((x, square, x[0], torch.arange(6), torch.arange(6)), {}),
        "nearest_code": ((x, square), {}),
        "plu_weight": ((square, square, x[0], torch.ones(6), torch.arange(6)), {}),
        "sample_discretized_logistic_mixture": ((torch.randn(2, 6, 3, 3),), {"channels": 1, "noise": noise}),
        "vector_quantize": ((x, square), {}),
    }


def elsewhere(value: Any) -> list[Any]:
    """``value`` with each of its tensors in turn on another device."""
    if isinstance(value, torch.Tensor):
        return [value.to("meta")]
    if isinstance(value, torch.nn.Module):
        return [copy.deepcopy(value).to("meta")]
    if not isinstance(value, list):
        return []
    return [[*value[:i], moved, *value[i + 1 :]] for i, v in enumerate(value) for moved in elsewhere(v)]


@pytest.mark.parametrize("name", sorted(n for n, f in vars(ops).items() if inspect.isfunction(f)))
def test_any_tensor_on_another_device_is_named(name: str) -> None:
    function, (args, kwargs) = getattr(ops, name), calls()[name]
    function(*args, **kwargs)
    names = {"parameters": "(weight|bias) . of network 0", "contexts": "context of network 0", "out_degrees": "(out|in)_degrees"}
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    for argument, value in [*bound.items()][1:]:
        known = names.get(argument, argument)
        for moved in elsewhere(value):
            with pytest.raises(ValueError, match=f"^{known}: .*(expected device .* got (meta|cpu)|is on (meta|cpu))"):
                function(**bound | {argument: moved})


@pytest.mark.parametrize("op", INVERTIBLE.values(), ids=INVERTIBLE)
def test_leading_batch_dimensions(op: Op) -> None:
    for sample in seeded_samples(op, torch.float32):
        args = change_samples(op, lambda a: torch.stack([a, a + 1]), sample.args)
        if args[0].numel() == 0:
            continue
        y, logabsdet = op.function(*args, **sample.kwargs)
        for i in range(2):
            expected = op.function(*change_samples(op, lambda a, i=i: a[i], args), **sample.kwargs)
            torch.testing.assert_close(y[i], expected[0])
            torch.testing.assert_close(logabsdet[i], expected[1])
