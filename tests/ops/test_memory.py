"""The memory that every op of OPS writes, and what turns a kernel's access to memory wrong, at each argument and gradient.

Outputs between canaries, the order of sums, tensors whose memory is not their value (lazily negated, conjugated, zeros that
were never written), tensors without memory (meta and fake tensors, subclasses), and allocations that fail.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import (
    Tensors,
    assert_same,
    assert_threads_do_not_matter,
    call_of,
    every_op,
    larger,
    leaves,
    needs_native,
    output_gradients,
    outputs_of,
    places,
    samples,
    size,
    traceable,
    ways,
)
from processes import python
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from flowkern import OPS, ops
from flowkern._core import backend as _backend, op as _registry
from flowkern._core.op import Op, Sample

Change = Callable[[torch.Tensor], torch.Tensor]
#: Values of a sample: enough for every way through the code.
LIMIT = 2000


def results(
    op: Op, sample: Sample, place: int | None = None, change: Change = torch.clone, of_grads: Change = torch.clone
) -> Tensors:
    """Outputs and gradients, with ``change`` applied to the tensor argument at ``place`` and ``of_grads`` to their gradients."""
    call = call_of(sample)
    flat, spec = tree_flatten(call)
    changed = tree_unflatten([change(a) if i == place else a for i, a in enumerate(flat)], spec)
    outputs = outputs_of(op.function, changed)
    recorded = [(y, of_grads(g.to(y))) for y, g in zip(outputs, output_gradients(outputs), strict=True) if y.requires_grad]
    if not recorded:
        return outputs
    ys, gs = zip(*recorded, strict=True)
    return (*outputs, *torch.autograd.grad(ys, leaves(call), gs, allow_unused=True, materialize_grads=True))


# --- what kernels write, and in which order ---


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_op
def test_outputs_are_written_whole_and_nothing_else(op: Op, dtype: torch.dtype, canaries: Any) -> None:
    for sample in samples(op, dtype):
        for value in results(op, sample):
            assert not value.isnan().any()
    canaries.assert_alive()


@needs_native
@every_op
def test_same_bits_for_any_number_of_threads(op: Op) -> None:
    """With so many samples that the work is divided among threads."""
    for sample in ways(op):
        if sample.args[0].numel() and not leaves(sample.kwargs):
            several = larger(op, sample, 40000)
            assert_threads_do_not_matter(lambda s=several: results(op, s))
    assert_threads_do_not_matter(lambda: results(op, max(samples(op), key=size)))


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
    for sample in samples(op, dtype, LIMIT):
        for place in places(sample):
            # The strides are those of the lazy tensor: kernels may sum in another order for others.
            plain = results(op, sample, place, lambda a: torch.empty_like(lazy(a)).copy_(a))
            assert_same(results(op, sample, place, lazy), plain)


@every_op
def test_lazy_gradients_have_their_value(op: Op) -> None:
    for sample in samples(op, limit=LIMIT):
        assert_same(results(op, sample, of_grads=lazily_negated), results(op, sample))


def test_the_sign_of_a_conjugate() -> None:
    """What was silently wrong: the sign of the state."""
    x, params = torch.randn(3, 6, dtype=torch.complex64).conj().imag, torch.randn(3, 6)
    assert x.is_neg()
    assert_same(ops.affine_coupling(x, params), ops.affine_coupling(x.clone(), params))


def never_written(a: torch.Tensor) -> torch.Tensor:
    return torch._efficientzerotensor(a.shape, dtype=a.dtype)


@every_op
def test_zeros_without_memory(op: Op) -> None:
    for sample in samples(op, limit=LIMIT):
        for place in places(sample):
            actual, plain = (results_or_error(op, sample, place, zeros) for zeros in (never_written, torch.zeros_like))
            if isinstance(plain, str):
                assert actual == plain  # zeros may be no permutation
            else:
                torch.testing.assert_close(actual, plain, equal_nan=True)
        actual, plain = (results(op, sample, of_grads=zeros) for zeros in (never_written, torch.zeros_like))
        torch.testing.assert_close(actual, plain, equal_nan=True)


def test_a_view_of_zeros_without_memory() -> None:
    """Its address is not none, but an offset from none."""
    x, params = never_written(torch.empty(4, 7))[:, 4:], torch.randn(4, 2)
    assert_same(ops.affine_coupling(x, params), ops.affine_coupling(torch.zeros(4, 3), params))


def results_or_error(op: Op, sample: Sample, place: int, change: Change) -> Tensors | str:
    try:
        return results(op, sample, place, lambda a: change(a).requires_grad_(a.requires_grad))
    except ValueError as error:
        return str(error)


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
    for sample in filter(traceable, samples(op, limit=LIMIT)):
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
    for sample in filter(traceable, samples(op, limit=LIMIT)):
        call = copy.deepcopy((sample.args, sample.kwargs))
        meta = Sample(sample.name, *tree_map_only((torch.Tensor, torch.nn.Module), lambda a: a.to("meta"), call))
        for a, b in zip(results(op, meta), results(op, sample), strict=True):
            assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")
    first = samples(op)[0]
    for place in list(places(first))[1:]:
        with pytest.raises(ValueError, match=r"device cpu.*got meta"):
            results(op, first, place, lambda a: a.to("meta"))


@pytest.mark.slow
def test_distributed_tensors(tmp_path: Path) -> None:
    """Values or torch's own refusal, at every argument of every op; models sharded by FSDP and called past its hooks."""
    script = Path(__file__).with_name("dtensor_ops.py")
    done = python(str(script), str(tmp_path), PYTHONPATH=str(script.parents[1]))
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert sum(counts.values()) > 200


# --- memory that runs out ---

LIMITED = """
import resource, sys, torch
from flowkern import OPS
sys.path.insert(0, TESTS)
from comparison import larger, leaves, results, samples

def large(op):
    '''A call of some MB: a sample with its batch repeated.'''
    chosen = [s for s in samples(op) if s.args[0].numel() and not leaves(s.kwargs)]
    return larger(op, max(chosen, key=lambda s: s.args[0].numel()), 1 << 17 if op.per_sample != 0 else 0)

def run(op, sample):
    return results(op.function, sample)

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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_memory_that_runs_out_is_an_error() -> None:
    """Python's MemoryError or torch's own error, wherever in a call it happens; the next call is right again."""
    script = f"TESTS, STEPS = {str(Path(__file__).parents[1])!r}, 24\n{LIMITED}"
    # Whatever is larger than a page comes from the system, and goes back to it.
    done = python("-c", script, MALLOC_MMAP_THRESHOLD_="4096", MALLOC_TRIM_THRESHOLD_="0", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    failures = {name: int(memory) + int(runtime) for name, memory, runtime in map(str.split, done.stdout.splitlines())}
    assert failures.keys() == OPS.keys()
    assert min(failures.values()) > 0
