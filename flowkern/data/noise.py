"""The order of the samples in an epoch and the noise on them, each keyed by what it belongs to."""

from typing import Any

import numpy as np
import torch

_STREAMS = {"order": 0, "train": 1, "val": 2, "test": 3}


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of an epoch. Raw Philox output is fixed by its specification; Generator's methods are not."""
    bits = np.random.Philox(key=[seed, _STREAMS["order"]], counter=[0, 0, epoch, 0]).random_raw(n)
    return np.argsort(bits, kind="stable")


def uniform(seed: int, stream: str, epoch: int, samples: np.ndarray, count: int) -> np.ndarray:
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
