"""Every op of OPS: values and gradients against float64 wherever there are kernels, and what does not change them.

Adding an op adds it here, and to the other generic files, by being in the table.
"""

from __future__ import annotations

import pytest
import torch
from comparison import (
    INVERTIBLE,
    LIMIT,
    assert_accurate,
    call_of,
    change_samples,
    check,
    every_dtype,
    every_op,
    gradients,
    leaves,
    needs_native,
    outputs_of,
    references,
    results,
    running,
    samples,
    serves,
    ways,
)

from flowkern._core import backend as _backend
from flowkern._core.op import Law, Op

every_invertible_op = pytest.mark.parametrize("op", INVERTIBLE.values(), ids=INVERTIBLE)


@pytest.mark.everywhere
@every_dtype
@every_op
def test_values_and_gradients(op: Op, dtype: torch.dtype) -> None:
    for sample in samples(op, dtype, LIMIT):
        check(op, sample)


@needs_native
@every_op
def test_registered_torch_kernels(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch implementations behind the registered ops, which a traced graph meets on a machine without kernels."""
    for sample in samples(op):
        fused = results(op.function, sample)
        with monkeypatch.context() as patch:
            patch.setattr(_backend, "native", None)
            patch.setattr(_backend, "only_torch", lambda x: False)
            plain = results(op.function, sample)
        for a, b, truth, same_dtype in zip(fused, plain, *references(op, sample), strict=True):
            assert_accurate(b, truth, same_dtype)
            assert a.stride() == b.stride() or a.numel() < 2


@every_invertible_op
def test_leading_batch_dimensions(op: Op) -> None:
    for sample in samples(op):
        args = change_samples(op, lambda a: torch.stack([a, a + 1]), sample.args)
        if args[0].numel() == 0:
            continue
        y, logabsdet = op.function(*args, **sample.kwargs)
        for i in range(2):
            expected = op.function(*change_samples(op, lambda a, i=i: a[i], args), **sample.kwargs)
            torch.testing.assert_close((y[i], logabsdet[i]), expected)


@every_invertible_op
def test_memory_format_is_kept(op: Op) -> None:
    for sample in samples(op):
        x = sample.args[0]
        y, _ = op.function(*sample.args, **sample.kwargs)
        channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@every_op
def test_autocast_does_not_round(op: Op, backend: str) -> None:
    for sample in samples(op):
        with running(backend):
            expected = results(op.function, sample)
            call = call_of(sample)
            with torch.autocast("cpu", torch.bfloat16):
                outputs = outputs_of(op.function, call)
            actual = *outputs, *gradients(outputs, leaves(call))
        torch.testing.assert_close(actual, expected)


@every_op
def test_nan_stays_in_its_sample(op: Op, where: str) -> None:
    """In outputs and gradients. Kernels keep it from what only a masked weight connects, where a reference multiplies by 0."""
    if not serves(op, where):
        pytest.skip("the op has no kernel for it")
    for sample in ways(op, limit=1000, coarse=True) if where == "triton" else samples(op, limit=1000):
        for i, argument in enumerate(sample.args[: op.per_sample]):
            for place in {0, argument[0].numel() - 1} if argument.numel() and argument.is_floating_point() else ():
                poisoned = argument.detach().clone(memory_format=torch.contiguous_format)
                poisoned[0].view(-1)[place] = torch.nan
                spoilt = type(sample)(sample.name, (*sample.args[:i], poisoned, *sample.args[i + 1 :]), sample.kwargs)
                found, expected = results(op.function, spoilt), results(op.reference, spoilt)
                for declared, actual, plain in zip(op.outputs, found, expected, strict=False):
                    assert not (actual.isnan() & ~plain.isnan()).any()
                    if Law.MASKED not in op.laws:
                        assert torch.equal(actual.isnan(), plain.isnan())
                    if declared.per_sample:
                        assert not actual[1:].isnan().any()
                count = len(leaves(sample.args[: op.per_sample]))
                for grad in found[len(op.outputs) :][:count]:
                    assert not grad[1:].isnan().any()
