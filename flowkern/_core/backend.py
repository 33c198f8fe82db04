"""Which backend runs an op, and why the others do not.

Four backends exist: ``torch`` (the reference, always there), ``cpp`` (the native CPU extension), ``triton``
and ``cuda``. ``auto`` takes the first that has no reason against it; naming one (``FLOWKERN_BACKEND`` or
``with flowkern.backend(name):``) either runs it or raises with the reasons.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

__all__ = ["BACKENDS", "backend", "call_native", "choose", "native", "native_cuda", "only_torch", "reasons"]

BACKENDS = ("cuda", "triton", "cpp", "torch")
_AUTO = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch")}


def _load(kind: str, name: str, why: str) -> tuple[ModuleType | None, str]:
    """The compiled extension, or None and the reason. torch is imported first: both share its OpenMP. Loading needs no GPU."""
    try:
        return importlib.import_module(f"flowkern.{name}"), ""
    except ImportError as error:
        if importlib.util.find_spec(f"flowkern.{name}") is None:
            return None, f"the {kind} extension was not built ({why})"
        return None, f"the {kind} extension does not load: {error}"


native, _native_reason = _load("CPU", "_native", "no compiler at install time, or FLOWKERN_EXT=0")
if native is not None and (_isa := os.environ.get("FLOWKERN_ISA")):
    native.use_isa(_isa)  # raises ValueError for an instruction set that this machine does not run
_cuda_why = "no nvcc or no NVIDIA driver at install time, or FLOWKERN_CUDA=0"
native_cuda, _native_cuda_reason = _load("CUDA", "_native_cuda", _cuda_why)

#: Whether the extension may multiply bfloat16 where it has float32: it does where the processor can, and the result is certified.
multiply_bfloat16 = True


@functools.cache
def _triton_reason() -> str:
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def runs_on(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a build for ``archs`` (``"80"``, ``"90a"``) has code for a GPU of this compute capability.

    Machine code serves its own generation from its number on, with a letter that number alone. The PTX of the last entry is
    compiled for later GPUs.
    """
    wanted = 10 * capability[0] + capability[1]
    for arch in archs:
        number = int(arch.rstrip("af"))
        if number == wanted or (arch.isdigit() and number < wanted and (number // 10 == capability[0] or arch == archs[-1])):
            return True
    return False


@functools.cache
def _capability_reason(device: torch.device) -> str:
    archs, capability = native_cuda.archs.split(";"), torch.cuda.get_device_capability(device)  # type: ignore[union-attr]
    if runs_on(archs, capability):
        return ""
    built, found = ", ".join(f"sm_{arch}" for arch in archs), ".".join(map(str, capability))
    return f"the CUDA extension was built for {built}, this GPU has compute capability {found}; see FLOWKERN_CUDA_ARCHS"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _checked(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: unknown name {name!r}; expected 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    return name


# Process-wide on purpose: autograd runs the backward of CUDA ops in threads of its own.
_requested = _checked(os.environ.get("FLOWKERN_BACKEND", "auto"))


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on one backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    The choice is process-wide. Raises ValueError for an unknown name at once, and RuntimeError from the op
    that the named backend cannot serve.
    """
    global _requested
    previous, _requested = _requested, _checked(name)
    try:
        yield
    finally:
        _requested = previous


def requested() -> str:
    """The backend asked for: a name, or ``"auto"``."""
    return _requested


def reasons(name: str, implementations: Mapping[str, Callable], tensors: Sequence[torch.Tensor]) -> list[str]:
    """Why backend ``name`` cannot serve an op on these tensors; empty if it can."""
    if name not in implementations:
        return ["the op has no kernel for it"]
    device = tensors[0].device.type
    if name == "cpp":
        if native is None:
            return [_native_reason]
        return [] if device == "cpu" else [f"it serves CPU tensors, these are on {device!r}"]
    if name == "triton":
        if _triton_reason():
            return [_triton_reason()]
        if device == "cpu" and not interpreting():
            return ["it serves CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"]
        return [] if device in ("cpu", "cuda") else [f"it serves CUDA tensors, these are on {device!r}"]
    if name == "cuda":
        if native_cuda is None:
            return [_native_cuda_reason]
        if device != "cuda":
            return [f"it serves CUDA tensors, these are on {device!r}"]
        return [why] if (why := _capability_reason(tensors[0].device)) else []
    return []


def choose(op: str, implementations: Mapping[str, Callable], tensors: Sequence[torch.Tensor]) -> str:
    """The backend that serves ``op`` on these tensors. Raises RuntimeError if the one asked for cannot."""
    if _requested == "auto":
        if tensors[0].is_cpu and native is not None and "cpp" in implementations:
            return "cpp"  # what the loop below finds, without the time it takes
        for name in _AUTO.get(tensors[0].device.type, ("torch",)):
            if not reasons(name, implementations, tensors):
                return name
    elif why := reasons(_requested, implementations, tensors):
        raise RuntimeError(f"{op}: backend {_requested!r} was asked for but cannot serve: {'; '.join(why)}")
    return _requested


def call_native(name: str, *args: Any) -> None:
    """Call the extension's entry ``name``, with torch's number of threads as its last argument."""
    getattr(native, name)(*args, torch.get_num_threads())


def only_torch(x: torch.Tensor) -> bool:
    """Whether no kernel can run on x's device, so that the reference may be traced and run directly."""
    if _requested == "torch":
        return True
    if x.is_cpu:
        return native is None and _requested == "auto"
    return not x.is_cuda or (_requested == "auto" and _triton_reason() != "")
