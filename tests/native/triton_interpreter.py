"""The Triton kernels on CPU tensors, in Triton's interpreter.

``test_triton.py`` runs this file in a process of its own with TRITON_INTERPRET=1, which has to be set before Triton is
imported: ``TRITON_INTERPRET=1 python -m pytest tests/native/triton_interpreter.py``.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import elementary
import nearest
import pytest
import torch
from comparison import DTYPES, LIMIT, assert_accurate, assert_same, check, every_op, results, samples, serves
from flowkern.kernels import _coupling, discretized_logistic_mixture as mixture, invertible_linear, masked_linear, nearest_code
from triton.runtime import interpreter

import flowkern
from flowkern import OPS, nn
from flowkern._core import backend as _backend
from flowkern._core.op import KERNELS, Op, Sample
from flowkern._core.split import moved_channels
from flowkern.ops import DegreeMask, FeatureMask, ScaleMap, affine_coupling
from flowkern.ops.parts import LogisticMixture

COUPLINGS = ("affine_coupling", "additive_coupling")

# NumPy, which the interpreter computes with, warns wherever IEEE arithmetic makes an infinity or a NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[_coupling.Launch]:
    """Lists the launches."""
    assert _backend.interpreting()
    seen: list[_coupling.Launch] = []
    run = _coupling.Launch.run
    monkeypatch.setattr(_coupling.Launch, "run", lambda self: (seen.append(self), run(self))[1])
    return seen


# Where they are not one for each kernel: the gradient of x, and the sum that those of W and b follow from, are two; a search
# prepares, screens, decides and looks again.
LAUNCHES = {
    "invertible_linear": 3,
    "masked_linear": 3,
    "nearest_code": 4,
    "vector_quantize": 4,
}


#: Those where there are no samples: the zeros of a weight's gradient are written by its kernel.
ON_NOTHING = {"masked_linear": 1}


@every_op
def test_launches_write_outputs_whole_and_nothing_else(op: Op, launches: list[_coupling.Launch], canaries: Any) -> None:
    if not serves(op, "triton"):
        pytest.skip("the op has no Triton kernel")
    for sample in samples(op, limit=LIMIT):
        launches.clear()
        for value in results(op.function, sample):
            assert not value.isnan().any()
        expected = LAUNCHES.get(op.name, len(op.kernels)) if sample.args[0].numel() else ON_NOTHING.get(op.name, 0)
        assert len(launches) == expected, sample.name
    canaries.assert_alive()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("components", [1, 2, 3, 4, 5, 10])
def test_components_of_the_mixture_that_share_a_pixel(
    components: int, channels_last: bool, launches: list[Any], canaries: Any
) -> None:
    """One, two or four threads of a pixel, with and without a remainder, and the gradient of the sum with the values."""
    op = OPS["discretized_logistic_mixture"]
    params = randn(2, 10 * components, 5, 7)
    params = params.to(memory_format=torch.channels_last) if channels_last else params
    x = torch.randint(256, (2, 3, 5, 7)).float()
    check(op, Sample("", (x, params)))
    rows = launches[0].keywords()["COMPONENTS"]
    assert rows == (min(4, 1 << (components - 1).bit_length()) if channels_last and components > 1 else 2 - components % 2)
    with_ones, of_sum = (op.kernels[1](x, params, grad, 256, False) for grad in (torch.ones(2), None))
    assert_same(of_sum, with_ones)
    canaries.assert_alive()


def test_offsets_of_the_mixture_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large to try: the kernel that would be used there, on sizes that can be."""
    constants = mixture.constants
    monkeypatch.setattr(mixture, "constants", lambda *a, **k: {**constants(*a, **k), "WIDE": True})
    for sample in samples(OPS["discretized_logistic_mixture"], limit=LIMIT)[:3]:
        check(OPS["discretized_logistic_mixture"], sample)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def agrees(x: torch.Tensor, params: torch.Tensor, **kwargs: Any) -> None:
    """Values and gradients of an affine coupling, as ``check`` holds them against the reference."""
    check(OPS["affine_coupling"], Sample("", (x, params), kwargs))


