"""Every op of OPS, at each of its tensor arguments and gradients, under what turns a kernel's memory access wrong.

Tensors whose memory is not their value (lazily negated, conjugated, zeros that were never written), tensors without memory
(meta and fake tensors, subclasses), gradients that come in batches, and allocations that fail.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import Tensors, arguments, leaves, output_gradients
from torch._subclasses import FakeTensorMode
from torch.autograd.functional import hessian, jacobian
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from flowkern import OPS, ops
from flowkern._core import backend as _backend
from flowkern._core import op as _registry
from flowkern._core.op import Law, Op, Sample

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
Change = Callable[[torch.Tensor], torch.Tensor]


def samples(op: Op, dtype: torch.dtype = torch.float32, limit: int = 2000) -> Iterator[Sample]:
    """Those of at most ``limit`` values: enough for every way through the code."""
    torch.manual_seed(0)
    for sample in (*op.samples("cpu", dtype), *with_optional_tensors(op, dtype)):
        if sum(a.numel() for a in tree_leaves(sample.args) if isinstance(a, torch.Tensor)) <= limit:
            yield sample


def with_optional_tensors(op: Op, dtype: torch.dtype) -> Iterator[Sample]:
    """What the op's own samples do not give it: keywords that are tensors."""
    seed = {"seed": torch.tensor([5])}
    if op.name == "gaussian_kl":
        yield Sample("seed", (torch.randn(3, 4).to(dtype), torch.randn(3, 4).to(dtype)), seed)
    if op.name == "dequantize":
        yield Sample("seed", (torch.randint(256, (3, 4)),), {**seed, "dtype": dtype})
    if op.name == "invertible_linear":
        weight = (torch.eye(4) + 0.1 * torch.randn(4, 4)).double()
        known = {"weight_inverse": weight.inverse().to(dtype), "logabsdet": weight.logdet().to(dtype)}
        for inverse in (False, True):
            yield Sample("known", (torch.randn(3, 4).to(dtype), weight.to(dtype)), {**known, "inverse": inverse})


Call = tuple[tuple[Any, ...], dict[str, Any]]


def call_of(sample: Sample) -> Call:
    """Arguments and keywords, their floating tensors as leaves that record gradients."""
    return arguments(Sample(sample.name, (sample.args, sample.kwargs)))


def outputs_of(op: Op, call: Call) -> Tensors:
    outputs = op.function(*call[0], **call[1])
    return outputs if isinstance(outputs, tuple) else (outputs,)


def results(
    op: Op, sample: Sample, place: int | None = None, change: Change = torch.clone, of_grads: Change = torch.clone
) -> Tensors:
    """Outputs and gradients, with ``change`` applied to the tensor argument at ``place`` and ``of_grads`` to their gradients."""
    call = call_of(sample)
    flat, spec = tree_flatten(call)
    outputs = outputs_of(op, tree_unflatten([change(a) if i == place else a for i, a in enumerate(flat)], spec))
    recorded = [(y, of_grads(g.to(y))) for y, g in zip(outputs, output_gradients(outputs), strict=True) if y.requires_grad]
    if not recorded:
        return outputs
    ys, gs = zip(*recorded, strict=True)
    return (*outputs, *torch.autograd.grad(ys, leaves(call), gs, allow_unused=True, materialize_grads=True))


def places(sample: Sample) -> Iterator[int]:
    """Where tensors stand among the flattened arguments and keywords."""
    return (i for i, a in enumerate(tree_leaves((sample.args, sample.kwargs))) if isinstance(a, torch.Tensor))


def assert_same(actual: Tensors, expected: Tensors) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --- tensors whose memory is not their value ---


def lazily_negated(a: torch.Tensor) -> torch.Tensor:
    """``a`` as a view of what is stored with the other sign."""
    return torch._neg_view(a.neg())


def imaginary_part_of_a_conjugate(a: torch.Tensor) -> torch.Tensor:
    """``a`` as users meet it: strided, and stored with the other sign."""
    return torch.complex(torch.zeros_like(a), -a).conj().imag if a.dtype in (torch.float32, torch.float64) else a


