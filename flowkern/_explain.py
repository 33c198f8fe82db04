"""``explain``: who serves an op, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ._core import backend
from ._core.op import OPS

__all__ = ["explain"]


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """A table of the backends for ``op`` (a name or a function of ``flowkern.ops``): which serves, and why not the others.

    With the op's arguments the answer is for these tensors; without, for float32 tensors on the CPU. Of networks among the
    arguments it says how many sequential steps their inverse takes, and which share of the weights it uses.
    Raises ValueError for an unknown op.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", "")
    if name not in OPS:
        raise ValueError(f"explain: unknown op {op!r}; expected one of {', '.join(OPS)}")
    kernel = OPS[name].kernels[0]
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)] or [torch.empty(0)]
    try:
        chosen = backend.choose(name, kernel.implementations, tensors)
    except RuntimeError:
        chosen = ""
    rows = [f"{name} on {tensors[0].device.type!r}, asked for {backend.requested()!r}"]
    for other in backend.BACKENDS:
        why = backend.reasons(other, kernel.implementations, tensors)
        state = "no: " + "; ".join(why) if why else ("serves" if other == chosen else "could serve")
        rows.append(f"  {other:<7}{state}")
    return "\n".join([*rows, *_facts((*args, *kwargs.values()))])


def _facts(arguments: Iterable[Any]) -> Iterator[str]:
    """What the descriptions of networks among the arguments say of themselves."""
    for argument in arguments:
        if hasattr(argument, "used_weights"):
            steps = f"{argument.depth} sequential steps for {argument.features} features"
            yield f"  {steps}; {argument.used_weights:.1%} of the weights used"
        elif isinstance(argument, list | tuple):
            yield from _facts(argument)
