"""The CPU extension itself: sanitizers, forked workers, and the choice of the instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import python

import flowkern
from flowkern import OPS
from flowkern._core import backend as _backend

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(_backend.native is None, reason="the CPU extension is not built")

EVERY_SAMPLE = """
import itertools, sys, torch
from flowkern import OPS, ops
from flowkern._core import backend as _backend
sys.path.insert(0, TESTS)
from comparison import DTYPES, results, running, samples
for isa in _backend.native.isas():
    for dtype in DTYPES:
        for op in OPS.values():
            for sample in samples(op, dtype):
                with running(isa):
                    assert all(y.isfinite().all() for y in results(op.function, sample)[: len(op.outputs)])
    # Searches larger than a block and its parts, with every screen, rows that are no numbers, and columns one after the other.
    screens = (False, True) if isa == "avx512" else (False,)
    for rows, codes, depth, _backend.multiply_bfloat16 in itertools.product((0, 1, 97, 301), (1, 65, 300), (1, 2, 33), screens):
        for dtype, metric, flipped in itertools.product(DTYPES[:2], ("euclidean", "cosine"), (False, True)):
            x, codebook = (torch.randint(-3, 4, (n, depth)).to(dtype) for n in (rows, codes))
            x[:1, 0], x[1:2, 0], codebook[1:2, 0], codebook[2:3, 0] = torch.nan, torch.inf, torch.nan, 1e30
            x = x.t().contiguous().t() if flipped else x
            with running(isa):
                index, _, looked = ops.nearest_code(x, codebook, metric=metric, return_stats=True)
            assert ((0 <= index) & (index < codes)).all() and 0 <= looked <= rows
print("every sample ran on", *_backend.native.isas())
"""


@pytest.mark.slow
def test_every_isa_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path, sanitized: Callable[..., None]) -> None:
    """Builds the extension with both sanitizers and runs every sample of every op on it, and searches of many sizes."""
    package = tmp_path / "flowkern"
    shutil.copytree(ROOT / "flowkern", package, ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "kernels", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Unoptimized: that compiles in half of the time, and moves no access out of the checks' sight.
    flags = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    assert _backend.native is not None
    runs = ",".join(_backend.native.isas())
    compiler = f"{sys.executable} {ROOT / 'tests' / 'compiler.py'} {tmp_path / 'objects'} {runs}"
    env = {**os.environ, "CXXFLAGS": flags, "CXX": compiler, "FLOWKERN_EXT": "1"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    here = f"import flowkern; assert flowkern.__file__.startswith({str(tmp_path)!r}); TESTS = {str(ROOT / 'tests')!r}"
    sanitized("-c", here + EVERY_SAMPLE, cwd=tmp_path, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="2")


@pytest.mark.slow
def test_forked_workers_do_not_hang() -> None:
    """The parent has used OpenMP threads; a forked child must not wait for them."""
    script = """
import os, torch
from flowkern import ops
torch.set_num_threads(2)
x, params = torch.randn(64, 64, 32, 32), torch.randn(64, 64, 32, 32)
expected = ops.affine_coupling(x, params)[1]
child = os.fork()
if child == 0:
    actual = ops.affine_coupling(x, params)[1]
    os._exit(0 if actual.tolist() == expected.tolist() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_extension_needs_no_torch_library() -> None:
    assert _backend.native is not None
    assert _backend.native.__file__
    needed = subprocess.run(["readelf", "-d", _backend.native.__file__], capture_output=True, text=True)
    if needed.returncode:
        pytest.skip("readelf is not installed")
    libraries = [line.split("[")[1].split("]")[0] for line in needed.stdout.splitlines() if "(NEEDED)" in line]
    assert libraries
    assert not [name for name in libraries if "torch" in name or "c10" in name]


@pytest.mark.slow
def test_one_openmp_in_the_process() -> None:
    """The extension binds to the OpenMP runtime that torch has loaded, so that there is one pool of threads."""
    assert _backend.native is not None
    if not _backend.native.openmp() or sys.platform != "linux":
        pytest.skip("built without OpenMP")
    script = """
import torch, flowkern
flowkern.ops.affine_coupling(torch.randn(8, 64, 32, 32), torch.randn(8, 64, 32, 32))
paths = {line.split()[-1] for line in open("/proc/self/maps")}
print(*(path for path in paths if "omp" in path.split("/")[-1] and ".so" in path))
"""
    done = python("-c", script)
    assert len(done.stdout.split()) == 1, done.stdout + done.stderr
    assert "torch" in done.stdout


def test_ops_have_native_kernels() -> None:
    """A build on a machine with a compiler must not silently leave kernels out."""
    for op in OPS.values():
        assert flowkern.explain(op.name).count("serves") >= 1
        assert "cpp    serves" in flowkern.explain(op.name)
    assert sysconfig.get_config_var("EXT_SUFFIX") in str(_backend.native)
