"""``ops.vector_quantize`` and ``ops.ema_update``: values, gradients, exact sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from comparison import assert_refused, assert_threads_do_not_matter, check, every_dtype, results

from flowkern import OPS, ops
from flowkern._core import code_sums as _code_sums
from flowkern._core.code_sums import CodeSums, code_sums
from flowkern._core.op import Sample
from flowkern.ops._vector_quantize import pass_gradient

HOW = [{}, {"rotation": True}, {"beta": 0.7, "codebook_loss": False}, {"beta": 2.0, "rotation": True}]
SHAPES = [((7, 3), 5), ((2, 3, 5), 4), ((1, 1), 1), ((6,), 3), ((0, 4), 2), ((40, 33), 70)]


def problem(shape: tuple[int, ...] = (7, 3), codes: int = 5, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(*s, dtype=torch.float64).to(dtype).requires_grad_() for s in (shape, (codes, shape[-1]))]


@every_dtype
def test_values_and_gradients_are_accurate(dtype: torch.dtype) -> None:
    for (shape, codes), how in itertools.product(SHAPES, HOW):
        sample = Sample("", tuple(problem(shape, codes, dtype)), how)
        check(OPS["vector_quantize"], sample)
        # In value the code itself, not x + (c - x) as rounding leaves it.
        quantized, index, *_ = results(ops.vector_quantize, sample)
        assert torch.equal(quantized, sample.args[1].detach()[index])


def test_the_losses_are_those_of_the_paper() -> None:
    x, codebook = problem(dtype=torch.float64)
    code = codebook.detach()[torch.cdist(x, codebook).argmin(1)].requires_grad_()
    mse = torch.nn.functional.mse_loss
    expected = mse(x.detach(), code) + 0.3 * mse(x, code.detach())
    _, index, loss = ops.vector_quantize(x, codebook, beta=0.3)
    torch.testing.assert_close(loss, expected)
    by_x, by_codebook = torch.autograd.grad(loss, (x, codebook))
    expected_x, by_code = torch.autograd.grad(expected, (x, code))
    torch.testing.assert_close(by_x, expected_x)
    torch.testing.assert_close(by_codebook, torch.zeros_like(codebook).index_add(0, index, by_code))
    commitment = ops.vector_quantize(x, codebook, beta=0.3, codebook_loss=False)[2]
    torch.testing.assert_close(commitment, 0.3 * mse(x, code))
    assert torch.autograd.grad(commitment, codebook, allow_unused=True) == (None,)


def test_the_rotation_takes_each_row_onto_its_code() -> None:
    x, codebook = problem((9, 4), 3, torch.float64)
    quantized, index, _ = ops.vector_quantize(x, codebook, rotation=True)
    for i in range(len(x)):
        jacobian = torch.stack([torch.autograd.grad(quantized[i, j], x, retain_graph=True)[0][i] for j in range(4)])
        code, row = codebook[index[i]].detach(), x[i].detach()
        torch.testing.assert_close(jacobian @ row, code)
        rotation = jacobian * row.norm() / code.norm()
        torch.testing.assert_close(rotation @ rotation.t(), torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(torch.linalg.det(rotation), torch.ones((), dtype=torch.float64))
        # It turns in the plane of the two alone.
        normal = torch.linalg.svd(torch.stack([row, code]))[2][2:]
        torch.testing.assert_close(normal @ rotation.t(), normal)


def test_directions_that_do_not_exist_are_passed_straight() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-2.0, 0.0]], requires_grad=True)
    g = torch.randn(3, 2)
    for code in (torch.zeros(1, 2), torch.tensor([[4.0, 0.0]])):
        gradient = torch.autograd.grad(ops.vector_quantize(x, code, rotation=True)[0], x, g)[0]
        assert gradient.isfinite().all()
        assert torch.equal(gradient[0], g[0])


def test_single_gradients() -> None:
    x, codebook = problem((12, 6), 5)
    quantized, _, loss = ops.vector_quantize(x, codebook.detach())
    assert torch.equal(torch.autograd.grad(quantized.sum(), x, retain_graph=True)[0], torch.ones_like(x))
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], (x - quantized).detach() * 0.5 / x.numel())
    assert not ops.vector_quantize(x.detach(), codebook.detach())[0].requires_grad


def test_the_codebook_may_move_before_the_backward() -> None:
    x, codebook = problem()
    moved = codebook.detach().clone()
    expected = torch.autograd.grad(sum(ops.vector_quantize(x, moved)[::2], torch.zeros(())).sum(), x)
    outputs = ops.vector_quantize(x, moved)[::2]
    moved.fill_(7.0)
    assert torch.equal(torch.autograd.grad(sum(outputs, torch.zeros(())).sum(), x)[0], expected[0])


def test_nan_stays_in_its_row() -> None:
    x, codebook = problem()
    bad = x.detach().clone()
    bad[2, 1] = torch.nan
    bad.requires_grad_()
    quantized, index, loss, by_x, _ = results(ops.vector_quantize, Sample("", (bad, codebook)))
    good, expected, *_ = results(ops.vector_quantize, Sample("", (x, codebook)))
    assert index[2] == 0
    assert torch.equal(quantized[2], codebook[0])
    assert loss.isnan()
    assert by_x.isnan().nonzero().tolist() == [[2, 1]]
    rest = [0, 1, 3, 4, 5, 6]
    assert torch.equal(index[rest], expected[rest])
    assert torch.equal(quantized[rest], good[rest])


# --- sums ---


def test_sums_do_not_depend_on_order_threads_or_parts() -> None:
    index = torch.randint(0, 9, (5000,))
    scales = 10.0 ** torch.linspace(-30, 30, 9)[index, None]
    x = torch.randn(5000, 40) * scales
    expected = code_sums(x, index, 12)
    exact = torch.zeros(12, 40, dtype=torch.float64).index_add_(0, index, x.double())
    assert torch.equal(expected, exact.float())
    order = torch.randperm(5000)
    assert torch.equal(code_sums(x[order], index[order], 12), expected)
    assert_threads_do_not_matter(lambda: [code_sums(x, index, 12)])


@pytest.mark.parametrize("values", [1 << 24, 7 * 40], ids=["all rows at once", "a few rows at a time"])
def test_a_gpu_sums_all_columns_at_once(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, index = torch.randn(50, 40), torch.randint(0, 9, (50,))
    expected = code_sums(x, index, 9)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(_code_sums, "_VALUES", values)
    ((columns, sums),) = CodeSums(x, index, 9).blocks()
    assert columns == slice(0, 40)
    assert torch.equal(sums.float(), expected)


def test_sums_of_extreme_values() -> None:
    for value in (1e-290, 1e-45, 3e38, 5e307):
        x = torch.full((3, 2), value, dtype=torch.float64)
        sums = CodeSums(x, torch.tensor([1, 1, 0]), 2)
        assert sums.counts.tolist() == [1, 2]
        ((_, values),) = sums.blocks()
        torch.testing.assert_close(values, torch.stack([x[0], x[0] + x[1]]), rtol=1e-9, atol=0.0)
    x = torch.tensor([[1.0], [torch.nan], [torch.inf]])
    assert code_sums(x, torch.tensor([0, 1, 2]), 4).isnan().flatten().tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ema_is_that_of_the_paper(dtype: torch.dtype) -> None:
    x, index = torch.randn(3, 10, 5, dtype=dtype), torch.randint(0, 4, (3, 10))
    counts, sums = torch.rand(6, dtype=dtype), torch.randn(6, 5, dtype=dtype)
    before = counts.clone(), sums.clone()
    new_counts, new_sums = ops.ema_update(x, index, counts, sums, decay=0.9)
    hot = torch.nn.functional.one_hot(index.flatten(), 6).to(dtype)
    torch.testing.assert_close(new_counts, 0.9 * counts + 0.1 * hot.sum(0))
    torch.testing.assert_close(new_sums, 0.9 * sums + 0.1 * hot.t() @ x.flatten(0, 1))
    assert torch.equal(counts, before[0])
    assert torch.equal(sums, before[1])
    x[0, 0, 2] = torch.nan
    index[0, 0] = 5
    for value in ops.ema_update(x, index, counts, sums, decay=0.9):
        assert value.isfinite().all()
    for old, new in zip((counts, sums), ops.ema_update(x[:0], index[:0], counts, sums, decay=0.5), strict=True):
        assert torch.equal(new, old / 2)


def test_the_gradient_that_passes_a_value() -> None:
    x, value = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    for rotation in (False, True):
        y = pass_gradient(x, value, rotation=rotation)
        assert torch.equal(y, value)
        g = torch.randn(5, 3)
        gradient = torch.autograd.grad(y, x, g)[0]
        if rotation:
            torch.testing.assert_close((gradient * x).sum(1), (g * value).sum(1))
        else:
            assert torch.equal(gradient, g)


def test_bad_input_is_named() -> None:
    x, codebook = (t.detach() for t in problem())
    cases = {
        r"TypeError: x: expected a floating dtype .* got torch.int64": (x.long(), codebook),
        r"TypeError: codebook: expected a floating dtype .* got torch.int64": (x, codebook.long()),
        r"ValueError: x: expected shape \(..., 3\), one value per column of the codebook, got \(7, 2\)": (x[:, :2], codebook),
        r"ValueError: codebook: expected shape \(K, D\) with at least one code, got \(0, 3\)": (x, codebook[:0]),
        r"ValueError: codebook: expected device cpu .* got meta": (x, codebook.to("meta")),
    }
    assert_refused(ops.vector_quantize, cases)
    index, counts, decay = torch.zeros(7, dtype=torch.int64), torch.zeros(5), {"decay": 0.9}
    cases = {
        r"TypeError: index: expected an int64 tensor, got torch.int32": (x, index.int(), counts, codebook, decay),
        r"ValueError: index: expected shape \(7,\), one code per row of x, got \(6,\)": (x, index[1:], counts, codebook, decay),
        r"ValueError: counts, sums: expected shapes \(K,\) and \(K, 3\), got \(4,\), \(5, 3\)": (
            *(x, index, counts[1:], codebook, decay),
        ),
        r"TypeError: sums: expected float32 or float64, got torch.bfloat16": (x, index, counts, codebook.bfloat16(), decay),
        r"ValueError: index: expected codes from 0 to under 5, got 0 to 5": (
            *(x, torch.arange(7).clamp(max=5), counts, codebook, decay),
        ),
        r"ValueError: decay: expected a number from 0 to 1, got 1.5": (x, index, counts, codebook, {"decay": 1.5}),
    }
    assert_refused(ops.ema_update, cases)
