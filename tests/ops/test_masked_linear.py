"""``masked_linear``: a linear map whose weights are masked by degrees."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_refused, assert_threads_do_not_matter, check, every_dtype, needs_native, output_gradients, results

from flowkern import OPS, nn, ops
from flowkern._core import backend as _backend
from flowkern._core.op import Sample
from flowkern.ops import DegreeMask, _masked_linear

KINDS = ("sorted", "unsorted", "strict")
SIZES = [(1, 1, 1), (5, 4, 3), (3, 1, 20), (17, 33, 50), (70, 20, 100), (2, 100, 13)]  # batch, inputs, outputs
LARGE = (40, 600, 1000)  # in panels, where it is plain torch code


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


def checked(given: tuple[Any, ...], ulps: float = 4) -> None:
    """Values and gradients wherever there are kernels; a weight that is masked has none."""
    check(OPS["masked_linear"], Sample("", given), ulps=ulps)
    gradient = results(ops.masked_linear, Sample("", given))[2]
    assert (gradient[~given[-1].dense()] == 0).all()


@pytest.mark.everywhere
@pytest.mark.parametrize("kind", KINDS)
@every_dtype
def test_every_size(dtype: torch.dtype, kind: str) -> None:
    for size in SIZES:
        checked(problem(size, kind, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_large_layers(kind: str) -> None:
    given = problem(LARGE, kind)
    assert bool(given[-1].panels) == (kind != "unsorted")
    checked(given)
    if kind == "strict":
        checked((given[0].bfloat16(), given[1], None, given[-1]))


@needs_native
def test_long_batches_few_samples_and_the_ends_of_steps() -> None:
    for size in ((1100, 20, 30), (257, 40, 600), (20, 1030, 24), (1, 300, 70), (4, 300, 70)):
        for kind in KINDS:
            checked(problem(size, kind), ulps=16)


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


@pytest.mark.everywhere
@pytest.mark.parametrize("kind", KINDS)
def test_any_strides_and_dtypes(kind: str) -> None:
    x, weight, bias, mask = problem((9, 32, 40), kind)
    checked((x.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2], mask))
    checked((x[:1].expand(9, 32), weight.bfloat16(), bias.half(), mask))
    checked((x.half(), weight, None, mask))
    checked((x, weight.double(), bias, mask))
    checked((x.repeat(1, 2)[:, ::2], weight.repeat(2, 1)[::2], bias[:1].expand(40), mask))


def test_leading_dimensions_and_nothing_at_all() -> None:
    x, weight, bias, mask = problem((6, 5, 7))
    for shape in ((5,), (2, 3, 5), (0, 5), (2, 0, 5)):
        a = x.flatten()[: torch.Size(shape).numel()].view(shape).requires_grad_()
        y = ops.masked_linear(a, weight, bias, mask)
        assert y.shape == (*shape[:-1], 7)
        if y.numel():
            torch.testing.assert_close(y, OPS["masked_linear"].reference(a, weight, bias, mask))
        assert torch.autograd.grad(y.sum(), a)[0].shape == shape
    for inputs, outputs in ((0, 3), (3, 0), (0, 0)):
        mask = degrees(inputs, outputs, "sorted")
        leaves = [torch.randn(s, requires_grad=True) for s in ((4, inputs), (outputs, inputs), (outputs,))]
        y = ops.masked_linear(*leaves, mask)
        torch.testing.assert_close(y, leaves[2].expand(4, outputs))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), leaves[2])[0], torch.full((outputs,), 4.0))


def test_rows_that_see_nothing_and_rows_that_see_all() -> None:
    x, weight, bias = torch.randn(5, 6), torch.randn(8, 6), torch.randn(8)
    for degree, expected in ((0, bias.expand(5, 8)), (9, x @ weight.t() + bias)):
        mask = DegreeMask(torch.full((8,), degree), torch.arange(1, 7))
        torch.testing.assert_close(ops.masked_linear(x, weight, bias, mask), expected)
        checked((x, weight, bias, mask))


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
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_number_of_threads(kind: str) -> None:
    sample = Sample("", problem((100, 300, 250), kind))
    assert_threads_do_not_matter(lambda: results(ops.masked_linear, sample))


@pytest.mark.skipif(_backend.interpreting(), reason="Triton compiles nothing in its interpreter")
@pytest.mark.parametrize(
    ("target", "product"),
    [
        ("sm_90", "wgmma.mma_async"),
        pytest.param("sm_80", "mma.sync", marks=pytest.mark.slow),
        pytest.param("sm_100", "tcgen05.mma", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtypes", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_runs_on_tensor_cores(dtypes: str, target: str, product: str) -> None:
    """Blocks come in asynchronous copies of 16 bytes; element by element come what is one for each unit, and no block."""
    pytest.importorskip("triton")
    from flowkern.kernels.compile import compile_launch, problems
    from flowkern.kernels.masked_linear import compile_cases

    for size in ((64, 784, 1024), (4096, 2048, 1536)):
        for name, launch in compile_cases(size, True, dtypes):
            build = compile_launch(launch, target)
            assert problems(build) == [], name
            assert product in build.assembly, name
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*, (?:0x)?([0-9a-f]+), ", build.assembly)
            assert len(copies) >= 8, name
            assert {int(size, 16) for size in copies} == {16}, name
            elements = re.findall(r"ld\.global(?:\.\w+)*\.[bu]16", build.assembly)
            assert len(elements) <= (4 if name == "forward" else 0), name


@pytest.mark.everywhere
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_autocast_lowers_as_it_does_linear(dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: y is in autocast's dtype, gradients are in those of the inputs, and values those of lowered inputs."""
    monkeypatch.setattr(_masked_linear, "_LOWERED_ON", {"cpu"})
    x, weight, bias, mask = problem((9, 40, 24))
    call = [t.requires_grad_() for t in (x.to(dtypes[0]), weight.to(dtypes[1]), bias)]
    lowered = [x.to(dtypes[0]).bfloat16(), weight.to(dtypes[1]).bfloat16(), bias]
    expected = results(ops.masked_linear, Sample("", (*lowered, mask)))
    for function in (ops.masked_linear, OPS["masked_linear"].reference):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(*call, mask)
            assert y.dtype is F.linear(call[0], call[1]).dtype is torch.bfloat16
            doubles = function(x.double(), weight, bias, mask)
        assert doubles.dtype is torch.float64
        assert torch.equal(doubles, function(x.double(), weight, bias, mask))
        grads = torch.autograd.grad(y, call, output_gradients((y,))[0].to(y.dtype))
        assert [g.dtype for g in grads] == [t.dtype for t in call]
        for actual, other in zip((y, *grads), expected, strict=True):
            torch.testing.assert_close(actual.float(), other.float(), rtol=2**-7, atol=1e-2)


