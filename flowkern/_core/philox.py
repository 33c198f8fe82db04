"""Random numbers from counters, which a kernel makes where it needs them, as often as it needs them: nothing is stored.

Philox4x32-10 turns a key and a counter into four words of 32 bits. The key is the seed. Element 64 g + 16 w + i of sample b
takes word w (0 to 3) of the counter (16 g + i, b, offset mod 2^32, offset div 2^32): 16 counters serve 64 neighbours, in
vectors of 16.
The integers are the same on every backend, what is computed from them the same to rounding.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011), section 3.3 and figure 3.
"""

from __future__ import annotations

import math

import torch

__all__ = ["as_offset", "as_seed", "bits", "normal"]

_WORD = 2**32 - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85

Seed = int | torch.Tensor | None


def as_seed(seed: Seed, device: torch.device) -> torch.Tensor:
    """(1,) int64 on the device: the seed given, or one that torch's generator draws; without any wait for the device.

    Raises TypeError for anything else than an integer, and ValueError for more than 64 bits.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    if isinstance(seed, torch.Tensor):
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed: expected an int64 tensor of one element, got {seed.dtype} of shape {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed: expected device {device}, got {seed.device}")
        return seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, an int64 tensor of one element, or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected 64 bits, got {seed}")
    return torch.full((1,), seed, dtype=torch.int64, device=device)  # which copies nothing from the host


def as_offset(offset: int) -> int:
    """A number of 64 bits as a signed one. Raises TypeError for anything else than an int, ValueError for more bits."""
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"offset: expected an int, got {type(offset).__name__}")
    if not -(2**63) <= offset < 2**64:
        raise ValueError(f"offset: expected 64 bits, got {offset}")
    return offset if offset < 2**63 else offset - 2**64


def _high_low(a: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two words of a product: that of int64 keeps all its 64 bits, though as a signed number."""
    product = a * multiplier
    return (product >> 32) & _WORD, product & _WORD


def bits(seed: torch.Tensor, offset: int, samples: int, elements: int) -> torch.Tensor:
    """(samples, elements) int64: numbers of 32 bits."""
    groups = -(-elements // 64)
    c0 = torch.arange(16 * groups, device=seed.device).expand(samples, -1)
    c1 = torch.arange(samples, device=seed.device)[:, None].expand_as(c0)
    c2, c3 = torch.full_like(c0, offset & _WORD), torch.full_like(c0, (offset >> 32) & _WORD)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        (high0, low0), (high1, low1) = _high_low(c0, _MULTIPLIERS[0]), _high_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    words = torch.stack([c.unflatten(1, (groups, 16)) for c in (c0, c1, c2, c3)], 2)
    return words.flatten(1)[:, :elements]


def normal(seed: torch.Tensor, offset: int, samples: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
    """(samples, elements) standard normal numbers: the words w and w + 1 of a counter make two, by Box and Muller.

    r = sqrt(-2 log u), u = (word + 1/2) / 2^32, times cos and sin of pi a, a = the next word as a signed number / 2^31.
    """
    groups = -(-elements // 64)
    words = bits(seed, offset, samples, 64 * groups).unflatten(1, (groups, 2, 2, 16))
    first, second = words.unbind(3)
    radius = (-2.0 * (first.to(dtype) * 2.0**-32 + 2.0**-33).log()).sqrt()
    angle = ((second ^ 2**31) - 2**31).to(dtype) * 2.0**-31 * math.pi
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 3).flatten(1)[:, :elements]
