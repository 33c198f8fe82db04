"""Functions whose inside a compiler does not see: those that communicate, ask for values or write in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from .op import observed

__all__ = ["opaque"]

Function = TypeVar("Function", bound=Callable[..., Any])


def opaque(*, fake: Callable[..., Any] | None = None, mutates: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Register a function as a torch op, so that ``torch.compile`` has no graph break at it; eager code calls it as it is.

    ``fake`` allocates what it returns, ``mutates`` names the arguments that it writes to.
    """

    def register(function: Function) -> Function:
        name = f"flowkern::{function.__name__.strip('_')}"
        op = torch.library.custom_op(name, function, mutates_args=mutates)
        op.register_fake(fake or (lambda *_: None))

        @functools.wraps(function)
        def call(x: torch.Tensor, *args: Any) -> Any:
            return (op if observed((x, *args)) else function)(x, *args)

        return cast(Function, call)

    return register
