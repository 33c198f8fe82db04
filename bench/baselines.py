"""The ``eager`` baselines: each op as a competent user writes it in plain torch for the case at hand.

No upcast that the dtypes do not ask for, no index where a slice does, the numerically sound form where there is one. An
entry of BASELINES takes the op's arguments, prepares what a layer would hold (masks), and returns the function that is timed,
which takes the same arguments. That one is also what ``torch.compile`` compiles. The ops that draw noise take it as ``noise``
too: with that of the op, the result can be held against the same values in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from flowkern import ops

__all__ = ["BASELINES"]

Pair = tuple[torch.Tensor, torch.Tensor]
Run = Callable[..., Any]

#: What each op of ``flowkern.OPS`` is compared with.
BASELINES: dict[str, Callable[..., Run]] = {}


def _prepared(function: Callable[..., Run]) -> Callable[..., Run]:
    """Registers what returns the function that is timed."""
    BASELINES[function.__name__] = function
    return function


def _plain(function: Run) -> Run:
    """Registers what is timed as it stands."""
    BASELINES[function.__name__] = lambda *_, **__: function
    return function


def _checkerboard(x: torch.Tensor) -> torch.Tensor:
    """1 where h + w is odd, else 0."""
    h, w = (torch.arange(n, device=x.device) for n in x.shape[2:])
    return ((h[:, None] + w) % 2).to(torch.float32)


@_prepared
def affine_coupling(x: torch.Tensor, params: torch.Tensor, *, split: str = "channel") -> Run:
    """y = x sigmoid(u + 2) + t on half of the values."""
    kept = x.shape[1] - x.shape[1] // 2
    mask = None if split == "channel" else _checkerboard(x)

    def run(x: torch.Tensor, params: torch.Tensor, *, split: str = "channel") -> Pair:
        # In 16 bits they are taken as float32: log-determinants are sums of many of them.
        u, t = params.to(torch.promote_types(params.dtype, torch.float32)).chunk(2, 1)
        log_s = F.logsigmoid(u + 2.0)
        if mask is None:
            moved = x[:, kept:] * log_s.exp() + t
            return torch.cat([x[:, :kept], moved.to(x.dtype)], 1), log_s.flatten(1).sum(1)
        log_s = log_s * mask
        return x * log_s.exp() + t * mask, log_s.flatten(1).sum(1)

    return run


@_prepared
def additive_coupling(x: torch.Tensor, shift: torch.Tensor, *, split: str = "channel") -> Run:
    """y = x + t on half of the values."""
    kept = x.shape[1] - x.shape[1] // 2
    mask = None if split == "channel" else _checkerboard(x)

    def run(x: torch.Tensor, shift: torch.Tensor, *, split: str = "channel") -> Pair:
        y = torch.cat([x[:, :kept], x[:, kept:] + shift], 1) if mask is None else x + shift * mask
        return y, torch.zeros(x.shape[0], device=x.device)

    return run


@_plain
def invertible_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, inverse: bool = False) -> Pair:
    """A product with W, on images a 1x1 convolution, and its log-determinant, to whose digits float64 is needed."""

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias) if x.ndim == 2 else F.conv2d(x, weight[:, :, None, None], bias)

    logabsdet = torch.linalg.slogdet(weight.double())[1].float() * x.shape[2:].numel()
    if inverse:
        y = product(x - bias.view(-1, *[1] * (x.ndim - 2)), torch.linalg.inv(weight), None)
        return y, (-logabsdet).expand(x.shape[0])
    return product(x, weight, bias), logabsdet.expand(x.shape[0])


@_plain
def plu_weight(
    lower: torch.Tensor, upper: torch.Tensor, log_diagonal: torch.Tensor, sign: torch.Tensor, permutation: torch.Tensor
) -> torch.Tensor:
    """(L + I) U = L U + U, its rows in their order."""
    u = upper.triu(1) + torch.diag(sign * log_diagonal.exp())
    return torch.addmm(u, lower.tril(-1), u)[permutation]


@_plain
def gaussian_kl(mean: torch.Tensor, log_scale: torch.Tensor, noise: torch.Tensor | None = None) -> Pair:
    """As a VAE writes it."""
    if noise is None:
        noise = torch.randn_like(mean)
    scale = log_scale.exp()
    kl = 0.5 * (mean.square() + scale.square() - 1.0) - log_scale
    return mean + scale * noise, kl.flatten(1).sum(1)


@_plain
def dequantize(v: torch.Tensor, *, alpha: float | None = None, noise: torch.Tensor | None = None) -> Pair:
    """Uniform noise on 256 levels, and with ``alpha`` the logit."""
    if noise is None:
        noise = torch.rand(v.shape, device=v.device)
    if alpha is None:
        x = (v + noise) / 256
        return x, x.new_full((len(v),), -math.log(256) * v.shape[1:].numel())
    p = alpha + (v + noise) * ((1 - 2 * alpha) / 256)
    low, high = p.log(), torch.log1p(-p)
    constant = math.log((1 - 2 * alpha) / 256) * v.shape[1:].numel()
    return low - high, constant - (low + high).flatten(1).sum(1)


@_plain
def rational_quadratic_spline(x: torch.Tensor, params: torch.Tensor) -> Pair:
    """As zuko writes it, for 8 bins on [-5, 5], without a branch."""
    widths, heights, d = params.split([8, 8, 7], -1)
    limit = math.log(1e3)
    knots = []
    for u in (widths, heights):
        shares = torch.softmax(u / (1 + (2 * u / limit).abs()), -1)
        knots.append(F.pad(10.0 * shares.cumsum(-1)[..., :-1] - 5.0, (1, 0), value=-5.0))
    slopes = F.pad((d / (1 + (d / limit).abs())).exp(), (1, 1), value=1.0)
    inside = x.abs() <= 5.0
    bin_ = (x.unsqueeze(-1) >= knots[0][..., 1:]).sum(-1, keepdim=True)
    ends = [F.pad(k, (0, 1), value=5.0) for k in knots]
    (x_0, x_1), (y_0, y_1), (d_0, d_1) = ([t.gather(-1, bin_ + i).squeeze(-1) for i in (0, 1)] for t in (*ends, slopes))
    s = (y_1 - y_0) / (x_1 - x_0)
    t = torch.where(inside, (x - x_0) / (x_1 - x_0), 0.5)
    q = t * (1 - t)
    denominator = s + (d_0 + d_1 - 2 * s) * q
    y = y_0 + (y_1 - y_0) * (s * t * t + d_0 * q) / denominator
    slope = (s / denominator).square() * (d_1 * t * t + 2 * s * q + d_0 * (1 - t) * (1 - t))
    return torch.where(inside, y, x), torch.where(inside, slope.log(), 0.0).sum(1)


@_plain
def discretized_logistic_mixture(x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """PixelCNN++'s likelihood of colour images of 8 bits, with the mass of a bin in a form that keeps its digits.

    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), and a - b is known beforehand.
    """
    components = params.shape[1] // 10
    logits, rest = params[:, :components], params[:, components:].unflatten(1, (3, 3 * components))
    means, log_scales, coefficients = rest.split(components, 2)
    red, green, blue = means.unbind(1)
    first, second, third = coefficients.tanh().unbind(1)
    level = (x / 127.5 - 1.0).unsqueeze(2)
    of_green = green + first * level[:, 0]
    of_blue = blue + second * level[:, 0] + third * level[:, 1]
    centered = level - torch.stack([red, of_green, of_blue], 1)
    precision = torch.exp(-log_scales)
    below, above = F.logsigmoid(precision * (centered + 1 / 255)), F.logsigmoid(-precision * (centered - 1 / 255))
    inside = below + above + torch.log(-torch.expm1(-2 / 255 * precision))
    x = x.unsqueeze(2)
    log_mass = torch.where(x == 0, below, torch.where(x == 255, above, inside)).sum(1)
    return torch.logsumexp(log_mass + logits.log_softmax(1), 1).flatten(1).sum(1)


def nearest(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The code of the least |c|^2 - 2 x c, which takes one product of matrices."""
    return torch.addmm(codebook.square().sum(1), x, codebook.t(), alpha=-2.0).argmin(1)


