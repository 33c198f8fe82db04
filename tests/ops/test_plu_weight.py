"""``plu_weight``: a matrix from its PLU factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_accurate

import flowkern
from flowkern import ops
from flowkern._core import backend as _backend
from flowkern.ops._plu_weight import _backward, _forward, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 2, 5, 12, 17, 40, 67]
needs_native = pytest.mark.skipif(_backend.native is None, reason="the CPU extension is not built")


def factors(channels: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Factors with values that must not count, in places that must not count."""
    lower = torch.randn(channels, channels, dtype=torch.float64) / max(1, channels) ** 0.5
    upper = torch.randn(channels, channels, dtype=torch.float64) / max(1, channels) ** 0.5
    log_diagonal = 0.3 * torch.randn(channels, dtype=torch.float64)
    sign = torch.randn(channels, dtype=torch.float64).sign()
    permutation = torch.randperm(channels)
    floating = tuple(f.to(dtype) for f in (lower, upper, log_diagonal, sign))
    return *floating, permutation


def results(function: Callable[..., Any], given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """W and the gradients of the three variables for a fixed gradient."""
    *variables, sign, permutation = given
    variables = [v.detach().requires_grad_() for v in variables]
    weight = function(*variables, sign, permutation)
    g = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(weight)
    return weight, *torch.autograd.grad(weight, variables, g)


def check(dtype: torch.dtype) -> None:
    for channels in SIZES:
        given = factors(channels, dtype)
        exact = (*(f.double() for f in given[:4]), given[4])
        for values in zip(results(ops.plu_weight, given), results(reference, exact), results(reference, given), strict=True):
            assert_accurate(*values, ulps=64 if dtype is torch.float64 else 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa_is_accurate(dtype: torch.dtype, isa: str) -> None:
    with flowkern.backend("cpp"):
        check(dtype)


def test_the_factors_give_the_matrix_and_its_determinant() -> None:
    weight = torch.randn(6, 6, dtype=torch.float64)
    p, lower, upper = torch.linalg.lu(weight)
    diagonal = upper.diagonal()
    # What is on and beyond the diagonals does not count: one matrix may hold both.
    compact = lower.tril(-1) + upper
    log_diagonal = diagonal.abs().log()
    actual = ops.plu_weight(compact, compact, log_diagonal, diagonal.sign(), p.argmax(1))
    torch.testing.assert_close(actual, weight)
    torch.testing.assert_close(torch.linalg.slogdet(actual)[1], log_diagonal.sum())


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_gradients_and_double_gradients(channels: int) -> None:
    *variables, sign, permutation = factors(channels)
    variables = [v.requires_grad_() for v in variables]

    def function(*variables: torch.Tensor) -> torch.Tensor:
        return ops.plu_weight(*variables, sign, permutation)

    assert torch.autograd.gradcheck(function, variables)
    assert torch.autograd.gradgradcheck(function, variables)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        actual, expected = (transform(f)(*variables) for f in (function, lambda *v: reference(*v, sign, permutation)))
        torch.testing.assert_close(actual, expected)


def test_mixed_dtypes_strides_and_expanded_gradients() -> None:
    lower, upper, log_diagonal, sign, permutation = factors(7, torch.float32)
    given = (lower.t(), upper.bfloat16(), log_diagonal.repeat_interleave(2)[::2], sign.half(), permutation)
    weight, *grads = results(ops.plu_weight, given)
    expected, *expected_grads = results(reference, given)
    assert weight.dtype is torch.float32
    torch.testing.assert_close(weight, expected)
    for actual, value, leaf in zip(grads, expected_grads, given, strict=False):
        assert actual.dtype is leaf.dtype
        torch.testing.assert_close(actual, value)
    leaf = lower.detach().requires_grad_()
    ops.plu_weight(leaf, upper, log_diagonal, sign, permutation).sum().backward()
    other = lower.detach().requires_grad_()
    reference(other, upper, log_diagonal, sign, permutation).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@needs_native
def test_outputs_are_written_whole_and_nothing_else(canaries: Any) -> None:
    for channels in SIZES[1:]:
        for value in results(ops.plu_weight, factors(channels, torch.float32)):
            assert not value.isnan().any()
    canaries.assert_alive()


@needs_native
def test_same_bits_for_any_number_of_threads() -> None:
    given, before, seen = factors(120, torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            seen.append(results(ops.plu_weight, given))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@needs_native
def test_opcheck_and_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    given = factors(5, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_forward.overload, given, test_utils=tests)
    torch.library.opcheck(_backward.overload, (torch.randn(5, 5), *given), test_utils=tests)
    torch._dynamo.reset()
    compiled = torch.compile(ops.plu_weight, fullgraph=True, backend="aot_eager")
    expected = results(ops.plu_weight, given)
    for a, b in zip(results(compiled, given), expected, strict=True):
        torch.testing.assert_close(a, b)
    monkeypatch.setattr(_backend, "native", None)
    monkeypatch.setattr(_backend, "only_torch", lambda x: False)
    for a, b in zip(results(ops.plu_weight, given), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_does_not_round() -> None:
    given = factors(5, torch.float32)
    for backend in ("auto", "torch"):
        with flowkern.backend(backend), torch.autocast("cpu", torch.bfloat16):
            actual = ops.plu_weight(*given)
        torch.testing.assert_close(actual, reference(*given))


def test_bad_input_is_named() -> None:
    lower, upper, log_diagonal, sign, permutation = factors(4, torch.float32)
    with pytest.raises(ValueError, match=r"lower: expected a square matrix, got shape \(4, 3\)"):
        ops.plu_weight(lower[:, :3], upper, log_diagonal, sign, permutation)
    with pytest.raises(ValueError, match=r"sign: expected shape \(4,\) for lower of shape \(4, 4\), got \(3,\)"):
        ops.plu_weight(lower, upper, log_diagonal, sign[:3], permutation)
    with pytest.raises(TypeError, match=r"permutation: expected an int64 tensor, got torch.int32"):
        ops.plu_weight(lower, upper, log_diagonal, sign, permutation.int())
    with pytest.raises(TypeError, match=r"upper: expected a floating dtype .* got torch.int64"):
        ops.plu_weight(lower, upper.long(), log_diagonal, sign, permutation)
    with pytest.raises((ValueError, IndexError)):
        ops.plu_weight(lower, upper, log_diagonal, sign, permutation + 1)
    if _backend.native is not None:
        with pytest.raises(ValueError, match="permutation: expected row numbers under 4, got 4"):
            ops.plu_weight(lower, upper, log_diagonal, sign, permutation + 1)
