"""Checkpoints: one file that holds a model's name, configuration and weights, and is never half written."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ._model import Model
from ._registry import build, name_of

__all__ = ["load", "read_checkpoint", "save", "write_atomically"]

StrPath = str | os.PathLike[str]


def write_atomically(content: Any, path: StrPath) -> None:
    """``torch.save`` to a file beside ``path``, synced to the disk, then renamed.

    Whatever happens, ``path`` holds the old file or the whole new one. Raises OSError (a full disk, a missing folder);
    the old file is then untouched.
    """
    path = Path(path)
    # Serialized in memory first: torch.save into a file turns a full disk into other errors.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, on systems that let one open a folder."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(model: Model, path: StrPath) -> None:
    """Write a model of ``flowkern.models`` to one file, which ``load`` rebuilds it from; the write is atomic.

    The file is torch's zip format with ``{"flowkern": version, "model": {"name", "config"}, "state_dict"}``, and holds no code.
    Raises TypeError for another model and OSError if the file cannot be written; an existing file then stays as it was.
    """
    content = {
        "flowkern": __version__,
        "model": {"name": name_of(model), "config": model.config},
        "state_dict": model.state_dict(),
    }
    write_atomically(content, path)


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _reason_against(content: Any) -> str | None:
    """Why ``content`` is not a checkpoint that this version reads, or None if it is."""
    if not isinstance(content, dict) or not isinstance(content.get("flowkern"), str):
        return "it was not written by flowkern"
    if _release(content["flowkern"]) > _release(__version__):
        return f"it was written by flowkern {content['flowkern']}, newer than this one ({__version__})"
    model, state = content.get("model"), content.get("state_dict")
    if not isinstance(model, dict) or not {"name", "config"} <= model.keys() or not isinstance(state, dict):
        return "the model or its state_dict is missing"
    return None


def _unpack(path: StrPath) -> Any:
    """The content of a zip file of torch's, after a look at its checksums, which torch.load leaves out."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path: StrPath) -> dict[str, Any]:
    """The content of a checkpoint as a dict with ``"flowkern"``, ``"model"``, ``"state_dict"`` and whatever else it holds.

    Tensors come to the CPU. Nothing in the file is executed (``weights_only``). Raises ValueError with the path and the
    reason for a truncated, damaged, foreign or newer file, and FileNotFoundError for none.
    """
    with open(path, "rb") as file:
        magic = file.read(2)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: not a checkpoint: " + ("the file is truncated" if magic == b"PK" else "it was not written by flowkern")
        )
    try:
        content = _unpack(path)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a checkpoint: the file is damaged or foreign: {str(error).splitlines()[0]}") from error
    if reason := _reason_against(content):
        raise ValueError(f"{path}: not a readable checkpoint: {reason}")
    return content


def load(path: StrPath) -> Model:
    """The model that ``save`` (or a training run) wrote, rebuilt on the CPU with its weights, in evaluation mode.

    Raises ValueError with the path and the reason for a truncated, damaged, foreign or newer file, for an unknown model or
    configuration and for weights that do not fit it, and FileNotFoundError for none.
    """
    content = read_checkpoint(path)
    model, state = content["model"], content["state_dict"]
    try:
        flow = build(model["name"], model["config"])
        dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
        if len(dtypes) == 1:
            flow = flow.to(*dtypes)
        flow.load_state_dict(state)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot rebuild the model: {error}") from error
    return flow.eval()
