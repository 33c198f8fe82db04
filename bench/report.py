"""Rows as a table for people, and as CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from .cases import CASES, Target
from .files import slug, write_atomically
from .measure import Row, verdict
from .timing import GPU_STATES

__all__ = ["COLUMNS", "HEADER", "describe", "line", "write_csv"]

COLUMNS = tuple(field.name for field in fields(Row))
_PAGES = {
    "fresh": "what is freed goes back to the system, and comes new and zeroed (the default)",
    "retained": "what is freed stays with the process (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ raised)",
    "cold": "inputs lie in device memory, the cache is cleared",
    "hot": "the same inputs again and again",
    "launched": "the same inputs again and again, without a CUDA graph, by the host's clock",
}
_LAYOUT = "{:<28}{:<18}{:<10}{:>10}  {:<24}{:>7}{:>9}{:>9}{:>10}  {}"
HEADER = _LAYOUT.format("case", "direction", "pages", "median", "quartiles", "% copy", "eager", "compile", "extra", "target")


def describe(row: Row) -> str:
    """The lines above a table: what, on what, and in which states."""
    versions = f"torch {row.torch}, triton {row.triton or 'none'}, flowkern {row.flowkern}, commit {row.commit}"
    gpu = row.pages in GPU_STATES
    states = "\n".join(f"{state}: {_PAGES[state]}" for state in (GPU_STATES if gpu else (row.pages,)))
    return f"{row.op} on {row.device}{'' if gpu else f', {row.threads} threads'}; {versions}\n{states}"


def line(row: Row) -> str:
    """A row of the fused op; without figures if its result was wrong."""
    if row.median_us is None or row.q1 is None or row.q3 is None:
        return f"{row.case:<28}{row.direction:<18}{row.pages:<10}  FAILED ({row.variant}): {row.failure}"
    return _LAYOUT.format(
        row.case,
        row.direction,
        row.pages,
        _duration(row.median_us),
        f"{_duration(row.q1)} .. {_duration(row.q3)}",
        "-" if row.percent_of_copy is None else f"{row.percent_of_copy:.0f}%",
        _times(row.vs_eager),
        _times(row.vs_compile),
        "-" if row.peak_extra_bytes is None else _bytes(row.peak_extra_bytes),
        verdict(row, _target(row)),
    )


def _target(row: Row) -> Target:
    return next(case for case in CASES[row.op] if case.name == row.case).target(row.direction, row.pages)


def _duration(microseconds: float) -> str:
    return f"{microseconds / 1000:.2f} ms" if microseconds >= 1000 else f"{microseconds:.2f} us"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _bytes(count: int) -> str:
    for unit, size in (("MB", 2**20), ("KB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def write_csv(folder: Path, rows: Iterable[Row]) -> list[Path]:
    """One file per op and device. A file that is there keeps the rows that were not measured again."""
    tables: dict[Path, dict[tuple[str, ...], dict[str, str]]] = {}
    for row in rows:
        path = folder / f"{row.op}-{slug(row.device)}.csv"
        table = tables.setdefault(path, _read(path))
        cells = {name: _cell(value) for name, value in asdict(row).items()}
        table[_key(cells)] = cells
    for path, table in tables.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())
        write_atomically(path, text.getvalue())
    return list(tables)


def _key(cells: dict[str, str]) -> tuple[str, ...]:
    return tuple(cells[name] for name in ("op", "case", "direction", "pages", "variant"))


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _read(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of a file by what they measure; none if it is not there or has other columns."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return {_key(cells): cells for cells in reader} if tuple(reader.fieldnames or ()) == COLUMNS else {}
