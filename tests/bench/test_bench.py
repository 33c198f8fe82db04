"""The bench prints no figure for a wrong result, and gpu-check loses no stage's findings to another's failure."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flowkern.bench import gpu_check, worker
from flowkern.bench.__main__ import main
from flowkern.bench.baselines import BASELINES
from flowkern.bench.cases import BOTH, CASES, FORWARD, NEVER_SLOWER, Case, cases_of
from flowkern.bench.comparison import Options, WrongResult, check, poisoned
from flowkern.bench.memory import peak_extra_bytes
from flowkern.bench.row import COLUMNS, Row, Target, describe, line, read_csv, slug, verdict, write_atomically, write_csv
from flowkern.bench.subjects import ops
from torch._subclasses import FakeTensorMode

from flowkern import OPS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
DIRECTIONS = (FORWARD, BOTH)
HERE = ["--here", "--quick", "--device", "cpu", "--only", "4x8", "--compile", "none"]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure of a test is one to quote."""
    monkeypatch.setattr(Options, "seconds", lambda self, cpu=5.0: 0.001)


@pytest.mark.parametrize("name", CASES)
def test_every_op_has_cases_that_are_valid_calls(name: str) -> None:
    """The traffic of large ones without their memory; values of the small ones are held against float64 below."""
    for device in ("cpu", "cuda"):
        cases = cases_of(name, device)
        assert len({case.name for case in cases}) == len(cases)
        assert {case.small for case in cases} == {True, False}
    assert CASES.keys() == BASELINES.keys() == OPS.keys()
    for case in CASES[name]:
        if case.traffic is not None:
            with FakeTensorMode():
                args = case.inputs(lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype))
                assert all(b >= 0 for b in case.traffic(*args))


def test_what_a_coupling_must_move() -> None:
    """Per transformed value of 4 bytes: 6 values forward, 8 backward; an additive one 5, and views as gradients."""
    for name, forward, backward in (("affine_coupling", 6, 8), ("additive_coupling", 5, 0)):
        case = next(iter(CASES[name]))
        args = case.inputs(lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))
        transformed = args[0].numel() // 2
        assert case.traffic(*args) == (4 * forward * transformed, 4 * backward * transformed)


@pytest.mark.parametrize("name", ["affine_coupling", "additive_coupling"])
def test_targets(name: str) -> None:
    main_case, *_, last = cases_of(name, "cpu")
    assert main_case.name == "32x96x64x64"
    assert main_case.target(BOTH, "retained") == Target(3.5, 1.5, 100.0)
    assert main_case.target(BOTH, "fresh") == NEVER_SLOWER
    for direction in DIRECTIONS:
        assert all(last.target(direction, pages) == NEVER_SLOWER for pages in ("fresh", "retained", "cold", "hot", "launched"))


def example_row(**values: Any) -> Row:
    where = {"subject": "affine_coupling", "case": "32x96x64x64", "direction": BOTH, "pages": "retained", "variant": "flowkern"}
    figures = {"median_us": 2.0, "q1": 1.0, "q3": 3.0, "percent_of_copy": 99.0, "peak_extra_bytes": 0, "threads": 1}
    ratios = {"ratio": 3.6, "against": "eager", "vs_compile": None, "failure": ""}
    versions = {"device": "A CPU(R)", "torch": "1", "triton": "2", "flowkern": "3", "commit": "4"}
    return Row(**where | figures | ratios | versions | values)


def test_a_missed_target_is_named() -> None:
    expected = ">= 3.5x eager, 1.5x compile, 100% of copy: MISSED 100% of copy; not measured 1.5x compile"
    assert verdict(example_row(), Target(3.5, 1.5, 100.0)) == expected
    assert verdict(example_row(ratio=1.0), Target(3.5)) == ">= 3.5x eager: MISSED 3.5x eager"
    assert verdict(example_row(), NEVER_SLOWER) == ">= 1x eager: reached"
    for pages in ("retained", "fresh", "cold", "hot", "launched"):
        assert line(example_row(pages=pages)).startswith("32x96x64x64")
        assert f"{pages}: " in describe(example_row(pages=pages))


# ---------------------------------------------------------------------------------------------------------------------
# Wrong results


