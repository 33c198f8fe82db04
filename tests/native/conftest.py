"""How kernels are run under sanitizers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import python


@pytest.fixture
def sanitized() -> Callable[..., None]:
    """Runs Python with the runtimes of the address and the undefined-behaviour sanitizer; it must say "every sample ran"."""
    if shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("needs g++ and its sanitizer runtimes")
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={lib}"], capture_output=True, text=True).stdout.strip()
        for lib in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(r).is_absolute() for r in runtimes):
        pytest.skip("the sanitizer runtimes are not installed")

    def run(*arguments: str, cwd: Path, **environment: str) -> None:
        # Leaks are not looked for: the interpreter and torch keep memory until the process ends.
        sanitizers = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
        done = python(*arguments, cwd=cwd, **sanitizers, **environment)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "every sample ran" in done.stdout

    return run
