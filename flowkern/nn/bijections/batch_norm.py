"""Batch normalization as a layer of a flow."""

import contextlib

import torch
from torch import nn

from ..._core.checks import accumulation_dtype, check_floating
from ..._core.state import CheckedState, changed, require
from .bijection import Bijection, Pair


class BatchNormFlow(CheckedState, Bijection):
    """z = exp(log_scale) (x - m) / sqrt(v + eps) + shift for each feature; logabsdet = n sum(log_scale - log(v + eps) / 2).

    m and v are the mean and the variance (divided by the count, as they stand in the density) over the batch and the n
    pixels in training mode, and their running averages in evaluation mode. In training mode each sample depends on the whole
    batch, which the log-determinant ignores (m and v count as constants there, though gradients flow through them), and there is
    no inverse: go to evaluation mode to sample. With several ranks each normalizes by its own batch.

    Args:
        features: D, or the channels of images.
        momentum: the weight of a batch in the running averages.
        eps: added to the variance.

    Shapes: x and z (B, D) or (B, C, H, W), logabsdet (B,) in nats. Raises ValueError for an input of another shape and, in
    training mode, for a batch of fewer than two values per feature; NotImplementedError for the inverse in training mode.

    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017), section 3.7 and appendix E;
    Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation" (2017), section 3.
    """

    running_mean: torch.Tensor
    running_variance: torch.Tensor

    def __init__(self, features: int, *, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        if features < 1:
            raise ValueError(f"BatchNormFlow: features must be at least 1, got {features}")
        if not eps > 0.0 or not 0.0 <= momentum <= 1.0:
            raise ValueError(f"BatchNormFlow: expected eps > 0 and momentum from 0 to 1, got {eps} and {momentum}")
        self.features, self.momentum, self.eps = features, momentum, eps
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_variance", torch.ones(features))

    def check_state(self, state: dict[str, torch.Tensor]) -> None:
        if "running_variance" in state:
            require(state["running_variance"] >= 0, "running_variance", "at least 0 everywhere")

    def _check(self, x: torch.Tensor) -> None:
        check_floating("x", x)
        if x.ndim not in (2, 4) or x.shape[1] != self.features:
            expected = f"(B, {self.features}) or (B, {self.features}, H, W)"
            raise ValueError(f"BatchNormFlow: expected an input of shape {expected}, got {tuple(x.shape)}")

    def _batch_statistics(self, x: torch.Tensor) -> Pair:
        """Mean and variance of the batch, of which the running averages take note."""
        if (count := x[:, 0].numel()) < 2:
            raise ValueError(f"BatchNormFlow: training mode needs at least 2 values of each feature, got {count}; use eval()")
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_variance.lerp_(variance.to(self.running_variance.dtype), self.momentum)
        return mean, variance

    def _affine(self, x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> Pair:
        """log s and t of z = s x + t."""
        log_scale = self.log_scale.to(x.dtype) - 0.5 * torch.log(variance.to(x.dtype) + self.eps)
        return log_scale, self.shift.to(x.dtype) - mean.to(x.dtype) * log_scale.exp()

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self._check(x)
        values, shape = x.to(accumulation_dtype(x, self.log_scale)), (-1, *[1] * (x.ndim - 2))
        statistics = self._batch_statistics(values) if self.training else (self.running_mean, self.running_variance)
        log_scale, shift = self._affine(values, *statistics)
        z = torch.addcmul(shift.view(shape), values, log_scale.exp().view(shape))
        return z.to(x.dtype), (x.shape[2:].numel() * log_scale.sum()).expand(x.shape[0])

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self._check(z)
        if self.training:
            raise NotImplementedError(
                "BatchNormFlow: no inverse in training mode, where z depends on the batch; call eval() first"
            )
        values, shape = z.to(accumulation_dtype(z, self.log_scale)), (-1, *[1] * (z.ndim - 2))
        log_scale, shift = self._affine(values, self.running_mean, self.running_variance)
        x = (values - shift.view(shape)) * (-log_scale).exp().view(shape)
        return x.to(z.dtype), (-z.shape[2:].numel() * log_scale.sum()).expand(z.shape[0])

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        return changed(self, "momentum", 0.0)

    def extra_repr(self) -> str:
        return f"features={self.features}, momentum={self.momentum}, eps={self.eps}"