def altered(function: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its results changed."""
    return lambda *args, **kwargs: change(*function(*args, **kwargs))


def slightly_off(y: torch.Tensor, logabsdet: torch.Tensor) -> Any:
    return y * (1 + 1e-5), logabsdet


def one_value_unwritten(y: torch.Tensor, logabsdet: torch.Tensor) -> Any:
    whole = torch.empty_like(y)
    whole[:-1] = y[:-1]
    whole[-1, 1:] = y[-1, 1:]
    return whole, logabsdet


@pytest.mark.parametrize(
    ("wrong", "directions", "says"),
    [
        (slightly_off, DIRECTIONS, "result 0: error"),
        (lambda y, logabsdet: (y + 1e-5 * (y - y.detach()), logabsdet), [BOTH], "result 2: error"),  # its gradient alone
        (one_value_unwritten, DIRECTIONS, "result 0: error nan"),
        (lambda y, logabsdet: (y, logabsdet[:, None]), [FORWARD], "shapes"),
        (lambda y, logabsdet: {}["something within"], DIRECTIONS, "KeyError: 'something within'"),
    ],
)
def test_a_wrong_result_has_no_figure(
    wrong: Any, directions: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    op = OPS["affine_coupling"]
    monkeypatch.setitem(OPS, op.name, dataclasses.replace(op, function=altered(op.function, wrong)))
    assert main([op.name, *HERE, "--csv", str(tmp_path)]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("4x8")]
    by_direction = {words[1]: " ".join(words) for words in lines if words[3] == "flowkern"}
    for direction in directions:
        assert "flowkern FAILED: " in by_direction[direction]
        assert says in by_direction[direction]
        assert " us" not in by_direction[direction]
    (path,) = tmp_path.iterdir()
    for cells in read_csv(path):
        failed = cells["variant"] == "flowkern" and cells["direction"] in by_direction and cells["failure"]
        assert (cells["median_us"] == "") == bool(failed)
        assert not (cells["ratio"] and failed)


def test_a_wrong_baseline_has_no_figures(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    right = BASELINES["additive_coupling"]
    monkeypatch.setitem(BASELINES, "additive_coupling", lambda *args, **kwargs: altered(right(*args, **kwargs), slightly_off))
    assert main(["additive_coupling", *HERE]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("eager FAILED: result 0") == out.count("flowkern FAILED: the plain code") == 2
    assert " us" not in out


def test_poison_reaches_every_allocation() -> None:
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_check_grants_rounding_alone() -> None:
    exact = (torch.linspace(0, 1, 100, dtype=torch.float64) / 3,)
    rounded = (exact[0].float(),)
    allowed = check(rounded, exact)
    check(rounded, exact, allowed)
    with pytest.raises(WrongResult, match="result 0: error"):
        check((rounded[0] + 1e-6,), exact, allowed)
    with pytest.raises(WrongResult, match="result 0: error nan"):
        check((rounded[0].log() * 0,), exact, allowed)
    with pytest.raises(WrongResult, match="shapes"):
        check((rounded[0][:-1],), exact, allowed)
    with pytest.raises(WrongResult, match="result 0: error"):
        check((rounded[0] + 1e-4,), exact)


# ---------------------------------------------------------------------------------------------------------------------
# Right ones


SMALL = [(name, case, way) for name in CASES for case in cases_of(name, "cpu") if case.small for way in case.directions]


@pytest.mark.parametrize(
    ("name", "case", "direction"),
    [pytest.param(*each, id="-".join(map(str, (each[0], each[1].name, each[2])))) for each in SMALL],
)
def test_baselines_and_ops_are_held_against_float64(name: str, case: Case, direction: str) -> None:
    compared = ops.compared(name, case, direction, Options(compile="none"))
    assert list(compared.calls) == ["eager", "flowkern"]
    for variant, call in compared.calls.items():
        assert compared.check(variant, call) == ""
    problem = ops.Problem(OPS[name], case, direction, CPU)
    results, exact = problem.checked(OPS[name].function)(), problem.exact()
    leaves = [a for a in torch.utils._pytree.tree_leaves(problem.args) if isinstance(a, torch.Tensor) and a.requires_grad]
    assert bool(leaves) == (direction == BOTH)
    assert [r.shape for r in results] == [e.shape for e in exact]
    assert all(e.dtype is torch.float64 for e in exact if e.is_floating_point())
    assert any(r.requires_grad for r in results) == (direction == BOTH)
    problem.poison(results)
    assert all(a.isfinite().all() for a in (*leaves, *problem.gradients))


def test_peak_extra_bytes_counts_what_is_held_beside_the_results() -> None:
    x = torch.ones(1000)
    assert peak_extra_bytes(lambda: (x.neg(),), CPU) == 0
    assert peak_extra_bytes(lambda: (x.neg().exp(),), CPU) == 4000
    assert peak_extra_bytes(lambda: (x[:10],), CPU) == 0


@pytest.mark.slow
def test_compile_is_measured_beside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    arguments = ["additive_coupling", *HERE[:-2], "--compile", "all", "--csv", str(tmp_path)]
    assert main(arguments) == 0
    (path,) = tmp_path.iterdir()
    rows = {(r["direction"], r["variant"]): r for r in read_csv(path)}
    assert {variant for _, variant in rows} == {"flowkern", "eager", "compile", "copy"}
    for direction in DIRECTIONS:
        eager, fused = rows[direction, "eager"], rows[direction, "flowkern"]
        assert eager["ratio"] == rows[direction, "compile"]["vs_compile"] == "1"
        assert float(fused["ratio"]) == pytest.approx(float(eager["median_us"]) / float(fused["median_us"]), rel=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the variables are those of the GNU C library")
def test_both_states_of_pages_are_measured_and_recorded(capsys: Any, tmp_path: Path) -> None:
    assert main(["affine_coupling", *HERE[1:], "--threads", "1", "--pages", "both", "--csv", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.index("fresh: ") < out.index("retained: ")
    assert out.count(">= 1x eager: ") == 4
    (path,) = tmp_path.iterdir()
    rows = read_csv(path)
    assert tuple(rows[0]) == COLUMNS
    assert {row["pages"] for row in rows} == {"fresh", "retained"}
    assert len(rows) == 2 * 2 * 3
    for row in rows:
        assert 0 < float(row["q1"]) <= float(row["median_us"]) <= float(row["q3"])
        assert row["threads"] == "1"
        assert row["torch"] == torch.__version__
        assert row["device"]
        assert row["commit"]


@pytest.mark.slow
def test_pages_other_than_asked_for_are_refused(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(worker, "environment", lambda options: dict(os.environ))
    for name in worker._MALLOC:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="ended with code 1"):
        list(worker.run_in_worker(Options(("affine_coupling",), pages="retained", only="4x8", compile="none")))
    assert "asked for retained" in capfd.readouterr().err


def test_csv_keeps_what_was_not_measured_again(tmp_path: Path) -> None:
    write_csv(tmp_path, [example_row(), example_row(pages="fresh")])
    (path,) = write_csv(tmp_path, [example_row(median_us=None, failure='wrong, "very"')])
    assert path.name == "affine_coupling-a-cpu.csv"
    rows = read_csv(path)
    assert [(row["pages"], row["median_us"], row["failure"]) for row in rows] == [
        ("retained", "", 'wrong, "very"'),
        ("fresh", "2", ""),
    ]


def test_a_file_is_whole_or_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, "before")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "after")
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]
    assert slug("Intel(R) Xeon(R) Gold 6430") == "intel-xeon-gold-6430"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "unknown subject no_such_op"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--here", "--device", "cpu", "--only", "no such case"], "no case matches"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# gpu-check


@pytest.mark.slow
def test_gpu_check_dry_run() -> None:
    results = ROOT / "bench" / "results"
    before = sorted(results.glob("*")) if results.exists() else None
    command = [sys.executable, "-m", "bench.gpu_check", "--dry-run"]
    # Compiled quickly: this is no place for figures.
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "CXXFLAGS": "-O0"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (sorted(results.glob("*")) if results.exists() else None) == before
    document = json.loads((gpu_check.WORK / "dry-run.json").read_text())
    assert {stage["status"] for stage in document["stages"].values()} == {"passed"}
    assert list(document["stages"]) == [
        *("build", "origin", "smoke", "tests", "networks", "likelihood", "ptxas", "bench", "memcheck", "racecheck")
    ]
    assert {row["subject"] for row in document["rows"]} == {*CASES, "networks", "likelihood"}
    assert document["torch"] == torch.__version__
    assert str(ROOT) not in json.dumps(document)


def test_the_stages_fit_into_the_time() -> None:
    assert sum(seconds for _, seconds, _ in gpu_check.Check(dry=False).stages()) == gpu_check._TOTAL


class Fragile(gpu_check.Check):
    """Stages that go wrong in every way."""

    def stages(self) -> Any:
        def out_of_memory(seconds: float) -> gpu_check.Outcome:
            raise OSError("cannot allocate memory")

        def sleep(seconds: float) -> gpu_check.Outcome:
            program = "import time; print('before', flush=True); time.sleep(60)"
            ran = gpu_check.run([sys.executable, "-c", program], 2.0, gpu_check.WORK, "sleep")
            return gpu_check.Outcome(ran.status(), ran.last_line(), log=ran.log())

        def fine(seconds: float) -> gpu_check.Outcome:
            self.rows = [{"subject": "x"}]
            return gpu_check.Outcome("passed", "1 row")

        return [("raises", 10.0, out_of_memory), ("sleeps", 10.0, sleep), ("fine", 10.0, fine)]


def test_a_stage_that_fails_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor does one for which no time is left run."""
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    fragile = Fragile(dry=True)
    gpu_check.perform(fragile)
    document = gpu_check.document(fragile)
    found = {name: stage["status"] for name, stage in document["stages"].items()}
    assert found == {"raises": "failed", "sleeps": "timed out", "fine": "passed"}
    assert document["stages"]["sleeps"]["log"].startswith("before\n")
    assert document["rows"] == [{"subject": "x"}]
    fragile = Fragile(dry=True)
    gpu_check.perform(fragile, total=1.0)
    assert {o.status for o in fragile.outcomes.values()} == {"did not run"}


def test_an_interrupt_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    class Interrupted(gpu_check.Check):
        def stages(self) -> Any:
            def interrupted(seconds: float) -> gpu_check.Outcome:
                raise KeyboardInterrupt

            return [("fine", 10.0, lambda seconds: gpu_check.Outcome("passed", "1 row")), ("ends", 10.0, interrupted)]

    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_check, "Check", Interrupted)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path / "out")]) == 130
    document = json.loads((tmp_path / "out" / "dry-run.json").read_text())
    assert {name: stage["summary"] for name, stage in document["stages"].items()} == {"fine": "1 row", "ends": "interrupted"}
    assert "seconds at most: fine 10, ends 10" in capsys.readouterr().out


