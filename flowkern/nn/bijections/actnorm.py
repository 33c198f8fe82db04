"""ActNorm: a learned scale and shift per channel that starts from the statistics of the first batch."""

from typing import Any

import torch
from torch import distributed, nn

from ..._core.checks import accumulation_dtype, check_floating, has_values
from .bijection import Bijection, Pair


class ActNorm(Bijection):
    """z = exp(log_scale) x + shift for each channel; logabsdet = H W (sum of log_scale), in nats.

    The first forward in training mode (under ``no_grad`` too) sets both so that each channel of its z has mean zero and
    variance one over the batch and the pixels: log_scale = -log(var + eps) / 2, shift = -mean exp(log_scale). A constant
    channel is safe: its scale is eps^(-1/2). Where ``torch.distributed`` is initialized the statistics are those of all
    ranks together, which must all come to that forward. Before it, in evaluation mode and in ``inverse``, the layer applies
    its parameters as they are: the identity, unless they were set by hand.

    Whether the layer is initialized is part of its state_dict; the layer asks the device only until it is.

    Args:
        channels: C.
        eps: added to the variance.

    Shapes: x and z (B, C) or (B, C, H, W), logabsdet (B,).
    Raises ValueError for an input of another number of channels and, at the initialization, for a batch of fewer than two
    samples (over all ranks) and for statistics that are not finite; the layer then stays as it was.

    Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (2018), section 3.1.
    """

    initialized: torch.Tensor  # 0-d bool
    label: str | None = None  # the layer's name in a larger model, for messages

    def __init__(self, channels: int, *, eps: float = 1e-6):
        super().__init__()
        if channels < 1:
            raise ValueError(f"ActNorm: channels must be at least 1, got {channels}")
        if not eps > 0.0:
            raise ValueError(f"ActNorm: eps must be positive, got {eps}")
        self.channels, self.eps = channels, float(eps)
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self.known = False  # that ``initialized`` is True: what the host knows without asking the device

    def is_initialized(self) -> bool:
        """Whether the statistics were taken. It reads the flag from the device, until that is True."""
        self.known = self.known or (has_values(self.initialized) and bool(self.initialized))
        return self.known

    def prepare(self, x: torch.Tensor) -> None:
        """What ``forward`` does before it transforms x: check its shape and, in training, initialize if that is to be done."""
        self.check_shape(x)
        if self.training and not self.known:
            self._initialize(x)

    @torch._disable_dynamo
    @torch.no_grad()
    def _initialize(self, x: torch.Tensor) -> None:
        if not has_values(x) or self.is_initialized():
            return
        batch, mean, variance = _statistics(x)
        if batch < 2:
            raise ValueError(
                f"{self._name()}: the initialization needs a batch of at least 2 samples, got {batch}; "
                "run a larger batch through the model in training mode first (torch.no_grad() will do)"
            )
        log_scale = -0.5 * torch.log(variance + self.eps)
        shift = -mean * log_scale.exp()
        if bad := (~(log_scale.isfinite() & shift.isfinite())).nonzero().flatten().tolist():
            raise ValueError(
                f"{self._name()}: the initialization saw NaN or infinity in {len(bad)} of {self.channels} channels "
                f"(the first: {bad[0]}); nothing was changed"
            )
        self.log_scale.copy_(log_scale)
        self.shift.copy_(shift)
        self.initialized.fill_(True)
        self.known = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.known = False

    def _name(self) -> str:
        return f"ActNorm {self.label!r}" if self.label else f"ActNorm(channels={self.channels})"

    def check_shape(self, x: torch.Tensor) -> None:
        """Raise ValueError unless x has this layer's channels, TypeError unless it is floating."""
        check_floating("x", x)
        if x.ndim not in (2, 4) or x.shape[1] != self.channels:
            raise ValueError(
                f"{self._name()}: expected (B, {self.channels}) or (B, {self.channels}, H, W), got shape {tuple(x.shape)}"
            )

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self.prepare(x)
        dtype = accumulation_dtype(x, self.log_scale)
        log_scale, shape = self.log_scale.to(dtype), (-1, *[1] * (x.ndim - 2))
        z = torch.addcmul(self.shift.to(dtype).view(shape), x.to(dtype), log_scale.exp().view(shape))
        return z.to(x.dtype), (x.shape[2:].numel() * log_scale.sum()).expand(x.shape[0])

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self.check_shape(z)
        dtype = accumulation_dtype(z, self.log_scale)
        log_scale, shape = self.log_scale.to(dtype), (-1, *[1] * (z.ndim - 2))
        x = (z.to(dtype) - self.shift.to(dtype).view(shape)) * (-log_scale).exp().view(shape)
        return x.to(z.dtype), (-z.shape[2:].numel() * log_scale.sum()).expand(z.shape[0])

    def extra_repr(self) -> str:
        return f"channels={self.channels}, eps={self.eps}"


def _statistics(x: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(samples, mean, variance) over all dimensions but the channels and over all ranks, in float64; no values, no samples."""
    values = x.detach().double().transpose(0, 1).flatten(1)
    sizes = values.new_tensor([x.shape[0], values.shape[1]])
    total = _summed(torch.cat([sizes, values.sum(1)]))
    samples, count = total[:2].tolist()
    mean = total[2:] / max(1.0, count)
    # About the mean of all ranks: a difference of two large sums would cancel.
    squares = _summed((values - mean[:, None]).square().sum(1))
    return int(samples) if count else 0, mean, squares / max(1.0, count)


def _summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks, which is the same on all of them; one process has its own."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values
