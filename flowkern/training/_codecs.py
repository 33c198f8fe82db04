"""What PNG and lossless WebP need for the images that a flow was evaluated on."""

import io
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, features

from ..data import Dataset, Split
from ._pictures import is_image

#: Pillow's settings for the smallest files.
CODECS: dict[str, dict[str, Any]] = {
    "PNG": {"format": "png", "optimize": True, "compress_level": 9},
    "WebP lossless": {"format": "webp", "lossless": True, "quality": 100, "method": 6, "exact": True},
}

#: Pixels of a mosaic's side: every codec takes as many.
_SIDE = 4096


def encode(image: np.ndarray, codec: str) -> bytes:
    """uint8 (H, W, 1 or 3) as a file of ``codec``. Raises RuntimeError if it does not decode to the same pixels."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    buffer = io.BytesIO()
    picture.save(buffer, **CODECS[codec])
    with Image.open(buffer) as decoded:
        if decoded.convert(picture.mode).tobytes() != picture.tobytes():
            raise RuntimeError(f"{codec} did not give back the pixels of an image of shape {image.shape}")
    return buffer.getvalue()


def payload(file: bytes) -> int:
    """The bytes of the compressed pixels in a PNG (its IDAT chunks) or a lossless WebP (its VP8L chunk).

    Without signatures, chunk headers, check sums and the image's size in PNG's IHDR; WebP's VP8L chunk holds the size.
    Source: RFC 2083 (PNG), section 3; RFC 9649 (WebP), section 2.
    """
    if file.startswith(b"RIFF"):
        return sum(size for kind, size in _chunks(file, 12, "little") if kind == b"VP8L")
    return sum(size for kind, size in _chunks(file, 8, "big") if kind == b"IDAT")


def _chunks(file: bytes, at: int, order: Any) -> Iterator[tuple[bytes, int]]:
    """(kind, bytes of content) of each chunk: PNG has the length first and a check sum behind, RIFF pads to even lengths."""
    while at < len(file):
        if order == "big":
            size, kind = int.from_bytes(file[at : at + 4], order), file[at + 4 : at + 8]
            at += 12 + size
        else:
            kind, size = file[at : at + 4], int.from_bytes(file[at + 4 : at + 8], order)
            at += 8 + size + size % 2
        yield kind, size


def mosaics(images: np.ndarray) -> list[np.ndarray]:
    """uint8 (N, H, W, C) side by side in as few pictures as hold them, each near square and full.

    A picture's last row may be short of images: what is left of it then makes pictures of its own.
    """
    n, height, width, channels = images.shape
    columns = min(n, max(1, min(_SIDE // width, round(math.sqrt(n * height / width)))))
    rows = min(n // columns, max(1, _SIDE // height))
    whole, rest = images[: rows * columns], images[rows * columns :]
    picture = whole.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return [picture.reshape(rows * height, columns * width, channels), *(mosaics(rest) if len(rest) else [])]


def codec_table(nll: np.ndarray, data: Dataset, part: str, name: str) -> str | None:
    """Bits per dimension of a split's images, under a flow and as files, as a table; None for data that makes no pictures.

    ``nll`` (N,) in nats is that of the flow ``name``. Where images overlap there is a second column for some that do not: a
    mosaic of images that overlap would have to code the same pixels only once, for which the flow, and a file for each
    image, pay each time. Raises RuntimeError if a codec loses something.
    """
    if data.levels is None or not is_image(data.shape):
        return None
    split: Split = getattr(data, part)
    images = np.ascontiguousarray(split.values.transpose(0, 2, 3, 1))
    everything = np.arange(len(split))
    distinct = everything if split.distinct is None else split.distinct
    columns = {f"{len(split)} images": everything, f"{len(distinct)} that share no pixel": distinct}
    dims = math.prod(data.shape)

    def bits(sizes: np.ndarray) -> list[float]:
        """Of each column; sizes (N,) in bits."""
        return [float(sizes[rows].sum()) / (len(rows) * dims) for rows in columns.values()]

    table = [(name, bits(nll / math.log(2.0)))]
    for codec in CODECS:
        if codec == "WebP lossless" and not features.check("webp"):
            table.append(("WebP: this Pillow was built without", [math.nan, math.nan]))
            continue
        files, mosaic = _encoded(list(images), codec), _encoded(mosaics(images[distinct]), codec)
        table.append((f"{codec}, a file for each image", bits(np.array([8 * len(file) for file in files]))))
        table.append(("  its compressed pixels, no headers", bits(np.array([8 * payload(file) for file in files]))))
        whole = 8 * sum(map(len, mosaic)) / (len(distinct) * dims)
        name = f"  all of them in {len(mosaic)} file{'s' if len(mosaic) > 1 else ''}"
        table.append((name, [whole if split.distinct is None else math.nan, whole]))
    names = list(columns)[: 1 if split.distinct is None else 2]
    return _rendered(f"bits/dim, {part} split of {data.name}", names, table)


def _encoded(images: Sequence[np.ndarray], codec: str) -> list[bytes]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda image: encode(image, codec), images))


def _rendered(title: str, columns: list[str], table: list[tuple[str, list[float]]]) -> str:
    width = max(len(title), *(len(name) for name, _ in table))
    lines = [f"{title:<{width}}" + "".join(f"  {name:>12}" for name in columns)]
    for name, values in table:
        cells = ["-" if math.isnan(v) else f"{v:.3f}" for v in values[: len(columns)]]
        lines.append(f"{name:<{width}}" + "".join(f"  {v:>{max(12, len(c))}}" for v, c in zip(cells, columns, strict=True)))
    return "\n".join(lines)
