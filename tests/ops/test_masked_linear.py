"""``masked_linear``: a linear map whose weights are masked by degrees."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import Tensors, assert_accurate, output_gradients

import flowkern
from flowkern import nn, ops
from flowkern._core import backend as _backend
from flowkern.ops import DegreeMask
from flowkern.ops._masked_linear import _backward, _forward, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ("sorted", "unsorted", "strict")
SIZES = [(1, 1, 1), (5, 4, 3), (3, 1, 20), (17, 33, 50), (70, 20, 100), (2, 100, 13)]  # batch, inputs, outputs
LARGE = (40, 600, 1000)  # in panels, where it is plain torch code
needs_native = pytest.mark.skipif(_backend.native is None, reason="the CPU extension is not built")


def degrees(inputs: int, outputs: int, kind: str) -> DegreeMask:
    generator = torch.Generator().manual_seed(inputs)
    most = max(1, 2 * inputs // 3)
    into, out = (torch.randint(0, most + 1, (n,), generator=generator) for n in (inputs, outputs))
    if kind != "unsorted":
        into, out = into.sort()[0], out.sort()[0]
    return DegreeMask(out, into, strict=kind == "strict")


def problem(size: tuple[int, int, int], kind: str = "sorted", dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """x, weight, bias and the mask; the weights that must not count are NaN."""
    batch, inputs, outputs = size
    mask = degrees(inputs, outputs, kind)
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((batch, inputs), (outputs, inputs), (outputs,)))
    return *(t.to(dtype) for t in (x, weight.masked_fill(~mask.dense(), float("nan")), bias)), mask


def results(function: Callable[..., Any], given: tuple[Any, ...], create_graph: bool = False) -> Tensors:
    """y and the gradients of x, weight and bias for a fixed gradient."""
    *tensors, mask = given
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, mask)
    g = output_gradients([y])[0].to(y)
    return y, *torch.autograd.grad(y, [t for t in leaves if t is not None], g, create_graph=create_graph)


def check(given: tuple[Any, ...], ulps: float = 4) -> None:
    exact = tuple(t.double() if isinstance(t, torch.Tensor) else t for t in given)
    ulps = 64 if given[0].dtype is torch.float64 else ulps
    actual, expected, plain = results(ops.masked_linear, given), results(reference, exact), results(reference, given)
    for values in zip(actual, expected, plain, strict=True):
        assert values[0].dtype is values[2].dtype
        assert_accurate(*values, ulps=ulps)
    mask = given[-1]
    assert (actual[2][~mask.dense()] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_isa_is_accurate(dtype: torch.dtype, kind: str, isa: str) -> None:
    with flowkern.backend("cpp"):
        for size in SIZES:
            check(problem(size, kind, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_backend_is_accurate(dtype: torch.dtype) -> None:
    with flowkern.backend("torch"):
        for size, kind in itertools.product(SIZES, KINDS):
            check(problem(size, kind, dtype))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_large_layers(backend: str, kind: str) -> None:
    given = problem(LARGE, kind)
    assert bool(given[-1].panels) == (kind != "unsorted")
    with flowkern.backend(backend):
        check(given)
        check((given[0].bfloat16(), given[1], None, given[-1]) if kind == "strict" else given)


@needs_native
def test_long_batches_few_samples_and_the_ends_of_steps() -> None:
    for size in ((1100, 20, 30), (257, 40, 600), (20, 1030, 24), (1, 300, 70), (4, 300, 70)):
        for kind in KINDS:
            check(problem(size, kind), ulps=16)


def test_the_mask_is_that_of_the_degrees() -> None:
    out, into = torch.tensor([3, 1, 2, 0, 5]), torch.tensor([2, 1, 4, 1])
    for strict in (False, True):
        mask = DegreeMask(out, into, strict=strict)
        expected = out[:, None] > into if strict else out[:, None] >= into
        assert torch.equal(mask.dense(), expected)
        assert mask.unmasked == expected.sum()
        assert mask.share == expected.float().mean()
        assert not mask.sorted
        x, weight, bias = torch.randn(6, 4), torch.randn(5, 4), torch.randn(5)
        plain = x @ (weight * expected).t() + bias
        torch.testing.assert_close(ops.masked_linear(x, weight, bias, mask), plain)
        torch.testing.assert_close(ops.masked_linear(x, weight, bias, out, into, strict=strict), plain)
        torch.testing.assert_close(ops.masked_linear(x, weight, None, mask), plain - bias)
    assert "2 x 2, strict=False, not masked=75.0%, unsorted" in str(DegreeMask(torch.tensor([1, 2]), torch.tensor([2, 1])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(2, 3, 4), (3, 1, 2), (1, 5, 1)])
def test_gradients_and_double_gradients(size: tuple[int, int, int], kind: str) -> None:
    x, weight, bias, mask = problem(size, kind, torch.float64)
    leaves = tuple(t.nan_to_num().requires_grad_() for t in (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: ops.masked_linear(*t, mask), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: ops.masked_linear(*t, mask), leaves)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        for i in range(3):
            actual, expected = (
                transform(lambda *t, f=f: f(*t, mask), argnums=i)(*leaves) for f in (ops.masked_linear, reference)
            )
            torch.testing.assert_close(actual, expected)
    many = torch.vmap(lambda a: ops.masked_linear(a, leaves[1], leaves[2], mask))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(many[1], reference(2 * x, *leaves[1:], mask))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_any_strides_dtypes_and_gradients(backend: str) -> None:
    with flowkern.backend(backend):
        for kind in KINDS:
            x, weight, bias, mask = problem((9, 32, 40), kind)
            check((x.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2], mask))
            check((x[:1].expand(9, 32), weight.bfloat16(), bias.half(), mask))
            check((x.half(), weight, None, mask))
            check((x, weight.double(), bias, mask))
            check((x.repeat(1, 2)[:, ::2], weight.repeat(2, 1)[::2], bias[:1].expand(40), mask))
            leaves = [t.nan_to_num().requires_grad_() for t in (x, weight, bias)]
            actual = torch.autograd.grad(ops.masked_linear(*leaves, mask).sum(), leaves)
            expected = torch.autograd.grad(reference(*leaves, mask).sum(), leaves)
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_leading_dimensions_and_nothing_at_all() -> None:
    x, weight, bias, mask = problem((6, 5, 7))
    for shape in ((5,), (2, 3, 5), (0, 5), (2, 0, 5)):
        a = x.flatten()[: torch.Size(shape).numel()].view(shape).requires_grad_()
        y = ops.masked_linear(a, weight, bias, mask)
        assert y.shape == (*shape[:-1], 7)
        if y.numel():
            torch.testing.assert_close(y, reference(a, weight, bias, mask))
        assert torch.autograd.grad(y.sum(), a)[0].shape == shape
    for inputs, outputs in ((0, 3), (3, 0), (0, 0)):
        mask = degrees(inputs, outputs, "sorted")
        leaves = [torch.randn(s, requires_grad=True) for s in ((4, inputs), (outputs, inputs), (outputs,))]
        y = ops.masked_linear(*leaves, mask)
        torch.testing.assert_close(y, leaves[2].expand(4, outputs))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), leaves[2])[0], torch.full((outputs,), 4.0))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_rows_that_see_nothing_and_rows_that_see_all(backend: str) -> None:
    x, weight, bias = torch.randn(5, 6), torch.randn(8, 6), torch.randn(8)
    with flowkern.backend(backend):
        for degree, expected in ((0, bias.expand(5, 8)), (9, x @ weight.t() + bias)):
            mask = DegreeMask(torch.full((8,), degree), torch.arange(1, 7))
            torch.testing.assert_close(ops.masked_linear(x, weight, bias, mask), expected)
            check((x, weight, bias, mask))


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_reaches_what_sees_it_and_nothing_else(kind: str, value: float, isa: str) -> None:
    x, weight, bias, mask = problem((20, 30, 60), kind)
    clean = ops.masked_linear(x, weight, bias, mask)
    assert clean.isfinite().all()
    for feature in (0, 13, 29):
        spoilt = x.clone()
        spoilt[3, feature] = value
        y = ops.masked_linear(spoilt, weight, bias, mask)
        sees = mask.dense()[:, feature]
        assert not y[3, sees].isfinite().any()
        assert torch.equal(y[3, ~sees], clean[3, ~sees])
        others = torch.arange(20) != 3
        assert torch.equal(y[others], clean[others])


@needs_native
def test_outputs_are_written_whole_and_nothing_else(canaries: Any) -> None:
    for size, kind in itertools.product(SIZES, KINDS):
        for value in results(ops.masked_linear, problem(size, kind)):
            assert not value.isnan().any()
    canaries.assert_alive()


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_number_of_threads(kind: str) -> None:
    given, before, seen = problem((100, 300, 250), kind), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            seen.append(results(ops.masked_linear, given))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_nothing_is_computed_that_nobody_asks_for() -> None:
    x, weight, bias, mask = problem((4, 6, 8))
    expected = results(reference, (x, weight, bias, mask))[1:]
    for i in range(3):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate((x, weight, bias))]
        y = ops.masked_linear(*leaves, mask)
        torch.testing.assert_close(torch.autograd.grad(y, leaves[i], output_gradients([y])[0].float())[0], expected[i])


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_compile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, mask = given = problem((5, 6, 8), kind)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    clean = weight.nan_to_num()
    for b in (bias, None):
        torch.library.opcheck(_forward.overload, (x, clean, b, *mask.indices), test_utils=tests)
        needs = (True, True, b is not None)
        torch.library.opcheck(_backward.overload, (torch.randn(5, 8), x, clean, b, *mask.indices, *needs), test_utils=tests)
    expected = results(ops.masked_linear, given)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(ops.masked_linear, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for a, b in zip(results(compiled, given), expected, strict=True):
            torch.testing.assert_close(a, b)
    monkeypatch.setattr(_backend, "native", None)
    monkeypatch.setattr(_backend, "only_torch", lambda x: False)
    for a, b in zip(results(ops.masked_linear, given), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(_backend.interpreting(), reason="Triton compiles nothing in its interpreter")
@pytest.mark.parametrize("dtypes", ["bfloat16", "float16"])
def test_half_precision_runs_on_tensor_cores(dtypes: str) -> None:
    pytest.importorskip("triton")
    from flowkern.kernels.compile import compile_launch, problems
    from flowkern.kernels.masked_linear import compile_cases

    for name, launch in compile_cases((64, 784, 1024), True, dtypes):
        build = compile_launch(launch, "sm_90")
        assert problems(build) == [], name
        assert "wgmma.mma_async" in build.assembly, name


def test_autocast_does_not_round() -> None:
    given = problem((5, 6, 8))
    for backend in ("auto", "torch"):
        with flowkern.backend(backend), torch.autocast("cpu", torch.bfloat16):
            actual = ops.masked_linear(*given)
        torch.testing.assert_close(actual, reference(*given))


def test_a_mask_moves_and_is_copied() -> None:
    mask = degrees(5, 7, "unsorted")
    for other in (copy.deepcopy(mask), mask.to("cpu")):
        assert all(a is b for a, b in zip(other.indices[:4], (other.reach, other.first, other.rows, other.columns), strict=True))
        assert torch.equal(other.dense(), mask.dense())
    away = copy.deepcopy(mask).to("meta")
    assert away.indices[0].is_meta
    with pytest.raises(ValueError, match="out_degrees: the DegreeMask is on meta, x on cpu"):
        ops.masked_linear(torch.randn(2, 5), torch.randn(7, 5), None, away)
    assert not mask.state_dict()


def test_bad_input_is_named() -> None:
    x, weight, bias, mask = problem((2, 3, 4))
    into, out = mask.in_degrees, mask.out_degrees
    for arguments, error, match in (
        (([1.0], weight, bias, mask), TypeError, "x: expected a tensor, got list"),
        ((x.long(), weight, bias, mask), TypeError, "x: expected a floating dtype .* got torch.int64"),
        ((x, weight.long(), bias, mask), TypeError, "weight: expected a floating dtype"),
        ((x, None, bias, mask), TypeError, "weight: expected a tensor, got NoneType"),
        ((x[:, :2], weight, bias, mask), ValueError, r"x: expected shape \(..., 3\), one value per in_degree, got \(2, 2\)"),
        ((x, weight.t(), bias, mask), ValueError, r"weight: expected shape \(4, 3\) for these degrees, got \(3, 4\)"),
        ((x, weight, bias[:3], mask), ValueError, r"bias: expected shape \(4,\) for these degrees, got \(3,\)"),
        ((x, weight.to("meta"), bias, mask), ValueError, "weight: expected device cpu .* got meta"),
        ((x, weight, bias, out), TypeError, "in_degrees: expected an integer tensor, got NoneType"),
        (
            (x, weight, bias, out, into.to("meta")),
            ValueError,
            r"in_degrees: expected device cpu \(that of out_degrees\), got meta",
        ),
        ((x, weight, bias, out.float(), into), TypeError, "out_degrees: expected an integer tensor, got torch.float32"),
        ((x, weight, bias, out, into[None]), ValueError, r"in_degrees: expected one degree per unit.* got shape \(1, 3\)"),
        ((x, weight, bias, mask, into), ValueError, "in_degrees, strict: expected neither beside a DegreeMask"),
    ):
        with pytest.raises(error, match=match):
            ops.masked_linear(*arguments)


def test_the_layer() -> None:
    into, out = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2, 2])
    layer = nn.MaskedLinear(into, out)
    x = torch.randn(5, 3)
    expected = x @ (layer.weight * (out[:, None] >= into)).t() + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert nn.MaskedLinear(into, out, bias=False).bias is None
    assert nn.MaskedLinear(into, out, strict=True).mask.unmasked == 2
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert layer.double()(x.double()).dtype is torch.float64
    assert copy.deepcopy(layer).mask.share == 5 / 12
