"""Kernels of the library executed from their PTX: a sample of what ``make ptx`` runs."""

from __future__ import annotations

import executor
import pytest
from every_kernel import HERE, TESTS, run

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(executor.missing()), reason=executor.missing())]

#: The target, files, and which tests: a product on the tensor cores of Hopper, a coupling, and csrc/cuda.
SAMPLES = {
    "triton": (
        "sm_90",
        (str(TESTS / "native" / "triton_interpreter.py"),),
        "(several_tiles_and_chunks and large) or many_samples",
    ),
    "cuda": ("sm_90", (str(HERE / "cuda_kernels.py"),), "float32-16 and small"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_kernels_run_from_their_ptx_without_a_note(name: str) -> None:
    target, files, chosen = SAMPLES[name]
    done = run(target, (*files, "-k", chosen))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