@_plain
def nearest_code(x: torch.Tensor, codebook: torch.Tensor) -> Pair:
    """The index and its squared distance."""
    index = nearest(x, codebook)
    return index, (x - codebook[index]).square().sum(1)


@_plain
def vector_quantize(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The straight-through code with both terms of the loss."""
    with torch.no_grad():
        index = nearest(x, codebook)
    code = F.embedding(index, codebook)
    loss = F.mse_loss(code, x.detach()) + 0.25 * F.mse_loss(x, code.detach())
    return x + (code - x).detach(), index, loss


@_prepared
def masked_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mask: ops.DegreeMask) -> Run:
    """The product with W times the mask, which a layer holds."""
    dense = mask.dense().to(weight.dtype)

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mask: object) -> torch.Tensor:
        return F.linear(x, weight * dense, bias)

    return run


@_prepared
def autoregressive_inverse(
    z: torch.Tensor, parameters: Sequence[torch.Tensor], networks: Sequence[ops.AutoregressiveNetwork]
) -> Run:
    """One pass of the network for each feature; with ReLU and s = exp(u), u and t alternating among the outputs."""
    (network,) = networks
    degrees = [torch.tensor(d) for d in (network.in_degrees, *network.hidden_degrees)]
    degrees.append(degrees[0].repeat_interleave(2))
    masks = [(rows[:, None] >= columns).float().to(z.device) for columns, rows in itertools.pairwise(degrees[:-1])]
    masks.append((degrees[-1][:, None] > degrees[-2]).float().to(z.device))

    def run(z: torch.Tensor, parameters: Sequence[torch.Tensor], networks: object) -> Pair:
        weights = [weight * mask for weight, mask in zip(parameters[0::2], masks, strict=True)]
        x = torch.zeros_like(z)
        for _ in range(z.shape[1]):
            h = x
            for weight, bias in zip(weights[:-1], parameters[1:-1:2], strict=True):
                h = torch.relu(F.linear(h, weight, bias))
            log_s, t = F.linear(h, weights[-1], parameters[-1]).unflatten(1, (-1, 2)).unbind(-1)
            x = (z - t) * torch.exp(-log_s)
        return x, -log_s.sum(1)

    return run
