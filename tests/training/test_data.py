"""Data sources, and the keyed order and noise of training."""

from __future__ import annotations

import gzip
import itertools
import math
import os
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("PIL")
pytest.importorskip("sklearn")

from PIL import Image, ImageOps, features  # noqa: E402

from flowkern import cli, data  # noqa: E402
from flowkern.data import noise, sources  # noqa: E402
from flowkern.training import negative_log_likelihood  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Bundled data


def test_digits_are_split_in_file_order():
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    assert (digits.levels, digits.shape, len(digits.classes)) == (17, (1, 8, 8), 10)
    assert [len(s) for s in (digits.train, digits.val, digits.test)] == [1000, 350, 447]
    values = np.concatenate([s.values for s in (digits.train, digits.val, digits.test)])
    assert values.dtype == np.uint8
    assert (values.reshape(-1, 64) == load_digits().data).all()
    assert digits.test.labels.tolist() == load_digits().target[1350:].tolist()


def test_photos_have_disjoint_regions(monkeypatch):
    from sklearn.datasets import load_sample_images

    real = data.load("photos")
    assert (real.levels, real.shape, real.classes) == (256, (3, 32, 32), ("china", "flower"))
    china = load_sample_images().images[0].transpose(2, 0, 1)
    assert (real.train.values[0] == china[:, :32, :32]).all(), "the crop is not a piece of the picture"
    photos = _numbered_photos(monkeypatch)
    columns = [set(np.unique(split.values[:, 2])) for split in (photos.train, photos.val, photos.test)]
    assert len(set.union(*columns)) == sum(map(len, columns)) == 160, "a column is in two splits, or in none"
    for split in (photos.train, photos.val, photos.test):
        assert np.bincount(split.labels).tolist() == [len(split) // 2] * 2


def _numbered_photos(monkeypatch) -> data.Dataset:
    """Of photographs of 427 x 640 of which a pixel tells its row and, last, its group of four columns."""
    rows, columns = np.indices((427, 640))
    image = np.stack([rows % 256, rows // 256, columns // 4], -1).astype(np.uint8)
    bunch = type("Bunch", (), {"filenames": ("china.jpg", "flower.jpg"), "images": (image, image)})
    monkeypatch.setattr("sklearn.datasets.load_sample_images", bunch)
    return data.load("photos")


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _write_images(root: Path, names: list[str], mode: str = "RGB") -> None:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (20 + i, 30), i if mode == "L" else (i, 100, 200)).save(root / name)


def _refused(source: str, message: str, **options: object) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load(source, **options)


def test_folder_reads_what_it_can_and_reports_the_rest(tmp_path):
    _write_images(tmp_path, [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(10)])
    (tmp_path / "cat" / "text.png").write_text("no image")
    whole = (tmp_path / "dog" / "0.png").read_bytes()
    (tmp_path / "dog" / "cut.png").write_bytes(whole[:-30] + bytes(255 - b for b in whole[-30:]))
    Image.fromarray(np.full((9, 9), 70_000 % 65536, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "readme.txt").write_text("not looked at")
    (tmp_path / "dog" / "._0.png").write_bytes(b"left by a file system")
    lines: list[str] = []
    folder = data.load(f"folder:{tmp_path}", size=16, report=lines.append)
    assert (folder.shape, folder.levels, folder.classes) == ((3, 16, 16), 256, ("cat", "dog"))
    assert [len(s) for s in (folder.train, folder.val, folder.test)] == [16, 2, 2]
    assert len(lines) == 4
    for name in ("cat/text.png", "dog/cut.png", "deep.png"):
        assert sum(name in line for line in lines) == 1, name
    assert "more than 8 bits" in next(line for line in lines if "deep.png" in line)
    assert "skipped 3 of 23" in lines[-1]
    # The colour of an image tells its class: i < 10 are cats.
    for split in (folder.train, folder.val, folder.test):
        assert ((split.values[:, 0, 0, 0] >= 10) == split.labels).all()


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, MemoryError, AttributeError, RecursionError])
def test_whatever_a_decoder_raises_is_a_line_for_that_file(tmp_path, monkeypatch, error):
    _write_images(tmp_path, [f"{i}.png" for i in range(4)])
    fit = ImageOps.fit

    def decode(image: Image.Image, *rest: object) -> Image.Image:
        if image.size[0] == 22:
            raise error("in two\nlines")
        return fit(image, *rest)

    monkeypatch.setattr(ImageOps, "fit", decode)
    lines: list[str] = []
    data.load(f"folder:{tmp_path}", size=4, report=lines.append)
    skipped = f"data: skipped {tmp_path / '2.png'}: {error.__name__}: in two lines"
    assert lines == [skipped, f"data: skipped 1 of 4 images below {tmp_path}"]


def test_images_of_kinds_that_the_decoder_does_not_know(tmp_path):
    """Of formats whose decoders raise more than OSError: a DDS of unknown pixels, an AVIF of damaged pixels; and a pipe."""
    _write_images(tmp_path, [f"{i}.png" for i in range(3)])
    header = [124, 0x1007, 8, 8, 0, 0, 0, *[0] * 11, 32, 4, int.from_bytes(b"ABCD", "little"), *[0] * 5, 0x1000, *[0] * 4]
    (tmp_path / "x.dds").write_bytes(b"DDS " + np.array(header, "<u4").tobytes() + bytes(64))
    names = ["x.dds", "pipe.png"]
    os.mkfifo(tmp_path / "pipe.png")
    if features.check("avif"):
        Image.new("RGB", (40, 40), (9, 99, 200)).save(tmp_path / "x.avif")
        whole = (tmp_path / "x.avif").read_bytes()
        (tmp_path / "x.avif").write_bytes(whole[:-30] + bytes(255 - b for b in whole[-30:]))
        names.append("x.avif")
    lines: list[str] = []
    data.load(f"folder:{tmp_path}", size=4, report=lines.append)
    for name in names:
        assert sum(name in line for line in lines) == 1, (name, lines)


def test_folder_split_depends_on_the_names_alone(tmp_path):
    names = [f"{i}.png" for i in range(50)]
    _write_images(tmp_path / "a", names)
    _write_images(tmp_path / "b", names[::-1])
    first, second = (data.load(f"folder:{tmp_path / name}", size=4) for name in "ab")
    assert first.classes == ()
    assert first.train.labels is None
    colour = lambda split: split.values[:, 0, 0, 0].tolist()  # noqa: E731
    assert colour(first.test) == [49 - c for c in colour(second.test)]
    members = [*colour(first.train), *colour(first.val), *colour(first.test)]
    assert sorted(members) == list(range(50))
    _write_images(tmp_path / "a", [*names, "another.png"])
    moved = set(colour(data.load(f"folder:{tmp_path / 'a'}", size=4).test)) ^ set(colour(first.test))
    assert len(moved) <= 2, "one more image may push one other across each border"


def test_folder_of_gray_images_has_one_channel(tmp_path):
    _write_images(tmp_path, [f"{i}.png" for i in range(5)], mode="L")
    assert data.load(f"folder:{tmp_path}").shape == (1, 32, 32)
    _write_images(tmp_path, ["colour.png"])
    assert data.load(f"folder:{tmp_path}").shape == (3, 32, 32)


def test_folder_without_readable_images(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    _refused(f"folder:{tmp_path}", r"holds 0 readable images \(of 1\)", report=lambda line: None)
    _refused(f"folder:{tmp_path / 'a.png'}", "is not a folder")
    _refused(f"folder:{tmp_path}", "size must be at least 1", size=0)


# ---------------------------------------------------------------------------------------------------------------------
# Binary formats


def _write_cifar10(root: Path, records: int) -> None:
    root.mkdir(parents=True)
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = np.full((records, 3073), k, np.uint8)
        rows[:, 1:1025] = 10 * np.arange(records)[:, None]
        (root / f"{name}.bin").write_bytes(rows.tobytes())


def test_cifar10(tmp_path, monkeypatch):
    root = tmp_path / "cifar-10-batches-bin"
    _write_cifar10(root, 20)
    _refused(f"cifar10:{root}", "data_batch_1.bin has 61460 bytes; expected 10000 records of 3073 bytes")
    monkeypatch.setattr(sources, "_CIFAR10_RECORDS", 20)
    for folder in (tmp_path, root):
        cifar = data.load(f"cifar10:{folder}")
        assert (cifar.shape, cifar.levels) == ((3, 32, 32), 256)
        assert [len(s) for s in (cifar.train, cifar.val, cifar.test)] == [90, 10, 20]
        assert cifar.train.labels[[0, 20, 40, 60, 80]].tolist() == [0, 1, 2, 3, 4]
        assert cifar.test.values[3, :, 5, 6].tolist() == [30, 5, 5], "the first plane is red"
    (root / "data_batch_3.bin").write_bytes(b"\x0b" * 20 * 3073)
    _refused(f"cifar10:{root}", "data_batch_3.bin has label 11; expected 0 to 9")
    (tmp_path / "empty").mkdir()
    _refused(f"cifar10:{tmp_path / 'empty'}", "data_batch_1.bin does not exist")


def _idx(values) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def _write_mnist(root: Path, packed: bool) -> None:
    root.mkdir()
    for part, n in (("train", 40), ("t10k", 7)):
        images = np.arange(n, dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8)
        for stem, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", images[:, 0, 0] % 10)):
            raw = _idx(values)
            (root / (f"{stem}.gz" if packed else stem)).write_bytes(gzip.compress(raw) if packed else raw)


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(tmp_path, packed):
    _write_mnist(tmp_path / "m", packed)
    mnist = data.load(f"mnist:{tmp_path / 'm'}")
    assert (mnist.shape, mnist.levels) == ((1, 28, 28), 256)
    assert [len(s) for s in (mnist.train, mnist.val, mnist.test)] == [36, 4, 7]
    assert mnist.val.values[:, 0, 0, 0].tolist() == [36, 37, 38, 39]
    assert mnist.val.labels.tolist() == [6, 7, 8, 9]


def test_mnist_refuses_what_is_not_whole(tmp_path):
    root = tmp_path / "m"
    _write_mnist(root, packed=False)
    images, labels = root / "train-images-idx3-ubyte", root / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    for raw, message in (
        (whole[:-1], r"images-idx3-ubyte has 31375 bytes; expected 31376 for sizes \(40, 28, 28\)"),
        (labels.read_bytes(), "starts with 0x00000801 .* expected the magic number 0x00000803"),
        (b"\0", r"\(1 bytes\)"),
        (_idx(np.zeros((39, 28, 28), np.uint8)), r"images \(39, 28, 28\) and 40 labels"),
    ):
        images.write_bytes(raw)
        _refused(f"mnist:{root}", message)
    images.unlink()
    _refused(f"mnist:{root}", "holds none of train-images-idx3-ubyte")
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-20])
    _refused(f"mnist:{root}", "is not a whole gzip file")


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


