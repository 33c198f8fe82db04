"""The certified nearest code: every backend and instruction set against all distances in float64, on inputs made to mislead."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import DTYPES, assert_threads_do_not_matter
from flowkern.bench.memory import peak_extra_bytes
from nearest import neighbour, not_finite, oracle, random, scales, ties

import flowkern
from flowkern import ops
from flowkern._core import backend as _backend
from flowkern.ops import _nearest_code

ROOT = Path(__file__).parents[2]
ISAS = _backend.native.isas() if _backend.native else []
NATIVE = [f"{isa}-float32" for isa in ISAS] + [f"{isa}-bfloat16" for isa in ISAS if isa == "avx512"]


@pytest.fixture(params=["torch", *NATIVE])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The torch code, and the kernels of every instruction set with every screen."""
    if request.param == "torch":
        with flowkern.backend("torch"):
            yield request.param
        return
    assert _backend.native is not None
    isa, screen = request.param.split("-")
    before = _backend.native.isa()
    _backend.native.use_isa(isa)
    monkeypatch.setattr(_backend, "multiply_bfloat16", screen == "bfloat16")
    with flowkern.backend("cpp"):
        yield request.param
    _backend.native.use_isa(before)


DRIVER = """
#include "csrc/kernels.h"
#include <cmath>
#include <cstdio>
#include <vector>
using namespace flowkern;
namespace flowkern {
bool in_forked_child() { return false; }
namespace ISA {
void nearest_code(In, In, bool, bool, Out, Out, Out, int);
}
}
Output matrix(void* data, Dtype dtype, int64_t rows, int64_t columns, int64_t row, int64_t step) {
  Output t;
  t.data = static_cast<char*>(data);
  t.dtype = dtype;
  t.dims = 2;
  t.size[0] = rows, t.size[1] = columns, t.stride[0] = row, t.stride[1] = step;
  return t;
}
template <class T>
void run(Dtype dtype, int64_t rows, int64_t codes, int64_t depth, bool cosine, bool pairs, bool flipped) {
  std::vector<T> x(rows * depth), codebook(codes * depth);
  std::vector<int64_t> index(rows, -1);
  std::vector<double> wide(rows);
  std::vector<float> narrow(rows);
  int64_t looked = -1;
  uint32_t state = 1;
  for (auto* values : {&x, &codebook})
    for (T& v : *values) v = T((state = state * 1664525u + 1013904223u) % 7u) - T(3);
  if (codes > 2) codebook[depth] = T(NAN), codebook[2 * depth] = T(1e30);
  if (rows > 2) x[0] = T(NAN), x[depth] = T(INFINITY);
  const Output rows_of = matrix(x.data(), dtype, rows, depth, flipped ? 1 : depth, flipped ? rows : 1);
  const bool in_double = sizeof(T) == 8;
  ISA::nearest_code(
      rows_of, matrix(codebook.data(), dtype, codes, depth, depth, 1), cosine, pairs,
      matrix(index.data(), Dtype::int64, rows, 1, 1, 1),
      matrix(in_double ? (void*)wide.data() : (void*)narrow.data(), in_double ? Dtype::float64 : Dtype::float32, rows, 1, 1, 1),
      matrix(&looked, Dtype::int64, 1, 1, 1, 1), 2);
  for (int64_t i : index)
    if (i < 0 || i >= codes) std::printf("index %ld", long(i));
  if (looked < 0 || looked > rows) std::printf("looked %ld", long(looked));
}
int main() {
  for (int64_t rows : {0, 1, 97, 301})
    for (int64_t codes : {1, 65, 300})
      for (int64_t depth : {1, 2, 33})
        for (int flags = 0; flags < 8; ++flags) {
          run<float>(Dtype::float32, rows, codes, depth, flags & 1, flags & 2, flags & 4);
          run<double>(Dtype::float64, rows, codes, depth, flags & 1, flags & 2, flags & 4);
        }
  std::printf("done");
}
"""
ISA_FLAGS = {"baseline": [], "avx2": ["-mavx2", "-mfma"]}
ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ and its sanitizer runtimes")
@pytest.mark.parametrize("isa", ISAS[:1])
def test_memory_and_arithmetic_under_sanitizers(isa: str, tmp_path: Path) -> None:
    """The kernel alone, in a program of its own, so that only one file is compiled."""
    (tmp_path / "driver.cpp").write_text(DRIVER.replace("ISA", isa))
    flags = ["-std=c++17", "-O1", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    sources = ["csrc/cpu/nearest_code.cpp", str(tmp_path / "driver.cpp")]
    program = str(tmp_path / "driver")
    command = ["g++", *flags, *ISA_FLAGS[isa], f"-DFLOWKERN_ISA={isa}", "-I.", *sources, "-o", program]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip("the sanitizer runtimes are not installed")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done"), done.stderr[-4000:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cases", [random, ties, scales, not_finite])
