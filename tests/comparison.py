"""What the tests of ops share: the one comparison, the samples, how a call's outputs and gradients are collected, and where."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import flowkern
from flowkern import OPS
from flowkern._core import backend as _backend
from flowkern._core.op import Law, Op, Sample

Tensors = tuple[torch.Tensor, ...]
Call = tuple[tuple[Any, ...], dict[str, Any]]
Function = Callable[..., Tensors]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: Those that invert themselves, all of whose positional arguments are tensors.
INVERTIBLE = {name: op for name, op in OPS.items() if Law.INVERTIBLE in op.laws}
#: Where ops run: the torch code and the C++ kernels on every instruction set, or the Triton kernels in their interpreter.
WAYS = ["triton"] if _backend.interpreting() else ["torch", *(_backend.native.isas() if _backend.native else [])]

#: Values of the samples that run in WAYS: what is larger takes the interpreter minutes.
LIMIT = 30000 if _backend.interpreting() else torch.inf

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
needs_native = pytest.mark.skipif(_backend.native is None, reason="the CPU extension is not built")


@contextlib.contextmanager
def running(way: str) -> Iterator[None]:
    """Ops inside the block run in one of ``WAYS``, or on the backend of that name."""
    if way in ("auto", *_backend.BACKENDS):
        with flowkern.backend(way):
            yield
        return
    assert _backend.native is not None
    before = _backend.native.isa()
    _backend.native.use_isa(way)
    try:
        with flowkern.backend("cpp"):
            yield
    finally:
        _backend.native.use_isa(before)


def serves(op: Op, way: str) -> bool:
    """Whether the op runs there: not every one has a Triton kernel."""
    return way != "triton" or any("triton" in kernel.implementations for kernel in op.kernels)


def those_with(law: Law) -> pytest.MarkDecorator:
    """A test of every op with this law."""
    chosen = {name: op for name, op in OPS.items() if law in op.laws}
    return pytest.mark.parametrize("op", chosen.values(), ids=chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def samples(op: Op, dtype: torch.dtype = torch.float32, limit: float = torch.inf, device: str = "cpu") -> list[Sample]:
    """The op's own of at most ``limit`` values, always the same ones."""
    torch.manual_seed(0)
    return [sample for sample in op.samples(device, dtype) if size(sample) <= limit]


def size(sample: Sample) -> int:
    return sum(t.numel() for t in tensors(sample))


def tensors(sample: Sample) -> list[torch.Tensor]:
    return [a for a in tree_leaves((sample.args, sample.kwargs)) if isinstance(a, torch.Tensor)]


def ways(
    op: Op, dtype: torch.dtype = torch.float32, limit: float = torch.inf, coarse: bool = False, device: str = "cpu"
) -> list[Sample]:
    """One sample for each way through the op's Python code, as the forms of tensors and the names of options tell it.

    ``coarse``: of forms only the numbers of dimensions count, of options only the first word of those that are text.
    """

    def form(value: Any) -> Any:
        if isinstance(value, str):
            return value.split("_")[0] if coarse else value
        if not isinstance(value, torch.Tensor):
            return type(value)
        contiguous = value.is_contiguous(), value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
        return value.ndim if coarse else (value.ndim, value.dtype, contiguous, value.numel() == 0)

    found: dict[Any, Sample] = {}
    for sample in samples(op, dtype, limit, device):
        kwargs = {name: value for name, value in sample.kwargs.items() if name != "inverse"}
        names = () if coarse else tuple(kwargs)
        found.setdefault((*map(form, tree_leaves((sample.args, kwargs))), names), sample)
    return list(found.values())


def traceable(sample: Sample) -> bool:
    """Whether shapes alone say what is computed: not those that describe a mask by the values of tensors."""
    return sample.name != "degrees"


