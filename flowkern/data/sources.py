"""Data sets for training and evaluation, and the keyed noise and order in which training sees them.

``load("digits")`` and its like give a ``Dataset``; ``loader`` turns one of its splits into batches. The order of an
epoch and all dequantization noise are functions of (seed, epoch, sample) through the counter-based generator Philox
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a resumed run, any number of workers and any
number of ranks see the same data.
"""

from __future__ import annotations

import copy
import functools
import gzip
import hashlib
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

__all__ = ["SOURCES", "Batch", "Dataset", "KeyedLoader", "Split", "batch_of", "dequantize", "load", "loader"]

#: What ``load`` understands.
SOURCES = ("digits", "photos", "folder:PATH", "cifar10:PATH", "mnist:PATH", "npy:PATH")


@dataclass(frozen=True)
class Split:
    """Part of a data set: values, uint8 (N, C, H, W) or float32 (N, D), and labels, int64 (N,) or None.

    ``origins`` is each sample's file, or its row in the file, for messages. ``distinct`` holds the numbers of samples that
    share no pixel with one another, where there are others that do.
    """

    values: np.ndarray
    labels: np.ndarray | None = None
    origins: Sequence[str] | np.ndarray | None = None
    distinct: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def digest(self) -> str:
        """A hash of values and labels, in hexadecimal."""
        found = hashlib.blake2b(digest_size=16)
        for array in (self.values, self.labels):
            if array is not None:
                found.update(f"{array.dtype.str} {array.shape}".encode())
                found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A data set in three splits.

    ``levels`` is the number of values that a pixel can take, or None for continuous data; ``classes`` names the
    labels and is empty where there are none. ``noise`` says whether discrete values are dequantized with noise, or by the
    middle of their cell: enough for a model that gives probabilities to the values themselves.
    """

    name: str
    levels: int | None
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    noise: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample: (C, H, W) or (D,)."""
        return self.train.values.shape[1:]

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What tells this data from other data, JSON-able: levels, classes, shape, and of each split its size and a hash."""
        splits = {part: [len(getattr(self, part)), getattr(self, part).digest()] for part in ("train", "val", "test")}
        return {"levels": self.levels, "classes": [*self.classes], "shape": [*self.shape], "splits": splits}

    def changes(self, identity: Mapping[str, Any]) -> str:
        """How this data differs from that with the given ``identity``, as far as that tells; "" if it does not."""
        own, found = self.identity, []
        for name in ("levels", "classes", "shape"):
            if identity.get(name, own[name]) != own[name]:
                found.append(f"{name} {own[name]} (it had {identity[name]})")
        for part, (samples, digest) in own["splits"].items():
            before, digest_before = identity.get("splits", own["splits"])[part]
            if samples != before:
                found.append(f"{samples} samples in {part} (it had {before})")
            elif digest != digest_before:
                found.append(f"other values or labels in {part}")
        return ", ".join(found)


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def load(source: str, *, size: int | None = None, report: Callable[[str], None] | None = None) -> Dataset:
    """The data set that ``source`` names.

    ================ ======================================================================= ======================
    source           what                                                                    split
    ================ ======================================================================= ======================
    ``digits``       scikit-learn's 8x8 scans of digits, 17 levels, labels                   1000/350/447, file order
    ``photos``       32x32 crops of scikit-learn's two photographs, labels                   disjoint vertical bands
    ``folder:PATH``  all images below PATH, cut square; sub-folders of PATH are the labels   80/10/10, hash of the path
    ``cifar10:PATH`` the binary version: data_batch_*.bin and test_batch.bin                 45000/5000/10000
    ``mnist:PATH``   the four idx files, plain or .gz                                        55000/5000/10000
    ``npy:PATH``     uint8 (N, H, W) or (N, C, H, W) images, or float (N, D) vectors         80/10/10, fixed shuffle
    ================ ======================================================================= ======================

    Everything is held in memory. ``size`` is the side of the images of ``folder:`` (32 by default). ``report`` is
    called with a line for each unreadable image, which is skipped, and with their number at the end; by default the
    lines go to stderr.

    Raises:
        ValueError: an unknown source, or a file that is not what it should be; the message names the file, what came
            and what was expected.
        FileNotFoundError: PATH or a file in it does not exist.
    """
    kind, colon, path = source.partition(":")
    readers: dict[str, Callable[[Path], Dataset]] = {
        "folder": lambda root: _folder(root, 32 if size is None else size, report or _to_stderr),
        "cifar10": _cifar10,
        "mnist": _mnist,
        "npy": _npy,
    }
    if source not in ("digits", "photos") and (kind not in readers or not path):
        raise ValueError(f"data: unknown source {source!r}; expected one of {', '.join(SOURCES)}")
    if size is not None and kind != "folder":
        raise ValueError(f"data: size={size} was given, but only folder:PATH is resized, not {source!r}")
    if not colon:
        return _digits() if source == "digits" else _photos()
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"data: {root} does not exist")
    return readers[kind](root)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    values = bunch.images.astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    train, val, test = (Split(values[i:j], labels[i:j]) for i, j in ((0, 1000), (1000, 1350), (1350, 1797)))
    return Dataset("digits", 17, train, val, test, tuple(map(str, range(10))))


def _photos() -> Dataset:
    from sklearn.datasets import load_sample_images

    bunch = load_sample_images()
    # Vertical bands of every 160 columns: 96 for training, 32 for validation, 32 for testing.
    parts = []
    for start, end in ((0, 96), (96, 128), (128, 160)):
        crops, places = zip(
            *(_crops(image[:, left + start : left + end]) for image in bunch.images for left in range(0, 640, 160)), strict=True
        )
        labels = np.repeat(np.arange(2), [sum(map(len, crops[:4])), sum(map(len, crops[4:]))])
        distinct = np.flatnonzero((np.concatenate(places) % 32 == 0).all(1))
        parts.append(Split(np.concatenate(crops), labels, distinct=distinct))
    train, val, test = parts
    return Dataset("photos", 256, train, val, test, tuple(Path(name).stem for name in bunch.filenames))


def _crops(region: np.ndarray, size: int = 32, stride: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """All crops (N, 3, size, size) of a region (H, W, 3) whose corners lie on multiples of ``stride``, and the corners (N, 2)."""
    windows = np.lib.stride_tricks.sliding_window_view(region, (size, size), axis=(0, 1))[::stride, ::stride]
    corners = stride * np.indices(windows.shape[:2]).reshape(2, -1).T
    return np.ascontiguousarray(windows.reshape(-1, 3, size, size)), corners


# Hidden by some systems beside every file, with the image's suffix.
_NOT_IMAGES = ("._",)


def _folder(root: Path, size: int, report: Callable[[str], None]) -> Dataset:
    from PIL import Image

    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder")
    if size < 1:
        raise ValueError(f"data: size must be at least 1, got {size}")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith(_NOT_IMAGES))
    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(lambda path: _decode(path, size), found))
    for path, image in zip(found, decoded, strict=True):
        if isinstance(image, str):
            report(f"data: skipped {path}: {image}")
    readable = {path.relative_to(root): i for path, i in zip(found, decoded, strict=True) if not isinstance(i, str)}
    if len(readable) < len(found):
        report(f"data: skipped {len(found) - len(readable)} of {len(found)} images below {root}")
    if len(readable) < 3:
        raise ValueError(f"data: {root} holds {len(readable)} readable images (of {len(found)}); expected at least 3")

    # By rank of the hash: near 80/10/10 for any number of images, and an image keeps its split when others are added.
    paths = sorted(readable, key=lambda path: hashlib.sha256(str(path.as_posix()).encode(errors="surrogateescape")).digest())
    tenth = _tenth(len(paths))
    gray = all(image.shape[0] == 1 for image in readable.values())
    classes = sorted({path.parts[0] if len(path.parts) > 1 else "." for path in paths})

    def part(members: Sequence[Path]) -> Split:
        images = [readable[path] if gray else np.broadcast_to(readable[path], (3, size, size)) for path in members]
        names = [path.parts[0] if len(path.parts) > 1 else "." for path in members]
        labels = np.array([classes.index(n) for n in names]) if len(classes) > 1 else None
        return Split(np.stack(images), labels, [str(root / path) for path in members])

    train, val, test = part(paths[2 * tenth :]), part(paths[tenth : 2 * tenth]), part(paths[:tenth])
    return Dataset(f"folder:{root}", 256, train, val, test, tuple(classes) if len(classes) > 1 else ())


def _tenth(n: int) -> int:
    """How many of n samples are kept for validation, and for the test: a tenth, but two where there are six or more."""
    return max(1 if n < 6 else 2, n // 10)


def _decode(path: Path, size: int) -> np.ndarray | str:
    """An image as uint8 (1 or 3, size, size), cut square around its centre; or why it cannot be read."""
    from PIL import Image, ImageOps

    try:
        if not path.is_file():
            return "it is no file"  # a pipe would be waited for
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
                return f"mode {image.mode!r} has more than 8 bits"
            gray = image.mode in ("1", "L", "LA")
            upright = ImageOps.exif_transpose(image).convert("L" if gray else "RGB")
            pixels = np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS))
    except Exception as error:  # a decoder of a damaged file may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return pixels[None] if gray else pixels.transpose(2, 0, 1)


_CIFAR10_RECORDS = 10_000
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cifar10(root: Path) -> Dataset:
    if (root / "cifar-10-batches-bin").is_dir():
        root = root / "cifar-10-batches-bin"
    train = [_cifar10_file(root / f"data_batch_{i}.bin") for i in range(1, 6)]
    values, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return _held_out("cifar10", values, labels, Split(*_cifar10_file(root / "test_batch.bin")), _CIFAR10_CLASSES)


def _cifar10_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = _read(path)
    if len(raw) != _CIFAR10_RECORDS * 3073:
        raise ValueError(f"data: {path} has {len(raw)} bytes; expected {_CIFAR10_RECORDS} records of 3073 bytes")
    records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), _labels(path, records[:, 0])


def _mnist(root: Path) -> Dataset:
    train, test = (
        (_idx(_idx_path(root, f"{part}-images", 3), 3), _idx(_idx_path(root, f"{part}-labels", 1), 1))
        for part in ("train", "t10k")
    )
    for (images, labels), part in ((train, "train"), (test, "t10k")):
        if len(images) != len(labels) or images.shape[1:] != train[0].shape[1:]:
            raise ValueError(f"data: {root}: {part} has images {images.shape} and {len(labels)} labels; expected one each")
        _labels(root / f"{part}-labels", labels)
    held_out = Split(test[0][:, None], test[1].astype(np.int64))
    return _held_out("mnist", train[0][:, None], train[1].astype(np.int64), held_out, tuple(map(str, range(10))))


def _idx_path(root: Path, stem: str, rank: int) -> Path:
    names = [f"{stem}{mark}idx{rank}-ubyte{suffix}" for mark in "-." for suffix in ("", ".gz")]
    for name in names:
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"data: {root} holds none of {', '.join(names)}")


def _idx(path: Path, rank: int) -> np.ndarray:
    """An idx file of unsigned bytes: big-endian magic number 0x08 and rank, the sizes, the values."""
    raw = _read(path)
    magic = int.from_bytes(raw[:4], "big")
    if len(raw) < 4 + 4 * rank or magic != 0x800 + rank:
        raise ValueError(
            f"data: {path} starts with 0x{magic:08x} ({len(raw)} bytes); expected the magic number 0x{0x800 + rank:08x}"
        )
    sizes = tuple(int(n) for n in np.frombuffer(raw, ">u4", rank, 4))
    expected = 4 + 4 * rank + math.prod(sizes)
    if len(raw) != expected:
        raise ValueError(f"data: {path} has {len(raw)} bytes; expected {expected} for sizes {sizes}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} does not exist")
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"data: {path} is not a whole gzip file: {error}") from error


def _labels(path: Path, labels: np.ndarray) -> np.ndarray:
    if labels.size and labels.max() > 9:
        raise ValueError(f"data: {path} has label {labels.max()}; expected 0 to 9")
    return labels.astype(np.int64)


def _held_out(name: str, values: np.ndarray, labels: np.ndarray, test: Split, classes: tuple[str, ...]) -> Dataset:
    """The last tenth of the training images, 5000 at most, becomes the validation split."""
    cut = len(values) - min(5000, len(values) // 10)
    return Dataset(name, 256, Split(values[:cut], labels[:cut]), Split(values[cut:], labels[cut:]), test, classes)


def _npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, the number of bytes that a .npy file holds behind its header), as the header says it.

    Raises ValueError for a file without such a header.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                raise ValueError("it is an archive (.npz); expected one array")
            file.seek(0)
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise ValueError(f"format {'.'.join(map(str, version))}; expected 1.0 or 2.0")
            shape, _, dtype = readers[version](file)
            rest = os.fstat(file.fileno()).st_size - file.tell()
    except Exception as error:  # a header is a Python literal, and its parser may raise anything
        raise ValueError(f"data: {path} is not a whole .npy file: {' '.join(str(error).split())}") from error
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"data: {path} is not a whole .npy file: shape {shape}; expected whole numbers of at least 0")
    return shape, dtype, rest


def _npy(path: Path) -> Dataset:
    if not path.is_file():
        raise ValueError(f"data: {path} is not a file")
    shape, dtype, rest = _npy_header(path)
    came = f"data: {path} holds {dtype} of shape {shape}"
    images = dtype == np.uint8 and len(shape) in (3, 4)
    if not images and not (np.issubdtype(dtype, np.floating) and len(shape) == 2):
        raise ValueError(f"{came}; expected uint8 (N, H, W) or (N, C, H, W) images, or float (N, D) vectors")
    if math.prod(shape) == 0 or shape[0] < 3:
        raise ValueError(f"{came}; expected at least 3 samples that are not empty")
    # Before anything is allocated: a header may claim any size.
    if (needed := math.prod(shape) * dtype.itemsize) > rest:
        raise ValueError(f"data: {path} is not a whole .npy file: {dtype} of shape {shape} is {needed} bytes, got {rest}")
    values = np.load(path, allow_pickle=False)
    if images:
        values = values if values.ndim == 4 else values[:, None]
    else:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if bad.size:
            rows = ", ".join(map(str, bad[:10])) + (", ..." if bad.size > 10 else "")
            raise ValueError(f"{came}, of which {bad.size} rows are not finite in float32: {rows}")
    order = _order(0, 0, len(values))
    tenth = _tenth(len(values))
    train, val, test = (
        Split(values[rows], origins=rows) for rows in (order[2 * tenth :], order[tenth : 2 * tenth], order[:tenth])
    )
    return Dataset(f"npy:{path}", 256 if images else None, train, val, test, ())


# ---------------------------------------------------------------------------------------------------------------------
# Keyed order and noise

_STREAMS = {"order": 0, "train": 1, "val": 2, "test": 3}


def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of an epoch. Raw Philox output is fixed by its specification; Generator's methods are not."""
    bits = np.random.Philox(key=[seed, _STREAMS["order"]], counter=[0, 0, epoch, 0]).random_raw(n)
    return np.argsort(bits, kind="stable")