@pytest.mark.parametrize("shape", [(20, 6, 5), (20, 3, 6, 5)])
def test_npy_images(tmp_path, shape):
    values = np.arange(math.prod(shape), dtype=np.int64).astype(np.uint8).reshape(shape)
    np.save(tmp_path / "x.npy", values)
    loaded = data.load(f"npy:{tmp_path / 'x.npy'}")
    assert (loaded.levels, loaded.shape) == (256, shape[1:] if len(shape) == 4 else (1, *shape[1:]))
    assert [len(s) for s in (loaded.train, loaded.val, loaded.test)] == [16, 2, 2]
    rows = {row.tobytes() for s in (loaded.train, loaded.val, loaded.test) for row in s.values}
    assert rows == {row.tobytes() for row in values}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_npy_vectors_are_continuous(tmp_path, dtype):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(30, 4)).astype(dtype))
    loaded = data.load(f"npy:{tmp_path / 'x.npy'}")
    assert (loaded.levels, loaded.shape, loaded.train.values.dtype) == (None, (4,), np.float32)
    batch = data.batch_of(loaded, "train", np.array([3, 0]), seed=0, epoch=0)
    assert (batch.x.numpy() == loaded.train.values[[3, 0]]).all(), "continuous data gets no noise"


def test_npy_refuses_bad_rows_and_foreign_files(tmp_path):
    path = tmp_path / "x.npy"
    values = np.zeros((30, 4))
    values[7, 1], values[29, 0] = np.nan, 1e300
    for array, message in (
        (values, "2 rows are not finite in float32: 7, 29"),
        (np.zeros((5, 4), np.int32), r"holds int32 of shape \(5, 4\); expected uint8"),
        (np.zeros((2, 4)), "at least 3 samples"),
        (np.array([{}]), "holds object of shape"),
    ):
        np.save(path, array, allow_pickle=True)
        _refused(f"npy:{path}", message)
    np.save(path, np.zeros((30, 4)))
    path.write_bytes(path.read_bytes()[:-8])
    _refused(f"npy:{path}", "is not a whole .npy file")
    np.savez(tmp_path / "x.npz", a=values)
    _refused(f"npy:{tmp_path / 'x.npz'}", "it is an archive")


