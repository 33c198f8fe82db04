"""Runs subjects in a process of its own, whose environment decides how memory comes and where threads run.

``python -m flowkern.bench.worker JSON`` takes an ``Options`` and prints each row as a line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from types import ModuleType

import torch

from . import subjects
from .cases import CASES
from .comparison import Options, measure
from .provenance import provenance
from .row import Row
from .timing import pages_here

__all__ = ["FILES", "environment", "module_of", "run", "run_in_worker"]

_MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
#: The subjects that are a file of their own.
FILES = tuple(sorted(found.name for found in pkgutil.iter_modules(subjects.__path__) if found.name != "ops"))


def module_of(subject: str) -> ModuleType:
    """The file that yields the comparisons of a subject."""
    return importlib.import_module(f"{subjects.__name__}.{'ops' if subject in CASES else subject}")


def run(options: Options) -> Iterator[Row | str]:
    """The rows of all subjects, each as soon as it is measured, and what else they print."""
    torch.set_num_threads(options.threads)
    origin = provenance(options.device)
    for name in options.subjects:
        module = module_of(name)
        if options.device not in getattr(module, "DEVICES", ("cpu", "cuda")):
            yield f"{name}: not measured on {options.device}"
            continue
        found = module.comparisons(options, (name,)) if name in CASES else module.comparisons(options)
        for item in found:
            if isinstance(item, str):
                yield item
            else:
                yield from measure(name, item, options, origin)


def environment(options: Options) -> dict[str, str]:
    """The environment of a worker: threads stay on their cores, and freed memory stays or goes."""
    variables = {name: value for name, value in os.environ.items() if name not in _MALLOC}
    if options.pages == "retained":
        variables.update(dict.fromkeys(_MALLOC, str(2**40)))
    return {"OMP_PROC_BIND": "true", "KINETO_LOG_LEVEL": "99", **variables}


def run_in_worker(options: Options) -> Iterator[Row | str]:
    """As ``run``, in a process of its own. Raises RuntimeError if it ends otherwise than well."""
    command = [sys.executable, "-m", f"{__package__}.worker", json.dumps(asdict(options))]
    with subprocess.Popen(command, env=environment(options), stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for text in worker.stdout:
            item = json.loads(text)
            yield item if isinstance(item, str) else Row(**item)
    if worker.returncode:
        raise RuntimeError(f"the measuring process ended with code {worker.returncode}")


def _main() -> None:
    # Whatever else writes to the standard output goes to the other one.
    rows, sys.stdout = sys.stdout, sys.stderr
    given = json.loads(sys.argv[1])
    options = Options(**{**given, "subjects": tuple(given.get("subjects", CASES))})
    if options.device == "cpu" and (pages := pages_here()) != options.pages:
        raise RuntimeError(f"pages: asked for {options.pages}, but in this process they are {pages}")
    for item in run(options):
        print(json.dumps(item if isinstance(item, str) else asdict(item)), file=rows, flush=True)


if __name__ == "__main__":
    _main()
