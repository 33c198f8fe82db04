"""Every subject of the bench runs, compares before it times, and finds what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flowkern.bench import comparison
from flowkern.bench.__main__ import main
from flowkern.bench.comparison import Options, off_by, peer, peers_of
from flowkern.bench.row import read_csv
from flowkern.bench.subjects import code_search, depth, install, likelihood, roundtrip, vector_quantizer
from flowkern.bench.worker import FILES

from flowkern import OPS, ops
from flowkern._core import backend

CPP = {"flowkern-cpp"} if backend.native is not None else set()
#: What each subject must measure, beside what depends on the machine; and the packages that it needs for all of that.
EXPECTED: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "autoregressive": ({"dense", "flowkern-density", "flowkern-torch", "nflows", "zuko", *CPP}, ("nflows", "zuko")),
    "code_search": ({"GEMM", "flowkern-torch"}, ()),
    "depth": ({"flowkern-store", "flowkern-reversible"}, ()),
    "glow": ({"conv2d", "nflows", "normflows", "flowkern-plu", "flowkern-reversible-bf16"}, ("nflows", "normflows")),
    "likelihood": ({"published", "eager", "flowkern", "flowkern-compat"}, ()),
    "networks": ({"dense", "torch"}, ()),
    "vector_quantizer": ({"gemm", "flowkern-torch"}, ()),
}
#: Those that give no rows of interleaved calls.
OTHERS = {"install", "roundtrip"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No figure of a test is one to quote; warnings are the peers'."""
    monkeypatch.setattr(Options, "seconds", lambda self, cpu=5.0: 0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def measured(subject: str, folder: Path) -> list[dict[str, str]]:
    """The rows of its file, of a quick run."""
    assert main([subject, "--quick", "--here", "--device", "cpu", "--csv", str(folder)]) == 0
    (path,) = folder.glob("*.csv")
    assert path.name.startswith(f"{subject}-")
    return read_csv(path)


@pytest.mark.slow
@pytest.mark.parametrize("subject", EXPECTED)
def test_a_subject_compares_and_times(subject: str, tmp_path: Path) -> None:
    variants, packages = EXPECTED[subject]
    for package in packages:
        pytest.importorskip(package)
    rows = measured(subject, tmp_path)
    assert {row["variant"] for row in rows} >= variants
    assert all(float(row["median_us"]) > 0 and not row["failure"] for row in rows)
    pictures = [path.read_bytes()[:4] for path in tmp_path.glob("*.png")]
    assert pictures == ([b"\x89PNG"] if subject in ("autoregressive", "depth") else [])
    if subject == "autoregressive":
        by_direction = {
            way: {row["variant"] for row in rows if row["direction"] == way} for way in {r["direction"] for r in rows}
        }
        densities, inverses = {"dense", "flowkern-density", "nflows", "zuko"}, {"dense", "flowkern-torch", *CPP}
        assert by_direction == {
            "density": densities,
            "density forward+backward": densities,
            "inverse": {*inverses, "nflows", "zuko"},
            "inverse+backward": {*inverses, "flowkern-density"},
        }
    if subject == "depth":
        ours = [(row["case"].split("-")[1], row["variant"]) for row in rows if row["variant"].startswith("flowkern")]
        assert ours == [(f"2x{steps}", f"flowkern-{memory}") for steps in (1, 2) for memory in ("store", "reversible")]
        assert all(float(row["peak_extra_bytes"]) > 0 for row in rows)
    if subject == "likelihood":
        assert {row["case"].split("-")[0] for row in rows} == {"mixture", "kl", "dequantize"}


def test_every_file_is_a_subject_of_these_tests() -> None:
    assert {*FILES} == {*EXPECTED, *OTHERS}


def test_roundtrip_prints_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roundtrip", "--quick", "--here"]) == 0
    assert "inverse(forward(x))" in capsys.readouterr().out


def test_an_install_is_a_figure_or_says_what_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "_installed", lambda folder, kernels: ("", 2.5))
    (row,) = measured("install", tmp_path)
    assert (row["variant"], row["median_us"]) == ("without-kernels", "2.5e+06")
    monkeypatch.setattr(install, "_installed", lambda folder, kernels: ("no compiler", 0.0))
    assert main(["install", "--quick", "--here"]) == 1


