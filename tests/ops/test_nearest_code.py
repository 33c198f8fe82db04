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
from flowkern.bench.memory import peak_extra_bytes

import flowkern
from flowkern import ops
from flowkern._core import backend as _backend
from flowkern.ops import _nearest_code

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
ISAS = _backend.native.isas() if _backend.native else []
NATIVE = [f"{isa}-float32" for isa in ISAS] + [f"{isa}-bfloat16" for isa in ISAS if isa == "avx512"]

Case = tuple[str, torch.Tensor, torch.Tensor]


@pytest.fixture(params=["torch", *NATIVE])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
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


def halving_sum(s: torch.Tensor) -> torch.Tensor:
    """As defined, one level after the other."""
    terms = [*s.unbind(-1)]
    terms += [torch.zeros_like(terms[0])] * (2 ** math.ceil(math.log2(len(terms))) - len(terms))
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [a + b for a, b in zip(terms[:half], terms[half:], strict=True)]
    return terms[0]


def normalized(x: torch.Tensor) -> torch.Tensor:
    """By the norm as IEEE 754 rounds it; zeros stay."""
    norms = [math.sqrt(v) if v == v else v for v in halving_sum(x * x).tolist()]
    return x / torch.tensor([v or 1.0 for v in norms], dtype=torch.float64)[:, None]


