"""``Tables``: buffers that are made from numbers on the host, wherever their module goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from .checks import on_host

__all__ = ["Tables"]

Self = TypeVar("Self", bound="Tables")


class Tables(nn.Module):
    """A module whose buffers are made from numbers on the host that nothing moves; they are not part of a state_dict.

    Kernels go where these tables say. So whatever gives them other memory (``.to()``, ``.to_empty()``, a way over meta), they
    are made anew in it, and never hold what lay there; nor does a cast change them.
    """

    numbers: dict[str, tuple[tuple[int, ...], torch.dtype] | None]

    def keep(self, device: torch.device, **tables: torch.Tensor | None) -> None:
        """Make buffers on that device, now and later, of what these tensors on the CPU hold."""
        with on_host():
            self.numbers = {name: None if t is None else (tuple(t.tolist()), t.dtype) for name, t in tables.items()}
        self.make(device)

    def make(self, device: torch.device) -> None:
        """Make the buffers anew, on that device."""
        for name, table in self.numbers.items():
            # From numbers: a fake tensor mode makes its own of them, where it would refuse a tensor of the host's.
            tensor = None if table is None else torch.tensor(table[0], dtype=table[1], device=device)
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self: Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = [*self.buffers(recurse=False)]
        super()._apply(fn, recurse)
        after = [*self.buffers(recurse=False)]
        if any(a is not b for a, b in zip(after, before, strict=True)):
            self.make(after[0].device)
        return self
