"""A limit on what a model's constructor may make, for configurations that nobody vouches for."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# To make a parameter takes some tensors on the way to its values (an LU factorization a dozen), and buffers are not all stored.
_TIMES, _BEYOND = 64, 2**24
_CALLS, _CALLS_BEYOND = 100, 2**15
_PARAMETERS, _PARAMETERS_BEYOND = 2, 64


class Budget(TorchDispatchMode):
    """Inside, this thread makes no more than a model takes that these ``tensors``, its state, fill; then it raises ValueError.

    What is counted are the elements of all tensors that operators return, each before it is allocated, and, for a billion
    layers would take long to come to much, the parameters of modules and the operators.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        super().__init__()
        stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.stored = sum(stored.values())
        self.elements = _TIMES * self.stored + _BEYOND
        self.calls = _CALLS * len(stored) + _CALLS_BEYOND
        self.parameters = _PARAMETERS * len(stored) + _PARAMETERS_BEYOND
        self._thread = threading.get_ident()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler, which takes longer than to load a model; none looks in here.
        return False

    def __enter__(self) -> Budget:
        self._hook = register_module_parameter_registration_hook(self._count_parameter)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._hook.remove()
        super().__exit__(*raised)

    def _count_parameter(self, module: torch.nn.Module, name: str, parameter: Any) -> None:
        if threading.get_ident() == self._thread:
            self.parameters -= parameter is not None
            self._check(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls -= 1
        inputs = [t.numel() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not inputs or math.prod(inputs) > self.elements:
            self._check(_numel(_without_memory(func, args, kwargs)))
        out = func(*args, **kwargs)
        made = _numel(out)
        self._check(made)
        self.elements -= made
        return out

    def _check(self, elements: int) -> None:
        if min(self.elements - elements, self.calls, self.parameters) < 0:
            raise ValueError(
                f"its configuration makes a model much larger than the {self.stored} bytes of weights that are stored"
            )


def _numel(tree: Any) -> int:
    return sum(t.numel() for t in tree_leaves(tree) if isinstance(t, torch.Tensor))


def _without_memory(func: Any, args: Any, kwargs: Any) -> Any:
    """What the operator returns, on the meta device; nothing where it has no such form, as those that look at values."""
    args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = {**kwargs, "device": torch.device("meta")}
    if kwargs.get("generator") is not None:
        kwargs = {**kwargs, "generator": None}
    try:
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError, TypeError):
        return None