def test_the_index_is_that_of_float64(cases: Any, dtype: torch.dtype, kernel: str) -> None:
    for name, x, codebook in cases(dtype):
        for metric in _nearest_code.METRICS:
            index, sqdist = ops.nearest_code(x, codebook, metric=metric)
            expected, distance = oracle(x, codebook, metric)
            assert index.dtype == torch.int64
            assert sqdist.dtype == distance.dtype
            assert torch.equal(index, expected), (name, metric, (index != expected).nonzero().flatten())
            assert torch.equal(sqdist.nan_to_num(-1), distance.nan_to_num(-1)), (name, metric)


def test_many_rows_of_mixed_dtypes(kernel: str) -> None:
    """More rows than share one block, and codes of several groups."""
    for dtypes in ((torch.float32, torch.bfloat16), (torch.float16, torch.float64), (torch.bfloat16, torch.float32)):
        x, codebook = torch.randn(400, 10).to(dtypes[0]), torch.randn(280, 10).to(dtypes[1])
        for metric in _nearest_code.METRICS:
            for actual, expected in zip(ops.nearest_code(x, codebook, metric=metric), oracle(x, codebook, metric), strict=True):
                assert torch.equal(actual, expected)


def test_the_reference_defines() -> None:
    for dtype in DTYPES:
        for cases in (random, ties, scales, not_finite):
            for name, x, codebook in cases(dtype):
                for metric in _nearest_code.METRICS:
                    actual = _nearest_code.reference(x, codebook, metric=metric)
                    for a, b in zip(actual, oracle(x, codebook, metric), strict=True):
                        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), (name, metric, dtype)


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


def test_nothing_is_written_beside_the_distances(canaries: Any, kernel: str) -> None:
    x, codebook = torch.randn(301, 9), torch.randn(77, 9)
    assert torch.equal(ops.nearest_code(x, codebook)[1], oracle(x, codebook, "euclidean")[1])
    canaries.assert_alive()


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
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_the_torch_code_never_holds_all_scores() -> None:
    x, codebook = torch.randn(8192, 16), torch.randn(2048, 16)
    with flowkern.backend("torch"):
        extra = peak_extra_bytes(lambda: ops.nearest_code(x, codebook), torch.device("cpu"))
    assert extra < x.shape[0] * codebook.shape[0] * 4 / 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.ones(2, 1)), TypeError, "x: expected a tensor, got list"),
        ((torch.ones(3, 2).long(), torch.ones(2, 2)), TypeError, "x: expected a floating dtype .*got torch.int64"),
        ((torch.ones(3, 2), torch.ones(2, 2).long()), TypeError, "codebook: expected a floating dtype .*got torch.int64"),
        ((torch.ones(3, 2), torch.ones(2, 3)), ValueError, r"x: expected shape \(..., 3\) as the codes have, got \(3, 2\)"),
        ((torch.ones(()), torch.ones(2, 3)), ValueError, r"x: expected shape \(..., 3\) as the codes have, got \(\)"),
        ((torch.ones(3, 2), torch.ones(0, 2)), ValueError, r"codebook: .* at least one code and entry, got \(0, 2\)"),
        ((torch.ones(3, 0), torch.ones(2, 0)), ValueError, r"codebook: .* at least one code and entry, got \(2, 0\)"),
        ((torch.ones(3, 2), torch.ones(2)), ValueError, r"codebook: expected shape \(K, D\)"),
        ((torch.ones(3, 2), torch.ones(2, 2, device="meta")), ValueError, "codebook: expected device cpu"),
    ],
)
def test_wrong_inputs_are_named(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.nearest_code(*arguments)


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(ValueError, match="metric: unknown name 'dot'; expected one of 'euclidean', 'cosine'"):
        ops.nearest_code(torch.ones(1, 1), torch.ones(1, 1), metric="dot")


def test_the_square_root_is_rounded_correctly() -> None:
    near_one = 1 + torch.arange(-300, 300, dtype=torch.float64) * 2.0**-53
    wide = 10 ** torch.empty(3000, dtype=torch.float64).uniform_(-323, 308)
    values = torch.cat([near_one, 4 * near_one, wide, torch.tensor([0.0, 5e-324, math.inf], dtype=torch.float64)])
    expected = torch.tensor([math.sqrt(value) for value in values.tolist()], dtype=torch.float64)
    assert torch.equal(_nearest_code._sqrt(values), expected)
