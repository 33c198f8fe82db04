"""Measures in a process of its own, whose environment decides how memory comes and where threads run.

``python -m flowkern.bench.worker JSON`` takes an ``Options`` and prints each row as a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

from .measure import Options, Row, measure

__all__ = ["environment", "rows_of_worker"]

_MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def environment(options: Options) -> dict[str, str]:
    """The environment of a worker: threads stay on their cores, and freed memory stays or goes."""
    variables = {name: value for name, value in os.environ.items() if name not in _MALLOC}
    if options.pages == "retained":
        variables.update(dict.fromkeys(_MALLOC, str(2**40)))
    return {"OMP_PROC_BIND": "true", "KINETO_LOG_LEVEL": "99", **variables}


def rows_of_worker(options: Options) -> Iterator[Row]:
    """The rows as the worker prints them. Raises RuntimeError if it ends otherwise than well."""
    command = [sys.executable, "-m", f"{__package__}.worker", json.dumps(asdict(options))]
    with subprocess.Popen(command, env=environment(options), stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for text in worker.stdout:
            yield Row(**json.loads(text))
    if worker.returncode:
        raise RuntimeError(f"the measuring process ended with code {worker.returncode}")


def _main() -> None:
    # Whatever else writes to the standard output goes to the other one.
    rows, sys.stdout = sys.stdout, sys.stderr
    for row in measure(Options(**json.loads(sys.argv[1]))):
        print(json.dumps(asdict(row)), file=rows, flush=True)


if __name__ == "__main__":
    _main()