def oracle(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All distances in float64, written anew: the lowest index of the least, and the distance."""
    bad, nan, missing = ~x.isfinite().all(1), x.isnan().any(1), ~codebook.isfinite().all(1)
    dtype = torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32
    x, codebook = x.double(), codebook.double()
    if metric == "cosine":
        x, codebook = normalized(x), normalized(codebook)
    d = halving_sum((x[:, None] - codebook[None]) ** 2)
    d[:, missing] = math.inf
    d[bad] = math.inf
    least = d.amin(1, keepdim=True)
    index = torch.where(d == least, torch.arange(d.shape[1]), d.shape[1]).amin(1)
    sqdist = least[:, 0]
    sqdist[nan] = math.nan
    return index, sqdist.to(dtype)


def neighbour(x: torch.Tensor, steps: int | torch.Tensor) -> torch.Tensor:
    """Numbers whose last place differs by so many units."""
    return (x.contiguous().view(BITS[x.dtype]) + steps).view(x.dtype)


def finite(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    return x.double().clamp(-limit, limit).to(dtype)


def random(dtype: torch.dtype) -> Iterator[Case]:
    for rows, codes, depth in (
        (1, 1, 1),
        (0, 5, 3),
        (9, 1, 4),
        (70, 33, 7),
        (260, 140, 16),
        (13, 300, 65),
        (40, 17, 1),
        (97, 130, 33),
    ):
        yield f"random {rows} {codes} {depth}", torch.randn(rows, depth).to(dtype), torch.randn(codes, depth).to(dtype)
    for offset in (3, 100, 1e4):
        moved = (offset + torch.randn(170, 20, dtype=torch.float64)).to(dtype)
        yield "far from 0", moved[:60], moved[60:]
        yield "but for some codes", moved[:60], torch.cat([finite(1e30 * moved[60:61], dtype), moved[60:], 0 * moved[:1]])
    yield "near the codes", *near(torch.randn(64, 24).to(dtype), dtype)
    strided = torch.randn(24, 40, dtype=torch.float64).to(dtype)
    yield "strided", strided.t()[::2, ::3], torch.randn(50, 16).to(dtype)[:, ::2]


def near(codebook: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (codebook.repeat(2, 1).double() + 0.01 * torch.randn(2 * len(codebook), codebook.shape[1])).to(dtype), codebook


def ties(dtype: torch.dtype) -> Iterator[Case]:
    for depth in (1, 3, 32, 100):
        base = (1 + torch.rand(1, depth)).to(dtype)
        # Codes that differ in the last place of one entry or of some, and rows between them.
        codes = neighbour(base.repeat(80, 1), torch.randint(-1, 2, (80, depth)).to(BITS[dtype]))
        yield "last places", neighbour(base.repeat(60, 1), torch.randint(-1, 2, (60, depth)).to(BITS[dtype])), codes
        left, right = torch.randn(40, depth).to(dtype), torch.randn(40, depth).to(dtype)
        middle = ((left.double() + right.double()) / 2).to(dtype)
        shifted = torch.cat([middle, neighbour(middle, 1), neighbour(middle, -1)])
        yield "midpoints", shifted, torch.stack([left, right], 1).flatten(0, 1)
        some = torch.randn(20, depth).to(dtype)
        yield "duplicates", torch.randn(30, depth).to(dtype), some.repeat(7, 1)[torch.randperm(140)]
        # Equal sums of other orders: only the definition's own order says which is less in float64.
        orders = torch.stack([base[0][torch.randperm(depth)] for _ in range(90)])
        yield "permuted", torch.full((5, depth), 0.3, dtype=dtype), orders
        yield "zeros", torch.zeros(3, depth, dtype=dtype), torch.zeros(40, depth, dtype=dtype)
        sphere = torch.eye(depth, dtype=dtype).repeat(3, 1)
        yield "equidistant", torch.cat([torch.ones(2, depth, dtype=dtype), torch.zeros(1, depth, dtype=dtype)]), sphere


def scales(dtype: torch.dtype) -> Iterator[Case]:
    def drawn(count: int, depth: int, low: float, high: float) -> torch.Tensor:
        exponents = torch.empty(count, 1, dtype=torch.float64).uniform_(low, high)
        return finite(torch.randn(count, depth, dtype=torch.float64) * 10**exponents, dtype)

    for depth in (2, 19):
        yield "mixed", drawn(50, depth, -30, 30), drawn(70, depth, -30, 30)
        yield "huge", drawn(40, depth, 30, 30), drawn(70, depth, 30, 30)
        yield "tiny", drawn(40, depth, -30, -30), drawn(70, depth, -30, -30)
        yield "subnormal", drawn(40, depth, -45, -37), drawn(70, depth, -45, -37)
        yield "one huge code", drawn(40, depth, 0, 0), torch.cat([drawn(70, depth, 0, 0), drawn(1, depth, 38, 38)])
        for exponent in (12, 14, 16, 20):  # float64 itself rounds the distances to few values
            yield f"far away {exponent}", drawn(40, depth, exponent, exponent), drawn(70, depth, 0, 0)
        for exponent in (-18, -20, -21, -22):  # products are subnormal in float32, where the first code sets the scale
            close = drawn(1, depth, exponent, exponent).double() * (1 + 1e-3 * torch.randn(90, depth))
            yield (
                f"subnormal products {exponent}",
                finite(close[:30], dtype),
                torch.cat([drawn(384, depth, 0, 0), finite(close[30:], dtype)]),
            )
        yield "in one entry", torch.cat([drawn(40, depth, 0, 0), drawn(40, 1, 25, 25)], 1), drawn(60, depth + 1, 0, 0)
        if dtype is torch.float64:
            yield "overflow", drawn(40, depth, 150, 300), drawn(40, depth, 150, 300)
            for exponent in (-155, -158, -160, -170):  # squares are subnormal, or zeros
                close = drawn(1, depth, exponent, exponent) * (1 + 1e-2 * torch.randn(90, depth))
                yield f"underflow {exponent}", close[:40], close[40:]
            yield "underflow", drawn(40, depth, -310, -150), drawn(40, depth, -310, -150)


def not_finite(dtype: torch.dtype) -> Iterator[Case]:
    for value in (math.nan, math.inf, -math.inf):
        x, codebook = torch.randn(30, 6).to(dtype), torch.randn(150, 6).to(dtype)
        x[3, 2] = x[7] = codebook[0, 5] = codebook[77] = value
        x[7, 0] = math.inf
        yield "entries", x, codebook
        yield "all codes", x, torch.full((35, 6), value, dtype=dtype)
        codebook[:-1, 1] = value
        yield "all codes but the last", x, codebook


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
def test_the_index_is_that_of_float64(cases: Any, dtype: torch.dtype, where: str) -> None:
    for name, x, codebook in cases(dtype):
        for metric in _nearest_code.METRICS:
            index, sqdist = ops.nearest_code(x, codebook, metric=metric)
            expected, distance = oracle(x, codebook, metric)
            assert index.dtype == torch.int64
            assert sqdist.dtype == distance.dtype
            assert torch.equal(index, expected), (name, metric, (index != expected).nonzero().flatten())
            assert torch.equal(sqdist.nan_to_num(-1), distance.nan_to_num(-1)), (name, metric)


def test_many_rows_of_mixed_dtypes(where: str) -> None:
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
def test_the_number_of_threads_changes_nothing(where: str, rows: int) -> None:
    x, codebook = torch.randn(rows, 48), torch.randn(900, 48)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(ops.nearest_code(x, codebook, return_stats=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_second_look_is_counted(where: str) -> None:
    apart = 10 * torch.eye(40, 64)
    *_, looked = ops.nearest_code(apart.repeat(2, 1) + 0.1, apart, return_stats=True)
    assert looked.shape == ()
    assert looked.dtype == torch.int64
    assert looked == 0
    centres = torch.randn(7, 64)
    close = neighbour(centres.repeat(80, 1), torch.randint(0, 2, (560, 64)).int())
    assert ops.nearest_code(centres, close, return_stats=True)[2] == 7


def test_leading_dimensions_and_empty_ones(where: str) -> None:
    x, codebook = torch.randn(3, 2, 4, 5), torch.randn(6, 5)
    index, sqdist = ops.nearest_code(x, codebook)
    assert index.shape == sqdist.shape == (3, 2, 4)
    assert torch.equal(index.flatten(), ops.nearest_code(x.flatten(0, 2), codebook)[0])
    assert ops.nearest_code(x[0, 0, 0], codebook)[0] == index[0, 0, 0]
    assert ops.nearest_code(x[:0], codebook)[0].shape == (0, 2, 4)


def test_nothing_is_written_beside_the_distances(canaries: Any, where: str) -> None:
    x, codebook = torch.randn(301, 9), torch.randn(77, 9)
    assert torch.equal(ops.nearest_code(x, codebook)[1], oracle(x, codebook, "euclidean")[1])
    canaries.assert_alive()


def test_neither_result_records_gradients(where: str) -> None:
    x, codebook = torch.randn(4, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    assert not any(value.requires_grad for value in ops.nearest_code(x, codebook, return_stats=True))


def test_autocast_and_lower_precision_of_products_change_nothing(where: str) -> None:
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


def test_it_is_compiled_without_a_graph_break() -> None:
    compiled = torch.compile(ops.nearest_code, backend="aot_eager", fullgraph=True)
    x, codebook = torch.randn(3, 7, 5), torch.randn(6, 5)
    for actual, expected in zip(compiled(x, codebook), ops.nearest_code(x, codebook), strict=True):
        assert torch.equal(actual, expected)
    torch.library.opcheck(torch.ops.flowkern.nearest_code.default, (x[0], codebook, False))


def test_vmap_runs_the_definition() -> None:
    x, codebooks = torch.randn(8, 5), torch.randn(3, 6, 5)
    index, _ = torch.vmap(ops.nearest_code, in_dims=(None, 0))(x, codebooks)
    assert torch.equal(index, torch.stack([ops.nearest_code(x, codebook)[0] for codebook in codebooks]))


def test_the_torch_code_never_holds_all_scores() -> None:
    x, codebook = torch.randn(8192, 16), torch.randn(2048, 16)
    with flowkern.backend("torch"):
        extra = peak_extra_bytes(lambda: ops.nearest_code(x, codebook), torch.device("cpu"))
    assert extra < x.shape[0] * codebook.shape[0] * 4 / 2


def test_explain_knows_it() -> None:
    assert "torch  " in flowkern.explain(ops.nearest_code, torch.randn(2, 3), torch.randn(4, 3))


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
