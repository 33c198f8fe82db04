"""The CUDA kernels: compiled for GPUs, and executed on the host from the same source, one thread after the other."""

from __future__ import annotations

import copy
import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import DTYPES, assert_accurate, assert_same
from networks import change_batch, contexts_of, density, made, parameters_of, tensors_of
from scale_maps import MAPS, check_sweep
from torch.utils._pytree import tree_map_only

import flowkern
from flowkern import ops
from flowkern._core import nvrtc
from flowkern._core.checks import accumulation_dtype
from flowkern._core.op import Sample
from flowkern.ops import AutoregressiveNetwork, ScaleMap
from flowkern.ops.autoregressive import cuda, cuda_backward, cuda_gather, definition, inverse as op

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
TILES = copy.deepcopy(cuda.TILES)
EVERY_TILE = [(dtype, tile) for dtype in DTYPES for tile in TILES.get(dtype, (1, 16))]
Pair = tuple[torch.Tensor, torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# The kernels as a library of the host


def build(output: Path, *flags: str) -> Path:
    """The kernels compiled by g++."""
    command = ["g++", "-x", "c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags]
    sources = sorted(map(str, SOURCES.glob("*.cu")))
    done = subprocess.run([*command, "-shared", "-fPIC", *sources, "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


class Host:
    """Stands in for the launch on a GPU with ``processors`` multiprocessors of ``memory`` bytes each."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.processors, self.memory, self.descending = 4, 1 << 20, False

    def launch(self, variant: nvrtc.Variant, arguments: ctypes.Structure, **grid: Any) -> None:
        function, macros = getattr(self.library, variant.kernel), dict(variant.macros)
        number, flag = ctypes.c_int64, ctypes.c_bool
        function.argtypes = [ctypes.POINTER(type(arguments)), flag, flag, number, number, number, flag]
        function.restype = flag
        kind = macros["FLOWKERN_VALUE"] == "double", macros["FLOWKERN_WEIGHT"] == "Bfloat16"
        assert function(arguments, *kind, int(macros["FLOWKERN_TILE"]), grid["blocks"], grid["shared"], self.descending)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return build(tmp_path_factory.mktemp("cuda") / "host.so", "-O1")


@pytest.fixture
def host(library: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(library)
    monkeypatch.setattr(cuda, "limits_of", lambda device: (host.processors, host.memory))
    monkeypatch.setattr(nvrtc, "launch", host.launch)
    return host


def use_tile(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """Leave one size of tiles, as far as a dtype has it."""
    few = {dtype: {tile: sizes[tile]} if tile in sizes else sizes for dtype, sizes in TILES.items()}
    monkeypatch.setattr(cuda, "TILES", few)


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def further(dtype: torch.dtype) -> Iterator[Sample]:
    """Shapes in which the kernel goes other ways: more rows in a step than threads, and more columns than one thread takes."""
    one_step = AutoregressiveNetwork((1,) * 300, ((0,) * 40, (0,) * 600))
    few = AutoregressiveNetwork((1, 2, 3), ((1,) * 70 + (2,) * 530, tuple(1 + i % 2 for i in range(90))), activation="tanh")
    residual = AutoregressiveNetwork((2, 1, 2), ((1,) * 50,) * 5, residual=True, activation="gelu", scale=ScaleMap.softplus())
    torch.manual_seed(1)
    random = tuple(tuple(torch.randint(1, 50, (n,)).tolist()) for n in (64, 40))
    shuffled = AutoregressiveNetwork(
        tuple((torch.randperm(50) + 1).tolist()), random, permutation=tuple(torch.randperm(50).tolist())
    )
    for name, network in (("one-step", one_step), ("few-steps", few), ("few-steps-residual", residual), ("random", shuffled)):
        z = torch.randn(7, network.features, dtype=torch.float64).to(dtype)
        context = torch.randn(7, network.widths[1], dtype=torch.float64).to(dtype)
        parameters = [p.to(dtype) for p in parameters_of(network, 0.5, torch.float64)]
        yield Sample(name, (z, parameters, [network]), {"contexts": [context]})


def samples(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Sample]:
    torch.manual_seed(0)
    return [*op._samples(device, dtype), *(to(sample, device) for sample in further(dtype))]


def to(sample: Sample, device: str) -> Sample:
    return Sample(sample.name, *tree_map_only(torch.Tensor, lambda t: t.to(device), (sample.args, sample.kwargs)))


every_sample = pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.name)


def run(sample: Sample) -> Pair:
    """The launcher, on whatever ``nvrtc.launch`` is."""
    text = "\n".join(network.text for network in sample.args[2])
    inputs = sample.args[0], tensors_of(sample), text, [c is not None for c in contexts_of(sample)]
    outputs = op._forward.outputs(*inputs)
    cuda.forward(*inputs, *outputs)
    return outputs


def defined(sample: Sample, dtype: torch.dtype | None = None) -> Pair:
    z, *tensors = (t if dtype is None else t.to(dtype) for t in (sample.args[0], *tensors_of(sample)))
    return op.reference(z, tensors, sample.args[2], [c is not None for c in contexts_of(sample)])


@functools.lru_cache(maxsize=1)
def references(dtype: torch.dtype, device: str) -> list[tuple[Sample, Pair, Pair]]:
    """Every sample, what float64 makes of it, and what plain torch code in its own dtypes does."""
    return [(sample, defined(sample, torch.float64), defined(sample)) for sample in samples(dtype, device)]


def assert_right(dtype: torch.dtype, device: str = "cpu") -> None:
    """No result is off by more than twice what plain torch code in the same dtypes is off, against float64."""
    for sample, exact, plain in references(dtype, device):
        for actual, truth, same_dtype in zip(run(sample), exact, plain, strict=True):
            assert actual.dtype is same_dtype.dtype
            assert_accurate(actual, truth, same_dtype, ulps=64 if dtype is torch.float64 else 4)


# ---------------------------------------------------------------------------------------------------------------------
# What it computes


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tile"), EVERY_TILE, ids=str)
def test_the_kernel_is_accurate(host: Host, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tile(monkeypatch, tile)
    assert_right(dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_scale_maps(host: Host, name: str, dtype: torch.dtype) -> None:
    check_sweep(lambda *args, contexts: run(Sample("", args, {"contexts": contexts})), name, dtype)


@pytest.mark.parametrize("tile", [1, 4])
@every_sample
def test_the_order_of_the_threads_does_not_matter(host: Host, sample: Sample, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that meet in a place without a barrier between them would."""
    use_tile(monkeypatch, tile)
    expected = run(sample)
    host.descending = True
    assert_same(run(sample), expected)


@every_sample
def test_what_does_not_fit_in_shared_memory_lies_in_a_scratch_buffer(host: Host, sample: Sample, monkeypatch: Any) -> None:
    monkeypatch.setattr(cuda, "RESIDENT", 1)  # blocks take several tiles, and use the buffer again
    host.processors = 2
    for tile in (1, 4):
        use_tile(monkeypatch, tile)
        host.memory = 1 << 20
        expected = run(sample)
        host.memory = 0
        assert_same(run(sample), expected)


@every_sample
def test_outputs_are_written_whole_and_nothing_else(host: Host, sample: Sample, canaries: Any) -> None:
    for memory in (1 << 20, 0):
        host.memory = memory
        for value in run(sample):
            assert not value.isnan().any()
        canaries.assert_alive()


@pytest.mark.parametrize("memory", [1 << 20, 0], ids=["shared", "scratch"])
@pytest.mark.parametrize("name", ["shuffled", "several-panels", "residual-panels", "chain", "few-steps"])
def test_nan_stays_in_its_sample(host: Host, name: str, memory: int) -> None:
    host.memory = memory
    sample = next(s for s in samples() if s.name == name)
    clean = run(sample)
    sample.args[0][1, 0] = float("nan")
    touched = [1]
    if contexts_of(sample)[0] is not None:
        contexts_of(sample)[0][2, 0] = float("inf")
        touched = [1, 2]
    x, logabsdet = run(sample)
    others = [i for i in range(len(x)) if i not in touched]
    assert x[1].isnan().any()
    assert logabsdet[1].isnan()
    assert torch.equal(x[others], clean[0][others])
    assert torch.equal(logabsdet[others], clean[1][others])


@every_sample
def test_masked_weights_do_not_matter(host: Host, sample: Sample) -> None:
    expected, poisoned = run(sample), copy.deepcopy(sample)
    weights = iter(poisoned.args[1][0::2])
    for network in poisoned.args[2]:
        for mask in definition.masks(network, torch.device("cpu")):
            next(weights)[~mask] = float("inf")
    assert_same(run(poisoned), expected)


def test_a_large_layer_and_a_batch_that_tiles_do_not_divide(host: Host) -> None:
    network = made(200, 300, 300)
    parameters, z = parameters_of(network, 0.5), torch.randn(21, 200)
    z[:, ::2] *= 3
    for batch in (1, 2, 3, 21):
        sample = Sample("", (z[:batch], parameters, [network]))
        actual = run(sample)
        back, total = density(Sample("", (actual[0], parameters, [network])))
        assert (back - z[:batch]).abs().max() <= 1e-5 * z.abs().max()
        torch.testing.assert_close(total, -actual[1])
        with flowkern.backend("torch"):
            expected = ops.autoregressive_inverse(z[:batch], parameters, network)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "launch", None)
    x, logabsdet = run(Sample("", (torch.randn(0, 4), parameters_of(made(4, 6)), [made(4, 6)])))
    assert x.shape == (0, 4)
    assert logabsdet.shape == (0,)


def test_tiles_grow_with_the_batch_and_shrink_with_the_memory() -> None:
    network = made(64, 256, 256)
    program = cuda._program(network.text, (False,), torch.device("cpu"))

    def tile(batch: int, memory: int) -> tuple[int, int, bool]:
        return cuda.tile_of(batch, torch.float32, program.units, 2, 4 * program.staged, (132, memory))

    assert [tile(batch, 232448)[0] for batch in (1, 132, 133, 500, 3000, 10**6)] == [1, 1, 4, 4, 16, 16]
    small = [tile(10**6, memory) for memory in (0, 10_000, 30_000, 60_000, 100_000)]
    assert [fits for _, _, fits in small] == [False, False, True, True, True]
    assert [size for size, _, fits in small if fits] == sorted(size for size, _, fits in small if fits)
    for memory, (_, shared, fits) in zip((30_000, 60_000, 100_000), small[2:], strict=True):
        assert fits
        assert shared <= memory


def test_the_stream_holds_every_weight_that_counts_once(host: Host) -> None:
    """Heads are rectangles of what counts; a tail's rectangle may also hold what does not."""
    for sample in samples():
        used = set()
        for network in sample.args[2]:
            program = cuda._program(network.text, (False,), torch.device("cpu"))
            numbers = program.numbers.numbers[: program.numbers.weights].tolist()
            assert len(set(numbers)) == len(numbers)
            used, start = set(numbers), 0
            for i, mask in enumerate(definition.masks(network, torch.device("cpu")), 1):
                plan = op.plans(network.text)[0]
                rows = torch.tensor(cuda.rows_of(plan, i), dtype=torch.int64)
                seen = torch.zeros_like(mask)
                seen[rows] = mask[rows]
                assert {start + n for n in seen.flatten().nonzero().flatten().tolist()} <= used
                start += mask.numel() + len(mask)  # a bias lies between two weights


# ---------------------------------------------------------------------------------------------------------------------
# The parameters in the order of use


@pytest.mark.parametrize("most", [96, 5, 1])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parameters_are_gathered_from_tensors_of_any_dtype_and_strides(
    host: Host, stored: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_gather, "SOURCES", most)
    dtype = torch.float64 if stored is torch.float64 else torch.float32
    others = [torch.float16, torch.bfloat16, torch.float32] if dtype is torch.float32 else [*DTYPES]
    of_weights = [torch.bfloat16] if stored is torch.bfloat16 else others
    half = torch.tensor(
        [0.0, -0.0, 2.0**-24, -(2.0**-14) * 1.5, 65504.0, float("inf"), -float("inf"), 1 / 3], dtype=torch.float16
    )
    tensors = [
        torch.randn(5, 4).to(of_weights[0]),
        half[:5].to(others[0]),
        torch.randn(12, 10)[::2, ::2].to(of_weights[-1]),
        torch.randn(12).to(others[1])[::2],
        torch.randn(7, 16).to(others[0])[:, 6::2],  # the term of a context
        torch.randn(6, 3).to(of_weights[-1]).t(),
        half[5:].repeat_interleave(2)[::2],
    ]
    firsts = cuda_gather.firsts_of([(4, 5, 6), (6, 3)], [True, False])
    assert firsts == [0, 20, 25, 55, 61, 66, 84, 87]
    draw = torch.randperm
    matrices = [0, 2, 5]
    weights = [torch.cat([draw(tensors[i].numel()) + firsts[i], torch.tensor([-1])]) for i in matrices]
    biases, contexts = [draw(len(tensors[i])) + firsts[i] for i in (1, 3, 6)], [draw(5) + firsts[4]]
    what = cuda_gather.numbers_of(weights, biases, contexts, firsts, torch.device("cpu"))
    whole = torch.cat(
        [tensors[4][0].double() if i == 4 else t.flatten().double() for i, t in enumerate(tensors)] + [torch.zeros(1)]
    )
    for numbers in (what, what._replace(numbers=what.numbers.long())):
        found, rest = cuda_gather.gather(tensors, numbers, 7, dtype, stored, 2)
        assert found.dtype is stored
        assert_same(found, whole[torch.cat(weights)].to(stored))
        assert rest.dtype is dtype
        assert_same(rest[: what.biases], whole[torch.cat(biases)].to(dtype))
        assert_same(rest[what.biases :].view(7, 5), tensors[4][:, contexts[0] - firsts[4]].to(dtype))


@pytest.mark.parametrize("name", ["chain", "bfloat16-weights", "strided", "several-panels"])
def test_more_tensors_than_a_launch_takes(host: Host, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = next(s for s in samples() if s.name == name)
    expected = run(sample), pulled_back(sample)
    monkeypatch.setattr(cuda_gather, "SOURCES", 2)
    assert_same(run(sample), expected[0])
    assert_same(pulled_back(sample), expected[1])


# ---------------------------------------------------------------------------------------------------------------------
# The backward


def pulled_back(
    sample: Sample, function: Any = cuda_backward.backward, dtype: torch.dtype | None = None, **kind: bool
) -> list[Any]:
    """The gradients of z and of the tensors, all of them in ``dtype``; ``kind``: which gradients there are, and are needed."""
    z, *tensors = (t if dtype is None else t.to(dtype) for t in (sample.args[0], *tensors_of(sample)))
    text, flags = "\n".join(network.text for network in sample.args[2]), [c is not None for c in contexts_of(sample)]
    x, logabsdet = defined(sample, torch.float64)
    x = x.to(accumulation_dtype(z, *tensors))
    grads = [
        torch.randn(t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).to(x)
        for i, t in enumerate((x, logabsdet))
    ]
    grads = [grad if kind.get(name, True) else None for name, grad in zip(("x", "log"), grads, strict=True)]
    inputs = x, tensors, *grads, text, flags, kind.get("needs", True)
    dz, found = op._backward.outputs(*inputs)
    function(*inputs, dz, found)
    return [dz, *found]


def assert_pulled_back_right(dtype: torch.dtype) -> None:
    """As ``assert_right``, of the gradients."""
    for sample in samples(dtype):
        exact, plain = pulled_back(sample, op._torch_backward, torch.float64), pulled_back(sample, op._torch_backward)
        for actual, truth, same_dtype in zip(pulled_back(sample), exact, plain, strict=True):
            assert actual.dtype is same_dtype.dtype
            assert_accurate(actual, truth, same_dtype, ulps=64 if dtype is torch.float64 else 4)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tile"), EVERY_TILE, ids=str)
def test_the_backward_is_accurate(host: Host, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tile(monkeypatch, tile)
    assert_pulled_back_right(dtype)


@pytest.mark.slow
@every_sample
def test_the_backward_has_one_order_and_writes_all(host: Host, sample: Sample, canaries: Any, monkeypatch: Any) -> None:
    """Threads in another order, scratch instead of shared memory, and blocks of several tiles change no bit."""
    monkeypatch.setattr(cuda, "RESIDENT", 1)
    host.processors = 2
    for tile in (1, 4):
        use_tile(monkeypatch, tile)
        host.memory, host.descending = 1 << 20, False
        expected = pulled_back(sample)
        assert not any(t.isnan().any() for t in expected)
        for host.memory, host.descending in ((1 << 20, True), (0, True)):
            assert_same(pulled_back(sample), expected)
    canaries.assert_alive()


@pytest.mark.parametrize("absent", ["x", "log", "needs"])
@pytest.mark.parametrize("name", ["shuffled", "chain", "few-steps-residual", "empty-batch"])
def test_the_backward_without_some_gradients(host: Host, name: str, absent: str) -> None:
    sample = next(s for s in samples(torch.float64) if s.name == name)
    expected = pulled_back(sample, op._torch_backward, **{absent: False})
    for actual, truth in zip(pulled_back(sample, **{absent: False}), expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["several-panels", "residual-panels", "chain", "few-steps"])
def test_nan_stays_in_its_sample_in_the_backward(host: Host, name: str) -> None:
    sample = next(s for s in samples() if s.name == name)
    clean = pulled_back(sample)[0]
    sample.args[0][1, 0] = float("nan")
    dz = pulled_back(sample)[0]
    others = [i for i in range(len(dz)) if i != 1]
    assert dz[1].isnan().any()
    assert torch.equal(dz[others], clean[others])


@every_sample
def test_the_backward_reads_every_weight_that_counts_once(sample: Sample) -> None:
    contexts = tuple(c is not None for c in contexts_of(sample))
    program = cuda_backward._program("\n".join(network.text for network in sample.args[2]), contexts, torch.device("cpu"))
    start, expected = 0, set()
    for network, context in zip(sample.args[2], contexts, strict=True):
        plan = op.plans(network.text)[0]
        for i, mask in enumerate(definition.masks(network, torch.device("cpu")), 1):
            rows, seen = torch.tensor(cuda.rows_of(plan, i), dtype=torch.int64), torch.zeros_like(mask)
            seen[rows] = mask[rows]
            expected |= {start + n for n in seen.flatten().nonzero().flatten().tolist()}
            start += mask.numel() + len(mask)
        start += network.widths[1] if context else 0
    counting = [n for n in program.numbers.numbers.tolist() if n >= 0]
    assert sorted(counting) == sorted(expected)


# ---------------------------------------------------------------------------------------------------------------------
# How it is built

EVERY_SAMPLE = """
import sys
sys.path[:0] = sys.argv[2:]
import torch, test_cuda as t
host = t.Host(sys.argv[1])
t.cuda.limits_of = lambda device: (2, host.memory)
t.nvrtc.launch = host.launch
for host.memory, dtype, step in ((1 << 20, torch.float32, 1), (0, torch.bfloat16, 2), (1 << 20, torch.float64, 3)):
    for sample in t.samples(dtype)[::step]:
        t.run(sample)
        t.pulled_back(sample)
print("every sample ran")
"""


@pytest.mark.slow
def test_the_kernel_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path, sanitized: Callable[..., None]) -> None:
    flags = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
    built = build(tmp_path / "host.so", *flags)
    sanitized("-c", EVERY_SAMPLE, *map(str, (built, ROOT / "tests", ROOT / "tests" / "native")), cwd=ROOT)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Needs a GPU: ``python -m bench.gpu_check`` runs these tests."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")(test))


@on_gpu
@pytest.mark.parametrize(("dtype", "tile"), EVERY_TILE, ids=str)
def test_the_kernel_is_accurate_on_a_gpu(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tile(monkeypatch, tile)
    assert_right(dtype, "cuda")


@on_gpu
def test_scratch_and_several_tiles_of_a_block_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = cuda.limits_of(torch.device("cuda"))
    for sample in samples(torch.float32, "cuda"):
        many = change_batch(sample, lambda t: t.repeat(40, 1))
        expected = run(many)
        assert_same(run(many), expected)
        for memory in (limits[1], 0):
            monkeypatch.setattr(cuda, "limits_of", lambda device, memory=memory: (2, memory))
            torch.testing.assert_close(run(many), expected, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(cuda, "limits_of", lambda device: limits)


@on_gpu
@pytest.mark.parametrize("name", ["shuffled", "several-panels", "residual-panels", "chain", "few-steps"])
def test_nan_stays_in_its_sample_on_a_gpu(name: str) -> None:
    sample = next(s for s in samples(torch.float32, "cuda") if s.name == name)
    clean = run(sample)
    sample.args[0][1, 0] = float("nan")
    others = [i for i in range(len(sample.args[0])) if i != 1]
    for actual, expected in zip(run(sample), clean, strict=True):
        assert actual[1].isnan().any()
        assert torch.equal(actual[others], expected[others])


@on_gpu
def test_large_layers_agree_with_the_cpu() -> None:
    for features, widths, batch in ((784, (1024, 1024), 64), (3072, (512, 512), 100)):
        network = made(features, *widths)
        parameters, z = parameters_of(network, 0.5), torch.randn(batch, features)
        expected = ops.autoregressive_inverse(z.double(), parameters, network)
        plain = ops.autoregressive_inverse(z, parameters, network)
        with flowkern.backend("cuda"):
            actual = ops.autoregressive_inverse(z.cuda(), [p.cuda() for p in parameters], network)
        for got, truth, same_dtype in zip(actual, expected, plain, strict=True):
            assert_accurate(got.cpu(), truth, same_dtype, ulps=8)