def parametrized(chosen: Callable[[Op], Iterable[Sample]], ops: Iterable[Op] = OPS.values()) -> pytest.MarkDecorator:
    """A test of (op, sample)."""
    return pytest.mark.parametrize(
        ("op", "sample"), [pytest.param(op, s, id=f"{op.name}-{s.name}") for op in ops for s in chosen(op)]
    )


def change_samples(op: Op, change: Callable[[torch.Tensor], torch.Tensor], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with ``change`` applied to those that have a batch dimension."""
    count = len(args) if op.per_sample is None else op.per_sample
    return *map(change, args[:count]), *args[count:]


def larger(op: Op, sample: Sample, elements: int) -> Sample:
    """The sample with its batch repeated until its first argument has so many elements."""
    repeats = max(1, elements // max(1, sample.args[0].numel()))
    return Sample(
        sample.name, change_samples(op, lambda a: a.detach().repeat(repeats, *[1] * (a.ndim - 1)), sample.args), sample.kwargs
    )


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def call_of(sample: Sample, dtype: torch.dtype | None = None) -> Call:
    """Arguments and keywords, floating tensors as leaves that record gradients, their strides kept, in ``dtype`` if given."""

    def changed(a: Any) -> Any:
        if isinstance(a, torch.dtype):
            return dtype or a
        return (a.detach() if dtype is None else a.detach().to(dtype)).requires_grad_() if a.is_floating_point() else a

    return tree_map_only((torch.Tensor, torch.dtype), changed, (sample.args, sample.kwargs))


def places(sample: Sample) -> Iterator[int]:
    """Where tensors stand among the flattened arguments and keywords."""
    return (i for i, a in enumerate(tree_leaves((sample.args, sample.kwargs))) if isinstance(a, torch.Tensor))


def leaves(values: Any) -> list[torch.Tensor]:
    """The floating tensors among nested values."""
    return [a for a in tree_leaves(values) if isinstance(a, torch.Tensor) and a.is_floating_point()]


def outputs_of(function: Callable[..., Any], call: Call) -> Tensors:
    """What the function returns, always as a tuple."""
    outputs = function(*call[0], **call[1])
    return outputs if isinstance(outputs, tuple) else (outputs,)


def function_of_tensors(function: Callable[..., Any], sample: Sample) -> tuple[Function, list[torch.Tensor]]:
    """The function of the sample's floating tensors alone, and these in float64."""
    flat, spec = tree_flatten(call_of(sample, torch.float64))
    places = [i for i, a in enumerate(flat) if isinstance(a, torch.Tensor) and a.is_floating_point()]

    def of_tensors(*values: torch.Tensor) -> Tensors:
        given = [*flat]
        for i, value in zip(places, values, strict=True):
            given[i] = value
        return outputs_of(function, tree_unflatten(given, spec))

    return of_tensors, [flat[i].detach().contiguous() for i in places]


def output_gradients(outputs: Sequence[torch.Tensor], seed: int = 0) -> Tensors:
    """Fixed random gradients in float64, for outputs of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu") for y in outputs)


def gradients(
    outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], of: Sequence[int] | None = None, **options: Any
) -> Tensors:
    """The gradients of ``inputs`` for the fixed output gradients, of the outputs numbered ``of`` alone if given.

    Outputs without a graph are left out; if all are, so are the gradients.
    """
    given = [(y, g.to(y)) for y, g in zip(outputs, output_gradients(outputs), strict=True)]
    recorded = [pair for i, pair in enumerate(given) if pair[0].requires_grad and (of is None or i in of)]
    if not recorded:
        return ()
    ys, gs = zip(*recorded, strict=True)
    return torch.autograd.grad(ys, inputs, gs, allow_unused=True, materialize_grads=True, **options)


def results(
    function: Callable[..., Any], sample: Sample, dtype: torch.dtype | None = None, of: Sequence[int] | None = None
) -> Tensors:
    """The outputs, and the gradients of all floating tensors for the fixed output gradients, of those numbered ``of`` alone."""
    call = call_of(sample, dtype)
    outputs = outputs_of(function, call)
    return *outputs, *gradients(outputs, leaves(call), of)


def references(op: Op, sample: Sample) -> tuple[Tensors, Tensors]:
    """The results of the reference in float64, and in the sample's own dtypes: of gradients those that the op declares."""
    of = [i for i, y in enumerate(op.outputs) if y.differentiable]
    return results(op.reference, sample, torch.float64, of), results(op.reference, sample, None, of)


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons


def assert_accurate(actual: torch.Tensor, exact: torch.Tensor, same_dtype: torch.Tensor | None = None, ulps: float = 4) -> None:
    """The error of ``actual`` against float64 is at most twice that of plain torch code in the same dtype.

    ``ulps`` units in the last place of the largest value are granted on top: a max over few values is a lottery.
    NaN and infinity must stand where they stand in ``exact``, and integers are equal.
    """
    assert actual.shape == exact.shape
    if not actual.is_floating_point():
        assert torch.equal(actual, exact)
        return
    if exact.numel() == 0:
        return
    actual_64, exact = actual.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    assert torch.equal(actual_64.isnan(), exact.isnan())
    assert torch.equal(actual_64.isinf(), exact.isinf())
    if not finite.any():
        return
    granted = ulps * torch.finfo(actual.dtype).eps * exact[finite].abs().max()
    if same_dtype is not None:
        granted = granted + 2 * (same_dtype.detach().double() - exact)[finite].abs().max()
    error = (actual_64 - exact)[finite].abs().max()
    assert error <= granted, f"error {error:.3e} > {granted:.3e}"


def check(op: Op, sample: Sample, run_in: Iterable[str] = WAYS, ulps: float | None = None) -> None:
    """Values and gradients against the reference in float64, no worse than twice the reference in the sample's own dtypes.

    Dtypes are those that the op declares, and gradients have the dtype of what they are gradients of.
    """
    inputs = leaves(sample.args)
    dtypes = [a.dtype for a in inputs] or [sample.kwargs["dtype"]]
    exact, plain = references(op, sample)
    for way in run_in:
        if not serves(op, way):
            continue
        with running(way):
            call = call_of(sample)
            outputs = outputs_of(op.function, call)
            grads = gradients(outputs, leaves(call))
        for declared, y in zip(op.outputs, outputs, strict=True):
            assert y.dtype is declared.dtype(dtypes), (way, sample.name, declared.name)
            assert y.requires_grad <= declared.differentiable, (way, sample.name, declared.name)
        assert [g.dtype for g in grads] == [a.dtype for a in leaves(call)][: len(grads)]
        for i, values in enumerate(zip((*outputs, *grads), exact, plain, strict=True)):
            try:
                # In float64 the reference is the truth itself: grant its own rounding, of sums too.
                assert_accurate(*values, ulps=16 * op.ulps if dtypes[0] is torch.float64 else op.ulps if ulps is None else ulps)
            except AssertionError as error:
                raise AssertionError(f"{way}, sample {sample.name}, result {i}: {error}") from error


def assert_same(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """The same bits, NaN for NaN."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_refused(function: Callable[..., Any], cases: dict[str, tuple[Any, ...]]) -> None:
    """``cases``: patterns of "type: message", and the arguments that raise such an error, keywords as a dict at their end."""
    for pattern, given in cases.items():
        args, keywords = (given[:-1], given[-1]) if given and isinstance(given[-1], dict) else (given, {})
        with pytest.raises((TypeError, ValueError)) as caught:
            function(*args, **keywords)
        assert re.match(pattern, f"{caught.typename}: {caught.value}"), (pattern, str(caught.value))


def assert_threads_do_not_matter(call: Callable[[], Sequence[torch.Tensor]]) -> None:
    """The same bits for 1, 2 and 5 threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(call())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(other, found[0])
