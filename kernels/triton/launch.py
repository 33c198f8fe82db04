"""How a kernel is started: its grid, what it is given, and the launch itself.

Triton looks at every argument of every launch, to find the code that was compiled for its like: that takes longer than
most kernels run. But a ``Grid`` is made once for all tensors of the same shapes and strides, and fixes every integer and
constant: beside it only dtypes and the device choose the code, as long as all tensors start at a multiple of 16 bytes. So
a grid keeps the code that Triton chose, and later launches start it at once.
"""

# mypy: allow-untyped-defs
import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime import driver

__all__ = ["Grid", "Launch", "Strides", "constants", "generation"]

Strides = tuple[int, ...]


@dataclass(eq=False)
class Grid:
    """How to launch a kernel on tensors of certain shapes and strides. Kept from call to call, it makes launches fast."""

    programs: int
    tiles: int  # per sample
    integers: tuple[int, ...]  # B, N, C, H, W, kept, tiles, then the strides of one tensor after the other
    keywords: dict[str, Any]  # the kernel's constants, and options of the compiler
    #: By kernel, device and dtypes: the code that Triton chose, and its arguments after the tensors.
    started: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = field(init=False, repr=False, default_factory=dict)


class Launch(NamedTuple):
    """One launch of a kernel: ``run`` it, or compile it without a GPU from tensors that hold no data."""

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
        """Start it on torch's current stream of the tensors' device."""
        kernel, tensors, grid = self
        if not isinstance(kernel, triton.JITFunction):  # the interpreter's
            kernel[(grid.programs,)](*self.arguments(), **grid.keywords)
            return
        for first in tensors:
            if first is not None:
                break
        active = driver.active
        device = active.get_current_device()
        if first.is_cuda and first.get_device() != device:
            with torch.cuda.device_of(first):
                self.run()
            return
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        key = device, id(kernel), *[None if t is None else t.dtype for t in tensors]
        usual = not [a for a in addresses if a and a % 16] and _as_usual(kernel)
        if usual and (found := grid.started.get(key)) is not None:
            code, rest = found
            stream, nothing = active.get_current_stream(device), (None, None, None)  # no metadata, for there are no hooks
            code.run(grid.programs, 1, 1, stream, code.function, code.packed_metadata, *nothing, *addresses, *rest)
            return
        code = kernel[(grid.programs,)](*self.arguments(), **grid.keywords)
        if usual and isinstance(code, CompiledKernel):
            constants = kernel.arg_names[len(tensors) + len(grid.integers) :]
            grid.started[key] = code, (*grid.integers, *(grid.keywords[name] for name in constants))


def _as_usual(kernel: Any) -> bool:
    """Whether Triton would start the code that it started before, and nobody looks on. On AMD a grid does not say enough."""
    runtime = triton.knobs.runtime
    return not (
        kernel.pre_run_hooks
        or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.debug
        or runtime.add_stages_inspection_hook is not None
        or triton.knobs.compilation.instrumentation_mode
        or torch.version.hip
    )


def constants(double: bool, num_warps: int, **others: Any) -> dict[str, Any]:
    """A kernel's constants, the dtype of its arithmetic, and the compiler's options: the default of fusion differs by release."""
    return {**others, "ACC": tl.float64 if double else tl.float32, "num_warps": num_warps, "enable_fp_fusion": True}


@functools.cache
def generation(device: torch.device) -> int:
    """The major compute capability of an NVIDIA GPU, else 0."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and not torch.version.hip else 0
