"""Which units of a masked network see which: ``DegreeMask``, the one description of degrees.

Unit o sees unit i of the layer before where degree(o) >= degree(i), or > in the last layer. With the units of both layers
sorted by degree, what a unit sees is a prefix of the layer before. ``masked_linear`` and the inverse of autoregressive layers
take their orders and prefixes from here.

Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation" (2015), eq. 8 and 9.
"""

from __future__ import annotations

from typing import Any

import torch

from ..._core.checks import check_same_device, host_tensor, on_host
from ..._core.tables import Tables

__all__ = ["DegreeMask", "dense_mask"]

# The torch code computes large layers in panels of rows. Time as a share of that of the one product with masked weights,
# measured on a CPU (MKL, batches of 16 to 256), forward / forward and backward: 1024 x 784 in 8 panels 0.5-0.65 / 0.7-0.8;
# 512 x 512 in 4 panels 0.7-0.8 / 0.9-1.1; 256 x 256 in 2 panels 0.9-1.2 / 1.2-1.7. More than 8 panels gain nothing.
_PANEL_ROWS, _MOST_PANELS, _PANELS_FROM = 128, 8, 1024 * 512


def _check_degrees(name: str, degrees: torch.Tensor) -> None:
    if not isinstance(degrees, torch.Tensor) or degrees.is_floating_point() or degrees.is_complex():
        raise TypeError(f"{name}: expected an integer tensor, got {getattr(degrees, 'dtype', type(degrees).__name__)}")
    if degrees.ndim != 1:
        raise ValueError(f"{name}: expected one degree per unit, shape (N,), got shape {tuple(degrees.shape)}")


def _panels(reach: list[int]) -> tuple[int, ...]:
    """(end, whole, seen) for one panel of rows after the other: its rows see `whole` columns all, and up to `seen` some."""
    rows = len(reach)
    count = min(_MOST_PANELS, rows // _PANEL_ROWS)
    ends = [rows * (i + 1) // count for i in range(count)]
    starts = [0, *ends[:-1]]
    return tuple(n for start, end in zip(starts, ends, strict=True) for n in (end, reach[start], reach[end - 1]))


class DegreeMask(Tables):
    """The mask M[o, i] = out_degrees[o] >= in_degrees[i] (``strict``: >) of a masked linear layer, prepared once on the host.

    A module, so that its index tensors move with ``.to()`` together with the layer that holds it. They are made from
    the degrees wherever it goes, and are not part of a state_dict. Any integers are degrees.

    Attributes:
        out_degrees, in_degrees: (O,), (I,) int64.
        reach: (O,) int32: how many of the sorted inputs the sorted outputs see, from the one of lowest degree up.
        first: (I,) int32: the first of the sorted outputs that sees each sorted input; O where none does.
        rows, columns: int32, the outputs and the inputs sorted by degree; None where they come sorted.
        unmasked, share: how many weights are not masked, and which share of all.

    Raises TypeError for degrees that are not integer tensors and ValueError for those that are not 1-D, not on one device, or
    hold no values.
    """

    out_degrees: torch.Tensor
    in_degrees: torch.Tensor
    reach: torch.Tensor
    first: torch.Tensor
    rows: torch.Tensor | None
    columns: torch.Tensor | None

    def __init__(self, out_degrees: torch.Tensor, in_degrees: torch.Tensor, *, strict: bool = False):
        super().__init__()
        _check_degrees("out_degrees", out_degrees)
        _check_degrees("in_degrees", in_degrees)
        check_same_device("in_degrees", in_degrees, out_degrees, of="out_degrees")
        out, into = host_tensor("out_degrees", out_degrees), host_tensor("in_degrees", in_degrees)
        with on_host():
            from_low, columns = into.sort(stable=True)
            to_high, rows = out.sort(stable=True)
            reach = torch.searchsorted(from_low, to_high, right=not strict)
            first = torch.searchsorted(reach, torch.arange(len(into)), right=True)
            tables = {
                "out_degrees": out.long(),
                "in_degrees": into.long(),
                "reach": reach.int(),
                "first": first.int(),
                "rows": None if torch.equal(to_high, out) else rows.int(),
                "columns": None if torch.equal(from_low, into) else columns.int(),
            }
            ends = reach.tolist()
        self.strict = strict
        self.out_features, self.in_features = len(out), len(into)
        self.unmasked = sum(ends)
        self.sorted = tables["rows"] is None and tables["columns"] is None
        self.panels = _panels(ends) if self.sorted and len(out) * len(into) >= _PANELS_FROM else ()
        self.keep(out_degrees.device, **tables)

    def make(self, device: torch.device) -> None:
        super().make(device)
        # What the registered ops take of a mask: a plain attribute, which is found ten times faster than a buffer.
        self.indices: tuple[Any, ...] = self.reach, self.first, self.rows, self.columns, self.panels

    @property
    def degrees(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(out_degrees, in_degrees) as numbers: known without a look at any device."""
        return self.numbers["out_degrees"][0], self.numbers["in_degrees"][0]  # type: ignore[index]

    @property
    def prefixes(self) -> list[int]:
        """``reach`` as numbers."""
        return [*self.numbers["reach"][0]]  # type: ignore[index]

    def order(self, which: str) -> list[int]:
        """The units sorted by degree, as numbers: "rows" are the outputs, "columns" the inputs."""
        table = self.numbers[which]
        return [*range(self.out_features if which == "rows" else self.in_features)] if table is None else [*table[0]]

    @property
    def share(self) -> float:
        return self.unmasked / max(1, self.out_features * self.in_features)

    def dense(self) -> torch.Tensor:
        """M, (O, I) bool, for inspection."""
        return dense_mask(self.reach, self.rows, self.columns, self.in_features)

    def extra_repr(self) -> str:
        kind = "" if self.sorted else ", unsorted"
        return f"{self.out_features} x {self.in_features}, strict={self.strict}, not masked={self.share:.1%}{kind}"


def dense_mask(reach: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None, inputs: int) -> torch.Tensor:
    """(O, inputs) bool: the mask that these tables of a ``DegreeMask`` describe."""
    place = torch.arange(inputs, device=reach.device) if columns is None else columns.argsort()
    ends = reach if rows is None else reach[rows.argsort()]
    return place < ends[:, None]
