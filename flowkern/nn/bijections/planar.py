"""Planar and radial flows: cheap from latent to data, and one scalar equation the other way."""

import torch
import torch.nn.functional as F
from torch import nn

from ..._core.checks import accumulation_dtype, check_floating
from ..densities.base import check_sizes
from ..networks.conditioner import check_context
from .bijection import Bijection, Pair
from .root import solve_increasing


def _length(x: torch.Tensor) -> torch.Tensor:
    """|x| of the rows, with gradient zero at zero."""
    square = x.square().sum(1)
    return torch.where(square > 0, square.clamp_min(torch.finfo(x.dtype).tiny).sqrt(), 0.0)


def _positive(raw: torch.Tensor) -> torch.Tensor:
    """softplus(raw), and not 0 where that underflows."""
    return F.softplus(raw).clamp_min(torch.finfo(raw.dtype).tiny)


class _Amortized(nn.Module):
    """(1, ``size``) learned constants, or (B, ``size``) from a context: constants plus a linear layer that starts small."""

    def __init__(self, size: int, context: int | None):
        super().__init__()
        self.constants = nn.Parameter(0.1 * torch.randn(size))
        self.conditioner = None if context is None else nn.Linear(context, size, bias=False)
        if self.conditioner is not None:
            nn.init.normal_(self.conditioner.weight, std=0.01)
        self.context = context

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        check_context(context, self.context, x.shape[0])
        values = self.constants[None]
        if self.conditioner is not None and context is not None:
            values = values + self.conditioner(context.to(values.dtype))
        return values.to(accumulation_dtype(x))


def _slope(h: torch.Tensor, at_zero: torch.Tensor) -> torch.Tensor:
    """Of a + u.w tanh(a) where h = tanh(a): from 1 + u.w, which is that at 0, to 1 far away, and positive all the way."""
    square = h.square()
    return square + (1.0 - square) * at_zero


class _RowFlow(Bijection):
    """What the two share: their size, and the numbers that make them, ``size`` of them."""

    def __init__(self, features: int, size: int, context: int | None):
        super().__init__()
        check_sizes(features=features)
        self.features, self.context = features, context
        self.parameters_of = _Amortized(size, context)

    def _numbers(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """(1 or B, size). Raises ValueError for x of another shape than (B, D), TypeError for x that is not floating."""
        check_floating("x", x)
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"{type(self).__name__}: expected x of shape (B, {self.features}), got {tuple(x.shape)}")
        return self.parameters_of(x, context)

    def extra_repr(self) -> str:
        return f"features={self.features}, context={self.context}"


class Planar(_RowFlow):
    """``inverse``: z = e + u tanh(w.e + b), log|det| = log|1 + (1 - tanh^2) u.w|; ``forward`` solves it for e. (B, D).

    u is moved along w so that u.w > -1, which makes it invertible (Rezende and Mohamed 2015, appendix A.1):
    u + (log(1 + exp(u.w)) - 1 - u.w) w / |w|^2. The new 1 + u.w, which is log(1 + exp(u.w)) of the old, keeps its digits where
    u.w rounds to -1: log|det| = log(tanh^2 + (1 - tanh^2) (1 + u.w)).

    Args:
        features: D.
        context: K of a context (B, K) from which u, w and b are computed by a linear layer; None for learned constants.

    The cheap direction is latent to data: in a posterior, where it is sampled. The other one solves for w.e, on the device.
    Source: Rezende and Mohamed, "Variational Inference with Normalizing Flows" (2015), eq. 10 to 12.
    """

    def __init__(self, features: int, context: int | None = None):
        super().__init__(features, 2 * features + 1, context)

    def _values(self, x: torch.Tensor, context: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """(u, w, b, 1 + u.w) of shapes (1 or B, D), (1 or B, D), (1 or B,), (1 or B,)."""
        u, w, b = self._numbers(x, context).split([self.features, self.features, 1], 1)
        dot = (u * w).sum(1)
        # |w|^2 = 0 leaves u as it is: then u.w = 0 already.
        square = w.square().sum(1)
        at_zero = torch.where(square > 0, _positive(dot), 1.0)
        u = u + ((at_zero - 1.0 - dot) / square.clamp_min(torch.finfo(w.dtype).tiny))[:, None] * w
        return u, w, b[:, 0], at_zero

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        u, w, b, at_zero = self._values(z, context)
        e = z.to(u.dtype)
        h = torch.tanh((e * w).sum(1) + b)
        return (e + u * h[:, None]).to(z.dtype), _slope(h, at_zero).log()

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        u, w, b, at_zero = self._values(x, context)
        y = x.to(u.dtype)
        along, dot = (y * w).sum(1), at_zero - 1.0

        def residual(a: torch.Tensor) -> Pair:
            h = torch.tanh(a + b)
            return a + dot * h - along, _slope(h, at_zero)

        a = solve_increasing(residual, along - dot.abs(), along + dot.abs())
        h = torch.tanh(a + b)
        return (y - u * h[:, None]).to(x.dtype), -_slope(h, at_zero).log()


class Radial(_RowFlow):
    """``inverse``: z = e + beta (e - c) / (alpha + r) with r = |e - c|; ``forward`` solves a quadratic for r. (B, D).

    log|det| = (D - 1) log(1 + beta / (alpha + r)) + log(1 + alpha beta / (alpha + r)^2). alpha = softplus(a) and
    beta = softplus(b) - alpha > -alpha, which makes it invertible (Rezende and Mohamed 2015, appendix A.2); their sum,
    softplus(b), keeps its digits where beta rounds to -alpha.

    Args:
        features: D.
        context: K of a context (B, K) from which c, a and b are computed by a linear layer; None for learned constants.

    Source: Rezende and Mohamed, "Variational Inference with Normalizing Flows" (2015), eq. 14.
    """

    def __init__(self, features: int, context: int | None = None):
        super().__init__(features, features + 2, context)

    def _values(self, x: torch.Tensor, context: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """(c, alpha, alpha + beta) of shapes (1 or B, D), (1 or B,), (1 or B,)."""
        values = self._numbers(x, context)
        return values[:, :-2], _positive(values[:, -2]), _positive(values[:, -1])

    def _log_det(self, r: torch.Tensor, alpha: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        across, along = (total + r) / (alpha + r), (r * (r + 2.0 * alpha) + alpha * total) / (alpha + r).square()
        return (self.features - 1) * across.log() + along.log()

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        centre, alpha, total = self._values(z, context)
        offset = z.to(centre.dtype) - centre
        r = _length(offset)
        out = centre + offset * ((total + r) / (alpha + r))[:, None]
        return out.to(z.dtype), self._log_det(r, alpha, total)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        centre, alpha, total = self._values(x, context)
        offset = x.to(centre.dtype) - centre
        length = _length(offset)
        # r^2 + (alpha + beta - length) r - alpha length = 0, by the form of its positive root that does not cancel.
        p, q = total - length, alpha * length
        root = (p.square() + 4.0 * q).clamp_min(torch.finfo(q.dtype).tiny).sqrt()
        r = torch.where(p > 0, 2.0 * q / (p.abs() + root), 0.5 * (root + p.abs()))
        out = centre + offset * ((alpha + r) / (total + r))[:, None]
        return out.to(x.dtype), -self._log_det(r, alpha, total)