def test_autocast_leaves_a_cpu_alone() -> None:
    x, weight, bias, mask = problem((9, 40, 24))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.masked_linear(x, weight, bias, mask)
    assert torch.equal(y, ops.masked_linear(x, weight, bias, mask))


@pytest.mark.parametrize("readable", [True, False])
def test_a_mask_of_the_same_degrees_is_made_once(readable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one reads the degrees and copies tables to their device, for which a GPU would be waited for."""
    made: list[DegreeMask] = []
    build = DegreeMask.__init__
    monkeypatch.setattr(DegreeMask, "__init__", lambda self, *a, **k: (made.append(self), build(self, *a, **k))[1])
    monkeypatch.setattr(_masked_linear, "_masks", {})
    if not readable:  # as on a GPU
        monkeypatch.setattr(_masked_linear, "_version", lambda degrees: (id(degrees), degrees._version))
    x, weight, out, into = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([3, 1, 2, 0, 5]), torch.tensor([2, 1, 4, 1])

    def agrees(masks: int, strict: bool = False) -> None:
        seen = out[:, None] > into if strict else out[:, None] >= into
        torch.testing.assert_close(ops.masked_linear(x, weight, None, out, into, strict=strict), x @ (weight * seen).t())
        assert len(made) == masks

    agrees(1)
    agrees(1)
    agrees(2, strict=True)
    agrees(2)
    out.add_(1)
    agrees(3)
    if readable:
        out.numpy()[2] = 0  # of which torch knows nothing
        agrees(4)
    others = [out + i for i in range(1, 21)]
    for i, other in enumerate(others, len(made) + 1):
        ops.masked_linear(x, weight, None, other, into)
        assert len(made) == i
    assert len(_masked_linear._masks) == 8


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
    cases = {
        "TypeError: x: expected a tensor, got list": ([1.0], weight, bias, mask),
        "TypeError: x: expected a floating dtype .* got torch.int64": (x.long(), weight, bias, mask),
        "TypeError: weight: expected a floating dtype": (x, weight.long(), bias, mask),
        "TypeError: weight: expected a tensor, got NoneType": (x, None, bias, mask),
        r"ValueError: x: expected shape \(..., 3\), one value per in_degree, got \(2, 2\)": (x[:, :2], weight, bias, mask),
        r"ValueError: weight: expected shape \(4, 3\) for these degrees, got \(3, 4\)": (x, weight.t(), bias, mask),
        r"ValueError: bias: expected shape \(4,\) for these degrees, got \(3,\)": (x, weight, bias[:3], mask),
        "ValueError: weight: expected device cpu .* got meta": (x, weight.to("meta"), bias, mask),
        "TypeError: in_degrees: expected an integer tensor, got NoneType": (x, weight, bias, out),
        r"ValueError: in_degrees: expected device cpu \(that of out_degrees\), got meta": (x, weight, bias, out, into.to("meta")),
        "TypeError: out_degrees: expected an integer tensor, got torch.float32": (x, weight, bias, out.float(), into),
        r"ValueError: in_degrees: expected one degree per unit.* got shape \(1, 3\)": (x, weight, bias, out, into[None]),
        "ValueError: in_degrees, strict: expected neither beside a DegreeMask": (x, weight, bias, mask, into),
    }
    assert_refused(ops.masked_linear, cases)


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
