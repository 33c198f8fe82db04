"""``python -m bench [SUBJECT ...]``: how fast and how small the ops, layers and models are, beside plain code and the peers.

A figure is printed only for a result that was just compared with float64, or with the peer's, in the same process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .cases import CASES
from .comparison import FLOWKERN, Options
from .docs import write_docs
from .row import Row, describe, line, slug, write_csv
from .timing import pages_here
from .worker import FILES, module_of, run, run_in_worker

__all__ = ["main"]

_EPILOG = f"""
Subjects: ops (all of them), {", ".join((*CASES, *FILES))}.
Each line has the median and the quartiles of many samples (all variants are sampled in turn), how many times faster it is than
plain torch code or what it is compared with, than torch.compile of that, its speed in percent of dst.copy_(src) of as many bytes,
and the most memory that it holds at a time above inputs and results.
pages: on a CPU whether freed memory stays with the process, on a GPU where the inputs lie (each table says it).
The exit code is 1 if a result was wrong (its line says FAILED); a missed target is no error.
"""
RESULTS = Path("bench/results")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if a result was wrong or could not be had."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.docs:
        print(f"written: {', '.join(map(str, write_docs()))}")
        return 0
    subjects = [name for given in arguments.subject for name in (CASES if given == "ops" else (given,))]
    if unknown := [name for name in subjects if name not in (*CASES, *FILES)]:
        parser.error(f"unknown subject {', '.join(unknown)}; expected ops, {', '.join((*CASES, *FILES))}")
    if arguments.threads < 1:
        parser.error(f"--threads: expected at least 1, got {arguments.threads}")
    if os.getloadavg()[0] > (os.cpu_count() or 1) / 2:
        print("other programs keep this machine busy: these figures are not to be quoted", file=sys.stderr)
    rows: list[Row] = []
    failed = False
    for options in _plans(arguments, tuple(subjects)):
        try:
            rows.extend(_printed(run(options) if arguments.here else run_in_worker(options)))
        except RuntimeError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            failed = True
    if not rows and not failed and arguments.only != "*":
        parser.error(f"--only {arguments.only}: no case matches")
    if arguments.csv is not None:
        for path in (*write_csv(arguments.csv, rows), *_pictures(rows, arguments.csv)):
            print(f"written: {path}")
    return int(failed or any(row.failure for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", nargs="*", default=["ops"], help="what to measure (all ops); the list is below")
    parser.add_argument("--quick", action="store_true", help="few samples and small sizes: to see that it works, not to quote")
    parser.add_argument(
        "--only", "--case", default="*", metavar="PATTERN", help="cases or directions that match, such as '*-bf16-*,1x2'"
    )
    parser.add_argument(
        "--pages", choices=("fresh", "retained", "both"), help="on a CPU: whether freed memory stays (ops: both, others: fresh)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (%(default)s)")
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu", help="(%(default)s)")
    parser.add_argument(
        "--compile", choices=("all", "large", "none"), default="all", help="cases for which torch.compile is measured too (all)"
    )
    parser.add_argument(
        "--csv",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="DIR",
        help="write SUBJECT-DEVICE.csv there (bench/results if no folder is named; without this option nothing is written)",
    )
    parser.add_argument("--here", action="store_true", help="measure in this process as it is, under a profiler for example")
    parser.add_argument(
        "--docs", action="store_true", help="measure nothing: write the tables of docs and README from the CSV files"
    )
    return parser


def _plans(arguments: argparse.Namespace, subjects: tuple[str, ...]) -> Iterator[Options]:
    """What to measure, by process: for each state of the pages those subjects that are measured in it."""
    options = Options(subjects, arguments.device, "cold", arguments.threads, arguments.quick, arguments.compile, arguments.only)
    if arguments.here or arguments.device == "cuda":
        yield options if arguments.device == "cuda" else replace(options, pages=pages_here())
        return
    for state in ("fresh", "retained"):
        if arguments.pages is None:
            chosen = tuple(name for name in subjects if state in getattr(module_of(name), "PAGES", ("fresh",)))
        else:
            chosen = subjects if arguments.pages in (state, "both") else ()
        if chosen:
            yield replace(options, subjects=chosen, pages=state)


def _printed(items: Iterator[Row | str]) -> Iterator[Row]:
    """The rows, printed as they come."""
    table = None
    for item in items:
        if isinstance(item, str):
            print(item, flush=True)
            continue
        if (item.subject, item.pages) != table:
            table = item.subject, item.pages
            print(describe(item))
        target = None  # what a fused op is to reach in this case
        if item.variant == FLOWKERN and item.subject in CASES:
            target = next(case for case in CASES[item.subject] if case.name == item.case).target(item.direction, item.pages)
        print(line(item, target), flush=True)
        yield item


def _pictures(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """Those of the subjects that draw one of their rows."""
    for name in dict.fromkeys(row.subject for row in rows):
        draw = getattr(module_of(name), "draw", None)
        own = [row for row in rows if row.subject == name and not row.failure]
        if draw is not None and own:
            path = folder / f"{name}-{slug(own[0].device)}.png"
            draw(own, f"{own[0].device}, {own[0].threads} threads", path)
            yield path


if __name__ == "__main__":
    sys.exit(main())
