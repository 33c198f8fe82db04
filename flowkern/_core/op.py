"""How an op enters the library: ``define`` registers its kernels with torch, ``register`` puts it in ``OPS``.

Everything that treats all ops alike (tests, PTX checks, benchmarks, ``explain``) iterates over ``OPS``. What only some ops
promise is a ``Law`` of theirs.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import backend

_LIBRARY = torch.library.Library("flowkern", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _plain(arguments: Sequence[Any]) -> bool:
    """Whether kernels may read every tensor among the arguments (lists are looked into): its memory is its value.

    It is not for a lazily negated tensor, for a tensor without storage (zeros that were never written, meta and fake tensors),
    and for a subclass, which may mean anything.
    """
    for a in arguments:
        if isinstance(a, torch.Tensor):
            if type(a) not in _PLAIN or a.is_neg() or a._is_zerotensor():
                return False
        elif isinstance(a, list | tuple) and not _plain(a):
            return False
    return True


def observed(arguments: Sequence[Any]) -> bool:
    """Whether a compiler, a tracer, a dispatch mode, a tensor subclass or a lazy value among the arguments must see the call.

    Otherwise torch's dispatcher is passed by, which saves a third of the time of a small call.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or not (_plain if backend.native is None else backend.native.plain)(arguments)
    )


@dataclass(frozen=True)
class Kernel:
    """One registered torch op: its overload, how its results are allocated, and what each backend runs for it.

    ``outputs`` returns uninitialized results for the op's inputs. An implementation takes these inputs and then the results,
    which it fills.
    """

    name: str
    overload: Callable[..., Any]
    outputs: Callable[..., Any]
    implementations: Mapping[str, Callable[..., Any]]

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args) if observed(args) else self.run(*args)

    def run(self, *args: Any) -> Any:
        """Choose the backend on these real tensors, and run it."""
        implementation = self.implementations[backend.choose(self.name, self.implementations, args[:1])]
        outputs = self.outputs(*args)
        if isinstance(outputs, tuple):
            implementation(*args, *outputs)
        else:
            implementation(*args, outputs)
        return outputs


class Law(enum.Flag):
    """What an op promises besides its values; the generic tests hold it to that.

    ``INVERTIBLE``: it takes ``inverse``, which undoes it, and keeps the memory format of its first argument.
    ``LOG_DET``: it returns (y, logabsdet), log|det dy/dx| of each sample of its first argument x.
    ``SEEDED``: it draws noise, the same for the same ``seed``.
    ``EXACT_INDEX``: its integers are those of the reference in float64, whatever the dtype.
    ``SURROGATE``: its gradient is not the derivative of what it returns, but that of the reference.
    ``MASKED``: a mask among its arguments hides weights, which then have no say, whatever their value.
    """

    NONE = 0
    INVERTIBLE = enum.auto()
    LOG_DET = enum.auto()
    SEEDED = enum.auto()
    EXACT_INDEX = enum.auto()
    SURROGATE = enum.auto()
    MASKED = enum.auto()


