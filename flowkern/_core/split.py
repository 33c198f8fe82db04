"""Which elements a coupling transforms: the named splits, ``FeatureMask``, and how to take and put these elements."""

from __future__ import annotations

import torch

from .checks import host_tensor, on_host
from .tables import Tables

#: The named splits; the position in this tuple is the code in the kernels, and ``len(SPLITS)`` stands for a FeatureMask.
SPLITS = ("channel", "channel_swap", "checkerboard", "checkerboard_swap")


class FeatureMask(Tables):
    """A split by a boolean mask over the channels (or features): True = transformed, False = kept.

    A module, so that its index tensors move with ``.to()`` together with the layer that holds it. They are made from the
    mask wherever it goes, and are not part of a state_dict. Raises TypeError for a mask that is not boolean and ValueError
    for one that is not 1-D, or holds no values.
    """

    place: torch.Tensor  # (C,) int32: the place of a channel among the transformed ones, or -1 if it is kept
    moved: torch.Tensor  # indices of the transformed channels
    kept: torch.Tensor  # indices of the kept channels

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        if not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool:
            raise TypeError(f"FeatureMask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.ndim != 1:
            raise ValueError(f"FeatureMask: expected a 1-D mask over the channels, got shape {tuple(mask.shape)}")
        on = host_tensor("FeatureMask", mask)
        with on_host():
            place = torch.where(on, on.cumsum(0) - 1, -1).to(torch.int32)
            moved, kept = on.nonzero().flatten(), (~on).nonzero().flatten()
        self.channels, self.moved_count = len(on), len(moved)
        self.keep(mask.device, place=place, moved=moved, kept=kept)

    @classmethod
    def from_place(cls, place: torch.Tensor) -> FeatureMask:
        """The mask whose ``place`` this is."""
        return cls(place >= 0)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, transformed={self.moved_count}"


Split = str | FeatureMask


def resolve(split: Split, x: torch.Tensor) -> int:
    """The split's code in the kernels. Raises ValueError or TypeError if it is unknown or does not fit ``x``."""
    if isinstance(split, FeatureMask):
        if split.channels != x.shape[1]:
            raise ValueError(f"split: the FeatureMask has {split.channels} channels, x has {x.shape[1]}")
        if split.place.device != x.device:
            raise ValueError(f"split: the FeatureMask is on {split.place.device}, x on {x.device}; move it with .to()")
        return len(SPLITS)
    if not isinstance(split, str):
        raise TypeError(f"split: expected a name or a FeatureMask, got {type(split).__name__}")
    if split not in SPLITS:
        raise ValueError(f"split: unknown name {split!r}; expected a FeatureMask or one of {', '.join(map(repr, SPLITS))}")
    if split.startswith("checkerboard") and x.ndim != 4:
        raise ValueError(f"split: {split!r} needs images (B, C, H, W), got x of shape {tuple(x.shape)}")
    return SPLITS.index(split)


def from_code(code: int, place: torch.Tensor | None) -> Split:
    """The split that the kernels know as ``code``, with the place of its FeatureMask."""
    return SPLITS[code] if place is None else FeatureMask.from_place(place)


def moved_channels(split: Split, channels: int) -> int:
    """How many channels of scale (and of shift) a conditioner must give; C for a checkerboard."""
    if isinstance(split, FeatureMask):
        return split.moved_count
    if split == "channel":
        return channels // 2
    return channels - channels // 2 if split == "channel_swap" else channels


def kept_channels(split: Split, channels: int) -> int:
    """How many channels the conditioner sees; C for a checkerboard, whose transformed places are zeros."""
    if isinstance(split, str) and split.startswith("checkerboard"):
        return channels
    return channels - moved_channels(split, channels)


def _checkerboard(x: torch.Tensor, split: str) -> torch.Tensor:
    """(H, W) bool, True where the split transforms: h + w odd, or even for ``checkerboard_swap``."""
    h, w = (torch.arange(n, device=x.device) for n in x.shape[2:])
    return (h[:, None] + w) % 2 == (1 if split == "checkerboard" else 0)


def restrict(values: torch.Tensor, split: Split) -> torch.Tensor:
    """``values`` at the transformed places: zeros at the kept ones of a checkerboard, elsewhere ``values`` itself."""
    if isinstance(split, str) and split.startswith("checkerboard"):
        return values.masked_fill(~_checkerboard(values, split), 0.0)
    return values


def take(x: torch.Tensor, split: Split) -> torch.Tensor:
    """The transformed elements of x: (B, moved_channels, ...)."""
    if isinstance(split, FeatureMask):
        return x.index_select(1, split.moved)
    if split == "channel":
        return x[:, x.shape[1] - x.shape[1] // 2 :]
    if split == "channel_swap":
        return x[:, : x.shape[1] - x.shape[1] // 2]
    return restrict(x, split)


def put(x: torch.Tensor, moved: torch.Tensor, split: Split) -> torch.Tensor:
    """x with its transformed elements replaced by ``moved``; the inverse of ``take``."""
    if isinstance(split, FeatureMask):
        return x.index_copy(1, split.moved, moved)
    kept = x.shape[1] - x.shape[1] // 2
    if split == "channel":
        return torch.cat([x[:, :kept], moved], 1)
    if split == "channel_swap":
        return torch.cat([moved, x[:, kept:]], 1)
    return torch.where(_checkerboard(x, split), moved, x)


def conditioner_input(x: torch.Tensor, split: Split) -> torch.Tensor:
    """What a conditioner may look at: the kept channels, or x with zeros at a checkerboard's transformed places."""
    if isinstance(split, FeatureMask):
        return x.index_select(1, split.kept)
    kept = x.shape[1] - x.shape[1] // 2
    if split == "channel":
        return x[:, :kept]
    if split == "channel_swap":
        return x[:, kept:]
    return x.masked_fill(_checkerboard(x, split), 0.0)
