"""The package really installed: wheel, sdist, editable, without a compiler, and what a failed build does."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import python

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# Every package of the source tree must be there, those of the extra too; torch alone must do for all others.
IMPORT_EVERYTHING = """
import importlib, importlib.util, os, pkgutil, sys
os.chdir(os.path.dirname(sys.executable))
import flowkern
assert os.environ["EXPECT_UNDER"] in flowkern.__file__, flowkern.__file__
for module in pkgutil.walk_packages(flowkern.__path__, "flowkern."):
    if not module.name.startswith(("flowkern.bench", "flowkern.training", "flowkern.cli", "flowkern.data", "flowkern.kernels")):
        importlib.import_module(module.name)
import flowkern.kernels, flowkern.bench
for package in os.environ["EXPECT_PACKAGES"].split():
    assert importlib.util.find_spec(package), package
for package in (flowkern, flowkern.ops, flowkern.nn, flowkern.models):
    for name in getattr(package, "__all__", [n for n in vars(package) if not n.startswith("_")]):
        getattr(package, name)
import torch
from flowkern._core import backend as _backend, nvrtc
assert {"common.cuh", "autoregressive_inverse.cu"} <= nvrtc._sources().keys()
y, logabsdet = flowkern.ops.affine_coupling(torch.randn(3, 4), torch.randn(3, 4))
assert y.shape == (3, 4) and logabsdet.shape == (3,)
print("isa:", _backend.native.isa() if _backend.native else None)
"""


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FLOWKERN_BACKEND", "FLOWKERN_EXT")}
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **env})


class Environment:
    """A fresh virtual environment. torch, which is large, is seen where this suite found it; flowkern is not."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=True)
        self.python = str(folder / "bin" / "python")
        self.folder = folder
        site = run([self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).stdout.strip()
        # A path in a .pth file is searched last, and the .pth files inside it (the editable flowkern) are not read.
        (Path(site) / "torch.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def pip(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return run([self.python, "-m", "pip", "--disable-pip-version-check", *args], **env)

    def isa(self, under: str | None = None) -> str:
        """Imports everything; the instruction set in use, or "None" without the extension."""
        packages = " ".join(f"flowkern.{init.parent.name}" for init in (ROOT / "flowkern").glob("*/__init__.py"))
        env = {"EXPECT_UNDER": under or str(self.folder), "EXPECT_PACKAGES": packages}
        done = run([self.python, "-W", "ignore", "-c", IMPORT_EVERYTHING], **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("isa:")[1].strip()


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment") / "env")


@pytest.fixture
def fresh(environment: Environment) -> Iterator[Environment]:
    """The environment without flowkern: making it takes longer than most installs."""
    yield environment
    environment.pip("uninstall", "--yes", "flowkern")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files: building must not need or leave anything in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, files.decode().split("\0")):
        if (ROOT / name).exists():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def quickly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What builds soonest: without optimization, and each object of one source once."""
    compiler = f"{sys.executable} {ROOT / 'tests' / 'compiler.py'} {tmp_path_factory.mktemp('objects')} all"
    return {"CXXFLAGS": "-O0", "CXX": compiler, "FLOWKERN_EXT": "1"}


def test_sdist_and_wheel(fresh: Environment, source: Path, quickly: dict[str, str], tmp_path: Path) -> None:
    """The sdist, and a wheel built from it in pip's isolated build, where there is no torch."""
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    built = subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    done = fresh.pip("wheel", "--no-deps", "-w", str(tmp_path), str(archive), **quickly)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert fresh.pip("install", "--no-deps", str(wheel)).returncode == 0
    assert fresh.isa() in ("avx512", "avx2", "baseline")


def test_install_from_source(fresh: Environment, source: Path, quickly: dict[str, str]) -> None:
    done = fresh.pip("install", "--no-deps", "--force-reinstall", str(source), **quickly)
    assert done.returncode == 0, done.stdout + done.stderr
    assert fresh.isa() in ("avx512", "avx2", "baseline")


def test_editable_install(fresh: Environment, source: Path, quickly: dict[str, str]) -> None:
    done = fresh.pip("install", "--no-deps", "-e", str(source), **quickly)
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        assert fresh.isa(under=str(source)) in ("avx512", "avx2", "baseline")
    finally:
        for built in (source / "flowkern").glob("_native*"):
            built.unlink()


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"FLOWKERN_EXT": "0"}, "FLOWKERN_EXT=0: flowkern is installed without its CPU kernels"),
        ({"PATH": "/nowhere", "CXX": ""}, "no C++ compiler was found"),
        ({"CXX": "false"}, "flowkern is installed without its CPU kernels and runs in pure torch"),
    ],
    ids=["not-wanted", "no-compiler", "broken-compiler"],
)
def test_pure_python_install_with_one_warning(fresh: Environment, source: Path, env: dict[str, str], said: str) -> None:
    done = fresh.pip("install", "-v", "--no-deps", str(source), **env)
    assert done.returncode == 0, done.stdout + done.stderr
    building = (done.stdout + done.stderr).split("Building wheel for flowkern")[-1]
    assert building.count("flowkern is installed without its CPU kernels") == 1
    assert said in building
    assert fresh.isa() == "None"


def test_an_unknown_mode_is_named() -> None:
    done = python("setup.py", "-q", "build_ext", cwd=ROOT, FLOWKERN_EXT="yes")
    assert done.returncode != 0
    assert "FLOWKERN_EXT: unknown value 'yes'; expected one of auto, 0, 1" in done.stderr


def test_a_failed_build_is_an_error_where_the_extension_is_required(fresh: Environment, source: Path) -> None:
    done = fresh.pip("install", "--no-deps", str(source), FLOWKERN_EXT="1", CXX="false")
    assert done.returncode != 0
    assert "FLOWKERN_EXT=1, but the CPU extension could not be built" in done.stdout + done.stderr
