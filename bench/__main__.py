"""``python -m bench``: how fast and how small each op is, against eager code, torch.compile and a copy.

A figure is printed only for a result that was just compared with float64 in the same process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .cases import CASES
from .measure import FUSED, Options, Row, measure
from .report import HEADER, describe, line, write_csv
from .subjects import autoregressive, glow, likelihood, nearest_code, vector_quantizer
from .timing import pages_here
from .worker import rows_of_worker

__all__ = ["main"]

_EPILOG = """
median and quartiles: of the fused op, of many samples; all variants are sampled in turn.
% copy: the time of dst.copy_(src) of as many bytes as the op must move, over the op's.
eager, compile: the time of plain torch code, and of torch.compile of it, over the op's.
pages: on a CPU whether freed memory stays with the process, on a GPU where the inputs lie (each table says it).
extra: the most memory the op holds at a time above its inputs and outputs.
``python -m bench glow`` measures 1x1 convolutions and a whole Glow beside the peers, ``python -m bench autoregressive`` the
inverse of masked autoregressive layers, ``python -m bench nearest_code`` and ``vector_quantizer`` vector quantization,
``python -m bench likelihood`` the likelihood kernels (--help says how).
The exit code is 1 if a result was wrong (its row says FAILED); a missed target is no error.
"""


#: Benches with a command line of their own, which need the peers.
BESIDE_PEERS = {
    "glow": glow,
    "autoregressive": autoregressive,
    "likelihood": likelihood,
    "nearest_code": nearest_code,
    "vector_quantizer": vector_quantizer,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if a result was wrong or could not be had."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in BESIDE_PEERS:
        return BESIDE_PEERS[argv[0]].main(argv[1:])
    parser = _parser()
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.op if name not in CASES]:
        parser.error(f"unknown op {', '.join(unknown)}; expected {', '.join(CASES)}")
    if arguments.threads < 1:
        parser.error(f"--threads: expected at least 1, got {arguments.threads}")
    if os.getloadavg()[0] > (os.cpu_count() or 1) / 2:
        print("other programs keep this machine busy: these figures are not to be quoted", file=sys.stderr)
    rows: list[Row] = []
    failed = False
    for options in _plans(arguments):
        try:
            for row in _printed(measure(options) if arguments.here else rows_of_worker(options)):
                rows.append(row)
        except RuntimeError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            failed = True
    if not rows and not failed:
        parser.error(f"--case {arguments.case}: no case matches")
    if arguments.csv is not None:
        for path in write_csv(arguments.csv, rows):
            print(f"written: {path}")
    return int(failed or any(row.failure for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("op", nargs="*", default=list(CASES), help=f"ops to measure (all: {', '.join(CASES)})")
    parser.add_argument("--quick", action="store_true", help="few samples: to see that it works, not to quote")
    parser.add_argument("--case", default="*", metavar="PATTERN", help="only cases whose name matches, such as '*-bf16-*'")
    parser.add_argument(
        "--pages", choices=("fresh", "retained", "both"), default="both", help="on a CPU: whether freed memory stays (both)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu", help="(%(default)s)")
    parser.add_argument(
        "--compile", choices=("all", "large", "none"), default="all", help="cases for which torch.compile is measured too (all)"
    )
    parser.add_argument(
        "--csv",
        nargs="?",
        type=Path,
        const=Path("bench/results"),
        metavar="DIR",
        help="write OP-DEVICE.csv there (bench/results if no folder is named; without this option nothing is written)",
    )
    parser.add_argument("--here", action="store_true", help="measure in this process as it is, under a profiler for example")
    return parser


def _plans(arguments: argparse.Namespace) -> Iterator[Options]:
    """What to measure, by process."""
    if arguments.here:
        states: tuple[str, ...] = (pages_here(),)
    elif arguments.device == "cuda":
        states = ("fresh",)
    else:
        states = ("fresh", "retained") if arguments.pages == "both" else (arguments.pages,)
    for pages in states:
        yield Options(
            tuple(arguments.op),
            arguments.device,
            pages,
            arguments.threads,
            arguments.quick,
            arguments.compile,
            arguments.case,
        )


def _printed(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, those of the fused ops and the failed ones printed as they come."""
    table = None
    for row in rows:
        if row.op != table:
            table = row.op
            print(f"\n{describe(row)}\n{HEADER}")
        if row.variant == FUSED or row.failure:
            print(line(row), flush=True)
        yield row


if __name__ == "__main__":
    sys.exit(main())
