"""A figure with where it comes from: as a line for people, as one of JSON, in the CSV files of ``bench/results``, and drawn."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["Row", "describe", "duration", "line", "plot", "read_csv", "size", "slug", "write_atomically", "write_csv"]


@dataclass(frozen=True)
class Row:
    """The time of one variant; ``failure`` says why there is none. The fields are the columns of the CSV files."""

    subject: str
    case: str
    direction: str
    pages: str
    variant: str
    median_us: float | None
    q1: float | None
    q3: float | None
    ratio: float | None  # the time of the variant named in ``against`` over this one's
    against: str
    vs_compile: float | None  # that of torch.compile of the plain code over this one's
    percent_of_copy: float | None  # that of a copy of as many bytes over this one's
    peak_extra_bytes: int | None  # the most memory held at a time, above inputs and results
    failure: str
    threads: int
    device: str
    torch: str
    triton: str
    flowkern: str
    commit: str


COLUMNS = tuple(field.name for field in fields(Row))

_PAGES = {
    "fresh": "what is freed goes back to the system, and comes new and zeroed (the default)",
    "retained": "what is freed stays with the process (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ raised)",
    "cold": "inputs lie in device memory, the cache is cleared",
    "hot": "the same inputs again and again",
    "launched": "the same inputs again and again, without a CUDA graph, by the host's clock",
}


@dataclass(frozen=True)
class Target:
    """Ratios to reach: times faster than eager, than torch.compile, and the speed of a copy in percent."""

    vs_eager: float | None = None
    vs_compile: float | None = None
    percent_of_copy: float | None = None


def verdict(row: Row, target: Target) -> str:
    """The target of a row of a fused op, whose ratio is to eager code, and whether it is reached."""
    wanted = (
        (target.vs_eager, row.ratio, "{:g}x eager"),
        (target.vs_compile, row.vs_compile, "{:g}x compile"),
        (target.percent_of_copy, row.percent_of_copy, "{:g}% of copy"),
    )
    parts = [(text.format(least), least, got) for least, got, text in wanted if least is not None]
    missed = [text for text, least, got in parts if got is not None and got < least]
    unknown = [text for text, _, got in parts if got is None]
    found = [f"MISSED {', '.join(missed)}"] if missed else []
    found += [f"not measured {', '.join(unknown)}"] if unknown else []
    return f">= {', '.join(text for text, _, _ in parts)}: {'; '.join(found) or 'reached'}"


def describe(row: Row) -> str:
    """The lines above a table: what, on what, and in which state."""
    versions = f"torch {row.torch}, triton {row.triton or 'none'}, flowkern {row.flowkern}, commit {row.commit}"
    return f"\n{row.subject} on {row.device}, {row.threads} threads; {versions}\n{row.pages}: {_PAGES[row.pages]}"


def line(row: Row, target: Target | None = None) -> str:
    """A row for people; without figures if its result was wrong."""
    head = f"{row.case:<34} {row.direction:<24} {row.pages:<9} {row.variant:<24}"
    if row.median_us is None or row.q1 is None or row.q3 is None:
        return f"{head} FAILED: {row.failure}"
    cells = [f"{duration(row.median_us):>10}  {duration(row.q1)} .. {duration(row.q3)}"]
    cells += [] if row.ratio is None or row.against == row.variant else [f"{row.ratio:.2f}x {row.against}"]
    cells += [] if row.vs_compile is None or row.variant == "compile" else [f"{row.vs_compile:.2f}x compile"]
    cells += [] if row.percent_of_copy is None or row.variant == "copy" else [f"{row.percent_of_copy:.0f}% of copy"]
    cells += [] if row.peak_extra_bytes is None else [size(row.peak_extra_bytes)]
    cells += [] if target is None else [verdict(row, target)]
    return f"{head} {'  '.join(cells)}"


def duration(microseconds: float) -> str:
    """A time with three digits in a unit that suits it."""
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= factor:
            return f"{microseconds / factor:.3g} {unit}"
    return f"{microseconds:.3g} us"


def size(count: float) -> str:
    """A number of bytes in a unit that suits it."""
    for unit, factor in (("MB", 2**20), ("KB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def write_csv(folder: Path, rows: Iterable[Row]) -> list[Path]:
    """One file per subject and device. A file that is there keeps the rows that were not measured again."""
    tables: dict[Path, dict[tuple[str, ...], Mapping[str, str]]] = {}
    for row in rows:
        path = folder / f"{row.subject}-{slug(row.device)}.csv"
        table = tables.setdefault(path, {_key(cells): cells for cells in read_csv(path)})
        values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in asdict(row).items()}
        cells = {name: "" if value is None else str(value) for name, value in values.items()}
        table[_key(cells)] = cells
    for path, table in tables.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())
        write_atomically(path, text.getvalue())
    return list(tables)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none if it is not there or has other columns."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return list(reader) if tuple(reader.fieldnames or ()) == COLUMNS else []


def _key(cells: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(cells[name] for name in ("subject", "case", "direction", "pages", "variant"))


def plot(
    path: Path,
    title: str,
    x: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    log: bool = False,
    dashed: Sequence[str] = (),
) -> None:
    """Draw lines against a size into a PNG file: one panel for each quantity, with a line for each label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4.0 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (quantity, lines) in zip(axes, panels.items(), strict=True):
        for label, points in lines.items():
            if points:
                xs, ys = zip(*sorted(points), strict=True)
                axis.plot(xs, ys, marker="o", label=label, linestyle="--" if label in dashed else "-")
        axis.set(xlabel=x, ylabel=quantity)
        axis.set(xscale="log", yscale="log") if log else axis.set(ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def slug(name: str) -> str:
    """The name of a device as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def write_atomically(path: Path, text: str) -> None:
    """Write beside the final name, sync, then rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
