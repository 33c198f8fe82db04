"""Everything that needs a GPU, in one command and in under ten minutes: ``python -m bench.gpu_check [--dry-run]``.

It builds the library from this checkout, runs the tests marked gpu, measures masked networks, likelihoods and the whole bench,
lets compute-sanitizer watch a few calls, and writes bench/results/GPU.json. Each stage has its own time, and one that
fails does not lose what the others found; the exit code is then 1. It needs Python with torch, triton, setuptools,
pybind11, ninja and pytest, and neither an installed flowkern nor a network. ``--dry-run`` does what needs no GPU: the
build, the collection of the tests, the compilation of all Triton kernels, and the measurements and the calls on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .row import slug, write_atomically

__all__ = ["FINISHED", "STARTED", "main"]

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-check"
RESULTS = ROOT / "bench" / "results"
#: Seconds for everything, with what is left of the ten minutes for stopping a stage and writing.
_TOTAL = 570.0
_LOG = 4000
#: What bench/smoke.py prints.
STARTED, FINISHED = "smoke: the device answers", "smoke: all calls finished"

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "did not run"


@dataclass
class Outcome:
    """What a stage found; ``log`` is the end of its output, kept where it did not pass."""

    status: str
    summary: str
    details: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    seconds: float = 0.0


@dataclass
class Ran:
    """A command that has ended: its exit code, or None if its time was up."""

    code: int | None
    output: str

    def status(self) -> str:
        return TIMED_OUT if self.code is None else FAILED if self.code else PASSED

    def log(self) -> str:
        return "" if self.code == 0 else self.output.replace(str(ROOT), ".")[-_LOG:]

    def last_line(self) -> str:
        lines = self.output.strip().splitlines()
        return lines[-1].strip("= ") if lines else "no output"


Stage = tuple[str, float, Callable[[float], Outcome]]


def run(command: Sequence[str], seconds: float, folder: Path, name: str, **variables: str) -> Ran:
    """Run a command in ``folder`` for at most so many seconds. Its output goes to a file, so that it outlives the command."""
    dropped = ("TRITON_INTERPRET", "FLOWKERN_BACKEND", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment.update(PYTHONUNBUFFERED="1", PYTHONPATH=str(folder), KINETO_LOG_LEVEL="99", **variables)
    path = WORK / f"{name}.log"
    with open(path, "w", encoding="utf-8") as log:
        streams: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
        try:
            code: int | None = process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:  # what is left of the command ends, its children too: it leads a process group of its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ran(code, path.read_text(encoding="utf-8", errors="replace"))


class Check:
    """The stages, and what they share: where the library was built, and on what it runs."""

    def __init__(self, dry: bool):
        self.dry = dry
        self.library = WORK / "library"
        self.device = "cpu" if dry else "cuda"
        self.outcomes: dict[str, Outcome] = {}
        self.origin: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []

    def python(self, seconds: float, name: str, *arguments: str, **variables: str) -> Ran:
        """Run this Python on the library that was built."""
        return run([sys.executable, *arguments], seconds, self.library, name, **variables)

    def stages(self) -> list[Stage]:
        """(name, seconds, what to do), the most valuable first."""
        always: list[Stage] = [("build", 150.0, self.build), ("origin", 60.0, self.find_origin)]
        ours: list[Stage] = [(name, 60.0, partial(self.bench, name=name, subjects=[name])) for name in ("networks", "likelihood")]
        if self.dry:
            # No figure comes of it, and a busy machine is slow: its limits only end what hangs.
            tiny: Stage = ("bench", 60.0, partial(self.bench, only="4x8,4x8-*,4x8x*,4x3x*,8x8"))
            stages = [*always, ("tests", 60.0, self.test), ("compile", 120.0, self.compile), tiny, *ours]
            return [(name, 10 * seconds, stage) for name, seconds, stage in (*stages, ("smoke", 30.0, self.smoke))]
        tools: list[Stage] = [(tool, 45.0, partial(self.sanitize, tool=tool)) for tool in ("memcheck", "racecheck")]
        return [*always, ("tests", 200.0, self.test), *ours, ("bench", 180.0, self.bench), *tools]

    def build(self, seconds: float) -> Outcome:
        """Lay out the library as an installation would, with its extension. If that fails, without."""
        shutil.rmtree(self.library, ignore_errors=True)
        options = ["--build-lib", str(self.library), "--build-temp", str(WORK / "objects")]
        command = [sys.executable, "setup.py", "-q", "build", *options]
        ran = run(command, seconds, ROOT, "build", FLOWKERN_EXT="1")
        built = sorted(path.name for path in self.library.glob("flowkern/_native*"))
        if ran.code == 0 and built:
            return Outcome(PASSED, f"built {', '.join(built)}")
        shutil.rmtree(self.library, ignore_errors=True)
        places = {"flowkern": ".", "kernels/triton": "kernels", "csrc/cuda": "kernels/cuda", "bench": "bench"}
        for source, place in places.items():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
            shutil.copytree(ROOT / source, self.library / "flowkern" / place, ignore=ignored, dirs_exist_ok=True)
        status = ran.status() if ran.code != 0 else FAILED
        return Outcome(status, "no extension was built; the rest runs without it", log=ran.log() or ran.output[-_LOG:])

    def find_origin(self, seconds: float) -> Outcome:
        """Device, versions and commit."""
        ran = self.python(seconds, "origin", "-m", "flowkern.bench.provenance")
        if ran.code != 0:
            return Outcome(ran.status(), ran.last_line(), log=ran.log())
        self.origin = json.loads(ran.last_line())
        if not self.dry and not self.origin["cuda"]:
            return Outcome(FAILED, "torch finds no CUDA GPU")
        return Outcome(PASSED, ", ".join(f"{key} {value}" for key, value in self.origin.items()))

    def test(self, seconds: float) -> Outcome:
        """Run the tests marked gpu; without a GPU collect them."""
        # Only files with such tests are looked at: others may need packages that are not there.
        texts = {str(path): path.read_text("utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))}
        files = [path for path, text in texts.items() if "mark.gpu" in text or "anywhere: str" in text]
        ini = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
        report = WORK / "tests.xml"
        report.unlink(missing_ok=True)
        how = ["--collect-only"] if self.dry else ["-rfE", f"--junitxml={report}"]
        # A warning of a package in a version of its own is shown, and fails nothing here.
        ran = self.python(seconds, "tests", "-m", "pytest", *ini, "-m", "gpu", "-W", "default", *files, *how)
        return Outcome(ran.status(), ran.last_line(), _tests(report), ran.log())

    def compile(self, seconds: float) -> Outcome:
        """Compile the Triton kernels for GPUs that are not there."""
        ran = self.python(seconds, "compile", "-m", "flowkern.kernels.compile", "--jobs", str(min(os.cpu_count() or 1, 8)))
        builds = sum(int(found) for found in re.findall(r"(\d+) builds", ran.output))
        return Outcome(ran.status(), f"{builds} builds" if ran.code == 0 else ran.last_line(), log=ran.log())

    def bench(self, seconds: float, name: str = "bench", **options: Any) -> Outcome:
        """Measure subjects, all ops where none is named. A wrong row among those printed, or none, is a failure."""
        options |= {"compile": "none", "quick": True} if self.dry else {"compile": "large"}
        ran = self.python(seconds, name, "-m", "flowkern.bench.worker", json.dumps({"device": self.device, **options}))
        rows = _rows(ran.output)
        self.rows += rows
        wrong = [f"{row['subject']} {row['case']} {row['direction']} {row['variant']}" for row in rows if row["failure"]]
        summary = f"{len(rows)} rows" + (f", of which wrong: {', '.join(dict.fromkeys(wrong))}" if wrong else "")
        failed = wrong or (not rows and ran.code == 0)
        return Outcome(FAILED if failed else ran.status(), summary, log=ran.log())

    def smoke(self, seconds: float) -> Outcome:
        """The calls that compute-sanitizer watches, without it."""
        ran = self.python(seconds, "smoke", "-m", "flowkern.bench.smoke", "--device", self.device)
        status = ran.status() if FINISHED in ran.output or ran.code != 0 else FAILED
        return Outcome(status, ran.last_line(), log=ran.log())

    def sanitize(self, seconds: float, tool: str) -> Outcome:
        """The calls under one tool of compute-sanitizer."""
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
        program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
        if program is None:
            return Outcome(NOT_RUN, "compute-sanitizer was not found")
        command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "flowkern.bench.smoke", "--every", "4"]
        # Without torch's cache each tensor is an allocation of its own, whose ends the tool knows.
        return _judge(run(command, seconds, self.library, tool, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def _judge(ran: Ran) -> Outcome:
    """What compute-sanitizer found. It has passed only if the calls were made under it and it says that it saw nothing."""
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)[^\n]*", ran.output)
    summary = found[0] if found else ran.last_line()
    log = ran.output.replace(str(ROOT), ".")[-_LOG:]
    if ran.code is not None and STARTED not in ran.output:
        return Outcome(NOT_RUN, f"the device did not answer under the tool: {summary}", log=log)
    if ran.code == 0 and FINISHED in ran.output and found and found[1] == "0":
        return Outcome(PASSED, summary)
    return Outcome(TIMED_OUT if ran.code is None else FAILED, summary, log=log)


def _tests(report: Path) -> dict[str, Any]:
    """Counts and the names of the tests that failed, of a JUnit report; nothing if there is none."""
    if not report.exists():
        return {}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")}
    cases = [case for suite in suites for case in suite.iter("testcase")]
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {**counts, "failed": failed}


def _rows(output: str) -> list[dict[str, Any]]:
    """The rows among the lines of a worker; its last line may be torn."""
    rows = []
    for row in re.findall(r'\{"subject".*', output):
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(row))
    return rows


def perform(check: Check, total: float = _TOTAL) -> None:
    """Run the stages, one after the other, whatever becomes of each; without the library or a GPU there are no more."""
    WORK.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + total
    for name, seconds, stage in check.stages():
        start = time.monotonic()
        left = min(seconds, end - start)
        try:
            outcome = stage(left) if left >= 5.0 else Outcome(NOT_RUN, "the time was up")
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            outcome = Outcome(FAILED, f"{type(error).__name__}: {error}")
        outcome.seconds = round(time.monotonic() - start, 1)
        check.outcomes[name] = outcome
        print(f"{name:<10}{outcome.status:<12}{outcome.seconds:>6.1f} s  {outcome.summary}", flush=True)
        if outcome.log:
            print("    " + "\n    ".join(outcome.log.splitlines()[-15:]), flush=True)
        if name == "origin" and outcome.status != PASSED:
            return


def document(check: Check) -> dict[str, Any]:
    """What is written: where it comes from, what each stage found, and all rows."""
    return {**check.origin, "stages": {name: asdict(o) for name, o in check.outcomes.items()}, "rows": check.rows}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if a stage failed or its time was up."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="what needs no GPU; writes nothing to bench/results")
    arguments = parser.parse_args(argv)
    if not (ROOT / "setup.py").exists():
        parser.error("run it from a checkout: it builds the library")
    check = Check(arguments.dry_run)
    perform(check, 10 * _TOTAL if arguments.dry_run else _TOTAL)
    # Without a GPU there is nothing to record.
    recorded = not check.dry and check.origin.get("cuda")
    path = RESULTS / f"{slug(check.origin['device'])}.json" if recorded else WORK / "dry-run.json"
    write_atomically(path, json.dumps(document(check), indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")
    return int(any(o.status in (FAILED, TIMED_OUT) for o in check.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
