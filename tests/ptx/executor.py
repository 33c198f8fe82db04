"""PTX on CPU tensors: the C++ program of ``executor/``, built when it is needed.

A ``Module`` is compiled PTX; ``launch`` runs one of its kernels and returns what was noticed on the way. What makes a result
meaningless (an access out of bounds, a deadlock) raises ``ExecutionError``, as does an instruction that is not supported.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["ExecutionError", "Launched", "Module", "Options", "missing", "options_of"]

SOURCES = Path(__file__).with_name("executor")
#: Where what was built is kept, by the hash of its sources.
BUILT = Path(__file__).parents[2] / "build" / "ptx"
#: No product may be fused with a sum that PTX rounds on its own.
FLAGS = ("-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror")


class ExecutionError(RuntimeError):
    """The kernel cannot be run to its end."""


def missing() -> str:
    """Why there is no executor; empty if there can be one."""
    return "" if sys.platform == "linux" and shutil.which("g++") else "needs g++ on Linux"


@functools.cache
def _library() -> ctypes.CDLL:
    texts = [(file.name, file.read_bytes()) for file in sorted(SOURCES.iterdir())]
    path = BUILT / f"executor-{hashlib.sha256(repr((texts, FLAGS, os.uname().nodename)).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        _build(path)
    library = ctypes.CDLL(str(path))
    library.ptx_said.restype, library.ptx_parse.restype = ctypes.c_char_p, ctypes.c_void_p
    library.ptx_parse.argtypes, library.ptx_free.argtypes = [ctypes.c_char_p], [ctypes.c_void_p]
    library.ptx_parameters.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.ptx_launch.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Request), ctypes.POINTER(ctypes.c_uint64)]
    library.ptx_parameters.restype = library.ptx_launch.restype = ctypes.c_bool
    return library


def _build(path: Path) -> None:
    """Whole or not at all: other processes may build it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:

        def command(*arguments: str) -> None:
            done = subprocess.run(["g++", *FLAGS, *arguments], cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)

        names = [file.stem for file in SOURCES.glob("*.cpp")]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda name: command("-c", str(SOURCES / f"{name}.cpp"), "-o", f"{name}.o"), names))
        command("-shared", *(f"{name}.o" for name in names), "-o", path.name)
        os.replace(Path(folder, path.name), path)


_OPTIONS = ("seed", "shuffle", "approximate", "truncate", "lazy", "limit")


class Options(ctypes.Structure):
    """How a launch is executed.

    ``shuffle``: blocks and warps take turns at random. ``approximate``: approximate instructions are off by as much as the PTX
    ISA documents. ``truncate``: sums of tensor cores lose what lies below 24 bits of their largest term. ``lazy``: asynchronous
    work is done when it is waited for, not when it is issued. ``limit``: instructions of warps.
    """

    _fields_ = tuple((name, ctypes.c_int64) for name in _OPTIONS)

    def __init__(self, **given: int):
        super().__init__(**{"seed": 1, "lazy": 1, "limit": 10**9, **given})


def options_of(text: str) -> Options:
    """From "shuffle=1,seed=7". Raises ValueError for another name."""
    given = dict(part.split("=") for part in text.split(",") if part)
    if unknown := given.keys() - {*_OPTIONS}:
        raise ValueError(f"options: unknown {', '.join(sorted(unknown))}")
    return Options(**{name: int(value) for name, value in given.items()})


class _Extent(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


class _Request(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("parameters", ctypes.c_char_p),
        ("parameter_bytes", ctypes.c_uint64),
        ("regions", ctypes.POINTER(_Extent)),
        ("region_count", ctypes.c_uint64),
        ("options", Options),
    )


class Launched(NamedTuple):
    """What a launch had to say: its notes, a line each, and how many instructions its warps executed."""

    notes: tuple[str, ...]
    instructions: int


def _extents(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """(begin, bytes) of the tensors' storages, those that overlap as one."""
    storages = {(s.data_ptr(), s.nbytes()) for s in (t.untyped_storage() for t in tensors) if s.nbytes()}
    found: list[tuple[int, int]] = []
    for begin, size in sorted(storages):
        if found and begin < sum(found[-1]):
            found[-1] = found[-1][0], max(sum(found[-1]), begin + size) - found[-1][0]
        else:
            found.append((begin, size))
    return found


class Module:
    """PTX, parsed. Raises ExecutionError with the line of what is not supported."""

    def __init__(self, text: str):
        self._library = _library()
        self._handle = self._library.ptx_parse(text.encode())
        if not self._handle:
            raise ExecutionError(self._said())

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.ptx_free(self._handle)

    def _said(self) -> str:
        return self._library.ptx_said().decode(errors="replace")

    def parameters(self, kernel: str) -> tuple[int, list[tuple[int, int]]]:
        """The bytes of a kernel's parameters, and (offset, bytes) of each. Raises KeyError for an unknown kernel."""
        if not self._library.ptx_parameters(self._handle, kernel.encode()):
            raise KeyError(kernel)
        (_, size), *each = ([int(number) for number in line.split()] for line in self._said().splitlines())
        return size, [(offset, size) for offset, size in each]

    def packed(self, kernel: str, arguments: Sequence[Any]) -> bytes:
        """Tensors, as the addresses of their first elements, and integers, as a kernel's parameters."""
        size, places = self.parameters(kernel)
        assert len(places) >= len(arguments), (kernel, places, len(arguments))
        packed = bytearray(size)
        for (offset, width), argument in zip(places, arguments, strict=False):  # Triton's own come last
            value = argument.data_ptr() if isinstance(argument, torch.Tensor) else int(argument)
            packed[offset : offset + width] = value.to_bytes(width, "little", signed=value < 0)
        return bytes(packed)

    def launch(
        self,
        kernel: str,
        parameters: bytes,
        tensors: Iterable[torch.Tensor],
        *,
        grid: int,
        threads: int,
        shared: int = 0,
        options: Options | None = None,
    ) -> Launched:
        """Runs ``grid`` blocks, which may touch the storages of ``tensors`` alone."""
        extents = _extents(tensors)
        one = ctypes.c_uint32 * 3
        request = _Request(
            *(kernel.encode(), one(grid, 1, 1), one(threads, 1, 1), shared, parameters, len(parameters)),
            *((_Extent * len(extents))(*(_Extent(*extent) for extent in extents)), len(extents), options or Options()),
        )
        instructions = ctypes.c_uint64()
        ended = self._library.ptx_launch(self._handle, request, instructions)
        notes = self._said().splitlines()
        if not ended:
            raise ExecutionError("\n".join(reversed(notes)))
        return Launched(tuple(notes), instructions.value)
