"""The processes of a run: no more than there are cores, none that outlives its launcher, and one run in a folder."""

import contextlib
import importlib.util
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

#: Names, to the ranks that a process starts, that process.
_LAUNCHER = "FLOWKERN_LAUNCHER"


def check_processes(accelerator: str, devices: str | int, workers: int) -> None:
    """Raises ValueError for more ranks on the CPU, or more workers of a rank, than there are cores for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    ranks = int(devices) if on_cpu and str(devices).isdecimal() else 1
    for name, count in (("devices", ranks), ("workers", workers)):
        if count > cores:
            raise ValueError(f"{name}: expected at most {cores}, the number of CPU cores, as each is a process, got {count}")


@contextlib.contextmanager
def launching() -> Iterator[None]:
    """Processes that are started inside, by the same script, end with this one: see ``end_with_launcher``."""
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(_LAUNCHER, None)


def end_with_launcher() -> None:
    """In a process that was started while its parent was ``launching``: end within about a second of that parent's end.

    However that ends, kill -9 included: the ranks of a run would wait for it, as for a collective, half an hour.
    """
    launcher = int(os.environ.pop(_LAUNCHER, "0"))
    if not launcher:
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the folder of a run, which is made if it is not there, against other runs.

    The lock is the system's, on the file ``.lock``, and ends with the process; the file, with the process's number, stays.
    Where the system has no such locks (Windows) nothing is held. Raises ValueError if another process holds the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    with open(out / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ValueError(f"{out}: another run, process {file.read().strip()}, is writing there") from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
