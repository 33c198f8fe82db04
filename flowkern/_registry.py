"""How an op enters the library: ``define`` registers its kernels with torch, ``register`` puts it in ``OPS``.

Everything that treats all ops alike (tests, PTX checks, benchmarks, ``explain``) iterates over ``OPS``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _backend

__all__ = ["EXPLAINED", "OPS", "Kernel", "Op", "Sample", "define", "reference_runs", "register"]

_LIBRARY = torch.library.Library("flowkern", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _observed(x: torch.Tensor) -> bool:
    """Whether a compiler, a tracer, a dispatch mode or a tensor subclass must see the call.

    Otherwise torch's dispatcher is passed by, which saves a third of the time of a small call.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or type(x) not in _PLAIN
    )


@dataclass(frozen=True)
class Kernel:
    """One registered torch op: its overload and what each backend runs for it."""

    name: str
    overload: Callable[..., Any]
    implementations: Mapping[str, Callable[..., Any]]

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args) if _observed(args[0]) else self.run(*args)

    def run(self, *args: Any) -> Any:
        """Choose the backend on these real tensors, and run it."""
        return self.implementations[_backend.choose(self.name, self.implementations, args[:1])](*args)


@dataclass(frozen=True)
class Sample:
    """Inputs for the generic tests and benches: ``function(*args, **kwargs)`` is valid."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """An op as users and generic tests see it; its keyword ``inverse`` reverses it.

    The first ``per_sample`` arguments have a batch dimension (None: all), the others serve all samples alike.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.device | str, torch.dtype], Iterable[Sample]]
    kernels: tuple[Kernel, ...]
    per_sample: int | None = None


OPS: dict[str, Op] = {}

#: The forward kernel of every function of ``flowkern.ops`` that has one, by its name: those of OPS, and those of other shape.
EXPLAINED: dict[str, Kernel] = {}


def register(op: Op) -> None:
    """Put an op into the table."""
    OPS[op.name] = op


def _lazy_triton(target: str) -> Callable[..., Any]:
    """``"module.function"`` of flowkern.kernels, imported at its first call: Triton is optional and slow to import."""
    module, function = target.split(".")

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"flowkern.kernels.{module}"), function)(*args)

    return launch


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    torch_: Callable[..., Any],
    cpp: Callable[..., Any],
    triton: str | None = None,
    cuda: Callable[..., Any] | None = None,
) -> Kernel:
    """Register ``flowkern::<schema>`` on the CPU and CUDA keys with a fake, and return the callable.

    The backend is chosen inside the implementation, on real tensors, so a compiler never traces the choice.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    name = schema.split("(")[0]
    implementations = {"torch": torch_, "cpp": cpp}
    if triton:
        implementations["triton"] = _lazy_triton(triton)
    if cuda:
        implementations["cuda"] = cuda
    kernel = Kernel(name, getattr(torch.ops.flowkern, name).default, implementations)
    if not name.endswith("_backward"):
        EXPLAINED[name] = kernel
    _LIBRARY.impl(name, kernel.run, "CPU")
    _LIBRARY.impl(name, kernel.run, "CUDA")
    torch.library.register_fake(f"flowkern::{name}", fake, lib=_LIBRARY)
    return kernel


def reference_runs(x: torch.Tensor) -> bool:
    """Whether an op must run its reference: no kernel for the device, or inside ``torch.func`` or forward-mode AD."""
    return _backend.only_torch(x) or torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
