"""How a kernel is started: its grid, what it is given, and the launch itself."""

# mypy: allow-untyped-defs
from typing import Any, NamedTuple

import torch
import triton.language as tl

__all__ = ["Grid", "Launch", "Strides", "constants"]

Strides = tuple[int, ...]


class Grid(NamedTuple):
    """How to launch a coupling kernel on tensors of certain shapes and strides."""

    programs: int
    tiles: int  # per sample
    integers: tuple[int, ...]  # B, N, C, H, W, kept, tiles, then the strides of one tensor after the other
    keywords: dict[str, Any]  # the kernel's constants, and options of the compiler


class Launch(NamedTuple):
    """One launch of a coupling kernel: ``run`` it, or compile it without a GPU from tensors that hold no data."""

    kernel: Any
    tensors: tuple[Any, ...]  # or None
    grid: Grid

    def arguments(self) -> tuple[Any, ...]:
        """The kernel's positional arguments."""
        return *self.tensors, *self.grid.integers

    def keywords(self) -> dict[str, Any]:
        """The kernel's constants, and options of the compiler."""
        return self.grid.keywords

    def run(self) -> None:
        with torch.cuda.device_of(next(t for t in self.tensors if t is not None)):
            self.kernel[(self.grid.programs,)](*self.arguments(), **self.grid.keywords)


def constants(double: bool, num_warps: int, **others: Any) -> dict[str, Any]:
    """A kernel's constants, the dtype of its arithmetic, and the compiler's options: the default of fusion differs by release."""
    return {**others, "ACC": tl.float64 if double else tl.float32, "num_warps": num_warps, "enable_fp_fusion": True}
