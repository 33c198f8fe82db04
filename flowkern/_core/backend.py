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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from . import nvrtc

__all__ = ["BACKENDS", "backend", "call_native", "choose", "native", "only_torch", "reasons"]

BACKENDS = ("cuda", "triton", "cpp", "torch")
_AUTO = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch")}


def _load_native() -> tuple[ModuleType | None, str]:
    """The compiled extension, or None and the reason. torch is imported first: both share its OpenMP."""
    try:
        return importlib.import_module("flowkern._native"), ""
    except ImportError as error:
        if importlib.util.find_spec("flowkern._native") is None:
            return None, "the CPU extension was not built (no compiler at install time, or FLOWKERN_EXT=0)"
        return None, f"the CPU extension does not load: {error}"


native, _native_reason = _load_native()
if native is not None and (_isa := os.environ.get("FLOWKERN_ISA")):
    native.use_isa(_isa)  # raises ValueError for an instruction set that this machine does not run

#: Whether the extension may multiply bfloat16 where it has float32: it does where the processor can, and the result is certified.
multiply_bfloat16 = True


_has_triton = importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_reason(device: torch.device) -> str:
    """Why Triton cannot serve a device. On a GPU its driver is started once, for which it compiles a file."""
    if not _has_triton:
        return "triton is not installed"
    if device.type != "cuda":
        return ""
    try:
        nvrtc.check_capability(torch.cuda.get_device_capability(device))
        with torch.cuda.device(device):
            importlib.import_module("triton").runtime.driver.active.get_current_target()
    except Exception as error:  # without a C compiler or a driver; whatever it is, the torch code serves
        return f"Triton does not run here: {nvrtc.one_line(error)}"
    return ""


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
        if device not in ("cpu", "cuda"):
            return [f"it serves CUDA tensors, these are on {device!r}"]
        if why := _triton_reason(tensors[0].device):
            return [why]
        if device == "cpu" and not interpreting():
            return ["it serves CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"]
        return []
    if name == "cuda":
        if device != "cuda":
            return [f"it serves CUDA tensors, these are on {device!r}"]
        return [why] if (why := nvrtc.reason(tensors[0].device)) else []
    return []


def choose(op: str, implementations: Mapping[str, Callable], tensors: Sequence[torch.Tensor]) -> str:
    """The backend that serves ``op`` on these tensors. Raises RuntimeError if the one asked for cannot."""
    if _requested == "auto":
        if tensors[0].is_cpu and native is not None and "cpp" in implementations:
            return "cpp"  # what the loop below finds, without the time it takes
        for name in _AUTO.get(tensors[0].device.type, ("torch",)):
            if name not in implementations:
                continue
            why = reasons(name, implementations, tensors)
            if not why:
                return name
            if tensors[0].is_cuda:
                _report(name, "; ".join(why))
    elif why := reasons(_requested, implementations, tensors):
        raise RuntimeError(f"{op}: backend {_requested!r} was asked for but cannot serve: {'; '.join(why)}")
    return _requested


@functools.cache
def _report(name: str, why: str) -> None:
    """Says once what makes a GPU slow."""
    warnings.warn(f"flowkern: ops run without their {name} kernels: {why}", stacklevel=2)


def call_native(name: str, *args: Any) -> None:
    """Call the extension's entry ``name``, with torch's number of threads as its last argument."""
    getattr(native, name)(*args, torch.get_num_threads())


def only_torch(x: torch.Tensor) -> bool:
    """Whether no kernel can run on x's device, so that the reference may be traced and run directly."""
    if _requested == "torch":
        return True
    if x.is_cpu:
        return native is None and _requested == "auto"
    return not x.is_cuda or (_requested == "auto" and not _has_triton)
