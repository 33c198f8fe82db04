"""Vector quantizers: a codebook that learns by moving averages or by its loss, on one process or many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ... import ops
from ..._core.checks import accumulation_dtype, check_same_device
from .codebook import initialize_codes, lookup, normalize, update_codes
from .quantizer import Quantizer, Triple

INITS = ("kmeans", "uniform")


class VectorQuantizer(Quantizer, kind="vector"):
    """The nearest code of every vector: forward(x) -> (quantized, index, loss).

    quantized is in value exactly the code and passes its gradient to x, straight or rotated (``ops.vector_quantize``). The codes
    learn in one of two ways. With a ``decay`` they are the moving averages of the vectors assigned to them, and loss = commitment
    mean (x - sg(c))^2. With ``decay=None`` the codebook is a parameter, and loss has the term mean (sg(x) - c)^2 besides.

    In training mode each forward takes one step of the moving averages, as batch normalization does, under ``no_grad`` too;
    in evaluation mode nothing changes. A code that no vector is assigned to stays exactly where it is: the averages are not
    smoothed, which would draw unused codes to the origin. Vectors that are not finite are left out of all statistics.

    Where ``torch.distributed`` is initialized, initialization, averages and revival are those of the vectors of all processes
    together, which must all come to that forward, be it with no vectors. Sums are in fixed point: codebooks have the same
    bits in all processes, for any number of them, and in one process that has all their vectors, rank 0's first.

    Args:
        dim: D, the channels of x.
        codes: K.
        heads: x is split into so many parts, each with a codebook of its own.
        decay: the weight of the past in the moving averages, or None.
        commitment: beta, the weight of the commitment term.
        init: "kmeans": the first forward in training mode sets the codes by Lloyd's iterations on its vectors; "uniform": +-1/K.
        revive_below: a code is dead when its moving count falls under this share of the mean number of vectors per code, N / K
            (0.1, say). It moves onto a vector of the batch drawn at random, and its averages start anew there; at most 256
            codes a step, the least used first. None: codes may die. Needs a decay.
        cosine: vectors (each head's) and codes are divided by their norms first; so quantized has norm 1.
        rotation: the gradient of the rotation trick.
        channels_first: x is (B, D, ...) instead of (B, ..., D).

    Shapes: x and quantized (B, ..., D) or (B, D, ...) with any number of further dimensions; index (B, ...), int64, with heads
    (B, ..., heads); loss 0-d. State: codebook (heads, K, D / heads), counts (heads, K), sums as the codebook, float32 or
    float64 whatever the module is cast to.

    Raises ValueError for arguments out of range, heads that do not divide D, inputs of other shapes; TypeError for other dtypes.

    Sources: van den Oord et al., "Neural Discrete Representation Learning" (2017), eq. 3 and appendix A.1; Fifty et al.,
    "Restructuring Vector Quantization with the Rotation Trick" (2024).
    """

    codebook: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor
    initialized: torch.Tensor  # 0-d bool
    steps: torch.Tensor  # 0-d int64

    def __init__(
        self,
        dim: int,
        codes: int,
        *,
        heads: int = 1,
        decay: float | None = 0.99,
        commitment: float = 0.25,
        init: str = "kmeans",
        revive_below: float | None = None,
        cosine: bool = False,
        rotation: bool = False,
        channels_first: bool = False,
    ):
        super().__init__()
        if dim < 1 or codes < 1 or heads < 1:
            raise ValueError(f"VectorQuantizer: dim, codes and heads must be at least 1, got {dim}, {codes} and {heads}")
        if dim % heads:
            raise ValueError(f"VectorQuantizer: heads must divide dim, got {heads} heads of dim {dim}")
        if decay is not None and not 0.0 <= decay < 1.0:
            raise ValueError(f"VectorQuantizer: expected a decay from 0 to under 1, or None, got {decay}")
        if init not in INITS:
            raise ValueError(f"VectorQuantizer: unknown init {init!r}; expected one of {', '.join(map(repr, INITS))}")
        if revive_below is not None and not 0.0 < revive_below < 1.0:
            raise ValueError(f"VectorQuantizer: expected revive_below between 0 and 1, or None, got {revive_below}")
        if revive_below is not None and decay is None:
            raise ValueError("VectorQuantizer: revive_below needs the counts of moving averages; give a decay")
        self.dim, self.codes, self.heads, self.decay, self.commitment = dim, codes, heads, decay, float(commitment)
        self.init, self.revive_below, self.cosine, self.rotation = init, revive_below, cosine, rotation
        self.channels_first, self.index_shape = channels_first, () if heads == 1 else (heads,)
        codebook = torch.empty(heads, codes, dim // heads).uniform_(-1 / codes, 1 / codes)
        if cosine:
            normalize(codebook)
        if decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("counts", torch.ones(heads, codes))
            self.register_buffer("sums", codebook.clone())
            self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("initialized", torch.tensor(init == "uniform"))
        self.known = init == "uniform"  # that ``initialized`` is True: what the host knows without asking the device

    def forward(self, x: torch.Tensor) -> Triple:
        last = self.channels_last(x)
        rows = self._rows(last)
        if self.training and not self.known:
            check_same_device("x", x, self.codebook, of="the codebook")
            if not rows.is_meta:
                self._initialize(rows.detach())
        how: dict[str, Any] = {"beta": self.commitment, "codebook_loss": self.decay is None, "rotation": self.rotation}
        parts = [ops.vector_quantize(rows[:, i], codes, **how) for i, codes in enumerate(self._codes())]
        if self.heads == 1:
            quantized, index, loss = parts[0]
        else:
            all_quantized, all_index, losses = zip(*parts, strict=True)
            quantized, index = torch.cat(all_quantized, 1), torch.stack(all_index, 1)
            loss = torch.stack(losses).mean()
        if self.training and self.decay is not None:
            state = self.codebook, self.counts, self.sums, self.steps
            update_codes(rows.detach(), index.view(-1, self.heads), *state, self.decay, self.revive_below or 0.0, self.cosine)
        quantized = quantized.to(x.dtype).view(last.shape)
        return self.as_given(quantized), self._shaped(index, last), loss

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The index of every vector of x, as forward gives it; nothing is learned."""
        last = self.channels_last(x)
        return self._shaped(lookup(self._rows(last), self._codes()), last)

    def decode(self, index: torch.Tensor) -> torch.Tensor:
        """The codes of these indices: quantized of forward, in the dtype of the codebook.

        Raises TypeError for an index that is not int64, and ValueError for one without a last dimension of heads, on another
        device or, where the values can be seen at no cost (on a CPU), with values that are no codes.
        """
        self.check_index(index)
        codebook = self._codes()
        if self.heads == 1:
            return self.as_given(codebook[0][index])
        parts = [codes[index[..., i]] for i, codes in enumerate(codebook)]
        return self.as_given(torch.cat(parts, -1))

    def _rows(self, last: torch.Tensor) -> torch.Tensor:
        """(N, heads, d), of norm 1 where that is asked for."""
        rows = last.reshape(-1, self.heads, self.dim // self.heads)
        return F.normalize(rows.to(accumulation_dtype(rows)), dim=-1) if self.cosine else rows

    def _codes(self) -> torch.Tensor:
        """The codebook as it is used. That of moving averages is kept at norm 1."""
        return F.normalize(self.codebook, dim=-1) if self.cosine and self.decay is None else self.codebook

    @torch.no_grad()
    def _initialize(self, rows: torch.Tensor) -> None:
        averages = torch.zeros_like(self.codebook[..., 0]), torch.zeros_like(self.codebook)
        if self.decay is not None:
            averages = self.counts, self.sums
        initialize_codes(rows, self.codebook.detach(), *averages, self.initialized, self.cosine)
        self.known = True

    def _shaped(self, index: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return index.view(last.shape[:-1] if self.heads == 1 else (*last.shape[:-1], self.heads))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.known = False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> VectorQuantizer:
        """Half precision would stop the averages from moving: they go along to a device, but not below float32."""
        exact = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            cast = getattr(self, name)
            if torch.finfo(cast.dtype).bits < 32:
                setattr(self, name, before.to(cast.device))
        return self

    def extra_repr(self) -> str:
        parts = [f"{self.dim}, codes={self.codes}"]
        for name, default in (("heads", 1), ("decay", 0.99), ("commitment", 0.25), ("init", "kmeans"), ("revive_below", None)):
            if (value := getattr(self, name)) != default:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts + [f"{name}=True" for name in ("cosine", "rotation", "channels_first") if getattr(self, name)])
