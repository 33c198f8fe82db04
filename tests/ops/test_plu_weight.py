"""``plu_weight``: a matrix from its PLU factors."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_refused

from flowkern import ops
from flowkern._core import backend as _backend


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
    matrix, log_diagonal, sign, permutation = torch.eye(4), torch.zeros(4), torch.ones(4), torch.arange(4)
    rest = log_diagonal, sign, permutation
    wrong = "expected row numbers under 4, got 4" if _backend.native is not None else ""
    cases = {
        r"ValueError: lower: expected a square matrix, got shape \(4, 3\)": (matrix[:, :3], matrix, *rest),
        r"ValueError: sign: expected shape \(4,\) for lower of shape \(4, 4\), got \(3,\)": (
            *(matrix, matrix, log_diagonal, sign[:3], permutation),
        ),
        r"TypeError: permutation: expected an int64 tensor, got torch.int32": (matrix, matrix, *rest[:2], permutation.int()),
        r"TypeError: upper: expected a floating dtype .* got torch.int64": (matrix, matrix.long(), *rest),
    }
    assert_refused(ops.plu_weight, cases)
    with pytest.raises((ValueError, IndexError), match=wrong):
        ops.plu_weight(matrix, matrix, log_diagonal, sign, permutation + 1)