def test_a_command_whose_time_is_up_may_still_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    program = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('reported', flush=True)"
    ran = gpu_check.run([sys.executable, "-I", "-S", "-c", program], 5.0, tmp_path, "sleep")  # it starts within
    assert (ran.code, ran.output) == (None, "reported\n")


ENDED = f"{gpu_check.STARTED}\n{gpu_check.FINISHED} (9)\n"


@pytest.mark.parametrize(
    ("code", "output", "status"),
    [
        (0, f"{ENDED}========= ERROR SUMMARY: 0 errors\n", "passed"),
        (0, f"{ENDED}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "passed"),
        (1, f"{ENDED}========= ERROR SUMMARY: 2 errors\n", "failed"),
        (0, ENDED, "failed"),
        (1, f"{gpu_check.STARTED}\nTraceback\n========= ERROR SUMMARY: 0 errors\n", "failed"),
        (1, "========= Error: Device not supported\n========= ERROR SUMMARY: 1 error\n", "did not run"),
        (0, "========= ERROR SUMMARY: 0 errors\n", "did not run"),
        (None, f"{gpu_check.STARTED}\n", "timed out"),
    ],
)
def test_a_sanitizer_that_saw_nothing_run_has_not_passed(code: int | None, output: str, status: str) -> None:
    assert gpu_check._judge(gpu_check.Ran(code, output)).status == status


def test_rows_survive_a_torn_line() -> None:
    good = json.dumps({"subject": "a", "case": "b"})
    assert gpu_check._rows(f"a warning\n{good}\nnoise {good}\n{good[:7]}") == [json.loads(good)] * 2


def test_counts_of_the_tests(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text("def test_a(): pass\ndef test_b(): assert 0\ndef test_d(no): pass\n")
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "test_three.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    expected = {"tests": 3, "failures": 1, "errors": 1, "skipped": 0, "failed": ["test_b", "test_d"]}
    assert gpu_check._tests(report) == expected
    assert gpu_check._tests(tmp_path / "none.xml") == {}


@pytest.mark.slow
def test_small_cases_under_pytest_benchmark(tmp_path: Path) -> None:
    quickly = ["--benchmark-max-time=0.001", "--benchmark-min-rounds=1", "--benchmark-warmup=off", "-k", "4x8 and coupling"]
    storage = f"--benchmark-storage=file://{tmp_path}"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "bench", "--benchmark-only", *quickly, storage]
    # Where this suite is shared out among processes, pytest-benchmark would measure nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "8 passed" in ran.stdout


def test_a_case_may_be_the_only_one_of_a_device() -> None:
    case = Case("x", lambda draw: (draw(1, 2),), lambda x: (8.0, 0.0), devices=("cuda",))
    assert case.target(FORWARD, "cold") == NEVER_SLOWER
    assert all("cuda" in c.devices for name in CASES for c in cases_of(name, "cuda"))