def _write_header(path: Path, shape: str, descr: str = "'<f4'", behind: int = 4000) -> None:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(behind))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"shape": "(1000000000000, 4)"}, r"float32 of shape \(1000000000000, 4\) is 16000000000000 bytes, got 4000"),
        ({"shape": f"({2**62}, {2**62})"}, "bytes, got 4000"),
        ({"shape": f"({10**18}, {10**18}, 8)", "descr": "'|u1'"}, "bytes, got 4000"),
        ({"shape": "(True, 30)"}, r"shape \(True, 30\); expected whole numbers of at least 0"),
        ({"shape": "(30, True)"}, r"shape \(30, True\); expected whole numbers of at least 0"),
        ({"shape": "(-1, 4)"}, r"shape \(-1, 4\); expected whole numbers of at least 0"),
        ({"shape": "(-30, -4)"}, "expected whole numbers of at least 0"),
        ({"shape": "(30.0, 4)"}, "is not a whole .npy file"),
        ({"shape": "(1000000000000, 0)"}, "expected at least 3 samples that are not empty"),
        ({"shape": "(30, 4)", "descr": "'|O'"}, r"holds object of shape \(30, 4\)"),
        ({"shape": "(30, 4)", "descr": "'<c8'"}, r"holds complex64 of shape \(30, 4\)"),
        ({"shape": "(30, 4)", "descr": "[('a', '<f4')]"}, "expected uint8"),
        ({"shape": "(30, 4)", "descr": "'nonsense'"}, "is not a whole .npy file"),
        ({"shape": "(" * 3000}, "is not a whole .npy file"),
        ({"shape": "(30, 4)", "behind": 479}, r"is 480 bytes, got 479"),
    ],
)
def test_npy_headers_are_not_believed(tmp_path, monkeypatch, header, message):
    _write_header(tmp_path / "x.npy", **header)
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("it was read before its header was checked"))
    _refused(f"npy:{tmp_path / 'x.npy'}", message)


