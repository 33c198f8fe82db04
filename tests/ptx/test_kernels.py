"""Kernels of the library executed from their PTX: a sample of what ``make ptx`` runs."""

from __future__ import annotations

import executor
import pytest
from every_kernel import HERE, TESTS, run

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(executor.missing()), reason=executor.missing())]

INTERPRETED = str(TESTS / "native" / "triton_interpreter.py")
#: The target, files, and which tests: products on the tensor cores of Hopper, a coupling, barriers left out; and csrc/cuda.
SAMPLES = {
    "triton": ("sm_90", (INTERPRETED,), "(several_tiles_and_chunks and large) or many_samples"),
    "faults": ("sm_90", (str(HERE / "left_out.py"), str(HERE / "truncated_sums.py")), "product_kernel or (certified and 15)"),
    "cuda": ("sm_90", (str(HERE / "cuda_kernels.py"),), "float32-16 and small"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_kernels_run_from_their_ptx_without_a_note(name: str) -> None:
    target, files, chosen = SAMPLES[name]
    done = run(target, (*files, "-k", chosen))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
