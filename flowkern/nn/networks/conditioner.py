"""Networks that turn the kept elements of a coupling into its parameters."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from ...ops.autoregressive.network import ACTIVATIONS as _WITH_SLOPES
from ..densities.base import check_name, check_share, check_sizes

#: The activations by name; the slope of ``leaky_relu`` is 0.01.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {name: of for name, (of, _) in _WITH_SLOPES.items()}


def named_activation(name: str) -> str:
    """``name`` itself. Raises ValueError unless it is one of ``ACTIVATIONS``."""
    check_name("activation", name, ACTIVATIONS)
    return name


def check_context(context: torch.Tensor | None, size: int | None, batch: int) -> None:
    """Raises ValueError unless the context is (batch, size), or None where the size is."""
    if size is None and context is not None:
        raise ValueError(f"context: got shape {tuple(context.shape)}, but the network was built without (context=None)")
    if size is not None and (context is None or context.shape != (batch, size)):
        got = "none" if context is None else tuple(context.shape)
        raise ValueError(f"context: expected shape ({batch}, {size}), got {got}")


def _zero(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _checked(hidden: Iterable[int]) -> Iterator[int]:
    for width in hidden:
        check_sizes(hidden=width)
        yield width


class _Network(nn.Module):
    """What the networks share: the name of their activation, the size of their context, and the checks of both."""

    def __init__(self, activation: str, context: int | None, dropout: float, **sizes: int):
        super().__init__()
        check_sizes(**sizes, context=context)
        check_share(dropout=dropout)
        self.activation, self.context = named_activation(activation), context

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, context={self.context}"


class MLP(_Network):
    """Linear layers with an activation (and dropout) between them: (B, in_features) -> (B, out_features).

    Args:
        hidden: the widths of the hidden layers.
        context: K of a context (B, K), which is concatenated to the input; None for a network without.
        activation: one of ``ACTIVATIONS``.
        zero_init: start the last layer at zero, so that a coupling starts as (nearly) the identity.

    Raises ValueError for sizes below 1, a dropout outside [0, 1), an unknown activation, and for a context that is missing, not
    expected or of a wrong shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Iterable[int] = (256, 256),
        *,
        context: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
        zero_init: bool = True,
    ):
        super().__init__(activation, context, dropout, in_features=in_features, out_features=out_features)
        widths = itertools.chain([in_features + (context or 0)], _checked(hidden), [out_features])
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.dropout = nn.Dropout(dropout)
        if zero_init:
            _zero(self.layers[-1])  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        check_context(context, self.context, x.shape[0])
        h = x if context is None else torch.cat([x, context.to(x.dtype)], 1)
        for layer in self.layers[:-1]:
            h = self.dropout(ACTIVATIONS[self.activation](layer(h)))
        return self.layers[-1](h)


class _ResidualBlock(nn.Module):
    """h + conv(act(conv(act(h)) + projection(context)))."""

    def __init__(self, channels: int, context: int | None, activation: str, dropout: float):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.projection = None if context is None else nn.Linear(context, channels)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation
        _zero(self.second)

    def forward(self, h: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        act = ACTIVATIONS[self.activation]
        inner = self.first(act(h))
        if self.projection is not None:
            inner = inner + self.projection(context)[:, :, None, None]
        return h + self.second(self.dropout(act(inner)))


class ResNet(_Network):
    """A small residual network: 3x3 convolution, residual blocks, 3x3 convolution; (B, in, H, W) -> (B, out, H, W).

    The last convolution, and the second one of each block, start at zero: a coupling starts as (nearly) the identity,
    and each block as the identity. There is no normalization layer, so a sample's result depends on that sample alone.

    Args:
        hidden: channels inside.
        blocks: residual blocks of two 3x3 convolutions.
        context: K of a context (B, K), projected linearly into each block; None for a network without.
        activation, dropout: as for ``MLP``.
        zero_init: whether the last convolution starts at zero.

    Raises ValueError as ``MLP`` does.
    Source: He et al., "Identity Mappings in Deep Residual Networks" (2016).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = 64,
        blocks: int = 2,
        *,
        context: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
        zero_init: bool = True,
    ):
        super().__init__(activation, context, dropout, in_channels=in_channels, out_channels=out_channels, hidden=hidden)
        check_sizes(0, blocks=blocks)
        self.first = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.blocks = nn.ModuleList(_ResidualBlock(hidden, context, activation, dropout) for _ in range(blocks))
        self.last = nn.Conv2d(hidden, out_channels, 3, padding=1)
        if zero_init:
            _zero(self.last)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        check_context(context, self.context, x.shape[0])
        h = self.first(x)
        for block in self.blocks:
            h = block(h, None if context is None else context.to(x.dtype))
        return self.last(ACTIVATIONS[self.activation](h))


class ConvNet(_Network):
    """Glow's network: 3x3, 1x1 and 3x3 convolutions with an activation between them; (B, in, H, W) -> (B, out, H, W).

    There is no normalization layer, so a sample's result depends on that sample alone.

    Args:
        hidden: channels inside.
        context: K of a context (B, K), projected linearly into the first hidden layer; None for a network without.
        activation: one of ``ACTIVATIONS``.
        dropout: of whole channels, before the last convolution.
        zero_init: start the last convolution at zero, so that a coupling starts as (nearly) the identity.

    Raises ValueError as ``MLP`` does.
    Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (2018), section 5.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = 128,
        *,
        context: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
        zero_init: bool = True,
    ):
        super().__init__(activation, context, dropout, in_channels=in_channels, out_channels=out_channels, hidden=hidden)
        self.first = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, hidden, 1)
        self.last = nn.Conv2d(hidden, out_channels, 3, padding=1)
        self.projection = None if context is None else nn.Linear(context, hidden, bias=False)
        self.dropout = nn.Dropout2d(dropout)
        if zero_init:
            _zero(self.last)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        check_context(context, self.context, x.shape[0])
        # In place: a convolution's output is read by nothing else, and its backward does not need it.
        act = torch.relu_ if self.activation == "relu" else ACTIVATIONS[self.activation]
        h = self.first(x)
        if self.projection is not None and context is not None:
            h = h + self.projection(context.to(x.dtype))[:, :, None, None]
        return self.last(self.dropout(act(self.second(act(h)))))


class Parallel(nn.Module):
    """Several networks on the same input, their outputs concatenated along the channels: one for scales, one for shifts.

    ``Parallel(s_net, t_net)`` gives the ``"scale_shift"`` layout.
    """

    def __init__(self, *networks: nn.Module):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        args = (x,) if context is None else (x, context)
        return torch.cat([network(*args) for network in self.networks], 1)
