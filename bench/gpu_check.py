"""Everything that needs a GPU, in one command and in under ten minutes: ``python -m bench.gpu_check [--dry-run] [--out FOLDER]``.

It builds the library from this checkout, calls every op, runs the tests marked gpu in several processes (which compile the
kernels at the same time), measures, lets compute-sanitizer watch a few calls, and writes bench/results/GPU.json, anew after each
stage. Each stage has its own time, and one that fails does not lose what the others found; the exit code is then 1, and
130 after an interrupt. It needs Python with torch, triton, setuptools, pybind11, ninja and pytest, and neither an installed
flowkern nor a network. ``--dry-run`` goes through the same stages on a CPU: the tests are collected, all else is tiny.
"""

from __future__ import annotations

import argparse
import concurrent.futures
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
#: Seconds that an interrupted command has for its report.
_TO_REPORT = 5.0
#: Processes that share the tests, at most: each compiles the kernels that its own meet.
_SHARES = 8
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
_running: set[subprocess.Popen[bytes]] = set()


def run(command: Sequence[str], seconds: float, folder: Path, name: str, **variables: str) -> Ran:
    """Run a command in ``folder`` for at most so many seconds. Its output goes to a file, so that it outlives the command."""
    dropped = ("TRITON_INTERPRET", "FLOWKERN_BACKEND", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment.update(PYTHONUNBUFFERED="1", PYTHONPATH=str(folder), KINETO_LOG_LEVEL="99", **variables)
    path = WORK / f"{name}.log"
    with open(path, "w", encoding="utf-8") as log:
        streams: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
        _running.add(process)
        try:
            code: int | None = process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
            _running.discard(process)
    return Ran(code, path.read_text(encoding="utf-8", errors="replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """What is left of a command ends, its children too: it leads a process group of its own. Interrupted, it may still report."""
    for number, seconds in ((signal.SIGINT, _TO_REPORT), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


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
        """(name, seconds, what to do), the most valuable first; their seconds add up to ``_TOTAL``."""
        found: list[Stage] = [
            ("build", 70.0, self.build),
            ("origin", 20.0, self.find_origin),
            ("smoke", 70.0, self.smoke),
            ("tests", 150.0, self.test),
            ("networks", 40.0, partial(self.bench, name="networks", subjects=["networks"])),
            ("likelihood", 30.0, partial(self.bench, name="likelihood", subjects=["likelihood"])),
            ("ptxas", 30.0, self.assemble_anew),
            ("bench", 110.0, partial(self.bench, only="4x8,4x8-*,4x8x*,4x3x*,8x8" if self.dry else "*")),
            ("memcheck", 25.0, partial(self.sanitize, tool="memcheck")),
            ("racecheck", 25.0, partial(self.sanitize, tool="racecheck")),
        ]
        # No figure comes of a dry run, and a busy machine is slow: its limits only end what hangs.
        return [(name, 10 * seconds, stage) for name, seconds, stage in found] if self.dry else found

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

    def test(self, seconds: float, name: str = "tests", only: Sequence[str] = (), **variables: str) -> Outcome:
        """Run the tests marked gpu, a share of them in each process; without a GPU collect them."""
        # Only files with such tests are looked at: others may need packages that are not there.
        texts = {str(path): path.read_text("utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))}
        files = [path for path, text in texts.items() if re.search("mark.gpu|NEEDS_GPU|anywhere: str", text)]
        # A warning of a package in a version of its own is shown, and fails nothing here.
        ini = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-W", "default"]
        shares = min(os.cpu_count() or 1, 2 if self.dry else _SHARES)

        def share(i: int) -> tuple[Ran, dict[str, Any]]:
            report = WORK / f"{name}-{i}.xml"
            report.unlink(missing_ok=True)
            how = ["--collect-only"] if self.dry else ["-rfE", f"--junitxml={report}"]
            command = ["-m", "pytest", *ini, "-m", "gpu", *only, *files, *how]
            return self.python(seconds, f"{name}-{i}", *command, FLOWKERN_TESTS_SHARE=f"{i}/{shares}", **variables), _tests(
                report
            )

        with concurrent.futures.ThreadPoolExecutor(shares) as pool:
            try:
                rans, found = zip(*pool.map(share, range(shares)), strict=True)
            except KeyboardInterrupt:  # the threads wait for their processes, which no terminal interrupts
                for process in [*_running]:
                    _end(process)
                raise
        worst = max(rans, key=lambda ran: [PASSED, FAILED, TIMED_OUT].index(ran.status()))
        details: dict[str, Any] = {}
        for counts in found:
            for name, value in counts.items():
                details[name] = details[name] + value if name in details else value
        summary = "; ".join(dict.fromkeys(ran.last_line() for ran in rans))
        return Outcome(worst.status(), summary, details, "".join(ran.log() for ran in rans)[-_LOG:])

    def assemble_anew(self, seconds: float) -> Outcome:
        """The tests of tensor cores once more, assembled by another ptxas than Triton's: versions of it made wrong code."""
        program, own = _cuda_program("ptxas"), self.origin.get("ptxas")
        said = run([program, "--version"], 10.0, WORK, "ptxas-version").output if program else ""
        version = next(iter(re.findall(r"release ([\d.]+)", said)), None)
        if program is None or version in (None, own):
            return Outcome(PASSED if self.dry else NOT_RUN, f"no ptxas was found but Triton's {own}")
        only = ["-k", "nearest_code or masked_linear or invertible_linear"]
        outcome = self.test(seconds, "ptxas", only, TRITON_PTXAS_PATH=program, TRITON_PTXAS_BLACKWELL_PATH=program)
        outcome.summary = f"{version} instead of {own}: {outcome.summary}"
        return outcome

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
        """Call every op, as compute-sanitizer will watch it."""
        every = ["--every", "4"] if self.dry else []
        ran = self.python(seconds, "smoke", "-m", "flowkern.bench.smoke", "--device", self.device, *every)
        status = ran.status() if FINISHED in ran.output or ran.code != 0 else FAILED
        return Outcome(status, ran.last_line(), log=ran.log())

    def sanitize(self, seconds: float, tool: str) -> Outcome:
        """The calls under one tool of compute-sanitizer, which needs a GPU."""
        if self.dry:
            return Outcome(PASSED, "left to a GPU")
        program = _cuda_program("compute-sanitizer")
        if program is None:
            return Outcome(NOT_RUN, "compute-sanitizer was not found")
        command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "flowkern.bench.smoke", "--every", "4"]
        # Without torch's cache each tensor is an allocation of its own, whose ends the tool knows.
        return _judge(run(command, seconds, self.library, tool, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def _cuda_program(name: str) -> str | None:
    """Where a program of the CUDA toolkit lies."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(folders))


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


def perform(check: Check, total: float = _TOTAL, record: Callable[[], object] = lambda: None) -> None:
    """Run the stages, one after the other, whatever becomes of each; without the library or a GPU there are no more.

    ``record()`` is called after each. An interrupt ends the stage, and is raised again.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + total
    print("seconds at most: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds, _ in check.stages()), flush=True)
    for name, seconds, stage in check.stages():
        start = time.monotonic()
        left = min(seconds, end - start)
        try:
            outcome = stage(left) if left >= 5.0 else Outcome(NOT_RUN, "the time was up")
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            outcome = Outcome(FAILED, f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            check.outcomes[name] = Outcome(NOT_RUN, "interrupted")
            record()
            raise
        outcome.seconds = round(time.monotonic() - start, 1)
        check.outcomes[name] = outcome
        record()
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
    parser.add_argument("--dry-run", action="store_true", help="the same on a CPU; writes nothing to bench/results")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the file goes (bench/results, of a dry run build/gpu-check)"
    )
    arguments = parser.parse_args(argv)
    if not (ROOT / "setup.py").exists():
        parser.error("run it from a checkout: it builds the library")
    check = Check(arguments.dry_run)

    def record() -> Path:
        # Without a GPU there is nothing to record.
        recorded = not check.dry and check.origin.get("cuda")
        folder = arguments.out or (RESULTS if recorded else WORK)
        path: Path = folder / (f"{slug(check.origin['device'])}.json" if recorded else "dry-run.json")
        write_atomically(path, json.dumps(document(check), indent=1) + "\n")
        return path

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a limit of the caller's ends it as an interrupt does
    try:
        perform(check, 10 * _TOTAL if arguments.dry_run else _TOTAL, record)
    except KeyboardInterrupt:
        print(f"interrupted; written: {record()}")
        return 130
    print(f"written: {record()}")
    return int(any(o.status in (FAILED, TIMED_OUT) for o in check.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
