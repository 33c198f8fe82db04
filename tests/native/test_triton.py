"""The Triton kernels: run in the interpreter, compiled for GPUs that need not be there, and run on one that is."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import NEEDS_GPU

import flowkern
from flowkern import OPS
from flowkern.ops import ScaleMap, affine_coupling

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
needs_compiler = pytest.mark.skipif(INTERPRETING, reason="TRITON_INTERPRET=1 replaces the compiler")


def run(*command: str, **environment: str) -> str:
    """The output of a Python process, which must succeed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FLOWKERN_BACKEND")} | environment
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


HERE = Path(__file__)
OPS_ROOM = HERE.parents[1] / "ops"
#: What runs in the interpreter: the tests of ops that run everywhere, in parts alike in length, and those of the kernels.
INTERPRETED = {
    "values": ("-m", "everywhere", str(OPS_ROOM / "test_values.py")),
    "scale-maps": ("-m", "everywhere", str(OPS_ROOM / "test_scale_maps.py")),
    "others": (
        "-m",
        "everywhere",
        str(OPS_ROOM),
        f"--ignore={OPS_ROOM}/test_values.py",
        f"--ignore={OPS_ROOM}/test_scale_maps.py",
    ),
    "kernels": (str(HERE.with_name("triton_interpreter.py")),),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", INTERPRETED)
def test_kernels_in_the_interpreter(what: str) -> None:
    pytest.importorskip("numpy", reason="Triton's interpreter needs NumPy")
    # NumPy, which the interpreter computes with, warns wherever IEEE arithmetic makes an infinity or a NaN.
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning")
    print(run("-m", "pytest", *options, *INTERPRETED[what], TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


@pytest.mark.slow
def test_kernels_compile_for_every_target() -> None:
    table = run("-m", "flowkern.kernels.compile", "--jobs", str(min(os.cpu_count() or 1, 4)))
    kernels = {kernel.name for op in OPS.values() for kernel in op.kernels if "triton" in kernel.implementations}
    for op, target in itertools.product(kernels & OPS.keys(), ("sm_80", "sm_90", "sm_100", "gfx942")):
        assert any(line.split()[:2] == [op, target] for line in table.splitlines()), table


@needs_compiler
class TestTheChecksOfCompiledKernels:
    """Each check must find what it is there for, in a kernel that really has the fault."""

    def launch(self, **choice: Any) -> Any:
        from flowkern.kernels import affine_coupling as kernels

        first = {name: values[0] for name, values in kernels.FACTORS.items()}
        return dict(kernels.compile_cases(**{**first, **choice}))["forward"]

    def changed(self, launch: Any, **keywords: Any) -> Any:
        return launch._replace(grid=dataclasses.replace(launch.grid, keywords={**launch.grid.keywords, **keywords}))

    @pytest.mark.parametrize(("target", "elements"), [("sm_90", 4096), ("gfx942", 16384)])
    def test_spills(self, target: str, elements: int) -> None:
        from flowkern.kernels.compile import compile_launch, problems

        crowded = self.changed(self.launch(scale="exp"), num_warps=1, ELEMENTS=elements)
        assert any("spills" in p for p in problems(compile_launch(crowded, target)))

    @pytest.mark.parametrize("target", ["sm_80", "gfx942"])
    def test_float64(self, target: str) -> None:
        import triton.language as tl
        from flowkern.kernels.compile import compile_launch, problems

        assert problems(compile_launch(self.launch(), target)) == []
        assert problems(compile_launch(self.launch(dtypes="float64"), target)) == []
        careless = compile_launch(self.changed(self.launch(), ACC=tl.float64), target)
        assert problems(careless) == ["computes in float64 without a float64 input"]

    @pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16"])
    def test_streaming(self, dtypes: str) -> None:
        from flowkern.kernels.compile import compile_launch, streaming_problems

        assert streaming_problems(compile_launch(self.launch(dtypes=dtypes), "sm_90")) == []
        strided = streaming_problems(compile_launch(self.launch(dtypes=dtypes, form="strided"), "sm_90"))
        assert any("under 16 bytes" in p for p in strided)
        # Inputs that start at any address, as Triton would see them.
        general = streaming_problems(compile_launch(self.launch(dtypes=dtypes, form="odd"), "sm_90"))
        assert any("under 16 bytes" in p for p in general)
        divided = streaming_problems(compile_launch(self.launch(dtypes=dtypes, split="checkerboard"), "sm_90"))
        assert any("integer divisions" in p for p in divided)

    def test_shared_memory(self) -> None:
        from flowkern.kernels.compile import compile_launch, problems

        build = compile_launch(self.launch(), "sm_80")
        build.shared = 2**20
        assert problems(build) == ["takes 1048576 bytes of shared memory, there are 166912"]

    def test_pixels_that_no_vector_holds(self) -> None:
        """Triton 3.9 ended the process."""
        from flowkern.kernels import discretized_logistic_mixture as kernels
        from flowkern.kernels.compile import compile_launch, problems

        launch = dict(kernels.compile_cases(3, 10, False, "odd", "float32"))["backward"]
        assert problems(compile_launch(launch, "sm_100")) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("dtypes", ["float32", "float64"])
    @pytest.mark.parametrize("components", [8, 100])
    @pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
    def test_roots_of_mixtures(self, target: str, components: int, dtypes: str) -> None:
        from flowkern.kernels import logistic_mixture_root as kernels
        from flowkern.kernels.compile import compile_launch, problems

        ((_, launch),) = kernels.compile_cases(components, dtypes)
        assert problems(compile_launch(launch, target)) == []

    def test_unknown_arguments(self) -> None:
        from flowkern.kernels.compile import compile_launch

        with pytest.raises(TypeError, match="forward_kernel takes no MISSPELT"):
            compile_launch(self.changed(self.launch(), MISSPELT=1), "sm_80")

    def test_failures_fail_the_command(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        from flowkern.kernels import compile as compiler

        monkeypatch.setattr(compiler, "problems", lambda build: ["is no good"] if build.target == "gfx942" else [])
        assert compiler.main(["additive_coupling"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert all(" 0 with problems" in line for line in lines[:3])
        assert " 0 with problems" not in lines[3]
        assert lines[4].endswith("for gfx942: is no good")


def test_pairwise_choices_cover_every_pair() -> None:
    from flowkern.kernels.compile import pairwise

    factors = {"a": "pqrs", "b": (False, True), "c": (1, 2, 3), "d": "xyz"}
    rows = list(pairwise(factors))
    for (a, u), (b, v) in itertools.combinations(factors.items(), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(u, v))
    assert len(rows) < 20


def plan(shape: tuple[int, ...], split: int, whole: tuple[int, ...], part: tuple[int, ...], **options: Any) -> Any:
    from flowkern.kernels import _coupling

    arguments = {"channels_last": False, "double": False, "moved": shape[1] // 2} | options
    return _coupling.grid(shape, split=split, whole=[whole], parts=[part], **arguments)


def test_contiguous_samples_are_one_axis() -> None:
    image = plan((8, 6, 10, 10), 0, (600, 100, 10, 1), (600, 100, 10, 1, 300))
    assert image.integers[:7] == (8, 600, 600, 1, 1, 300, 1)
    assert image.keywords["LINEAR"]
    cropped = plan((8, 6, 10, 10), 0, (2400, 400, 20, 1), (600, 100, 10, 1, 300))
    assert cropped.integers[:7] == (8, 600, 6, 10, 10, 3, 1)
    assert not cropped.keywords["LINEAR"]
    masked = plan((8, 6, 10, 10), 4, (600, 100, 10, 1), (600, 100, 10, 1, 300))
    assert masked.integers[:7] == (8, 600, 6, 1, 100, 3, 1)
    checkered = plan((8, 6, 10, 10), 2, (600, 100, 10, 1), (1200, 100, 10, 1, 600), moved=6)
    assert checkered.integers[:7] == (8, 600, 6, 10, 10, 3, 1)
    assert checkered.keywords["LINEAR"]
    broadcast = plan((8, 6, 10, 10), 0, (0, 0, 0, 0), (600, 100, 10, 1, 300))
    assert broadcast.integers[7:11] == (0, 0, 0, 0)
    assert not broadcast.keywords["LINEAR"]


def test_every_element_has_one_thread_place() -> None:
    for samples, features, double in itertools.product((1, 7, 4096), (2, 63, 4096, 5000), (False, True)):
        how = plan((samples, features), 0, (features, 1, 0, 0), (features, 1, 0, 0, 1), double=double)
        rows, columns = how.keywords["ROWS"], how.keywords["ELEMENTS"]
        assert how.tiles == -(-features // columns)
        assert how.programs == how.tiles * -(-samples // rows)
        assert rows * columns <= 32 * how.keywords["num_warps"] * (2 if double else 8)


# On a GPU


class TestOnAGPU:
    pytestmark = NEEDS_GPU

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_elementary_functions(self, dtype: torch.dtype) -> None:
        from elementary import FUNCTIONS, assert_elementary

        # In float32 the power of two is good to 2**-22, and a quotient to 2 units in the last place: 8 units for tanh.
        for name in FUNCTIONS:
            assert_elementary(name, dtype, "cuda", units=8 if dtype is torch.float32 else 4)

    @pytest.mark.vast
    @pytest.mark.parametrize("shape", [(2, 2**30 + 2), (1, 2**31 + 2)], ids=["by-sample", "in-one-sample"])
    def test_more_than_2_to_31_elements(self, shape: tuple[int, int]) -> None:
        if torch.cuda.mem_get_info()[0] < 60 * 2**30:
            pytest.skip("needs 60 GiB of GPU memory")
        x, params, grad = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(3))
        half = shape[1] // 2
        with flowkern.backend("triton"):
            y, logabsdet = affine_coupling(x.requires_grad_(), params.requires_grad_())
            dx, dparams = torch.autograd.grad((y, logabsdet), (x, params), (grad, torch.ones_like(logabsdet)))
        assert torch.equal(y[:, :half], x[:, :half])
        assert torch.equal(dx[:, :half], grad[:, :half])
        for part in (slice(0, 4096), slice(half - 4096, half)):
            moved = [t[:, half:][:, part] for t in (x, y, grad, dx, params, dparams)]
            raw = params[:, :half][:, part].detach().requires_grad_()
            inputs = [t.detach().requires_grad_() for t in (moved[0], moved[4])]
            s, log_s = ScaleMap.sigmoid()(raw.float())
            expected = (inputs[0] * s + inputs[1]).bfloat16()
            gradients = torch.autograd.grad((expected, log_s), (*inputs, raw), (moved[2], torch.ones_like(log_s)))
            actual = (moved[1], moved[3], moved[5], dparams[:, :half][:, part])
            for a, b in zip(actual, (expected, *gradients), strict=True):
                torch.testing.assert_close(a, b)
        total = torch.zeros(shape[0], dtype=torch.float64, device="cuda")
        for raw in params.detach()[:, :half].split(2**28, 1):
            total += torch.nn.functional.logsigmoid(raw.float() + 2.0).sum(1, dtype=torch.float64)
        torch.testing.assert_close(logabsdet.double(), total, rtol=1e-5, atol=0)
