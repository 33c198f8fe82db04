"""``plu_weight``: a matrix from its PLU factors."""

from __future__ import annotations

import pytest
import torch

from flowkern import ops
from flowkern._core import backend as _backend


def factors(channels: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Factors with values that must not count, in places that must not count."""
    lower = torch.randn(channels, channels, dtype=torch.float64) / max(1, channels) ** 0.5
    upper = torch.randn(channels, channels, dtype=torch.float64) / max(1, channels) ** 0.5
    log_diagonal = 0.3 * torch.randn(channels, dtype=torch.float64)
    sign = torch.randn(channels, dtype=torch.float64).sign()
    permutation = torch.randperm(channels)
    floating = tuple(f.to(dtype) for f in (lower, upper, log_diagonal, sign))
    return *floating, permutation


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
