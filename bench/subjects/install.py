"""How long an install from source takes: ``pip install`` of the sdist in a fresh environment, without the packages it depends on.

The build is pip's isolated one, which fetches its own requirements, and the kernels are compiled as for users.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..comparison import Comparison, Options

__all__ = ["DEVICES", "comparisons"]

DEVICES = ("cpu",)
ROOT = Path(__file__).parents[2]


def comparisons(options: Options) -> Iterator[Comparison | str]:
    """One install, ``--quick`` without the kernels. It needs a checkout, and a network or a cache of pip's."""
    if not (ROOT / "setup.py").exists():
        yield "install: not measured, as this is no checkout"
        return
    variant = "without-kernels" if options.quick else "with-kernels"
    with tempfile.TemporaryDirectory() as folder:
        failure, seconds = _installed(Path(folder), "0" if options.quick else "1")
    yield Comparison("sdist", "install", {}, variant, failures={variant: failure}, slow={variant: [seconds]})


def _installed(folder: Path, kernels: str) -> tuple[str, float]:
    """(what went wrong, seconds)."""
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    made = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    if made.returncode:
        return _last_line(made), 0.0
    (archive,) = folder.glob("*.tar.gz")
    environment = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--force-reinstall", str(archive)]
    start = time.perf_counter()
    made = subprocess.run(command, env={**os.environ, "FLOWKERN_EXT": kernels}, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    return (_last_line(made) if made.returncode else ""), seconds


def _last_line(ran: subprocess.CompletedProcess[str]) -> str:
    return (ran.stderr.strip().splitlines() or ["no output"])[-1]
