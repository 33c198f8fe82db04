"""A pytest plugin: Triton kernels run on CPU tensors from the PTX that they are compiled to, csrc/cuda from that of NVRTC.

``FLOWKERN_PTX=sm_90 PYTHONPATH=tests:tests/ptx python -m pytest -p on_ptx ...`` drives by it the tests that Triton's interpreter
runs; ``FLOWKERN_PTX_OPTIONS`` are those of ``executor.Options``, as "shuffle=1,seed=7". A test fails for which a launch has
notes. ``every_kernel.py`` runs all of them.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import triton
from executor import Launched, Module, Options, options_of
from flowkern.kernels import compile as compiler, invertible_linear, nearest_code
from flowkern.kernels.launch import Grid, Launch
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from flowkern._core import backend, nvrtc

TARGET = os.environ.get("FLOWKERN_PTX", "sm_90")
OPTIONS = options_of(os.environ.get("FLOWKERN_PTX_OPTIONS", ""))


class Run(NamedTuple):
    """One launch, so that it can be repeated with other PTX."""

    name: str
    text: str
    kernel: str
    parameters: bytes
    tensors: tuple[torch.Tensor, ...]
    grid: dict[str, int]

    def execute(self, module: Module, options: Options | None = None) -> Launched:
        return module.launch(self.kernel, self.parameters, self.tensors, options=options or OPTIONS, **self.grid)


class Log:
    """What was launched: (name, what it had to say). ``before`` is called with each ``Run`` before it is executed."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, Launched]] = []
        self.before: Any = lambda run: None

    def add(self, run: Run, module: Module) -> None:
        self.before(run)
        self.launches.append((run.name, run.execute(module)))


LOG = Log()


@functools.cache
def parsed(text: str) -> Module:
    return Module(text)


# ---------------------------------------------------------------------------------------------------------------------
# Triton


_compiled: dict[str, Any] = {}


def compiled(launch: Launch) -> tuple[Any, list[Any]]:
    """The kernel as Triton compiles it for this launch, and the arguments that are left."""
    source, options = compiler.source(launch)
    key = f"{id(launch.kernel)} {source.signature} {source.constants} {source.attrs} {options}"
    if key not in _compiled:
        _compiled[key] = triton.compile(source, target=compiler.TARGETS[TARGET], options=options)
    left = [v for n, v in zip(launch.kernel.arg_names, launch.arguments(), strict=False) if source.signature[n] != "constexpr"]
    return _compiled[key], left


def run_launch(launch: Launch) -> None:
    """Stands in for ``Launch.run``."""
    build, left = compiled(launch)
    text, kernel = build.asm["ptx"], build.metadata.name
    place = {"grid": launch.grid.programs, "threads": 32 * build.metadata.num_warps, "shared": build.metadata.shared}
    tensors = tuple(t for t in launch.tensors if isinstance(t, torch.Tensor))
    name = f"{launch.kernel.fn.__module__.split('.')[-1]}.{kernel}"
    LOG.add(Run(name, text, kernel, parsed(text).packed(kernel, left), tensors, place), parsed(text))


def run_kernel(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
    """Stands in for what a kernel of Triton does when it is called."""
    run_launch(Launch(kernel, args, Grid(grid[0], 1, (), keywords)))


# ---------------------------------------------------------------------------------------------------------------------
# CUDA


def tensors_of_callers() -> Iterator[torch.Tensor]:
    """Those that the functions hold which prepare a launch of a CUDA kernel: its arguments are bare addresses."""
    for depth in (2, 3):
        found = tree_leaves([*sys._getframe(depth).f_locals.values()])
        yield from (leaf for leaf in found if isinstance(leaf, torch.Tensor))


def ptx_of(variant: nvrtc.Variant) -> str:
    capability = {"sm_80": "80", "sm_90": "90a", "sm_100": "100a"}[TARGET]
    return nvrtc.compiled(variant, f"compute_{capability}").rstrip(b"\0").decode()


def run_cuda(variant: nvrtc.Variant, arguments: ctypes.Structure, *, blocks: int, device: torch.device, **grid: int) -> None:
    text = ptx_of(variant)
    place = {"grid": blocks, **grid}
    name = f"{variant.kernel}.{'.'.join(value for _, value in variant.macros)}"
    run = Run(name, text, variant.kernel, bytes(arguments), tuple(tensors_of_callers()), place)
    LOG.add(run, parsed(text))


# ---------------------------------------------------------------------------------------------------------------------
# The plugin


def install() -> None:
    """For the rest of the process. Kernels were imported before: they are those of a GPU, not of the interpreter."""
    assert not triton.knobs.runtime.interpret
    JITFunction.run = run_kernel
    Launch.run = run_launch
    backend.interpreting = lambda: True
    nearest_code.generation = invertible_linear._generation = lambda device: int(TARGET[3:]) // 10
    nvrtc.launch = run_cuda


install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = len(LOG.launches)
    yield
    noted = [f"{name}: {note}" for name, launched in LOG.launches[before:] for note in launched.notes]
    assert not noted, "\n".join(noted)


def counts() -> list[tuple[str, int, int, int]]:
    """Of each kernel: its name, launches, instructions of warps, notes."""
    found: dict[str, tuple[int, int, int]] = collections.defaultdict(lambda: (0, 0, 0))
    for name, launched in LOG.launches:
        launches, instructions, notes = found[name]
        found[name] = launches + 1, instructions + launched.instructions, notes + len(launched.notes)
    return [(name, *found[name]) for name in sorted(found)]


def pytest_sessionfinish() -> None:
    """Adds a line for each kernel to the file ``FLOWKERN_PTX_REPORT``: "target kernel launches instructions notes"."""
    if path := os.environ.get("FLOWKERN_PTX_REPORT"):
        with open(path, "a") as report:
            report.writelines(f"{TARGET} {' '.join(map(str, line))}\n" for line in counts())