@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lazy", [lazily_negated, imaginary_part_of_a_conjugate])
def test_lazy_arguments_have_their_value(op: Op, dtype: torch.dtype, lazy: Change) -> None:
    for sample in samples(op, dtype):
        for place in places(sample):
            # The strides are those of the lazy tensor: kernels may sum in another order for others.
            plain = results(op, sample, place, lambda a: torch.empty_like(lazy(a)).copy_(a))
            assert_same(results(op, sample, place, lazy), plain)


@every_op
def test_lazy_gradients_have_their_value(op: Op) -> None:
    for sample in samples(op):
        assert_same(results(op, sample, of_grads=lazily_negated), results(op, sample))


@every_op
def test_losses_on_complex_numbers(op: Op) -> None:
    """The gradient that such a loss hands back is a lazy view."""
    for sample in samples(op):
        call = call_of(sample)
        outputs = [y for y in outputs_of(op, call) if y.requires_grad]
        if not outputs:
            continue
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        losses = [(torch.complex(y.double(), y.double()).conj().imag * 2).sum() for y in outputs]
        plain = [(-2 * y.double()).sum() for y in outputs]
        assert_same(*(torch.autograd.grad(each, leaves(call), **options) for each in (losses, plain)))


def test_the_sign_of_a_conjugate() -> None:
    """What was silently wrong: the sign of the state."""
    x, params = torch.randn(3, 6, dtype=torch.complex64).conj().imag, torch.randn(3, 6)
    assert x.is_neg()
    assert_same(ops.affine_coupling(x, params), ops.affine_coupling(x.clone(), params))


def never_written(a: torch.Tensor) -> torch.Tensor:
    return torch._efficientzerotensor(a.shape, dtype=a.dtype)


@every_op
def test_zeros_without_memory(op: Op) -> None:
    for sample in samples(op):
        for place in places(sample):
            actual, plain = (results_or_error(op, sample, place, zeros) for zeros in (never_written, torch.zeros_like))
            if isinstance(plain, str):
                assert actual == plain  # zeros may be no permutation
            else:
                torch.testing.assert_close(actual, plain, equal_nan=True)
        actual, plain = (results(op, sample, of_grads=zeros) for zeros in (never_written, torch.zeros_like))
        torch.testing.assert_close(actual, plain, equal_nan=True)


def results_or_error(op: Op, sample: Sample, place: int, change: Change) -> Tensors | str:
    try:
        return results(op, sample, place, lambda a: change(a).requires_grad_(a.requires_grad))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("op", [op for op in OPS.values() if Law.SEEDED in op.laws], ids=lambda op: op.name)
def test_equal_seeds_draw_equal_noise(op: Op) -> None:
    for sample in samples(op):
        if not sample.args[0].numel():
            continue
        changes: tuple[dict[str, Any], ...] = ({}, {}, {"seed": 1234567})
        first, again, other = (outputs_of(op, (sample.args, {**sample.kwargs, **changed})) for changed in changes)
        assert_same(first, again)
        assert not torch.equal(first[0], other[0])


# --- tensors without memory of their own ---


class Doubled(torch.Tensor):
    """A subclass without memory of its own: its value is twice that of the tensor that it holds."""

    half: torch.Tensor

    @staticmethod
    def __new__(cls, half: torch.Tensor) -> Doubled:
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, strides=half.stride(), dtype=half.dtype, device=half.device)

    def __init__(self, half: torch.Tensor):
        self.half = half

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Doubled, lambda a: a.half * 2, (args, kwargs or {}))
        return function(*args, **kwargs)


@every_op
def test_subclasses_without_memory(op: Op) -> None:
    """They are asked what they make of the op, at whichever argument they stand."""
    for sample in samples(op, limit=300):
        for place in places(sample):
            if tree_leaves((sample.args, sample.kwargs))[place].is_floating_point():
                exact = results(op, sample, place, lambda a: (a.detach() / 2) * 2)
                actual = results(op, sample, place, lambda a: Doubled(a.detach() / 2))
                torch.testing.assert_close(actual, exact, equal_nan=True)


def without_values(op: Op) -> Iterator[Sample]:
    """The samples that can be asked for shapes alone: not those that describe a mask by values."""
    return (sample for sample in samples(op) if sample.name != "degrees")