MASK = FeatureMask(torch.tensor([True, False, True]))
SEVERAL_TILES = {
    "channel": ((2, 3, 37, 41), (2, 2, 37, 41), {}),
    "channel-swap": ((2, 3, 37, 41), (2, 4, 37, 41), {"split": "channel_swap", "inverse": True}),
    "interleaved": ((2, 4, 37, 41), (2, 4, 37, 41), {"layout": "interleaved_shift_scale"}),
    "pair": ((2, 4, 37, 41), (2, 2, 37, 41, 2), {"layout": "pair_scale_shift"}),
    "checkerboard": ((2, 3, 37, 41), (2, 6, 37, 41), {"split": "checkerboard"}),
    "checkerboard-pair": ((2, 3, 37, 41), (2, 3, 37, 41, 2), {"split": "checkerboard_swap", "layout": "pair_shift_scale"}),
    "mask": ((2, 3, 37, 41), (2, 4, 37, 41), {"split": MASK}),
    "nothing-moved": ((2, 1, 65, 67), (2, 0, 65, 67), {}),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("name", SEVERAL_TILES)
def test_samples_of_several_tiles(name: str, channels_last: bool, launches: list[_coupling.Launch]) -> None:
    shape, params_shape, kwargs = SEVERAL_TILES[name]
    x, params = randn(*shape), randn(*params_shape)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
        params = params.to(memory_format=torch.channels_last) if params.ndim == 4 else params
    agrees(x, params, **kwargs)
    assert launches[0].grid.tiles > 1
    assert launches[0].grid.keywords["SKIP"] == (x.is_contiguous() and kwargs.get("split") in (None, "channel_swap"))


# In the last four the kept features end with a tile, or one before or after it.
@pytest.mark.parametrize(
    ("features", "split"),
    [
        *((n, "channel") for n in (1, 2, 255, 256, 257, 4095, 4096, 4097, 8192, 8193)),
        (8192, "channel_swap"),
        (8193, "channel_swap"),
    ],
)
def test_sizes_around_a_tile(features: int, split: str) -> None:
    agrees(randn(2, features), randn(2, 2 * moved_channels(split, features)), split=split)


@pytest.mark.parametrize("samples", [1, 63, 64, 65, 300])
def test_many_samples_in_a_tile(samples: int, launches: list[_coupling.Launch]) -> None:
    agrees(randn(samples, 4), randn(samples, 4), layout="interleaved_scale_shift")
    assert launches[0].grid.programs == -(-samples // 64)


def test_64_bit_offsets_are_used_where_32_do_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(shape: tuple[int, ...], *strides: int) -> bool:
        return _coupling.grid(shape, False, False, 0, shape[1] // 2, [(0, *strides)], [(0, 1, 1, 1, 1)]).keywords["WIDE"]

    assert not wide((2, 4), 2**29, 0, 0)
    assert wide((2, 4), 2**30, 0, 0)
    assert wide((2, 2, 2**15, 2**15), 2**30, 2**15, 1)
    assert wide((2, 2, 2, 2), 1, 0, 2**31)
    # Too large to try: the kernels that would be used there, on sizes that can be.
    for name in COUPLINGS:
        module = importlib.import_module(f"flowkern.kernels.{name}")
        original = module._grid.__wrapped__

        def forced(*args: Any, original: Any = original) -> _coupling.Grid:
            how = original(*args)
            return dataclasses.replace(how, keywords={**how.keywords, "WIDE": True})

        monkeypatch.setattr(module, "_grid", forced)
    for sample in samples(OPS["additive_coupling"]):
        check(OPS["additive_coupling"], sample)
    agrees(randn(2, 3, 37, 41), randn(2, 2, 37, 41))
    agrees(randn(2, 3, 5, 6).to(memory_format=torch.channels_last), randn(2, 6, 5, 6), split="checkerboard")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [OPS[name] for name in COUPLINGS], ids=COUPLINGS)
def test_kept_places_keep_their_bits(op: Op, dtype: torch.dtype) -> None:
    """Also those that arithmetic would change."""
    special = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf"), 1e-45], dtype=torch.float64).to(dtype)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    for sample in samples(op, dtype):
        if not sample.args[0].numel():
            continue
        shape = sample.args[0].shape
        x = special.repeat(-(-shape.numel() // 5))[: shape.numel()].view(shape)
        # What is transformed, as the reference tells: places that a change of the other arguments reaches.
        zeros = torch.zeros(shape, dtype=torch.float64)
        rest = [torch.full_like(a, 3.0, dtype=torch.float64) for a in sample.args[1:]]
        moved = op.reference(zeros, *rest, **sample.kwargs)[0] != 0
        y, _ = op.function(x, *sample.args[1:], **sample.kwargs)
        assert torch.equal(y.view(bits)[~moved], x.view(bits)[~moved]), sample.name


@pytest.mark.parametrize("split", ["checkerboard", "checkerboard_swap"])
@pytest.mark.parametrize("layout", ["scale_shift", "pair_shift_scale"])
def test_params_at_kept_places_of_a_checkerboard_are_ignored(split: str, layout: str) -> None:
    x = randn(2, 3, 4, 5)
    params = randn(2, 6, 4, 5) if layout == "scale_shift" else randn(2, 3, 4, 5, 2)
    kept = (torch.arange(4)[:, None] + torch.arange(5)) % 2 == (0 if split == "checkerboard" else 1)
    kept = kept if layout == "scale_shift" else kept[..., None]
    clean = Sample("", (x, params), {"split": split, "layout": layout})
    for value in (float("nan"), float("inf")):
        dirty = Sample("", (x, params.masked_fill(kept, value)), clean.kwargs)
        expected, actual = results(affine_coupling, clean), results(affine_coupling, dirty)
        assert_same(actual, expected)
        assert (actual[-1].masked_select(kept) == 0).all()


@pytest.mark.parametrize("scale", [ScaleMap.exp(), ScaleMap.sigmoid(), ScaleMap.tanh(2.0), ScaleMap.soft_clip()], ids=str)
def test_large_raw_scales(scale: ScaleMap) -> None:
    """exp(u) stays accurate where u * log2(e) would lose digits, and log s where s itself underflows or rounds to 1."""
    u = torch.tensor([-80.0, -40.5, -20.25, -1e-4, 1e-4, 5.0, 17.3, 40.25])
    sample = Sample("", (randn(8, 2), torch.stack([u, randn(8)], 1)), {"scale": scale})
    op = OPS["affine_coupling"]
    for a, exact, plain in zip(
        op.function(*sample.args, **sample.kwargs),
        op.reference(*(a.double() for a in sample.args), **sample.kwargs),
        op.reference(*sample.args, **sample.kwargs),
        strict=True,
    ):
        for i in range(8):  # one by one: the largest value would hide the others
            assert_accurate(a[i], exact[i], plain[i])


def assert_nearest(x: torch.Tensor, codebook: torch.Tensor, metric: str, name: str = "") -> int:
    """Index and distance are those of all distances in float64; returns how many rows were looked at again."""
    expected = nearest.oracle(x, codebook, metric)
    *actual, looked = flowkern.ops.nearest_code(x, codebook, metric=metric, return_stats=True)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), (name, metric)
    return int(looked)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cases", ["random", "ties", "scales", "not_finite"])
def test_nearest_code(cases: str, dtype: torch.dtype, launches: list[_coupling.Launch], canaries: Any) -> None:
    # The interpreter takes its time: every second case or every third, others of the six kinds of ties at the next depth.
    number, share = DTYPES.index(dtype), 2 if dtype is torch.float32 else 3
    for i, (name, x, codebook) in enumerate(getattr(nearest, cases)(dtype)):
        if (i + i // 6) % share != number % share:
            continue
        if name.startswith("subnormal") and dtype is torch.bfloat16:
            continue  # which it takes for other numbers
        launches.clear()
        metric = ("euclidean", "cosine")[(i // share + number) % 2]
        assert_nearest(x[:: max(1, len(x) // 2)], codebook, metric, name)
        assert len(launches) == (0 if not len(x) else 1 if dtype is torch.float64 else 4)
    canaries.assert_alive()


@pytest.mark.parametrize(("generation", "rows"), [(0, 20), (9, 66)], ids=["small tiles", "large tiles"])
def test_nearest_code_of_several_tiles_and_chunks(
    generation: int, rows: int, monkeypatch: pytest.MonkeyPatch, canaries: Any
) -> None:
    monkeypatch.setattr(nearest_code, "generation", lambda device: generation)
    codebook = randn(300, 70)
    codebook[17] = codebook[290] = codebook[40]
    x = codebook[torch.randint(0, 300, (rows,))] + 0.3 * randn(rows, 70)
    x[-1] = codebook[290] + 1e-3
    assert 0 < assert_nearest(x, codebook.to(torch.bfloat16), "euclidean") < rows
    canaries.assert_alive()


#: How degrees of outputs and of inputs come, and whether the mask is strict; those that are not sorted are gathered.
ORDERS: dict[str, tuple[Any, Any, bool]] = {
    "sorted": (torch.sort, torch.sort, False),
    "strict": (torch.sort, torch.sort, True),
    "rows": (None, torch.sort, False),
    "columns": (torch.sort, None, True),
    "neither": (None, None, False),
}


def masked_problem(sizes: tuple[int, int, int], order: str, dtype: torch.dtype) -> Sample:
    """Some outputs see nothing, some see all, and many have the same degree. What is masked is NaN."""
    batch, inputs, outputs = sizes
    *sorts, strict = ORDERS[order]
    degrees = (torch.randint(-inputs // 8, inputs + inputs // 8, (n,)) // 3 for n in (outputs, inputs))
    mask = DegreeMask(*(d if sort is None else sort(d)[0] for sort, d in zip(sorts, degrees, strict=True)), strict=strict)
    weight = randn(outputs, inputs, dtype=dtype).masked_fill(~mask.dense(), torch.nan)
    return Sample(f"{sizes}", (randn(batch, inputs, dtype=dtype), weight, randn(outputs, dtype=dtype), mask))


# The ends of blocks and of steps: at them, a neighbour before and after, and where 16 bytes are a piece or not.
@pytest.mark.parametrize(
    ("order", "dtype"),
    [
        (order, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for order in ORDERS
        if (order == "sorted") | (dtype.itemsize == 2)
    ],
    ids=str,
)
def test_masked_linear_at_the_ends_of_blocks(
    order: str, dtype: torch.dtype, launches: list[_coupling.Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = order in ("sorted", "strict")
    for sizes in ((70, 136, 200), (64, 64, 64), (1, 65, 127), (17, 60, 4)):
        launches.clear()
        check(OPS["masked_linear"], masked_problem(sizes, order, dtype))
        unit = 16 // dtype.itemsize
        whole = pieces and not any(n % unit for n in sizes[1:])
        assert {launch.grid.keywords["UNIT"] for launch in launches} == {unit if whole else 1}, sizes
    # The blocks of large products, which are more than there are multiprocessors.
    monkeypatch.setattr(masked_linear, "_MULTIPROCESSORS", 1)
    monkeypatch.setattr(masked_linear, "_grid", masked_linear._grid.__wrapped__)
    check(OPS["masked_linear"], masked_problem((130, 136, 264), order, dtype))


def test_masked_linear_of_any_memory() -> None:
    """Pieces of 16 bytes are read where they lie so, and nowhere else."""
    _, weight, bias, mask = masked_problem((9, 64, 72), "sorted", torch.float32).args
    base = randn(9 * 64 + 1)
    for given in (base[1:].view(9, 64), base.as_strided((9, 64), (1, 9)), randn(9, 66)[:, :64], randn(1, 64).expand(9, 64)):
        for matrix in (weight, weight.t().contiguous().t(), torch.nn.functional.pad(weight, (3, 0))[:, 3:]):
            check(OPS["masked_linear"], Sample("", (given, matrix, bias, mask)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cosine", [False, True])
def test_the_bound_of_the_screen_of_nearest_code(dtype: torch.dtype, cosine: bool) -> None:
    """It holds the score of every entry and of the nearest code, and is no wider than what 16 bits lose."""
    x, codebook = randn(20, 40, dtype=dtype), randn(150, 40, dtype=dtype) * torch.linspace(0.2, 2, 150)[:, None].to(dtype)
    sizes = nearest_code._Sizes.of(20, 150, 40, 0)
    work = nearest_code._Work.empty(x, codebook, sizes)
    outputs = KERNELS["nearest_code"].outputs(x, codebook, cosine)
    for launch in nearest_code._launches(x, codebook, cosine, outputs, work, sizes).values():
        launch.run()
    kept = work.kept[:20]
    upper, code, lower, dropped = kept[:, :4].flatten(1), kept[:, 4:8].flatten(1).view(torch.int32), kept[:, 8], kept[:, 9]
    exact = [nearest.normalized(t.double()) if cosine else t.double() for t in (x, codebook)]
    if dtype is torch.float32 and not cosine:
        centre = codebook[::10].sort(0).values[7]  # of 15
        assert torch.equal(work.norms[-40:], centre)
        exact = [t - centre for t in exact]
    scores = exact[0] @ exact[1].t() - exact[1].square().sum(1) / 2
    whole, first = code % 2 == 1, code.long() & -4
    real = (code >= 0) & (first < 150)
    quads = torch.nn.functional.pad(scores, (0, 2), value=-torch.inf).view(20, -1, 4).amax(2)
    own = torch.where(real, quads.gather(1, torch.where(real, first, 0) // 4), -torch.inf)
    assert (upper >= own).all()
    scale = exact[0].norm(dim=1, keepdim=True) * exact[1].norm(dim=1).max()
    width = 2.0**-5 if dtype is torch.float32 or cosine else 2.0**-9
    assert (upper - own <= width * scale)[real].all()
    best = scores.amax(1)
    assert (lower.amax(1) <= best).all()
    assert (lower.amax(1) >= best - width * scale[:, 0]).all()
    # Whatever is in no entry, nor in the group of one where all of it is meant, is not the nearest, or was dropped.
    group, number = sizes.tile // 4, torch.arange(150)
    entered = real[..., None] & torch.where(
        whole[..., None], number // group == first[..., None] // group, number // 4 == first[..., None] // 4
    )
    assert (real & ~whole).any()
    rest = scores.masked_fill(entered.any(1), -torch.inf).amax(1)
    assert (rest <= torch.maximum(lower.amax(1), dropped.amax(1))).all()


def test_rows_of_nearest_code_that_are_looked_at_again() -> None:
    apart = 10 * torch.eye(40, 64)
    assert assert_nearest(apart[:5] + 0.1, apart, "euclidean") == 0
    # Nor are rows and codes far from zero, which 16 bits alone would not tell apart.
    assert assert_nearest(300 + apart[:5] + 0.1, 300 + apart, "euclidean") == 0
    close = nearest.neighbour(torch.ones(200, 64), torch.randint(0, 2, (200, 64)).int())
    assert assert_nearest(torch.ones(3, 64), close, "euclidean") == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", elementary.FUNCTIONS)
def test_elementary_functions(name: str, dtype: torch.dtype) -> None:
    # expm1 carries the rounding of exp through one subtraction, and tanh that through a quotient.
    elementary.assert_elementary(name, dtype, "cpu", units=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_elementary_functions_at_the_ends(dtype: torch.dtype) -> None:
    infinity, nan = float("inf"), float("nan")
    x = torch.tensor([nan, infinity, -infinity, 0.0, 1e4, -1e4], dtype=dtype)
    for name, expected in {
        "exp": [nan, infinity, 0.0, 1.0, infinity, 0.0],
        "expm1": [nan, infinity, -1.0, 0.0, infinity, -1.0],
        "tanh": [nan, 1.0, -1.0, 0.0, 1.0, -1.0],
    }.items():
        assert torch.equal(
            elementary.evaluate(name, x).nan_to_num(99.0, 98.0), torch.tensor(expected, dtype=dtype).nan_to_num(99.0, 98.0)
        )
    half = torch.tensor([nan, torch.pi / 2, -torch.pi / 2, 0.0], dtype=dtype)
    torch.testing.assert_close(elementary.evaluate("atan", x[:4]), half, equal_nan=True)
    assert elementary.evaluate("log1p", x[:1]).isnan().all()
    # Between the last finite float32 and infinity, and down through the subnormal numbers.
    ends = torch.tensor([88.72, 88.73, -87.5, -103.0, -104.5])
    torch.testing.assert_close(elementary.evaluate("exp", ends), ends.exp(), rtol=1e-6, atol=2e-45)


@pytest.mark.parametrize(
    ("components", "dtypes"),
    [
        (1, (torch.float32, torch.float32)),
        (3, (torch.float64, torch.float32)),
        (8, (torch.float32, torch.bfloat16)),
        (20, (torch.float32, torch.float32)),
    ],
)
def test_roots_of_mixtures(components: int, dtypes: tuple[torch.dtype, ...], launches: list[Any], canaries: Any) -> None:
    """Against the search in float64: no worse than twice what torch's operations are off."""
    params = (2 * torch.randn(3, 5, 2 + 3 * components, dtype=torch.float64)).to(dtypes[1]).movedim(-1, 0)[2:]
    z = (3 * torch.randn(3, 10, dtype=torch.float64)).to(dtypes[0])[:, ::2]
    z[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    params[2 * components - 1, 1, 1] = torch.nan
    accumulate = torch.promote_types(*dtypes)
    exact, plain = (LogisticMixture(params.to(dtype))._search(z.to(dtype)) for dtype in (torch.float64, accumulate))
    root = LogisticMixture(params).root(z)
    assert [launch.kernel.__name__ for launch in launches] == ["kernel"]
    canaries.assert_alive()
    assert root.isnan().nonzero().tolist() == [[0, 2], [1, 1]]
    known = ~root.isnan()
    assert_accurate(root[known], exact[known], plain[known], ulps=16)


def test_no_roots_launch_nothing(launches: list[Any]) -> None:
    assert LogisticMixture(torch.randn(6, 0, 3)).root(torch.randn(0, 3)).shape == (0, 3)
    assert not launches


def test_couplings_of_mixtures_invert_by_the_kernel(launches: list[Any]) -> None:
    transformer = nn.MixtureLogistic(3)
    x, params = torch.randn(4, 5), torch.randn(4, 5, 11)
    y, logabsdet = transformer.forward(x, params, False)
    inputs = [t.requires_grad_() for t in (y, params)]
    found = {}
    for backend in ("triton", "torch"):
        with flowkern.backend(backend):
            back, negated = transformer.forward(*inputs, True)
        torch.testing.assert_close((back, negated), (x, -logabsdet), rtol=1e-4, atol=1e-4)
        found[backend] = torch.autograd.grad((back.sin() * negated).sum(), inputs)
    torch.testing.assert_close(found["triton"], found["torch"], rtol=1e-3, atol=1e-4)
    assert len(launches) == 1


def tensor_core_dot(_: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
    """``create_dot`` of the interpreter as a pessimist's tensor core computes it.

    Operands are rounded to bfloat16. The products of 16 places and what was there are aligned to the largest of them, and
    cut off 23 binary digits below it, as is their sum.
    """
    left, right = (torch.from_numpy(t.data).bfloat16().double() for t in (a, b))
    assert (left == torch.from_numpy(a.data)).logical_or(left.abs() < 2.0**-110).logical_or(left != left).all(), "not split"
    found = torch.from_numpy(total.data).double()
    for k in range(0, left.shape[1], 16):
        addends = torch.cat([(left[:, k : k + 16, None] * right[None, k : k + 16]).transpose(1, 2), found[..., None]], -1)
        ulp = torch.ldexp(torch.ones_like(found), addends.abs().amax(-1).frexp().exponent - 24)[..., None]
        cut = torch.where(addends.isfinite() & (ulp > 0), (addends / ulp).trunc() * ulp, addends).sum(-1)
        ulp = torch.ldexp(torch.ones_like(found), cut.frexp().exponent - 24)
        found = torch.where(cut.isfinite() & (cut != 0), (cut / ulp).trunc() * ulp, cut).float().double()
    return interpreter.TensorHandle(found.float().numpy(), total.dtype.scalar)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", tensor_core_dot)


def full_range(*shape: int) -> torch.Tensor:
    return randn(*shape) * torch.randint(-30, 30, shape).double().exp2().float()


def worst_digits(*shape: int) -> torch.Tensor:
    """The second eight digits are ones, and the third are half of their last: as much of a product is left out as can be."""
    return torch.full(shape, 1 + 2.0**-7 - 2.0**-16).copysign(randn(*shape))


def cancelling(*shape: int) -> torch.Tensor:
    """Neighbouring channels almost cancel."""
    x = randn(*shape)
    x[:, 1::2] = -x[:, : shape[1] // 2 * 2 : 2] * (1 + 2.0**-20)
    return x


#: (x, weight), float32.
HARD = {
    "usual": lambda: (randn(3, 70, 8, 5), randn(70, 70)),
    "full range": lambda: (full_range(3, 70, 8, 5), full_range(70, 70)),
    "worst digits": lambda: (worst_digits(3, 70, 8, 5), worst_digits(70, 70)),
    "cancelling": lambda: (cancelling(3, 70, 8, 5), 1 + 1e-4 * randn(70, 70)),
    "many channels": lambda: (randn(40, 300), randn(300, 300)),
    "large": lambda: (1e37 * randn(40, 33).clamp(-3, 3), 0.1 * randn(33, 33)),
    "largest": lambda: (torch.full((40, 33), torch.finfo(torch.float32).max), torch.eye(33).roll(1, 0)),
    "small": lambda: (2.0**-100 * randn(40, 33), randn(33, 33)),
}


@pytest.mark.parametrize("name", HARD)
def test_split_products_are_as_good_as_float32(name: str, launches: list[_coupling.Launch], tensor_cores: None) -> None:
    """Each result, and not only the largest: beside the sum of its products' sizes, as rounding is."""
    x, weight = HARD[name]()
    grad = full_range(*x.shape) if name == "full range" else randn(*x.shape) * (1e-30 if name.startswith("large") else 1)

    def products(dtype: torch.dtype, sizes: bool = False) -> list[torch.Tensor]:
        given = [(t.abs() if sizes else t).to(dtype).movedim(1, -1).reshape(-1, t.shape[1]) for t in (x, grad)]
        left = (weight.abs() if sizes else weight).to(dtype)
        return [given[0] @ left.t(), given[1] @ left, given[1].t() @ given[0]]

    known = torch.tensor(0.0)
    x.requires_grad_(), weight.requires_grad_()
    y, _ = flowkern.ops.invertible_linear(x, weight, logabsdet=known)
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    x, weight = x.detach(), weight.detach()
    keywords = [launch.keywords() for launch in launches]
    assert [k.get("TERMS", k.get("X_TERMS")) for k in keywords] == [3, 3, 3]
    actual = [*(t.detach().movedim(1, -1).reshape(-1, x.shape[1]) for t in (y, dx)), dweight]
    for a, exact, plain, size in zip(
        actual, products(torch.float64), products(torch.float32), products(torch.float64, sizes=True), strict=True
    ):
        error, granted = ((t.double() - exact).abs() / size for t in (a, plain))
        assert a.isfinite().all()
        assert error.max() <= 2 * granted.max() + 2.0**-23, (error.max() * 2**24, granted.max() * 2**24)


def test_split_products_round_what_is_subnormal(tensor_cores: None) -> None:
    """To multiples of 2^-133, which is as far as bfloat16 reaches."""
    x, weight = 2.0**-125 * randn(40, 33), randn(33, 33)
    y, _ = flowkern.ops.invertible_linear(x, weight, logabsdet=torch.tensor(0.0))
    error = (y.double() - x.double() @ weight.double().t()).abs()
    assert (error <= 2.0**-133 * weight.double().abs().sum(1)).all()


NAN_OF_LAST_DIGIT = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("patched", [False, True], ids=["interpreter", "tensor cores"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_split_products_keep_infinity_and_nan(dtype: torch.dtype, patched: bool, request: pytest.FixtureRequest) -> None:
    """Where the terms of a number have a zero, beside infinity, that would make NaN."""
    if patched and dtype is torch.float16:
        pytest.skip("tensor cores multiply float16 too")
    if patched:
        request.getfixturevalue("tensor_cores")
    weight = randn(40, 40)
    weight[:, 3], weight[5], weight[7, 7], weight[2, 9] = 1.0, 2.0, 0.0, float("-inf")
    x = randn(60, 40).to(dtype)
    for row, value in enumerate((float("inf"), -float("inf"), float("nan"), NAN_OF_LAST_DIGIT)):
        x[row, row + 3 : row + 8 : 4] = value
    x[10, 3], x[10, 4] = float("inf"), -float("inf")
    grad = randn(60, 40).to(dtype)
    grad[20, 5], grad[21, 6], grad[22] = float("inf"), float("nan"), 0.0
    x.requires_grad_(), weight.requires_grad_()
    y, _ = flowkern.ops.invertible_linear(x, weight, logabsdet=torch.tensor(0.0))
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    left, right, factor = grad.float(), x.detach().float(), weight.detach()
    for actual, expected in ((y, (right @ factor.t()).to(dtype)), (dx, (left @ factor).to(dtype)), (dweight, left.t() @ right)):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(actual), kind(expected)), kind
    assert y.isfinite().any(), "it would prove nothing"


@pytest.mark.parametrize("generation", [0, 9], ids=["float32", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_with_and_without_tensor_cores(
    dtype: torch.dtype, generation: int, monkeypatch: pytest.MonkeyPatch, launches: list[_coupling.Launch]
) -> None:
    monkeypatch.setattr(invertible_linear, "_generation", lambda device: generation)
    if dtype is not torch.float16 and generation:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", tensor_core_dot)
    op, seen = OPS["invertible_linear"], set()
    for sample in samples(op, dtype, limit=LIMIT):
        if sample.args[0].shape[1] >= 32:
            check(op, sample)
            seen |= {launch.keywords().get("X_TERMS") for launch in launches}
    assert seen - {None} == (
        {0} if not generation else {3} if dtype is torch.float32 else {2} if dtype is torch.float16 else {1, 2}
    )
