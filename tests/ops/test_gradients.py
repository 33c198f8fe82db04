"""Gradients of every op of OPS: twice, in batches, of any strides, and where some of them are absent."""

from __future__ import annotations

import itertools

import pytest
import torch
from comparison import (
    Tensors,
    assert_accurate,
    assert_same,
    call_of,
    every_op,
    function_of_tensors,
    gradients,
    leaves,
    needs_native,
    outputs_of,
    results,
    running,
    samples,
    serves,
    ways,
)
from torch.autograd.functional import hessian, jacobian

from flowkern import OPS
from flowkern._core import backend as _backend
from flowkern._core.op import Law, Op, Sample

DERIVATIVES = {name: op for name, op in OPS.items() if Law.SURROGATE not in op.laws and any(y.differentiable for y in op.outputs)}
every_derivative = pytest.mark.parametrize("op", DERIVATIVES.values(), ids=DERIVATIVES)


def exact_samples(op: Op, limit: int) -> list[Sample]:
    """Those whose floating arguments are all float64, as finite differences need it, and that give no tensor twice."""
    chosen = ways(op, torch.float64, limit)
    return [s for s in chosen if {a.dtype for a in leaves(s.args)} == {torch.float64} and not leaves(s.kwargs)]


@pytest.mark.everywhere
@every_derivative
def test_gradients_and_double_gradients(op: Op) -> None:
    """Against finite differences; in Triton's interpreter, where the reference differentiates twice, the first ones alone."""
    interpreting = _backend.interpreting()
    if interpreting and not serves(op, "triton"):
        pytest.skip("the op has no kernel for it")
    for sample in exact_samples(op, 64 if not interpreting else 40):
        function, inputs = function_of_tensors(op.function, sample)
        leaves = tuple(a + 0.01 for a in inputs)  # off the kinks
        # What an op takes as a constant gets no gradient.
        outputs = function(*(a.requires_grad_() for a in leaves))
        recorded = [y for y in outputs if y.requires_grad]
        if not recorded or not any(y.numel() for y in recorded):
            continue
        found = torch.autograd.grad(sum(y.sum() for y in recorded), leaves, allow_unused=True)
        variables = tuple(a if g is not None else a.detach() for a, g in zip(leaves, found, strict=True))

        def checked(*values: torch.Tensor, function: object = function) -> Tensors:
            return tuple(y for y in function(*values) if y.requires_grad)  # type: ignore[operator]

        assert torch.autograd.gradcheck(checked, variables, fast_mode=interpreting)
        if not interpreting:
            assert torch.autograd.gradgradcheck(checked, variables, fast_mode=sum(a.numel() for a in variables) > 30)


@every_op
def test_double_gradients_match_the_reference(op: Op) -> None:
    for sample in samples(op, torch.float64, limit=2000):
        found = []
        for function in (op.function, op.reference):
            call = call_of(sample)
            declared = [i for i, y in enumerate(op.outputs) if y.differentiable]
            first = gradients(outputs_of(function, call), leaves(call), declared, create_graph=True)
            second = gradients(first, leaves(call)) if any(g.requires_grad for g in first) else ()
            found.append((*first, *second))
        torch.testing.assert_close(*found)


SEVERAL = {name: op for name, op in OPS.items() if sum(y.differentiable for y in op.outputs) > 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_native)])
@pytest.mark.parametrize("op", SEVERAL.values(), ids=SEVERAL)
def test_every_subset_of_the_outputs(op: Op, backend: str, dtype: torch.dtype) -> None:
    """Where some outputs have no gradient: one that is absent is not zero, which times infinity would be NaN."""
    places = [i for i, y in enumerate(op.outputs) if y.differentiable]
    # A network's gradient starts from the rounded output, and for one output alone it is a sum of terms that cancel.
    ulps = 16 * op.ulps if dtype is torch.float64 else 32 if Law.MASKED in op.laws else op.ulps
    for sample in samples(op, dtype, limit=10000):
        if dtype is torch.float64 and {a.dtype for a in leaves(sample.args)} != {dtype}:
            continue
        for count in range(1, len(places)):
            for of in itertools.combinations(places, count):
                with running(backend):
                    actual = results(op.function, sample, of=of)
                exact, plain = results(op.reference, sample, torch.float64, of), results(op.reference, sample, of=of)
                for values in zip(actual, exact, plain, strict=True):
                    assert_accurate(*values, ulps=ulps)


