"""``table``: the models of this library side by side on one data set, every row a few seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from .. import models
from ..data import load
from ..nn.densities.base import check_sizes
from ._evaluate import importance_nlls
from ._pictures import atomic
from ._plan import Plan, differences, make_plan
from ._run import check_minutes, has_ended, run, trained_minutes

IMPORTANCE_SAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: what it is called, and the plan of its runs."""

    label: str
    model: str
    preset: str = "recipe"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def plan(self, data: str, seed: int) -> Plan:
        return make_plan(self.model, data, preset=self.preset, seed=seed, config=dict(self.config))


def _vae(label: str, latent: int, **config: Any) -> Row:
    return Row(f"VAE, L={latent}, {label}", "vae", config={"latent": latent, **config})


#: Rows by the name of their folder. Recipe: batches of 64, Adamax, lr 1e-3, until 20 epochs bring nothing.
ROWS: dict[str, Row] = {
    "realnvp": Row("RealNVP, eight couplings on raw pixels", "realnvp"),
    "realnvp-default": Row("RealNVP, multi-scale, logit, averaged weights", "realnvp", "default"),
    "dequantized": Row("RealNVP, multi-scale, variational dequantization", "dequantized", "default"),
    "maf": Row("MAF, eight layers, logit", "maf", "default"),
    "vae-16": _vae("standard prior", 16),
    "vae-16-iaf": _vae("standard prior, IAF posterior", 16, posterior="iaf"),
    "vae-16-planar": _vae("standard prior, planar posterior", 16, posterior="planar"),
    "vae-2": _vae("standard prior", 2),
    "vae-2-mixture": _vae("mixture of 16 Gaussians as prior", 2, prior="mixture"),
    "vae-2-vamp": _vae("VampPrior of 16", 2, prior="vamp"),
    "vae-2-realnvp": _vae("RealNVP prior", 2, prior="realnvp"),
    "vae-2-maf": _vae("MAF prior", 2, prior="maf"),
    "pixelcnn": Row("PixelCNN, categorical", "pixelcnn", "default"),
    "pixelvae": Row("VAE, L=8, PixelCNN decoder", "pixelvae", "default"),
    "made": Row("MADE, categorical", "made", "default"),
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """One row over its seeds, in nats per image: mean and standard deviation (None for a single seed).

    ``ended``: whether the runs ended by themselves, not by a limit on their time.
    """

    row: Row
    seeds: int
    ended: bool
    validation: tuple[float, float | None]
    test: tuple[float, float | None]
    importance: tuple[float, float | None]

    @classmethod
    def of(cls, row: Row, results: Sequence[Mapping[str, Any]]) -> Summary:
        def moments(name: str) -> tuple[float, float | None]:
            values = [result[name] for result in results]
            return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None

        # Results of before this was written down are of runs that had.
        ended = all(result.get("ended", True) for result in results)
        return cls(row, len(results), ended, moments("validation"), moments("test"), moments("importance"))

    @property
    def label(self) -> str:
        return self.row.label if self.ended else f"{self.row.label} *"


def table(data: str, out: Path, *, seeds: int = 5, rows: Sequence[str] | None = None, max_minutes: float | None = None) -> str:
    """Train every row of ``ROWS`` (or those named) with seeds 0, 1, ..., and return the table in Markdown.

    ``out`` gets a folder for each run, ``digits.md`` (the name of the data) and a plot beside it. A run that is finished is not
    done again, one that was cut off is resumed, and the table is written anew after each. ``max_minutes`` is for a single run:
    what has come by then enters the table with a star, and a call with more time or without a limit goes on from there.

    Raises ValueError for an unknown row, no seed, a limit that is no time, and for what in ``out`` is damaged or of another plan.
    """
    names = list(ROWS) if rows is None else list(rows)
    for name in names:
        if name not in ROWS:
            raise ValueError(f"rows: unknown name {name!r}; expected some of {', '.join(ROWS)}")
    check_sizes(seeds=seeds)
    check_minutes(max_minutes)
    summaries(data, out, seeds)  # refuses what cannot be continued, before hours of training
    columns = [SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(names) * seeds)
        for seed in range(seeds):
            for name in names:
                bar.update(task, description=f"{name}, seed {seed}")
                _result(ROWS[name], data, seed, out / name / str(seed), max_minutes)
                if not console.is_terminal:  # where no bar is shown
                    print(f"{name}, seed {seed}: done", file=sys.stderr, flush=True)
                bar.advance(task)
                text = _write(data, out, seeds)
    return text


def _result(row: Row, data: str, seed: int, out: Path, max_minutes: float | None) -> None:
    """Train, unless it is done, and write ``table.json``: validation, test bound and importance estimate, in nats.

    Beside them the plan, and whether training had ended by itself. A run without any validation yet leaves no such file.
    """
    plan, last = row.plan(data, seed), out / "last.ckpt"
    stored = _stored(out, plan)
    if stored is not None:
        over = stored.get("ended", True)
        if over or (max_minutes is not None and last.exists() and trained_minutes(last) >= max_minutes):
            return
    if last.exists():
        _check_plan(out, plan, models.read_checkpoint(last).get("plan"))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            score = run(plan, out, resume=True, max_minutes=max_minutes)
    except SystemExit as end:
        # Lightning ends the process when it is interrupted; the rows share one.
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    if score is None:
        return
    model = models.load(out / "best.ckpt")
    importance = importance_nlls(model, load(data), "test", draws=IMPORTANCE_SAMPLES, batch_size=512)
    best = models.read_checkpoint(last)["callbacks"]
    validation = next(state["best"] for name, state in best.items() if "best" in state)
    content = {
        "validation": float(validation),
        "test": score.nats,
        "importance": float(importance.mean()),
        "ended": has_ended(last, plan),
        "plan": dataclasses.asdict(plan),
    }
    with atomic(out / "table.json") as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def _stored(out: Path, plan: Plan) -> dict[str, Any] | None:
    """What ``table.json`` in ``out`` holds, or None if there is none.

    Raises ValueError for one that is damaged, and for one of another plan; older ones name none.
    """
    path = out / "table.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        for name in ("validation", "test", "importance"):
            float(content[name])
    except (ValueError, LookupError, TypeError) as error:
        what = f"{type(error).__name__} {error}"
        raise ValueError(f"{path}: not the result of a row ({what}); delete it, and it is made anew") from error
    if "plan" in content:
        _check_plan(out, plan, content["plan"])
    return content


def _check_plan(out: Path, plan: Plan, stored: Any) -> None:
    """Raises ValueError unless the run in ``out`` has this plan; fields that did not exist then have their defaults."""
    defaults = dataclasses.asdict(Plan(plan.model, plan.data))
    wanted, known = dataclasses.asdict(plan), defaults | (stored if isinstance(stored, dict) else {})
    if changed := differences(*(json.loads(json.dumps(fields)) for fields in (wanted, known))):
        raise ValueError(f"{out} holds a run of another plan: the row has {changed}; move it away, or name another folder")


def summaries(data: str, out: Path, seeds: int) -> list[Summary]:
    """What so many seeds have brought in ``out``, in the order of ``ROWS``. Raises ValueError as ``_stored`` does."""
    found = []
    for name, row in ROWS.items():
        stored = [_stored(out / name / str(seed), row.plan(data, seed)) for seed in range(seeds)]
        results = [result for result in stored if result is not None]
        if results:
            found.append(Summary.of(row, results))
    return found


def markdown(lines: Sequence[Summary]) -> str:
    """The table: nats per image, means over the seeds and their standard deviations."""

    def cell(moments: tuple[float, float | None]) -> str:
        mean, deviation = moments
        return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"

    head = ["| model | seeds | validation | test bound | importance estimate |", "|---|---|---|---|---|"]
    body = [
        f"| {line.label} | {line.seeds} | {cell(line.validation)} | {cell(line.test)} | {cell(line.importance)} |"
        for line in lines
    ]
    cut = "(*) stopped by --max-minutes before the training had ended; more of them, or none, go on from there"
    note = [] if all(line.ended for line in lines) else ["", cut]
    return "\n".join(head + body + note)


def _write(data: str, out: Path, seeds: int) -> str:
    lines = summaries(data, out, seeds)
    text = markdown(lines)
    name = data.partition(":")[0]
    with atomic(out / f"{name}.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    _draw(lines, out / f"{name}.png", name)
    return text


def _draw(lines: Sequence[Summary], path: Path, title: str) -> None:
    """The test bounds with their standard deviations, and the importance estimates, one line a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.32 * len(lines)), layout="constrained")
    axes = figure.subplots()
    places = range(len(lines))
    axes.errorbar([s.test[0] for s in lines], places, xerr=[s.test[1] or 0.0 for s in lines], fmt="o", label="test bound")
    axes.plot([s.importance[0] for s in lines], places, "|", markersize=12, label=f"{IMPORTANCE_SAMPLES} importance samples")
    axes.set_yticks(places, [s.label for s in lines])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    axes.set(xlabel="negative log-likelihood [nats per image]", title=title)
    axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
