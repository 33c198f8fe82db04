"""The CPU extension itself: sanitizers, forked workers, and the choice of the instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import flowkern
from flowkern import OPS
from flowkern._core import backend as _backend

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(_backend.native is None, reason="the CPU extension is not built")

EVERY_SAMPLE = """
import sys
from flowkern import OPS
from flowkern._core import backend as _backend
sys.path.insert(0, TESTS)
from comparison import DTYPES, results, running, samples
for isa in _backend.native.isas():
    for dtype in DTYPES:
        for op in OPS.values():
            for sample in samples(op, dtype):
                with running(isa):
                    assert all(y.isfinite().all() for y in results(op.function, sample)[: len(op.outputs)])
print("every sample ran on", *_backend.native.isas())
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ and its sanitizer runtimes")
def test_every_isa_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """Builds the extension with both sanitizers and runs every sample of every op on it."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={lib}"], capture_output=True, text=True).stdout.strip()
        for lib in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(r).is_absolute() for r in runtimes):
        pytest.skip("the sanitizer runtimes are not installed")
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
    # Leaks are not looked for: the interpreter and torch keep memory until the process ends.
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "2",
    }
    here = f"import flowkern; assert flowkern.__file__.startswith({str(tmp_path)!r}); TESTS = {str(ROOT / 'tests')!r}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", here + EVERY_SAMPLE], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "every sample ran on" in done.stdout


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


@pytest.mark.slow
@pytest.mark.parametrize("name", _backend.native.isas() if _backend.native else [])
def test_the_environment_chooses_the_isa(name: str) -> None:
    script = "from flowkern._core import backend as _backend; print(_backend.native.isa())"
    env = {**os.environ, "FLOWKERN_ISA": name}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == name


@pytest.mark.slow
def test_an_unknown_isa_is_named() -> None:
    assert _backend.native is not None
    with pytest.raises(ValueError, match=r"FLOWKERN_ISA: this machine does not run 'mmx'; expected one of .*baseline"):
        _backend.native.use_isa("mmx")
    env = {**os.environ, "FLOWKERN_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", "import flowkern"], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "FLOWKERN_ISA: this machine does not run 'mmx'" in done.stderr


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
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert len(done.stdout.split()) == 1, done.stdout + done.stderr
    assert "torch" in done.stdout


def test_ops_have_native_kernels() -> None:
    """A build on a machine with a compiler must not silently leave kernels out."""
    for op in OPS.values():
        assert flowkern.explain(op.name).count("serves") >= 1
        assert "cpp    serves" in flowkern.explain(op.name)
    assert sysconfig.get_config_var("EXT_SUFFIX") in str(_backend.native)
