"""All kernels executed from their PTX: ``python tests/ptx/every_kernel.py [--targets sm_90] [--options shuffle=1,seed=7]``.

It runs by the plugin ``on_ptx`` what Triton's interpreter runs, csrc/cuda, the certified index with truncated sums, and kernels
with a barrier, wait or fence left out. It prints how often each kernel was launched, and fails if a test does or one has a note.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent
TARGETS = ("sm_80", "sm_90", "sm_100")
#: What is run for each target.
ROOMS = {
    "kernels": (str(TESTS / "native" / "triton_interpreter.py"),),
    "ops": ("-m", "everywhere", str(TESTS / "ops")),
    "csrc/cuda": (str(HERE / "cuda_kernels.py"),),
    "truncated": (str(HERE / "truncated_sums.py"),),
    "left out": (str(HERE / "left_out.py"),),
}


def run(target: str, arguments: Sequence[str], options: str = "", report: str = "") -> subprocess.CompletedProcess[str]:
    """pytest on the executor, which raises nothing: its output and whether all tests passed are in what is returned."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FLOWKERN_BACKEND")}
    environment |= {
        "FLOWKERN_PTX": target,
        "FLOWKERN_PTX_OPTIONS": options,
        "FLOWKERN_PTX_REPORT": report,
        "OMP_NUM_THREADS": "1",
    }
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS, HERE, TESTS / "native")))
    command = [sys.executable, "-m", "pytest", "-p", "on_ptx", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)


def table(report: str) -> list[str]:
    """A line for each target and kernel."""
    sums: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for line in report.splitlines():
        target, kernel, *numbers = line.split()
        sums[target, kernel] = [a + int(b) for a, b in zip(sums[target, kernel], numbers, strict=True)]
    head = f"{'target':<8}{'kernel':<62}{'launches':>9}{'instructions':>18}{'notes':>7}"
    return [head, *("{:<8}{:<62}{:>9}{:>18,}{:>7}".format(*key, *numbers) for key, numbers in sorted(sums.items()))]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description="Execute all kernels from their PTX.")
    parser.add_argument("--targets", nargs="*", default=TARGETS, choices=TARGETS)
    parser.add_argument("--options", default="", help='of the executor, as "shuffle=1,approximate=1,truncate=1,lazy=0,seed=7"')
    parser.add_argument("-k", default="", help="only the tests whose names match, as in pytest")
    given = parser.parse_args(arguments)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report")
        report.touch()
        for target in given.targets:
            for room, what in ROOMS.items():
                done = run(target, ("-n", "auto", "--dist", "worksteal", "-k", given.k, *what), given.options, str(report))
                passed = re.search(r"(\d+) passed", done.stdout)
                print(f"{target:<8}{room:<12}{passed[1] if passed else 0:>6} tests passed", flush=True)
                if done.returncode not in (0, 5):  # 5: no test has such a name
                    print(done.stdout[-20000:], done.stderr[-4000:], sep="\n")
                    failed = True
        print("\n".join(table(report.read_text())))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
