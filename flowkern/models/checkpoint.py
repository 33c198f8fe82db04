"""Checkpoints: one file that holds a model's name, configuration and weights, and is never half written."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .._core.checks import FLOATING
from .._core.scale_map import ScaleMap
from .._core.version import __version__
from ._budget import Budget
from ._model import Model
from ._registry import build, name_of, plain

__all__ = ["content_of", "load", "read_checkpoint", "save", "write_atomically"]

StrPath = str | os.PathLike[str]


def write_atomically(content: Any, path: StrPath) -> None:
    """``torch.save`` to a file beside ``path``, synced to the disk, then renamed.

    Whatever happens, ``path`` holds the old file or the whole new one. Raises OSError, as for a full disk or a missing folder.
    """
    path = Path(path)
    # Serialized in memory first: torch.save into a file turns a full disk into other errors.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(path, path.with_name(f".{path.name}.{os.getpid()}.tmp")) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    if os.name == "posix":  # elsewhere no folder can be opened, which makes the rename durable
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[Path]:
    """``temporary`` to write to; it takes the place of ``path`` when the block ends, and is removed if that raises."""
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def content_of(model: Model, state_dict: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a checkpoint says of a model: ``{"flowkern": version, "model": {"name", "config"}, "state_dict"}``.

    ``state_dict`` stands in for the model's own where other weights are to be kept, as an average of them. Raises TypeError for
    a model that is none of ``flowkern.models``, and for a transformer or quantizer in it whose class has no name.
    """
    return {
        "flowkern": __version__,
        "model": {"name": name_of(model), "config": plain(model.config, saved=True)},
        "state_dict": model.state_dict() if state_dict is None else state_dict,
    }


def save(model: Model, path: StrPath) -> None:
    """Write a model of ``flowkern.models`` to one file, which ``load`` rebuilds it from; the write is atomic.

    The file is torch's zip format with what ``content_of`` says, and holds no code.
    Raises TypeError as ``content_of`` does and OSError if the file cannot be written; an existing file then stays as it was.
    """
    write_atomically(content_of(model), path)


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d{1,9}", version)[:3]))


def _reason_against(content: Any) -> str | None:
    """Why ``content`` is not a checkpoint that this version reads, or None if it is."""
    if not isinstance(content, dict) or not isinstance(content.get("flowkern"), str):
        return "it was not written by flowkern"
    if _release(content["flowkern"]) > _release(__version__):
        return f"it was written by flowkern {content['flowkern']}, newer than this one ({__version__})"
    model, state = content.get("model"), content.get("state_dict")
    if not isinstance(model, dict) or not {"name", "config"} <= model.keys() or not isinstance(state, dict):
        return "the model or its state_dict is missing"
    for name in ("plan", "data"):
        if not isinstance(content.get(name, {}), dict):
            return f"{name}: expected a dict, got {type(content[name]).__name__}"
    return next((reason for item in state.items() if (reason := _reason_against_weight(*item))), None)


def _reason_against_weight(name: Any, value: Any) -> str | None:
    if not isinstance(name, str):
        return f"state_dict: expected strings as keys, got {name!r}"
    if not isinstance(value, torch.Tensor):
        return f"state_dict: {name!r}: expected a tensor, got {type(value).__name__}"
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return f"state_dict: {name!r}: expected a dense tensor with values, got {value.dtype} {value.layout} on {value.device}"
    return None


def _unpack(path: StrPath) -> Any:
    """The content of a zip file of torch's, after a look at its checksums, which torch.load leaves out."""
    with zipfile.ZipFile(path) as archive:
        # torch does not compress: what is larger unpacked than on disk would be so at any factor.
        if any(entry.file_size > entry.compress_size for entry in archive.infolist()):
            raise zipfile.BadZipFile("it is compressed")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")
    with open(path, "rb") as file:  # torch takes no names of files that are not UTF-8
        return torch.load(file, map_location="cpu", weights_only=True)


def read_checkpoint(path: StrPath) -> dict[str, Any]:
    """The content of a checkpoint as a dict with ``"flowkern"``, ``"model"``, ``"state_dict"`` and whatever else it holds.

    Tensors come to the CPU. Nothing in the file is executed (``weights_only``). Raises ValueError with the path and the
    reason for a truncated, damaged, foreign or newer file, and OSError (FileNotFoundError for none) if it cannot be read.
    """
    with open(path, "rb") as file:
        magic = file.read(2)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: not a checkpoint: " + ("the file is truncated" if magic == b"PK" else "it was not written by flowkern")
        )
    try:
        content = _unpack(path)
    except Exception as error:  # a damaged file may lead zipfile, torch and pickle to anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path}: not a checkpoint: the file is damaged or foreign: {reason}") from error
    if (why := _reason_against(content)) is not None:
        raise ValueError(f"{path}: not a readable checkpoint: {why}")
    return content


def _as_meant(config: Any) -> Any:
    """A configuration with what it left out while that had another default: an affine transformer's scale was a sigmoid.

    Configurations are whole now, but once held a transformer as it was given.
    """
    if not isinstance(config, Mapping):
        return config
    unsaid = {"scale": dataclasses.asdict(ScaleMap.sigmoid())} if config.get("kind") == "affine" else {}
    return {**unsaid, **{name: _as_meant(value) for name, value in config.items()}}


def load(path: StrPath) -> Model:
    """The model that ``save`` (or a training run) wrote, rebuilt on the CPU with its weights, in evaluation mode.

    Raises ValueError with the path and the reason for a truncated, damaged, foreign or newer file, for an unknown model or
    configuration and for weights that do not fit it, and FileNotFoundError for none.
    """
    content = read_checkpoint(path)
    model, state = content["model"], content["state_dict"]
    try:
        with Budget(state.values()):
            flow = build(model["name"], _as_meant(model["config"]))
        dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
        # Between floating dtypes a value may be converted, not to another kind of number.
        for name, own in flow.state_dict().items():
            came = state[name].dtype if name in state else own.dtype
            if came != own.dtype and not (own.is_floating_point() and came in FLOATING):
                expected = "a floating dtype" if own.is_floating_point() else own.dtype
                raise ValueError(f"state_dict: {name!r}: expected {expected}, got {came}")
        if len(dtypes) == 1:
            flow = flow.to(*dtypes)
        flow.load_state_dict(state)
    except Exception as error:  # so may a configuration lead a constructor
        raise ValueError(f"{path}: cannot rebuild the model: {str(error) or type(error).__name__}") from error
    return flow.eval()