def test_npy_in_any_order_of_memory(tmp_path):
    values = np.arange(720, dtype=np.int64).astype(np.uint8).reshape(30, 4, 6)
    for array in (values, np.random.default_rng(0).normal(size=(30, 4))):
        loaded = []
        for variant in (array, np.asfortranarray(array), array.astype(array.dtype.newbyteorder())):
            np.save(tmp_path / "x.npy", variant)
            loaded.append(data.load(f"npy:{tmp_path / 'x.npy'}"))
        for other in loaded[1:]:
            for part in ("train", "val", "test"):
                assert (getattr(other, part).values == getattr(loaded[0], part).values).all()
                batches = [data.batch_of(d, part, np.arange(2), seed=0, epoch=0).x for d in (loaded[0], other)]
                assert torch.equal(*batches)


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    os.mkfifo(tmp_path / "pipe.npy")
    for name in ("folder", "pipe"):
        _refused(f"npy:{tmp_path / name}.npy", rf"{name}\.npy is not a file")
    for source in ("", "nope", "digits:x", "folder", "folder:", "mnist"):
        _refused(source, "unknown source")
    _refused(f"folder:{tmp_path / 'no'}", "does not exist")
    _refused("digits", "only folder:PATH is resized", size=16)


def test_a_source_is_one_declared_function(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_READERS", dict(sources._READERS))

    @data.source("lines:PATH")
    def lines(path: Path) -> data.Dataset:
        part = data.Split(np.array([[float(line)] for line in path.read_text().split()], np.float32))
        return data.Dataset("lines", None, part, part, part, ())

    (tmp_path / "x").write_text("1.5 2.5")
    assert data.load(f"lines:{tmp_path / 'x'}").test.values.tolist() == [[1.5], [2.5]]
    _refused("lines", r"unknown source 'lines'; expected one of digits, .*, npy:PATH, lines:PATH")
    assert f"{', '.join(data.SOURCES[:-1])} or {data.SOURCES[-1]}" == cli._SOURCES, "what the command line says"


# ---------------------------------------------------------------------------------------------------------------------
# Dequantization


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantized_values_stay_in_their_bins(levels):
    v = np.arange(levels, dtype=np.uint8)
    for u in (0.0, 0.5, 65535 / 65536):
        x = data.dequantize(v, levels, np.full(levels, u, np.float32))
        assert x.dtype == torch.float32
        assert 0.0 <= float(x.min()) <= float(x.max()) < 1.0
        # Division rounds once: floor is exact again half a unit in the last place further up.
        assert (torch.floor(x.double() * levels + 1e-5).numpy() == v).all()


def test_discrete_nll_of_a_histogram_density(digits):
    """With p(x) = levels^D P(v) on the bin of v, the bound is -log P(v) itself, whatever the noise."""
    counts = np.bincount(digits.train.values.ravel(), minlength=17) + 1.0
    log_p = torch.from_numpy(np.log(counts / counts.sum()))
    batch = data.batch_of(digits, "val", np.arange(50), seed=3, epoch=1)
    v = torch.floor(batch.x.double() * 17 + 1e-5).long()
    log_density = (log_p[v] + math.log(17)).flatten(1).sum(1)
    expected = -log_p[torch.from_numpy(digits.val.values[:50]).long()].flatten(1).sum(1)
    torch.testing.assert_close(negative_log_likelihood(log_density, 64, 17), expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(negative_log_likelihood(log_density, 64, None), -log_density, rtol=0.0, atol=0.0)


def test_noise_is_uniform_and_independent(digits):
    samples = np.arange(1000)
    noise = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        x = data.batch_of(digits, "train", samples, seed=seed, epoch=epoch).x.double().numpy()
        noise.append((x * 17 - digits.train.values).reshape(1000, -1))
    n = 64_000
    for u in noise:
        # Five standard errors of the mean and of the variance of U[0, 1), whose fourth central moment is 1/80.
        assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
        assert abs(u.var() - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / n)
        # Neighbouring pixels and samples: correlation 0 with standard error 1 / sqrt(n).
        for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(a.size)
    for a, b in itertools.combinations(noise, 2):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(n)


def test_keyed_streams_are_fixed():
    """Checkpoints of one version resume in another: these figures may never change."""
    assert noise.order(7, 3, 8).tolist() == [2, 4, 0, 6, 7, 5, 1, 3]
    assert (noise.uniform(7, "train", 3, np.array([5]), 4)[0] * 65536).astype(int).tolist() == [33052, 45757, 62050, 58747]


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


def _stack(batches) -> torch.Tensor:
    return torch.cat([b.x for b in batches])


def test_batches_do_not_depend_on_workers(digits):
    alone, helped = (list(data.loader(digits, "train", 64, seed=1, epoch=2, workers=n)) for n in (0, 2))
    assert [b.total for b in alone] == [64] * 15 + [40]
    assert torch.equal(_stack(alone), _stack(helped))
    assert torch.equal(torch.cat([b.labels for b in alone]), torch.cat([b.labels for b in helped]))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_global_batches(digits, world):
    whole = list(data.loader(digits, "train", 63, seed=1, epoch=2))
    slices = zip(*(data.loader(digits, "train", 63, seed=1, epoch=2, rank=r, world=world) for r in range(world)), strict=True)
    for batch, parts in zip(whole, slices, strict=True):
        assert sum(len(p.x) for p in parts) == len(batch.x) == parts[0].total
        for rank, part in enumerate(parts):
            assert torch.equal(part.x, batch.x[rank::world])
            assert torch.equal(part.labels, batch.labels[rank::world])


def test_a_rank_may_get_nothing(digits):
    *_, last = data.loader(digits, "train", 999, seed=0, rank=1, world=2)
    assert last.x.shape == (0, 1, 8, 8)
    assert last.total == 1


@pytest.mark.parametrize(("workers", "parts"), [(0, 1), (2, 1), (0, 2)])
def test_loader_resumes_in_mid_epoch(digits, workers, parts):
    loader, resumed = (data.loader(digits, "train", 100, seed=4, epoch=1, workers=workers, parts=parts) for _ in range(2))
    batches = iter(loader)
    whole = [next(batches) for _ in range(3 * parts)]
    resumed.load_state_dict(loader.state_dict())
    whole += list(batches)
    assert torch.equal(_stack(whole), _stack(data.loader(digits, "train", 100, seed=4, epoch=1, parts=parts)))
    assert torch.equal(_stack(resumed), _stack(whole[3 * parts :]))
    resumed.sampler.set_epoch(2)
    assert len(list(resumed)) == 10 * parts, "the next epoch is whole again"


@pytest.mark.parametrize("world", [1, 2])
def test_parts_make_up_the_batches(digits, world):
    """Sample i of a batch comes in part i % parts, on rank (i // parts) % world; small last batches have as many parts."""
    whole = list(data.loader(digits, "train", 333, seed=1, epoch=2))
    assert [len(b.x) for b in whole] == [333, 333, 333, 1]
    ranks = [list(data.loader(digits, "train", 333, seed=1, epoch=2, rank=r, world=world, parts=3)) for r in range(world)]
    for i, batch in enumerate(whole):
        x = torch.full_like(batch.x, math.nan)
        for rank, batches in enumerate(ranks):
            assert len(batches) == len(data.loader(digits, "train", 333, seed=1, parts=3)) == 12
            for part, piece in enumerate(batches[3 * i : 3 * i + 3]):
                x[part::3][rank::world] = piece.x
                assert piece.total == len(batch.x)
        assert torch.equal(x, batch.x)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_refuses_nan_and_names_batch_and_row(tmp_path, workers):
    """The values turn bad after ``load``, which refuses them itself."""
    path = tmp_path / "x.npy"
    np.save(path, np.arange(90.0).reshape(30, 3))
    loaded = data.load(f"npy:{path}")
    row = int(loaded.train.values[5, 0]) // 3
    loaded.train.values[5, 1] = np.nan
    batches = iter(data.loader(loaded, "train", 4, seed=0, workers=workers))
    number = noise.order(0, 0, len(loaded.train)).tolist().index(5) // 4
    for _ in range(number):
        next(batches)
    message = f"{path}: NaN or infinity in 1 of 4 samples of train batch {number}, epoch 0: row {row}$"
    with pytest.raises(ValueError, match=message):
        next(batches)


def test_loader_names_the_file_of_a_bad_image(tmp_path, monkeypatch):
    _write_images(tmp_path, [f"{i}.png" for i in range(5)])
    folder = data.load(f"folder:{tmp_path}", size=4)
    dequantize = noise.dequantize
    monkeypatch.setattr("flowkern.data.batches.dequantize", lambda values, levels, u: dequantize(values, levels, u) * math.inf)
    with pytest.raises(ValueError, match=r"in 1 of 1 samples of val batch 0, epoch 0: ") as error:
        next(iter(data.loader(folder, "val", 4, seed=0)))
    named = Path(str(error.value).rpartition(": ")[2])
    assert (sources._decode(named, 4) == folder.val.values[0]).all()


def test_distinct_crops_share_no_pixel(monkeypatch):
    photos = _numbered_photos(monkeypatch)
    for split, columns in ((photos.train, 3), (photos.val, 1), (photos.test, 1)):
        crops = split.values[split.distinct]
        assert len(crops) == 2 * 4 * columns * 13, "as many as fit"
        for label in (0, 1):
            pixels = crops[split.labels[split.distinct] == label].transpose(0, 2, 3, 1).reshape(-1, 3)
            assert len(np.unique(pixels, axis=0)) == len(pixels) / 4


def test_epochs_differ_and_validation_does_not(digits):
    first, second = (_stack(data.loader(digits, "train", 100, seed=0, epoch=e)) for e in (0, 1))
    assert not torch.equal(first, second)
    assert sorted(noise.order(0, 1, 1000).tolist()) == list(range(1000))
    one, other = (_stack(data.loader(digits, "val", 100, seed=0, epoch=e)) for e in (0, 1))
    assert torch.equal(one, other)
    assert (torch.floor(one.double() * 17 + 1e-5).numpy() == digits.val.values).all(), "validation is in file order"


@pytest.mark.parametrize(("n", "kept"), [(3, 1), (5, 1), (6, 2), (12, 2), (29, 2), (30, 3)])
def test_small_folders_have_enough_for_a_standard_error(tmp_path, n, kept):
    _write_images(tmp_path, [f"{i}.png" for i in range(n)])
    found = data.load(f"folder:{tmp_path}", size=4)
    assert (len(found.train), len(found.val), len(found.test)) == (n - 2 * kept, kept, kept)