def test_a_missing_peer_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    peer("some subject", "no-such-package")(lambda: None)
    peer("some subject", "torch")(len)
    assert peers_of("some subject") == {"torch": len}
    assert "no-such-package is not installed" in capsys.readouterr().err


def test_only_takes_patterns_of_cases_and_directions() -> None:
    options = Options(only="1x2,*-bf16*,inverse")
    assert options.wants("1x2", "forward")
    assert options.wants("4x8-bf16-params", "forward")
    assert options.wants("4x8", "inverse")
    assert not options.wants("11x2", "forward")


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong is found


def altered(function: Any, output: int, change: Any) -> Any:
    """The op with one output changed."""

    def run(*args: Any, **kwargs: Any) -> Any:
        results = function(*args, **kwargs)
        if isinstance(results, torch.Tensor):
            return change(results)
        return tuple(change(y) if i == output else y for i, y in enumerate(results))

    return run


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize(
    ("name", "cases"), [("discretized_logistic_mixture", "mixture"), ("gaussian_kl", "kl"), ("dequantize", "dequantize")]
)
def test_likelihoods_that_are_wrong_have_no_figure(name: str, cases: str, output: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values a little off, or gradients alone: then no figure is given, and that of plain code still is."""
    right = getattr(ops, name)
    changes = [lambda y: 1.001 * y, lambda y: 1.001 * y - 0.001 * y.detach()]
    monkeypatch.setattr(comparison, "cpu_samples", lambda calls, seconds: {variant: [1.0, 1.0] for variant in calls})
    options = Options(quick=True, only=f"{cases}-*")
    for change in changes[: 1 if name == "dequantize" else 2]:
        monkeypatch.setattr(ops, name, altered(right, output, change))
        origin = dict.fromkeys(("device", "torch", "triton", "flowkern", "commit"), "")
        found = [row for c in likelihood.comparisons(options) for row in comparison.measure("likelihood", c, options, origin)]
        fused = [row for row in found if row.variant == "flowkern"]
        assert any(row.failure.startswith("off by") for row in fused)
        assert all((row.median_us is None) == bool(row.failure) for row in fused)
        assert all(row.median_us for row in found if row.variant in ("eager", "published"))
    assert off_by((torch.ones(2),), (torch.tensor([1.0, 1.001]),)).startswith("off by")


def test_another_index_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_search, "QUICK", ((40, 300, 16),))
    wrong = {"flowkern-torch": lambda x, codebook: torch.zeros(len(x)).long()}
    monkeypatch.setattr(code_search, "searches", lambda: wrong)
    assert main(["code_search", "--quick", "--here", "--device", "cpu"]) == 1


def test_another_codebook_is_a_difference() -> None:
    subjects = vector_quantizer.Subjects(20, 8, 4)
    right, wrong = (subjects.ours("torch") for _ in range(2))
    assert vector_quantizer.differences(subjects, {"right": right, "same": subjects.ours("torch")}) == {"right": "", "same": ""}
    wrong[1]().add_(0.01)
    right = subjects.ours("torch")
    assert "step 0: " in vector_quantizer.differences(subjects, {"right": right, "wrong": wrong})["wrong"]


def test_wrong_gradients_of_a_deep_flow_are_refused() -> None:
    x, models, _ = depth.variants(depth.Architecture(levels=1, steps=2, hidden=4, side=4, batch=2))
    assert depth.disagreement(models[depth.STORE], models[depth.REVERSIBLE], x) == ""
    with torch.no_grad():
        next(models[depth.REVERSIBLE].parameters()).add_(0.01)
    assert "the gradient differs by" in depth.disagreement(models[depth.STORE], models[depth.REVERSIBLE], x)


def test_round_trip_in_float32_with_trained_weights() -> None:
    for result in roundtrip.measured(side=8, hidden=(64, 64), steps=20, samples=50):
        assert result.error <= 1e-4
        assert result.in_float64 <= 1e-12
        assert result.limit <= result.error


def test_published_code_is_what_the_op_reproduces() -> None:
    """The bench's own "published" is that of the tests of the op: both import it from the bench."""
    torch.manual_seed(0)
    x, params = torch.randint(256, (2, 3, 2, 2)), torch.randn(2, 20, 2, 2, dtype=torch.float64)
    expected = OPS["discretized_logistic_mixture"].function(x, params, compat="pixelcnn++")
    torch.testing.assert_close(likelihood.published(x, params), expected)
