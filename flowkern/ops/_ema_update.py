"""A codebook that follows its rows: moving averages of how many rows each code has and of their sum.

With n_k the number of rows of code k in a batch and S_k their sum, counts_k <- decay counts_k + (1 - decay) n_k and
sums_k <- decay sums_k + (1 - decay) S_k; the code is sums_k / counts_k.

Source: van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning" (2017), appendix A.1.
"""

from __future__ import annotations

import torch

from .._core.checks import check_codes, check_floating, check_same_device
from .._core.code_sums import CodeSums, Reduce, alone

__all__ = ["ema_update", "update_averages_"]

Pair = tuple[torch.Tensor, torch.Tensor]


def _averaged(old: torch.Tensor, new: torch.Tensor, decay: float) -> torch.Tensor:
    """decay old + (1 - decay) new, in float64 and each operation by itself, which every machine does alike."""
    return new.mul(1.0 - decay).add_(old.to(torch.float64, copy=True).mul_(decay))


def update_averages_(
    x: torch.Tensor,
    index: torch.Tensor,
    codebook: torch.Tensor | None,
    counts: torch.Tensor,
    sums: torch.Tensor,
    decay: float,
    reduce: Reduce = alone,
) -> None:
    """Moves counts (K,), sums (K, D) and the codes that have rows, in place. All are float32 or float64.

    Rows that are not finite are left out. A code without rows stays exactly where it is.
    """
    batch = CodeSums(x, index, len(counts), skip=True, reduce=reduce)
    averaged = _averaged(counts, batch.counts.double(), decay)
    counts.copy_(averaged)
    # Codes with rows become the mean, the others stay: in arithmetic, which is exact here, as torch.where is slow.
    absent = batch.counts == 0
    divisor, kept = averaged.masked_fill_(absent, torch.inf)[:, None], absent.double()[:, None]
    for columns, values in batch.blocks():
        moved = _averaged(sums[:, columns], values, decay)
        sums[:, columns] = moved
        if codebook is not None:
            codebook[:, columns] = moved.div_(divisor).add_(codebook[:, columns] * kept)


@torch.no_grad()
def ema_update(x: torch.Tensor, index: torch.Tensor, counts: torch.Tensor, sums: torch.Tensor, *, decay: float) -> Pair:
    """Moving averages of the number of rows of each code and of their sum, after one more batch; nothing changes in place.

    counts_k <- decay counts_k + (1 - decay) n_k and sums_k <- decay sums_k + (1 - decay) S_k, with n_k the number and S_k
    the sum of the rows i with index_i = k. Time and memory are O(N D + K D). Rows are summed in fixed point, so that the
    result has the same bits for any order of rows and any number of threads. Rows with a value that is not finite are left out.

    Args:
        x: (..., D), floating.
        index: (...) int64, the code of each row.
        counts: (K,), sums: (K, D); float32 or float64.
        decay: the weight of the past, from 0 to 1.

    Returns: counts and sums, in the dtypes given. Neither is differentiable.

    Raises:
        TypeError: inputs of another kind of dtype.
        ValueError: a wrong shape or device, a decay outside [0, 1]; an index that is no code, where the values can be seen at
            no cost (on a CPU).

    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), appendix A.1.
    """
    check_floating("x", x)
    for name, value in (("counts", counts), ("sums", sums)):
        check_floating(name, value)
        check_same_device(name, value, x)
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: expected float32 or float64, got {value.dtype}")
    check_codes("index", index, len(counts) if counts.ndim else 0, x)
    if x.ndim < 1 or index.shape != x.shape[:-1]:
        raise ValueError(f"index: expected shape {tuple(x.shape[:-1])}, one code per row of x, got {tuple(index.shape)}")
    expected = (len(counts), x.shape[-1]) if counts.ndim == 1 else None
    if sums.shape != expected:
        raise ValueError(
            f"counts, sums: expected shapes (K,) and (K, {x.shape[-1]}), got {tuple(counts.shape)}, {tuple(sums.shape)}"
        )
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay: expected a number from 0 to 1, got {decay}")
    counts, sums = counts.clone(), sums.clone()
    update_averages_(x.reshape(-1, x.shape[-1]), index.reshape(-1), None, counts, sums, decay)
    return counts, sums
