"""What every op asks of its inputs, and how it allocates: shared by all op files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from .op import observed, transformed

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(name: str, x: torch.Tensor) -> None:
    """Raises TypeError unless ``x`` is a tensor of float64, float32, bfloat16 or float16."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating dtype (float64, float32, bfloat16 or float16), got {x.dtype}")


def check_same_device(name: str, value: torch.Tensor, x: torch.Tensor, of: str = "x") -> None:
    """Raises ValueError unless ``value`` lives where ``x``, the argument called ``of``, does."""
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} (that of {of}), got {value.device}")


def check_tensor(
    name: str, value: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor, of: str = "x", why: str | None = None
) -> None:
    """Raises as ``check_floating`` and ``check_same_device`` do, and ValueError unless ``value`` has that shape.

    ``why`` follows the shape in the message; None names that of ``x``.
    """
    check_floating(name, value)
    check_same_device(name, value, x, of)
    if value.shape != shape:
        why = f" for {of} of shape {tuple(x.shape)}" if why is None else why
        raise ValueError(f"{name}: expected shape {shape}{why}, got {tuple(value.shape)}")


def check_codes(name: str, index: torch.Tensor, codes: int, x: torch.Tensor, of: str = "x") -> None:
    """Raises TypeError unless ``index`` is an int64 tensor, and ValueError unless it lives where ``x`` does.

    Where the values can be read at no cost, also ValueError for one that is no code: from 0 to codes - 1.
    """
    if not isinstance(index, torch.Tensor) or index.dtype is not torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}")
    check_same_device(name, index, x, of)
    if index.numel() and values_can_be_read(index):
        lowest, highest = (int(v) for v in index.aminmax())
        if lowest < 0 or highest >= codes:
            raise ValueError(f"{name}: expected codes from 0 to under {codes}, got {lowest} to {highest}")


def accumulation_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: the dtype of the arithmetic and of logabsdet."""
    for t in tensors:
        if t is not None and t.dtype is torch.float64:
            return torch.float64
    return torch.float32


def empty_as(x: torch.Tensor) -> torch.Tensor:
    """An uninitialized tensor of x's shape and dtype: channels_last if x is (and not contiguous), else contiguous.

    Fakes and kernels allocate with this one expression, so that their strides agree: the memory format is always given,
    because ``empty_like`` alone would copy any permutation of strides.
    """
    channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def flatten_batch(x: torch.Tensor, params: torch.Tensor) -> tuple[torch.Size, torch.Tensor, torch.Tensor]:
    """(leading dimensions, x, params) with the leading batch dimensions flattened into one.

    (..., D) becomes (B, D) and (..., C, H, W) becomes (B, C, H, W): three dimensions are vectors, five and more
    are images. Raises ValueError for fewer than two, and if params has other leading dimensions.
    """
    if x.ndim < 2:
        raise ValueError(f"x: expected (B, C) or (B, C, H, W), got shape {tuple(x.shape)}")
    leading = x.shape[: 2 if x.ndim == 3 else x.ndim - 3]
    if params.shape[: len(leading)] != leading:
        raise ValueError(f"params: expected leading dimensions {tuple(leading)} as x has, got shape {tuple(params.shape)}")
    return leading, x.flatten(0, len(leading) - 1), params.flatten(0, len(leading) - 1)


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Tensors made inside hold values and are on the CPU, whatever the default device and the fake tensor mode around it."""
    with unset_fake_temporarily(), torch.device("cpu"):
        yield


def has_values(x: torch.Tensor) -> bool:
    """Whether x holds values on some device: a tensor on meta does not, and a fake one neither."""
    return not x.is_meta and not isinstance(x, FakeTensor)


def host_tensor(name: str, values: Any) -> torch.Tensor:
    """``values`` (a tensor, or numbers) as a tensor on the CPU, for what is made from them while a layer is built.

    Raises ValueError for a tensor that holds no values.
    """
    if isinstance(values, torch.Tensor) and not has_values(values):
        kind = "one on meta" if values.is_meta else "a fake one"
        raise ValueError(f"{name}: expected a tensor that holds values, got {kind}; they are read here, make it on the CPU")
    with on_host():
        return torch.as_tensor(values).detach().cpu().clone()  # written out, if it is zeros that nobody wrote


def values_can_be_read(x: torch.Tensor) -> bool:
    """Whether x has values, and looking at them waits for no device and breaks no graph: on a CPU, eager, not transformed."""
    return x.is_cpu and not observed((x,)) and not transformed()