def _uniform(seed: int, stream: str, epoch: int, samples: np.ndarray, count: int) -> np.ndarray:
    """(len(samples), count) float32 in [0, 1), each row a function of (seed, stream, epoch, sample) alone.

    The values are multiples of 2^-16, so that v + u is exact in float32 for v < 256 and never rounds up to v + 1.
    """
    generator = np.random.Philox(key=[seed, _STREAMS[stream]])
    state: Any = generator.state
    bits = np.empty((len(samples), -(-count // 4)), "<u8")
    for row, sample in zip(bits, samples, strict=True):
        state["state"]["counter"][:] = 0, sample, epoch, 0
        generator.state = state
        row[:] = generator.random_raw(bits.shape[1])
    return bits.view("<u2")[:, :count].astype(np.float32) / 65536


def dequantize(values: np.ndarray, levels: int, u: np.ndarray) -> torch.Tensor:
    """x = (v + u) / levels: float32 in [0, 1) for v in 0 .. levels - 1 and u in [0, 1).

    With D values per sample a density p(x) bounds the probability of the integers v, in nats:
    -log P(v) <= E_u[-log p(x)] + D log(levels).
    Source: Theis, van den Oord and Bethge, "A note on the evaluation of generative models" (2016), section 3.1.
    """
    return torch.from_numpy((values + u.reshape(values.shape)) / np.float32(levels))


class Batch(NamedTuple):
    """A batch, or a part of it: one rank's slice of one of the parts that a step accumulates.

    x: (B, C, H, W) or (B, D) float32; labels: (B,) int64 or None; total: the number of samples of the whole batch, over all
    ranks and parts.
    """

    x: torch.Tensor
    labels: torch.Tensor | None
    total: int


def batch_of(data: Dataset, part: str, samples: np.ndarray, *, seed: int, epoch: int, total: int | None = None) -> Batch:
    """The samples of a split ("train", "val" or "test"), dequantized with the noise of (seed, epoch, sample)."""
    split: Split = getattr(data, part)
    values = split.values[samples]
    if data.levels is None:
        x = torch.from_numpy(values)
    else:
        count = int(np.prod(data.shape))
        u = _uniform(seed, part, epoch, samples, count) if data.noise else np.full((len(samples), count), 0.5, np.float32)
        x = dequantize(values, data.levels, u)
    labels = None if split.labels is None else torch.from_numpy(split.labels[samples])
    return Batch(x, labels, len(samples) if total is None else total)


class _Batches(TorchDataset):
    """The samples of a split, by (epoch, samples, total)."""

    def __init__(self, data: Dataset, part: str, seed: int):
        self.data, self.part, self.seed = data, part, seed

    def __getitem__(self, key: tuple[int, np.ndarray, int]) -> Batch:
        epoch, samples, total = key
        return batch_of(self.data, self.part, samples, seed=self.seed, epoch=epoch, total=total)


class _Sampler:
    """Cuts a permutation keyed by (seed, epoch) into global batches, these into parts, and gives this rank's slice of each.

    Sample i of a batch is in part i % parts, and sample j of a part on rank j % world. Unlike in torch's
    DistributedSampler the global batches do not depend on the number of ranks.
    """

    def __init__(self, n: int, batch_size: int, *, seed: int, shuffle: bool, rank: int, world: int, parts: int = 1):
        self.n, self.batch_size, self.seed, self.shuffle, self.rank, self.world = n, batch_size, seed, shuffle, rank, world
        self.parts = parts
        self.epoch = 0
        self.first = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.parts * -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, int]]:
        first, self.first = self.first, 0
        order = _order(self.seed, self.epoch, self.n) if self.shuffle else np.arange(self.n)
        for i in range(first, len(self)):
            batch, part = divmod(i, self.parts)
            samples = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.epoch if self.shuffle else 0, samples[part :: self.parts][self.rank :: self.world], len(samples)


class KeyedLoader(DataLoader):
    """A DataLoader that can resume in mid-epoch, whatever its workers have fetched ahead."""

    sampler: _Sampler
    dataset: _Batches
    _delivered = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._delivered = self.sampler.first
        keys = iter(copy.copy(self.sampler))
        for batch, (epoch, samples, _) in zip(super().__iter__(), keys, strict=True):
            self._require_finite(batch, epoch, samples)
            self._delivered += 1
            yield batch

    def _require_finite(self, batch: Batch, epoch: int, samples: np.ndarray) -> None:
        """Raise ValueError, naming the batch and where its bad samples come from, for NaN or infinity in x."""
        finite = batch.x.flatten(1).isfinite().all(1)
        if finite.all():
            return
        part, number = self.dataset.part, self._delivered // self.sampler.parts
        split: Split = getattr(self.dataset.data, part)
        bad = samples[~finite.numpy()]
        origins = split.origins
        where = ", ".join(
            origins[i] if isinstance(origins, list) else f"row {i if origins is None else origins[i]}" for i in bad[:5]
        )
        raise ValueError(
            f"data: {self.dataset.data.name}: NaN or infinity in {len(bad)} of {len(samples)} samples of {part} batch {number}, "
            f"epoch {epoch}: {where}{', ...' if len(bad) > 5 else ''}"
        )

    def state_dict(self) -> dict[str, int]:
        """How many batches (or parts of batches) of the epoch were delivered."""
        return {"batches": self._delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next epoch behind the batches that were delivered."""
        self.sampler.first = state["batches"]


def loader(
    data: Dataset,
    part: str,
    batch_size: int,
    *,
    seed: int,
    epoch: int = 0,
    rank: int = 0,
    world: int = 1,
    parts: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> KeyedLoader:
    """Batches of a split of ``data``: global batches of ``batch_size`` samples, of which each rank gets its slice.

    "train" is shuffled and has fresh noise in every epoch; the other splits come in file order, always with the same
    noise. Each batch comes in ``parts`` parts, one after the other. The last batch of an epoch may be smaller; a rank's
    slice of it may even be empty. Raises ValueError, as they come, for values that are not finite.
    """
    shuffle = part == "train"
    sampler = _Sampler(len(getattr(data, part)), batch_size, seed=seed, shuffle=shuffle, rank=rank, world=world, parts=parts)
    sampler.set_epoch(epoch)
    return KeyedLoader(
        _Batches(data, part, seed),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )
