"""Batches of a data set, which depend on seed, epoch and sample alone, whatever the number of workers and ranks."""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset as TorchDataset

from .noise import dequantize, order, uniform
from .sources import Dataset, Split


class Batch(NamedTuple):
    """A batch, or a part of it: one rank's slice of one of the parts that a step accumulates.

    x: (B, C, H, W) or (B, D) float32; labels: (B,) int64 or None; total: the samples of the batch over all ranks and parts.
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
        u = uniform(seed, part, epoch, samples, count) if data.noise else np.full((len(samples), count), 0.5, np.float32)
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
        permuted = order(self.seed, self.epoch, self.n) if self.shuffle else np.arange(self.n)
        for i in range(first, len(self)):
            batch, part = divmod(i, self.parts)
            samples = permuted[batch * self.batch_size : (batch + 1) * self.batch_size]
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
