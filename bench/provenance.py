"""Where a figure comes from: device, versions and commit. ``python -m flowkern.bench.provenance`` prints it as JSON."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import flowkern
from flowkern._core import nvrtc

__all__ = ["commit", "device_name", "machine", "provenance"]


def provenance(device: str) -> dict[str, str]:
    """Device, versions and commit as they stand in every row."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "flowkern": flowkern.__version__,
        "commit": commit(),
    }


def device_name(device: str) -> str:
    """The GPU's name, or the processor's model."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the checkout that this file lies in, with ``-dirty`` if tracked files differ from it.

    ``FLOWKERN_COMMIT`` stands in for a copy of a checkout that has no history; without it, "unknown".
    """
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(["git", "-C", str(here), *arguments], check=True, capture_output=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    top = git("rev-parse", "--show-toplevel")
    # An installed copy may lie in a checkout of something else.
    if top is None or not Path(top, "flowkern", "_core", "op.py").exists():
        return os.environ.get("FLOWKERN_COMMIT", "unknown")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", top)
    return f"{git('rev-parse', '--short=12', 'HEAD')}{'-dirty' if changed else ''}"


def machine() -> dict[str, str | None]:
    """Beside ``provenance``: Python, CUDA, the compilers of GPU code, and the GPU's driver, clocks and power limit."""
    gpu = torch.cuda.is_available()
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda if gpu else None}
    found["nvrtc"] = nvrtc.missing() or nvrtc.version()
    with contextlib.suppress(Exception):  # of a Triton that is not there, or names it otherwise
        found["ptxas"] = importlib.import_module("triton").knobs.nvidia.ptxas.version
    fields = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
        values = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split(", ")
        found.update(zip(fields, values, strict=False))
    return found


if __name__ == "__main__":
    print(json.dumps({**provenance("cuda" if torch.cuda.is_available() else "cpu"), **machine()}))
