"""The certified nearest code: every backend and instruction set against all distances in float64, on inputs made to mislead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparison import DTYPES, assert_refused, assert_same, assert_threads_do_not_matter, running
from flowkern.bench.memory import peak_extra_bytes
from nearest import neighbour, not_finite, oracle, random, scales, ties

import flowkern
from flowkern import ops
from flowkern._core import backend as _backend
from flowkern.ops import _nearest_code

ISAS = _backend.native.isas() if _backend.native else []
NATIVE = [f"{isa}-float32" for isa in ISAS] + [f"{isa}-bfloat16" for isa in ISAS if isa == "avx512"]


every_kind = pytest.mark.parametrize("cases", [random, ties, scales, not_finite])


@pytest.fixture(params=["torch", *NATIVE])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The torch code, and the kernels of every instruction set with every screen."""
    way, _, screen = request.param.partition("-")
    monkeypatch.setattr(_backend, "multiply_bfloat16", screen == "bfloat16")
    with running(way):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_the_index_is_that_of_float64(cases: Any, dtype: torch.dtype, kernel: str) -> None:
    for name, x, codebook in cases(dtype):
        for metric in _nearest_code.METRICS:
            actual, expected = ops.nearest_code(x, codebook, metric=metric), oracle(x, codebook, metric)
            assert torch.equal(actual[0], expected[0]), (name, metric, (actual[0] != expected[0]).nonzero().flatten())
            assert_same(actual, expected)


def test_many_rows_of_mixed_dtypes(kernel: str, canaries: Any) -> None:
    """More rows than share one block, and codes of several groups; nothing is written beside the distances."""
    for dtypes in ((torch.float32, torch.bfloat16), (torch.float16, torch.float64), (torch.bfloat16, torch.float32)):
        x, codebook = torch.randn(401, 9).to(dtypes[0]), torch.randn(277, 9).to(dtypes[1])
        for metric in _nearest_code.METRICS:
            assert_same(ops.nearest_code(x, codebook, metric=metric), oracle(x, codebook, metric))
    canaries.assert_alive()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_the_reference_defines(cases: Any, dtype: torch.dtype) -> None:
    for _, x, codebook in cases(dtype):
        for metric in _nearest_code.METRICS:
            assert_same(_nearest_code.reference(x, codebook, metric=metric), oracle(x, codebook, metric))


@pytest.mark.parametrize("rows", [100, 700], ids=["codes shared", "rows shared"])
def test_the_number_of_threads_changes_nothing(kernel: str, rows: int) -> None:
    x, codebook = torch.randn(rows, 48), torch.randn(900, 48)
    assert_threads_do_not_matter(lambda: ops.nearest_code(x, codebook, return_stats=True))


def test_the_second_look_is_counted(kernel: str) -> None:
    apart = 10 * torch.eye(40, 64)
    *_, looked = ops.nearest_code(apart.repeat(2, 1) + 0.1, apart, return_stats=True)
    assert looked.shape == ()
    assert looked.dtype == torch.int64
    assert looked == 0
    centres = torch.randn(7, 64)
    close = neighbour(centres.repeat(80, 1), torch.randint(0, 2, (560, 64)).int())
    assert ops.nearest_code(centres, close, return_stats=True)[2] == 7


def test_leading_dimensions_and_empty_ones(kernel: str) -> None:
    x, codebook = torch.randn(3, 2, 4, 5), torch.randn(6, 5)
    index, sqdist = ops.nearest_code(x, codebook)
    assert index.shape == sqdist.shape == (3, 2, 4)
    assert torch.equal(index.flatten(), ops.nearest_code(x.flatten(0, 2), codebook)[0])
    assert ops.nearest_code(x[0, 0, 0], codebook)[0] == index[0, 0, 0]
    assert ops.nearest_code(x[:0], codebook)[0].shape == (0, 2, 4)


def test_neither_result_records_gradients(kernel: str) -> None:
    x, codebook = torch.randn(4, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    assert not any(value.requires_grad for value in ops.nearest_code(x, codebook, return_stats=True))


def test_autocast_and_lower_precision_of_products_change_nothing(kernel: str) -> None:
    x = torch.randn(300, 64)
    codebook = x[:40].repeat(20, 1) + 1e-3 * torch.randn(800, 64)
    expected = oracle(x, codebook, "euclidean")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = ops.nearest_code(x, codebook)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same(results, expected)


def test_the_torch_code_never_holds_all_scores() -> None:
    x, codebook = torch.randn(8192, 16), torch.randn(2048, 16)
    with flowkern.backend("torch"):
        extra = peak_extra_bytes(lambda: ops.nearest_code(x, codebook), torch.device("cpu"))
    assert extra < x.shape[0] * codebook.shape[0] * 4 / 2


def test_wrong_inputs_are_named() -> None:
    ones = torch.ones
    cases = {
        "TypeError: x: expected a tensor, got list": ([1.0], ones(2, 1)),
        "TypeError: x: expected a floating dtype .*got torch.int64": (ones(3, 2).long(), ones(2, 2)),
        "TypeError: codebook: expected a floating dtype .*got torch.int64": (ones(3, 2), ones(2, 2).long()),
        r"ValueError: x: expected shape \(..., 3\) as the codes have, got \(3, 2\)": (ones(3, 2), ones(2, 3)),
        r"ValueError: x: expected shape \(..., 3\) as the codes have, got \(\)": (ones(()), ones(2, 3)),
        r"ValueError: codebook: .* at least one code and entry, got \(0, 2\)": (ones(3, 2), ones(0, 2)),
        r"ValueError: codebook: .* at least one code and entry, got \(2, 0\)": (ones(3, 0), ones(2, 0)),
        r"ValueError: codebook: expected shape \(K, D\)": (ones(3, 2), ones(2)),
        "ValueError: codebook: expected device cpu": (ones(3, 2), ones(2, 2, device="meta")),
        "ValueError: metric: unknown name 'dot'; expected one of 'euclidean', 'cosine'": (
            ones(1, 1),
            ones(1, 1),
            {"metric": "dot"},
        ),
    }
    assert_refused(ops.nearest_code, cases)


def test_the_square_root_is_rounded_correctly() -> None:
    near_one = 1 + torch.arange(-300, 300, dtype=torch.float64) * 2.0**-53
    wide = 10 ** torch.empty(3000, dtype=torch.float64).uniform_(-323, 308)
    values = torch.cat([near_one, 4 * near_one, wide, torch.tensor([0.0, 5e-324, math.inf], dtype=torch.float64)])
    expected = torch.tensor([math.sqrt(value) for value in values.tolist()], dtype=torch.float64)
    assert torch.equal(_nearest_code._sqrt(values), expected)
