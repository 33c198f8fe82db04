"""The Triton kernels of ``nearest_code``: what the compiler makes of them, and what a GPU does."""

from __future__ import annotations

import re
from typing import Any

import nearest
import pytest
import torch
from comparison import NEEDS_GPU

import flowkern
from flowkern import ops
from flowkern._core import backend as _backend

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.skipif(_backend.interpreting(), reason="TRITON_INTERPRET=1 replaces the compiler")
class TestCompiled:
    def build(self, name: str, target: str, sizes: tuple[int, int, int], cosine: bool = False, dtypes: str = "float32") -> Any:
        from flowkern.kernels import nearest_code
        from flowkern.kernels.compile import compile_launch

        return compile_launch(dict(nearest_code.compile_cases(sizes, cosine, dtypes, target))[name], target)

    @pytest.mark.parametrize("sizes", [(16384, 256, 8192), (64, 256, 65536)], ids=str)
    def test_the_screen_keeps_the_tensor_cores_of_hopper_busy(self, sizes: tuple[int, int, int]) -> None:
        build = self.build("screen", "sm_90", sizes)
        assert build.spilled == 0
        assert re.search(r"wgmma\.mma_async\S*\.f32\.bf16\.bf16", build.assembly)
        # The places of codes are in the last bits of scores, also of those near zero; and float64 is for the few.
        assert not re.search(r"\.ftz|\.f64", build.assembly)
        if sizes[0] <= 64:
            return
        # The accumulator is reduced inside the threads that hold it, by fewer than two comparisons for each of their 64 scores.
        loop = re.search(r"^(\$L\w+):(?:(?!^\$L).)*(wgmma\.mma_async.*)bra\S*\s+\1;", build.assembly, re.MULTILINE | re.DOTALL)
        assert loop
        assert 64 < len(re.findall(r"(?:max|min)\.f32", loop[2])) < 2 * 64
        assert not re.search(r"shfl|(?:ld|st)\.shared", loop[2])
        # The norms of the codes are where the sums begin: nothing is subtracted from a score.
        assert len(re.findall(r"(?:add|sub)\.\S*f32", loop[2])) < 8

    def test_the_definition_is_rounded_as_it_says(self) -> None:
        euclidean = self.build("decide", "sm_90", (16384, 256, 8192)).assembly
        assert re.search(r"mul\.rn\.f64|mul\.f64", euclidean)
        assert not re.search(r"fma\S*\.f64", euclidean)
        for name in ("prepare", "decide"):
            cosine = self.build(name, "sm_90", (16384, 256, 8192), cosine=True).assembly
            assert set(re.findall(r"\b(?:sqrt|div|rsqrt|rcp)\S*\.f64", cosine)) <= {"sqrt.rn.f64", "div.rn.f64"}


class TestOnAGPU:
    pytestmark = NEEDS_GPU

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("cases", [nearest.ties, nearest.scales, nearest.not_finite])
    def test_the_index_is_that_of_float64(self, cases: Any, dtype: torch.dtype) -> None:
        for i, (name, x, codebook) in enumerate(cases(dtype)):
            metric = ("euclidean", "cosine")[i % 2]
            with flowkern.backend("triton"):
                actual = ops.nearest_code(x.cuda(), codebook.cuda(), metric=metric)
            for a, b in zip(actual, nearest.oracle(x, codebook, metric), strict=True):
                assert torch.equal(a.cpu().nan_to_num(-1), b.nan_to_num(-1)), (name, metric)

    @pytest.mark.parametrize("sizes", [(4096, 256, 8192), (64, 256, 65536), (1000, 1030, 300)], ids=str)
    def test_it_agrees_with_the_torch_code_and_with_itself(self, sizes: tuple[int, int, int]) -> None:
        rows, depth, codes = sizes
        x, codebook = torch.randn(rows, depth, device="cuda"), torch.randn(codes, depth, device="cuda")
        with flowkern.backend("triton"):
            actual, again = ops.nearest_code(x, codebook), ops.nearest_code(x, codebook)
        with flowkern.backend("torch"):
            expected = ops.nearest_code(x, codebook)
        for a, b, c in zip(actual, again, expected, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)

    def test_it_waits_for_nothing(self) -> None:
        x, codebook = torch.randn(500, 32, device="cuda"), torch.randn(300, 32, device="cuda")
        with flowkern.backend("triton"):
            ops.nearest_code(x, codebook)  # compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                ops.nearest_code(x, codebook, return_stats=True)
            finally:
                torch.cuda.set_sync_debug_mode("default")
