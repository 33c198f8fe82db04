"""State of modules: what a ``state_dict`` must not set it to, and attributes that are others for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["CheckedState", "changed", "require"]


def require(holds: torch.Tensor | bool, name: str, expected: str) -> None:
    """Raises ValueError unless it holds everywhere."""
    if not bool(torch.as_tensor(holds).all()):
        raise ValueError(f"{name}: expected {expected}")


class CheckedState(nn.Module):
    """A module whose ``check_state`` refuses values that its kernels and formulas were not made for.

    ``load_state_dict`` then raises RuntimeError with the reason, among its other errors, and the module stays as it was.
    """

    def check_state(self, state: dict[str, torch.Tensor]) -> None:
        """Raises ValueError for own parameters and buffers that it cannot have; ``state`` may lack some."""
        raise NotImplementedError(f"{type(self).__name__} has no check_state")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own: dict[str, Any] = {name: state_dict.get(prefix + name) for name in (*self._parameters, *self._buffers)}
        # What holds no values here (on meta, or a shard of a DTensor) is checked where it came from.
        plain = {n: v for n, v in own.items() if type(v) in (torch.Tensor, nn.Parameter) and not v.is_meta}
        try:
            # Of another shape, torch has its own message.
            self.check_state({n: v.detach() for n, v in plain.items() if v.shape == getattr(self, n).shape})
        except ValueError as error:
            errors: list[str] = rest[-1]
            errors.append(f"{prefix}{error}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)


@contextlib.contextmanager
def changed(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """While it is open, the attribute of that name has another value."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
