"""Dequantization: from discrete values v to x = (v + u) / levels, with u drawn uniformly or by a learned flow."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributions import constraints

from ... import ops
from ..._core.checks import accumulation_dtype
from ..bijections.bijection import Bijection, Pair
from ..bijections.compose import Compose
from ..bijections.coupling import AffineCoupling
from ..networks.conditioner import ConvNet
from .base import check_sizes, normal_log_prob

_SIGMOID = ops.ScaleMap.sigmoid()


class UniformDequantization(nn.Module):
    """u uniform on (0, 1): forward(v) -> (u, log q(u | v)), u of v's shape (B, ...), log q = 0 (B,) in nats.

    u is an odd multiple of 2^-16: v + u is exact in float32, and so in v's cell, for up to 256 levels.
    """

    def forward(self, v: torch.Tensor) -> Pair:
        return _uniform(v)


def _uniform(v: torch.Tensor) -> Pair:
    dtype = accumulation_dtype(v) if v.is_floating_point() else torch.float32
    u = (torch.randint(2**15, v.shape, dtype=dtype, device=v.device) + 0.5) / 2**15
    return u, u.new_zeros(v.shape[0])


class Dequantize(Bijection):
    """z = x + u for x of integers, u drawn uniformly from (0, 1) at every call; the inverse is x = floor(z). logabsdet = 0.

    For columns of integers before the layers of a flow: log p(z) is then, on average over u, at most log P(x), and the density's
    samples are integers. An x that is no integer has no probability: its sample's logabsdet is -inf. Where x is so large
    that its dtype leaves no room for u (above 256 in bfloat16), u is 0. Any shape (B, ...).

    Source: Theis, van den Oord and Bethge, "A note on the evaluation of generative models" (2016), section 3.1.
    """

    domain = constraints.integer_interval(-math.inf, math.inf)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        u, zeros = _uniform(x)
        whole = torch.where(x.isinf(), 0.0, x.floor())
        z = (whole + u).to(x.dtype)
        return torch.where(z.floor() > whole, whole, z), zeros.masked_fill((x != whole).flatten(1).any(1), -math.inf)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        return z.floor(), z.new_zeros(z.shape[0], dtype=accumulation_dtype(z))


class VariationalDequantization(nn.Module):
    """u = sigmoid(g(e, v)) with e ~ N(0, I) and a flow g: forward(v) -> (u, log q(u | v)), (B, C, H, W) and (B,) in nats.

    log P(v) >= E_q[log p(v + u) - log q(u | v)]: the better q follows p(v + u), the smaller the gap (Ho et al. 2019, eq. 12).
    Where the couplings' networks are zero, as they start, u is logistic normal.

    Args:
        shape: (C, H, W) of v.
        levels: how many values an element of v can have.
        couplings: of g, affine, with alternating checkerboards.
        hidden: channels of their networks, which see v besides.
        flow: g itself instead, a bijection over (C, H, W) whose context (B, C H W) is v from -1 to 1; its ``inverse`` is run.

    Raises ValueError for a shape that is not (C, H, W), and for sizes below 1.
    Source: Ho et al., "Flow++" (2019), section 3.1.
    """

    def __init__(self, shape: Sequence[int], levels: int, *, couplings: int = 4, hidden: int = 32, flow: Bijection | None = None):
        super().__init__()
        if len(shape) != 3 or levels < 2:
            raise ValueError(f"shape, levels: expected (C, H, W) and at least 2, got {tuple(shape)} and {levels}")
        check_sizes(couplings=couplings, hidden=hidden)
        self.shape, self.levels = tuple(shape), levels
        channels = 2 * self.shape[0]

        def couple(i: int) -> AffineCoupling:
            network = _SeesMap(ConvNet(channels, channels, hidden), self.shape)
            return AffineCoupling(network, split=("checkerboard", "checkerboard_swap")[i % 2], scale=_SIGMOID)

        self.flow = flow or Compose(*map(couple, range(couplings)))

    def forward(self, v: torch.Tensor) -> Pair:
        dtype = next((p.dtype for p in self.flow.parameters()), torch.float32)
        shown = (2.0 * v.to(dtype) / (self.levels - 1) - 1.0).flatten(1)
        e = torch.randn(v.shape[0], *self.shape, dtype=dtype, device=v.device)
        y, logabsdet = self.flow.inverse(e, shown)
        wide = y.to(accumulation_dtype(y))
        # Strictly below 1, so that floor(v + u) is v.
        u = wide.sigmoid().clamp_max(1.0 - 2.0**-16)
        slope = -(nn.functional.softplus(wide) + nn.functional.softplus(-wide)).flatten(1).sum(1)
        return u, normal_log_prob(e.to(wide.dtype), 3) - logabsdet - slope


class _SeesMap(nn.Module):
    """A network over maps that sees the context (B, C H W) as C more channels."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.network, self.shape = network, shape

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.network(torch.cat([x, context.view(-1, *self.shape)], 1))
