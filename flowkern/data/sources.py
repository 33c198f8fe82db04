"""The data sets: each is one function here, declared by ``source``."""

import functools
import gzip
import hashlib
import math
import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .noise import order


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


#: What reads a source, by its name, and the names of those that take ``size`` and ``report`` besides.
_READERS: dict[str, Callable[..., Dataset]] = {}
_RESIZED: list[str] = []


def source(name: str, *, resized: bool = False) -> Callable[[Callable[..., Dataset]], Callable[..., Dataset]]:
    """Declare a function to be the data set ``name``, or ``"name:PATH"``: it is then called with the path, which exists.

    A ``resized`` one is also given the keyword arguments ``size`` and ``report`` of ``load``.
    """

    def declare(read: Callable[..., Dataset]) -> Callable[..., Dataset]:
        _READERS[name] = read
        if resized:
            _RESIZED.append(name)
        return read

    return declare


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

    Everything is held in memory. ``size`` is the side of the images of ``folder:`` (32 by default). ``report`` is called with a
    line for each unreadable image, which is skipped, and with their number at the end; by default the lines go to stderr.

    Raises:
        ValueError: an unknown source, or a file that is not what it should be; it names the file, what came and was expected.
        FileNotFoundError: PATH or a file in it does not exist.
    """
    kind, colon, path = source.partition(":")
    name = f"{kind}:PATH" if path else source
    if name not in _READERS:
        raise ValueError(f"data: unknown source {source!r}; expected one of {', '.join(_READERS)}")
    if size is not None and name not in _RESIZED:
        raise ValueError(f"data: size={size} was given, but only {', '.join(_RESIZED)} is resized, not {source!r}")
    if not colon:
        return _READERS[name]()
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"data: {root} does not exist")
    if name not in _RESIZED:
        return _READERS[name](root)
    return _READERS[name](root, size=32 if size is None else size, report=report or functools.partial(print, file=sys.stderr))


@source("digits")
def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    values = bunch.images.astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    train, val, test = (Split(values[i:j], labels[i:j]) for i, j in ((0, 1000), (1000, 1350), (1350, 1797)))
    return Dataset("digits", 17, train, val, test, tuple(map(str, range(10))))


@source("photos")
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


@source("folder:PATH", resized=True)
def _folder(root: Path, size: int, report: Callable[[str], None]) -> Dataset:
    from PIL import Image

    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder")
    if size < 1:
        raise ValueError(f"data: size must be at least 1, got {size}")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    # Some systems hide a file ._NAME beside every file, with the image's suffix.
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith("._"))
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


@source("cifar10:PATH")
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


@source("mnist:PATH")
def _mnist(root: Path) -> Dataset:
    read: list[tuple[np.ndarray, np.ndarray]] = []
    for part in ("train", "t10k"):
        images, labels = _idx(root, f"{part}-images", 3), _idx(root, f"{part}-labels", 1)
        if len(images) != len(labels) or (read and images.shape[1:] != read[0][0].shape[2:]):
            raise ValueError(f"data: {root}: {part} has images {images.shape} and {len(labels)} labels; expected one each")
        read.append((images[:, None], _labels(root / f"{part}-labels", labels)))
    return _held_out("mnist", *read[0], Split(*read[1]), tuple(map(str, range(10))))


def _idx(root: Path, stem: str, rank: int) -> np.ndarray:
    """An idx file of unsigned bytes: big-endian magic number 0x08 and rank, the sizes, the values."""
    names = [f"{stem}{mark}idx{rank}-ubyte{suffix}" for mark in "-." for suffix in ("", ".gz")]
    path = next((root / name for name in names if (root / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"data: {root} holds none of {', '.join(names)}")
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


@source("npy:PATH")
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
    shuffled, tenth = order(0, 0, len(values)), _tenth(len(values))
    parts = shuffled[2 * tenth :], shuffled[tenth : 2 * tenth], shuffled[:tenth]
    train, val, test = (Split(values[rows], origins=rows) for rows in parts)
    return Dataset(f"npy:{path}", 256 if images else None, train, val, test, ())


#: What ``load`` understands.
SOURCES = tuple(_READERS)