@pytest.mark.everywhere
@every_derivative
def test_any_strides_of_the_gradients(op: Op) -> None:
    """Expanded and permuted ones, as those of sums and of transposed outputs."""
    if not serves(op, "triton" if _backend.interpreting() else "cpp"):
        pytest.skip("the op has no kernel for it")
    for sample in samples(op, limit=10000) if not _backend.interpreting() else ways(op, limit=300, coarse=True):
        calls = call_of(sample), call_of(sample, torch.float64), call_of(sample)
        functions = op.function, op.reference, op.reference
        ys = [outputs_of(f, call)[0] for f, call in zip(functions, calls, strict=True)]
        shape = ys[0].shape
        permuted = torch.randn([*reversed(shape)]).permute(*reversed(range(len(shape))))
        for grad in (torch.ones(()).expand(shape), permuted):
            given = grad.to(ys[0].dtype), grad.to(ys[0].dtype).double(), grad.to(ys[0].dtype).contiguous()
            found = [
                torch.autograd.grad(y, leaves(call), g, retain_graph=True, allow_unused=True, materialize_grads=True)
                for y, call, g in zip(ys, calls, given, strict=True)
            ]
            for values in zip(*found, strict=True):
                assert_accurate(*values, ulps=op.ulps)


@every_op
def test_gradients_of_some_inputs_alone(op: Op) -> None:
    for sample in ways(op, limit=4000):
        call = call_of(sample)
        expected = results(op.function, sample)[len(op.outputs) :]
        for i, gradient in enumerate(expected):
            alone = call_of(sample)
            for j, leaf in enumerate(leaves(alone)):
                leaf.requires_grad_(i == j)
            outputs = outputs_of(op.function, alone)
            if any(y.requires_grad for y in outputs):
                torch.testing.assert_close(gradients(outputs, leaves(alone)[i : i + 1])[0], gradient)
            else:
                assert not gradient.any()
        assert len(expected) in (0, len(leaves(call)))


@every_op
def test_batched_gradients(op: Op) -> None:
    """``is_grads_batched`` gives what one output gradient after the other gives."""
    for sample in samples(op, torch.float64, limit=2000):
        call = call_of(sample)
        ys = [y for y in outputs_of(op.function, call) if y.requires_grad]
        if not ys or not all(y.numel() for y in ys):
            continue
        gs = [torch.randn(3, *y.shape).to(y) for y in ys]
        together = torch.autograd.grad(ys, leaves(call), gs, is_grads_batched=True, retain_graph=True, allow_unused=True)
        for i in range(3):
            each = torch.autograd.grad(ys, leaves(call), [g[i] for g in gs], retain_graph=True, allow_unused=True)
            for a, b in zip(together, each, strict=True):
                if a is None or b is None:  # one says nothing where the other says zeros
                    assert all(t is None or not t.any() for t in (a, b))
                else:
                    torch.testing.assert_close(a[i], b)


@every_op
def test_vectorized_jacobians_and_hessians(op: Op) -> None:
    for sample in samples(op, torch.float64, limit=60):
        if any(a.dtype is not torch.float64 for a in leaves(sample.args)):
            continue  # of a coarser dtype, in which the two ways round differently
        function, inputs = function_of_tensors(op.function, sample)
        if not inputs or not all(a.numel() for a in inputs):
            continue

        def floating(*values: torch.Tensor, function: object = function) -> Tensors:
            return tuple(y.double() for y in function(*values) if y.is_floating_point())  # type: ignore[operator]

        def loss(*values: torch.Tensor, function: object = floating) -> torch.Tensor:
            return sum(y.square().sum() for y in function(*values))  # type: ignore[operator]

        for of, derivative in ((floating, jacobian), (loss, hessian)):
            torch.testing.assert_close(derivative(of, tuple(inputs), vectorize=True), derivative(of, tuple(inputs)))


@every_op
def test_losses_on_complex_numbers(op: Op) -> None:
    """The gradient that such a loss hands back is a lazy view."""
    for sample in samples(op, limit=2000):
        call = call_of(sample)
        outputs = [y for y in outputs_of(op.function, call) if y.requires_grad]
        if outputs:
            losses = [(torch.complex(y.double(), y.double()).conj().imag * 2).sum() for y in outputs]
            plain = [(-2 * y.double()).sum() for y in outputs]
            options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            assert_same(*(torch.autograd.grad(each, leaves(call), **options) for each in (losses, plain)))