def as_input(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of the first floating argument."""
    return dtypes[0]


def accumulated(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of the arithmetic: float64 if an argument is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def as_index(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """That of indices: int64."""
    return torch.int64


@dataclass(frozen=True)
class Output:
    """One value that an op returns.

    ``dtype`` gives its dtype for those of the floating arguments, or for the keyword ``dtype`` where no argument is floating.
    ``per_sample``: its first dimensions are those of the batch.
    """

    name: str
    dtype: Callable[[Sequence[torch.dtype]], torch.dtype] = as_input
    differentiable: bool = True
    per_sample: bool = True


#: What the ops of ``Law.LOG_DET`` return.
LOGABSDET = Output("logabsdet", accumulated)


@dataclass(frozen=True)
class Sample:
    """Inputs for the generic tests and benches: ``function(*args, **kwargs)`` is valid; args may hold lists and plain values."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """An op as users and generic tests see it. ``reference`` has the signature of ``function``.

    ``outputs`` describes what it returns: a tensor, or a tuple of several. The first ``per_sample`` arguments have a batch
    dimension (None: all), the others serve all samples alike. ``ulps`` units in the last place of a result's largest value are
    granted to a kernel beside twice the error of torch's code: more where a small number divides what was rounded before.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.device | str, torch.dtype], Iterable[Sample]]
    kernels: tuple[Kernel, ...]
    outputs: tuple[Output, ...]
    per_sample: int | None = None
    laws: Law = Law.NONE
    ulps: float = 4


OPS: dict[str, Op] = {}
KERNELS: dict[str, Kernel] = {}


def normal(device: torch.device | str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """``draw(*shape, dtype=dtype)``: standard normal numbers for samples, the same ones in every dtype, to rounding."""

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float64).to(dtype)

    return draw


def register(function: Callable[..., Any], *described: Any, **properties: Any) -> None:
    """Put an op into the table under its function's name; what follows is that of ``Op``."""
    OPS[function.__name__] = Op(function.__name__, function, *described, **properties)


def _lazy_triton(target: str, implementations: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """``"module.function"`` of flowkern.kernels, imported at its first call: Triton is optional and slow to import.

    Then it takes its own place among the implementations.
    """
    module, function = target.split(".")

    def launch(*args: Any) -> Any:
        implementations["triton"] = found = getattr(importlib.import_module(f"flowkern.kernels.{module}"), function)
        return found(*args)

    return launch


def _copied(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """An implementation from a function that returns its ``count`` results. A result that is None leaves its output alone."""

    def fill(*args: Any) -> None:
        with torch.no_grad():
            results = function(*args[:-count])
        for output, result in zip(args[-count:], results if isinstance(results, tuple) else (results,), strict=True):
            if result is not None:
                output.copy_(result)

    return fill


def define(
    schema: str,
    *,
    outputs: Callable[..., Any],
    torch_: Callable[..., Any],
    fills: bool = False,
    cpp: Callable[..., Any] | None = None,
    triton: str | None = None,
    cuda: Callable[..., Any] | None = None,
) -> Kernel:
    """Register ``flowkern::<schema>`` on the CPU and CUDA keys, and return the callable.

    The backend is chosen inside the implementation, on real tensors, so a compiler never traces the choice.

    Args:
        outputs: allocates the results, for the fake and for every backend. One of shape (0,) is not wanted by anyone.
        torch_: returns the results, from the inputs alone; or with ``fills`` is an implementation like the others.
        cpp: the implementation on the CPU. None is the extension's entry of the op's name.
        triton: that on a GPU, as ``"module.function"`` of flowkern.kernels.
        cuda: that of the CUDA extension.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    name = schema.split("(")[0]
    overload = getattr(torch.ops.flowkern, name).default
    plain = torch_ if fills else _copied(torch_, len(overload._schema.returns))
    implementations = {"torch": plain, "cpp": cpp or (lambda *args: backend.call_native(name, *args))}
    if triton:
        implementations["triton"] = _lazy_triton(triton, implementations)
    if cuda:
        implementations["cuda"] = cuda
    kernel = KERNELS[name] = Kernel(name, overload, outputs, implementations)
    _LIBRARY.impl(name, kernel.run, "CPU")
    _LIBRARY.impl(name, kernel.run, "CUDA")
    torch.library.register_fake(f"flowkern::{name}", outputs, lib=_LIBRARY)
    return kernel


def recording(*tensors: torch.Tensor | None) -> bool:
    """Whether gradients are being recorded for one of these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work, which kernels are invisible to."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def reference_runs(x: torch.Tensor, *, own_torch: bool = False) -> bool:
    """Whether an op must run its reference: there is no kernel for the device, or the op is transformed.

    ``own_torch`` is for an op whose torch code is a kernel too, better than the reference: it serves where there is no other one.
    """
    if transformed():
        return True
    return backend.only_torch(x) and not (own_torch and (x.is_cpu or x.is_cuda or x.is_meta))