@pytest.mark.skipif(_backend.native is None, reason="the CPU extension is not built")
def test_both_ways_to_look_at_arguments_agree() -> None:
    """The extension's way, and that of an installation without it, which need not mind meta: torch's own code runs there."""
    a = torch.randn(3, 4)
    lazy = lazily_negated(a), never_written(a), Doubled(a), FakeTensorMode().from_tensor(a)
    plain = a, a[:, ::2], a[:0], torch.nn.Parameter(a), a.long(), None, 3, "text"
    for value, expected in (*((v, False) for v in lazy), *((v, True) for v in plain)):
        for call in ((value,), (a, value), (a, [a, value])):
            assert _backend.native.plain(call) is expected
            assert _registry._plain(call) is expected


@every_op
def test_fake_tensors(op: Op) -> None:
    """Outputs and gradients as the real ones in shape, dtype and device; no memory is asked for."""
    for sample in without_values(op):
        expected = results(op, sample)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake = Sample(sample.name, *tree_map_only(torch.Tensor, mode.from_tensor, (sample.args, sample.kwargs)))
        with mode:
            actual = results(op, fake)
        for a, b in zip(actual, expected, strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@every_op
def test_one_fake_argument_among_real_ones(op: Op) -> None:
    """Torch refuses the mixture, or runs it: no memory is read."""
    for sample in samples(op, limit=300):
        for place in places(sample):
            mode = FakeTensorMode()
            with pytest.raises(Exception, match=r"[Ff]ake|data-dependent|no data"):
                results(op, sample, place, lambda a, mode=mode: mode.from_tensor(a.detach()))


@every_op
def test_meta_tensors(op: Op) -> None:
    for sample in without_values(op):
        call = copy.deepcopy((sample.args, sample.kwargs))
        meta = Sample(sample.name, *tree_map_only((torch.Tensor, torch.nn.Module), lambda a: a.to("meta"), call))
        for a, b in zip(results(op, meta), results(op, sample), strict=True):
            assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")
    first = next(samples(op))
    for place in list(places(first))[1:]:
        with pytest.raises(ValueError, match=r"device cpu.*got meta"):
            results(op, first, place, lambda a: a.to("meta"))


def test_distributed_tensors(tmp_path: Path) -> None:
    """Values or torch's own refusal, at every argument of every op; models sharded by FSDP and called past its hooks."""
    script = Path(__file__).with_name("dtensor_ops.py")
    done = subprocess.run([sys.executable, "-W", "ignore", str(script), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert sum(counts.values()) > 200


# --- gradients in batches ---


def batched(op: Op, sample: Sample, count: int = 3) -> tuple[Tensors, list[Tensors]]:
    """The gradients for a batch of output gradients: in one call, and one after the other."""
    call = call_of(sample)
    ys = [y for y in outputs_of(op, call) if y.requires_grad]
    if not ys or not all(y.numel() for y in ys):
        return (), []
    gs = [torch.randn(count, *y.shape).to(y) for y in ys]
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    together = torch.autograd.grad(ys, leaves(call), gs, is_grads_batched=True, **options)
    return together, [torch.autograd.grad(ys, leaves(call), [g[i] for g in gs], **options) for i in range(count)]


@every_op
def test_batched_gradients(op: Op) -> None:
    for sample in samples(op, torch.float64):
        together, each = batched(op, sample)
        for i, grads in enumerate(each):
            for a, b in zip(together, grads, strict=True):
                if a is None or b is None:  # one says nothing where the other says zeros
                    assert all(t is None or not t.any() for t in (a, b))
                else:
                    torch.testing.assert_close(a[i], b)


@every_op
def test_vectorized_jacobians_and_hessians(op: Op) -> None:
    for sample in samples(op, torch.float64, limit=60):
        if any(a.dtype is not torch.float64 for a in leaves(sample.args)):
            continue  # of a coarser dtype, in which the two ways round differently
        flat, spec = tree_flatten((sample.args, sample.kwargs))
        variables = [i for i, a in enumerate(flat) if isinstance(a, torch.Tensor) and a.is_floating_point()]
        if not variables or not all(flat[i].numel() for i in variables):
            continue

        def function(*values: torch.Tensor, flat: list[Any] = flat, spec: Any = spec, at: list[int] = variables) -> Tensors:
            given = [*flat]
            for i, v in zip(at, values, strict=True):
                given[i] = v
            return tuple(y.double() for y in outputs_of(op, tree_unflatten(given, spec)) if y.is_floating_point())

        inputs = tuple(flat[i].detach().contiguous() for i in variables)
        torch.testing.assert_close(jacobian(function, inputs, vectorize=True), jacobian(function, inputs))

        def loss(*values: torch.Tensor, function: Any = function) -> torch.Tensor:
            return sum(y.square().sum() for y in function(*values))

        torch.testing.assert_close(hessian(loss, inputs, vectorize=True), hessian(loss, inputs))


# --- two calls in one graph ---


@every_op
def test_two_calls_in_one_dynamic_graph(op: Op) -> None:
    """What a second call shares with the first, such as constants, must be nothing that the compiler takes for a variable."""
    sample = next(s for s in samples(op) if s.args[0].numel() > 8)

    def twice(first: Call, second: Call) -> list[torch.Tensor]:
        return [y for call in (first, second) for y in outputs_of(op, call)]

    torch._dynamo.reset()
    calls = call_of(sample), call_of(sample)
    outputs = torch.compile(twice, fullgraph=True, dynamic=True, backend="aot_eager")(*calls)
    expected = twice(*calls)
    torch.testing.assert_close(outputs, expected)
    sums = [[y.sum() for y in ys if y.requires_grad] for ys in (outputs, expected)]
    if sums[1]:
        actual, plain = (torch.autograd.grad(s, leaves(calls), allow_unused=True, materialize_grads=True) for s in sums)
        torch.testing.assert_close(actual, plain)


# --- memory that runs out ---

LIMITED = """
import resource, sys, torch
from flowkern import OPS
from flowkern._core.op import Sample
sys.path.insert(0, TESTS)
from comparison import arguments, leaves

def large(op):
    '''A call of some MB: a sample with its batch repeated, or matrices.'''
    if op.name == "plu_weight":
        n = 500
        return Sample("", (*torch.randn(2, n, n), torch.randn(n), torch.ones(n), torch.randperm(n)))
    if op.name == "nearest_code":
        return Sample("", (torch.randn(5000, 64), torch.randn(4000, 64)))
    batched = [s for s in op.samples("cpu", torch.float32) if s.args[0].numel() and not s.kwargs.get("contexts")]
    sample = max(batched, key=lambda s: s.args[0].numel())
    count = len(sample.args) if op.per_sample is None else op.per_sample
    repeats = -(-(1 << 19) // sample.args[0].numel())
    grown = [a.detach().repeat(repeats, *[1] * (a.ndim - 1)) for a in sample.args[:count]]
    return Sample("", (*grown, *sample.args[count:]), sample.kwargs)

def run(op, sample):
    args = arguments(sample)
    outputs = op.function(*args, **sample.kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    recorded = [y for y in outputs if y.requires_grad]
    if not recorded:
        return outputs
    grads = torch.autograd.grad(recorded, leaves(args), [torch.ones_like(y) for y in recorded], allow_unused=True)
    return *outputs, *(g for g in grads if g is not None)

def limit(pages):
    resource.setrlimit(resource.RLIMIT_AS, (pages, resource.RLIM_INFINITY))

def size():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

torch.set_num_threads(2)
for op in OPS.values():
    torch.manual_seed(0)
    sample, failures = large(op), {"MemoryError": 0, "RuntimeError": 0}
    expected = run(op, sample)
    share = 8 * sum(a.nbytes for a in leaves(sample.args) or sample.args) // STEPS
    for step in range(STEPS):  # more and more is left for what the call asks of the system
        limit(size() + step * share)
        try:
            actual = run(op, sample)
        except (MemoryError, RuntimeError) as error:
            assert isinstance(error, MemoryError) or "memory" in str(error), error
            actual, _ = expected, failures.__setitem__(type(error).__name__, failures[type(error).__name__] + 1)
        finally:
            limit(resource.RLIM_INFINITY)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), op.name
    assert all(torch.equal(a, b) for a, b in zip(run(op, sample), expected, strict=True)), op.name
    print(op.name, *failures.values())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_memory_that_runs_out_is_an_error() -> None:
    """Python's MemoryError or torch's own error, wherever in a call it happens; the next call is right again."""
    script = f"TESTS, STEPS = {str(Path(__file__).parents[1])!r}, 40\n{LIMITED}"
    # Whatever is larger than a page comes from the system, and goes back to it.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    failures = {name: int(memory) + int(runtime) for name, memory, runtime in map(str.split, done.stdout.splitlines())}
    assert failures.keys() == OPS.keys()
    assert min(failures.values()) > 0
