"""MADE: a network whose outputs for a feature see only the features that come before it, and its masked layer."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from ... import ops
from ..._core.checks import accumulation_dtype, host_tensor, on_host
from ...ops.autoregressive import sweep as _autoregressive_sweep
from ...ops.autoregressive.network import plans
from .conditioner import ACTIVATIONS, check_context, named_activation

#: A rule for the degrees of all hidden units, or the degrees themselves, one tensor for each hidden layer.
Degrees = str | Sequence[torch.Tensor]
#: (degrees of what a masked layer sees, of its own units, whether it sees lower ones alone).
Seen = tuple[torch.Tensor, torch.Tensor, bool]
DEGREES = ("sorted", "cyclic", "random")


def _spread(width: int, low: int, high: int) -> torch.Tensor:
    """``width`` degrees from low to high, sorted and evenly spread; with fewer units than degrees both ends are among them."""
    units, count = torch.arange(width), high - low + 1
    return low + (units * count // width if width >= count or width == 1 else units * (count - 1) // (width - 1))


def _drawn(rule: str, width: int, features: int, low: int, generator: torch.Generator) -> torch.Tensor:
    """The degrees of a hidden layer, from ``low`` to D-1. A single feature leaves only degree 0."""
    high = features - 1
    low = min(low, high)
    if rule == "sorted":
        return _spread(width, low, high)
    if rule == "cyclic":
        return torch.arange(width) % max(1, high) + min(1, high)
    return torch.randint(low, features, (width,), generator=generator).sort()[0]


def _hidden_degrees(
    rule: Degrees, hidden: Sequence[int], features: int, residual: bool, context: bool, generator: torch.Generator
) -> list[torch.Tensor]:
    """Those of every masked layer but the last. Units of degree 0 show the context, and nothing else, to the first feature."""
    if any(width < 1 for width in hidden) or (residual and not hidden):
        raise ValueError(f"hidden: expected widths of at least 1, and one at least with residual=True, got {tuple(hidden)}")
    # A residual block has its own width and that of what it is added to.
    widths = [hidden[0], *(w for inner in hidden[1:] for w in (inner, hidden[0]))] if residual else [*hidden]
    if not isinstance(rule, str):
        degrees = [host_tensor("degrees", d) for d in rule]
        if [d.shape for d in degrees] != [(w,) for w in widths] or any(d.is_floating_point() for d in degrees):
            raise ValueError(
                f"degrees: expected integer tensors of lengths {widths}, got shapes {[tuple(d.shape) for d in degrees]}"
            )
        return [d.long() for d in degrees]
    if rule not in DEGREES:
        raise ValueError(f"degrees: unknown rule {rule!r}; expected tensors or one of {', '.join(map(repr, DEGREES))}")
    found: list[torch.Tensor] = []
    for i, width in enumerate(widths):
        stream = residual and i and i % 2 == 0
        low = int(found[-1].min()) if found and rule == "random" else int(not context)
        found.append(found[0] if stream else _drawn(rule, width, features, low, generator))
    return found


def _order(order: str | torch.Tensor, features: int, generator: torch.Generator) -> torch.Tensor:
    if isinstance(order, torch.Tensor):
        order = host_tensor("order", order)
        if order.shape != (features,) or not torch.equal(order.sort()[0], torch.arange(features)):
            raise ValueError(f"order: expected each of 0..{features - 1} once, shape ({features},), got {order}")
        return order.long()
    if order not in ("sequential", "random"):
        raise ValueError(f"order: unknown name {order!r}; expected 'sequential', 'random' or a tensor")
    return torch.randperm(features, generator=generator) if order == "random" else torch.arange(features)


def _refuse(layer: int, wrong: torch.Tensor, degrees: torch.Tensor, why: str) -> None:
    if wrong.any():
        unit = int(wrong.nonzero()[0])
        raise ValueError(f"degrees: layers[{layer}]: unit {unit} of degree {int(degrees[unit])} {why}")


def _check_degrees(features: int, hidden: Sequence[torch.Tensor], residual: bool) -> None:
    """Raises ValueError for units that would show an output its own input, and for those that see nothing and feed nothing."""
    for i, degrees in enumerate(hidden):
        _refuse(
            i, degrees >= features, degrees, f"sees every input: an output that it fed would see its own; expected < {features}"
        )
        if residual and i and i % 2 == 0:
            wrong = degrees != hidden[0]
            _refuse(i, wrong, degrees, "is added to one of another degree, by which an output would see its own input")
    if residual:
        return  # what is added to feeds the outputs itself
    lowest, blind = 1.0, []
    for degrees in hidden:
        blind.append(degrees < lowest)
        lowest = min((float(d) for d in degrees[~blind[-1]]), default=math.inf)
    highest = math.inf
    for i, degrees in reversed([*enumerate(hidden)]):
        feeds = degrees <= highest
        _refuse(i, blind[i] & ~feeds, degrees, "sees nothing and feeds nothing")
        highest = max((float(d) for d in degrees[feeds]), default=-math.inf)


def degrees_of(masks: Sequence[ops.DegreeMask]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """(those of the features, those of each hidden layer) of a MADE with these masks."""
    return masks[0].degrees[1], tuple(mask.degrees[0] for mask in masks[:-1])


class MaskedLinear(nn.Module):
    """y = x (W * M)^T + b, M[o, i] = out_degrees[o] >= in_degrees[i] (``strict``: >): (..., I) -> (..., O).

    It starts as ``nn.Linear`` does, uniform within 1 / sqrt(I): that is also where the peers start, so that their
    hyperparameters carry over. Scaled by what each row really sees, the rows that see one input would start with weights
    up to sqrt(I) times larger, and the first features of a flow with scales far from 1.

    Args:
        in_degrees, out_degrees: (I,), (O,) integers; sorted ones save a gather.
        bias: whether there is a b.
        strict: > instead of >=, for the last layer of a MADE.

    Raises TypeError for degrees that are not integer tensors, ValueError for other shapes of degrees or x, and without values.
    Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation" (2015), section 3.
    """

    def __init__(self, in_degrees: torch.Tensor, out_degrees: torch.Tensor, *, bias: bool = True, strict: bool = False):
        super().__init__()
        self.mask = ops.DegreeMask(out_degrees, in_degrees, strict=strict)
        shape = self.mask.out_features, self.mask.in_features
        bound = max(1, shape[1]) ** -0.5
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(shape[0]).uniform_(-bound, bound)) if bias else None
        self.mask.to(self.weight.device)  # the default one, whatever that of the degrees

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.masked_linear(x, self.weight, self.bias, self.mask)

    @torch.no_grad()
    def exchange(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Put output ``rows[i]`` and input ``columns[j]`` in the places i and j, their weights and degrees with them."""
        self.weight.copy_(self.weight[rows][:, columns])
        if self.bias is not None:
            self.bias.copy_(self.bias[rows])
        mask = self.mask
        self.mask = ops.DegreeMask(mask.out_degrees[rows], mask.in_degrees[columns], strict=mask.strict)

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}"


class MADE(nn.Module):
    """Masked autoencoder: (B, D) -> (B, D, K), where the K outputs of a feature see only the features before it.

    Feature i has degree order[i] + 1, hidden units have degrees from 0 to D-1. A hidden unit sees units of its degree and
    below, an output those below its own. Plain: h = act(layer(h)) for each hidden layer. With ``residual=True`` the network
    is that of nflows 0.14: h = layers[0](x), then for each further width of ``hidden`` one block
    h = h + layers[2](act(layers[1](act(h)))), and the last layer is linear in h. In both, the context adds
    ``context_layer(context)``, linear without bias, to the first hidden layer's output (before its activation).
    It starts within 1 / sqrt(D + C), as the columns of one layer that sees both.

    The weights of nflows' MADE fit, without context: ``initial_layer``, then ``blocks.i.linear`` (plain) or
    ``blocks.i.linear_layers.{0,1}`` (residual), then ``final_layer`` are ``layers`` in order, for ``hidden`` of
    num_blocks + 1 equal widths and ``degrees="cyclic"``. Row d * K + k of the last layer belongs to feature d.

    Args:
        features: D.
        hidden: widths of the hidden layers, or residual: that of h, then the inner one of each block.
        params_per_feature: K.
        context: the length of a context (B, C); None for a network without.
        activation: one of ``ACTIVATIONS``.
        order: ``"sequential"``, ``"random"``, or (D,) integers: order[i] is the place at which feature i comes.
        degrees: ``"sorted"`` spreads them evenly over 1..D-1, ascending, so that no layer needs a gather; ``"cyclic"`` is
            nflows' arange(h) % (D-1) + 1; ``"random"`` draws them from the lowest of the layer before to D-1, and sorts them; or
            one integer tensor for each layer of ``layers`` but the last. With a context the first and the third begin at 0: the
            first feature sees it through units of degree 0, which see nothing else. (By ``"cyclic"``, as in nflows, the first
            feature does not depend on the context.) A single feature has hidden units of degree 0 alone.
        seed: of what is drawn.

    Attributes:
        layers: the ``MaskedLinear`` layers in order of use.
        order, in_degrees: (D,) int64; ``hidden_degrees``: a list of (H,) int64, for every layer but the last.
        depth: how many sequential steps an inverse takes: the number of distinct sets of hidden units that outputs see.
        share: the share of the weights that is not masked.

    Raises ValueError for a wrong size, name, order or context; for degrees under which an output would see its own input, or
    a hidden unit sees nothing and feeds nothing, with the layer and the unit.

    Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation" (2015), sections 3 and 4.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (512, 512),
        params_per_feature: int = 2,
        context: int | None = None,
        activation: str = "relu",
        residual: bool = False,
        order: str | torch.Tensor = "sequential",
        degrees: Degrees = "sorted",
        seed: int = 0,
    ):
        super().__init__()
        if features < 1 or params_per_feature < 1:
            raise ValueError(f"features, params_per_feature: expected at least 1, got {features} and {params_per_feature}")
        if context is not None and not hidden:
            raise ValueError("context: expected a hidden layer that it can be added to, got hidden=()")
        self.features, self.params_per_feature = features, params_per_feature
        self.hidden, self.residual, self.context = tuple(hidden), residual, context
        self.activation = named_activation(activation)
        seen = self._degrees(order, degrees, torch.Generator().manual_seed(seed))
        self.layers = nn.ModuleList(MaskedLinear(into, out, strict=strict) for into, out, strict in seen)
        self.context_layer: nn.Linear | None = None
        if context is not None:
            self.context_layer = nn.Linear(context, hidden[0], bias=False)
            with torch.no_grad():  # from 1 / sqrt(C) to 1 / sqrt(D + C)
                self.context_layer.weight.mul_(math.sqrt(context / (features + context)))

    def _degrees(self, order: str | torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[Seen]:
        """Those of each masked layer, on the CPU."""
        with on_host():
            order = _order(order, self.features, generator)
            hidden = _hidden_degrees(degrees, self.hidden, self.features, self.residual, self.context is not None, generator)
            _check_degrees(self.features, hidden, self.residual)
            before = [order + 1, *hidden]
            out = (order + 1).repeat_interleave(self.params_per_feature)
        return [*((into, of, False) for into, of in itertools.pairwise(before)), (before[-1], out, True)]

    def masks(self) -> list[ops.DegreeMask]:
        """The masks of ``layers``."""
        return [layer.mask for layer in self.layers]  # type: ignore[misc]

    def use_masks(self, masks: Sequence[nn.Module]) -> None:
        """Give ``layers`` other masks, those of a network of the same sizes."""
        for layer, mask in zip(self.layers, masks, strict=True):
            layer.mask = mask

    def resample_masks(self, generator: torch.Generator) -> None:
        """Draw another order of the features and other degrees of the hidden units, as Germain et al. do in section 4."""
        device = next(self.parameters()).device
        seen = self._degrees("random", "random", generator)
        self.use_masks([ops.DegreeMask(out, into, strict=strict).to(device) for into, out, strict in seen])

    @torch.no_grad()
    def sort_units(self) -> None:
        """Exchange hidden units, with their weights, so that those of each layer come sorted by degree.

        The network computes what it did, without gathers: for weights that were trained under ``"cyclic"`` degrees, as
        nflows' are. Parameters change in place, so that an optimizer's state for them no longer fits.
        """
        orders = [degrees.argsort(stable=True) for degrees in self.hidden_degrees]
        if self.context_layer is not None:
            self.context_layer.weight.copy_(self.context_layer.weight[orders[0]])
        features = torch.arange(self.features, device=self.in_degrees.device)
        outputs = torch.arange(self.features * self.params_per_feature, device=features.device)
        for layer, columns, rows in zip(self.layers, [features, *orders], [*orders, outputs], strict=True):
            layer.exchange(rows, columns)  # type: ignore[operator]

    @property
    def in_degrees(self) -> torch.Tensor:
        return self.layers[0].mask.in_degrees  # type: ignore[union-attr,return-value]

    @property
    def order(self) -> torch.Tensor:
        return self.in_degrees - 1

    @property
    def hidden_degrees(self) -> list[torch.Tensor]:
        return [layer.mask.out_degrees for layer in self.layers[:-1]]  # type: ignore[union-attr,misc]

    def levels(self) -> list[torch.Tensor]:
        """The features in the order in which they can be computed one after the other; those of one level all at once."""
        masks = self.masks()
        with on_host():
            last = torch.tensor(masks[-1].degrees[1]).sort()[0]
            seen = torch.searchsorted(last, torch.tensor(masks[0].degrees[1]))
            return [(seen == n).nonzero().flatten() for n in seen.unique()]

    @property
    def depth(self) -> int:
        return len(self.levels())

    @property
    def share(self) -> float:
        masks = self.masks()
        return sum(m.unmasked for m in masks) / sum(m.out_features * m.in_features for m in masks)

    def preactivation_context(self, context: torch.Tensor | None) -> torch.Tensor | None:
        """What the context adds to the output of the first layer: (B, H), or None for a network without."""
        return None if self.context_layer is None or context is None else self.context_layer(context)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, D), context (B, C) or None -> (B, D, K) in the dtype of x. Raises ValueError for other shapes."""
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"x: expected shape (B, {self.features}), got {tuple(x.shape)}")
        check_context(context, self.context, x.shape[0])
        *hidden, last = self.layers  # iterated over: each slice of a ModuleList is a module of its own, made anew
        act, h = ACTIVATIONS[self.activation], x
        if hidden:
            h = hidden[0](x)
            if context is not None:
                h = h + self.preactivation_context(context.to(self.context_layer.weight.dtype)).to(h.dtype)  # type: ignore[union-attr]
        if self.residual:
            for first, second in zip(hidden[1::2], hidden[2::2], strict=True):
                h = h + second(act(first(act(h))))
        elif hidden:
            h = act(h)
            for layer in hidden[1:]:
                h = act(layer(h))
        return last(h).unflatten(1, (self.features, self.params_per_feature))

    @torch.no_grad()
    def generate(
        self, n: int, finish: Callable[[list[int], torch.Tensor], torch.Tensor], context: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (n, D), made by the network's own outputs: every unit is computed once, for the work of one pass.

        ``finish(features, params)`` is called for one level after the other: it turns the params (n, F, K) of the level's
        features into their values (n, F). Outputs and x are float64 if the parameters are, else float32. No gradients are
        recorded. Raises ValueError for a context (n, C) of a wrong shape.
        """
        check_context(context, self.context, n)
        weights, biases = ([cast(torch.Tensor, getattr(layer, name)) for layer in self.layers] for name in ("weight", "bias"))
        (plan,) = plans(self.description().text)
        with torch.autocast(weights[0].device.type, enabled=False):
            term = None if context is None else self.preactivation_context(context.to(weights[0].dtype))
            parameters = _autoregressive_sweep.Parameters(weights, biases, term)
            return _autoregressive_sweep.generate(plan, parameters, accumulation_dtype(*weights), n, finish)

    def description(self) -> ops.AutoregressiveNetwork:
        """Its degrees and kind, for what orders the units; the scale and the layout of a flow are not among them."""
        return ops.AutoregressiveNetwork(*degrees_of(self.masks()), self.activation, self.residual)

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, params_per_feature={self.params_per_feature}, context={self.context}, "
            f"activation={self.activation!r}, residual={self.residual}, depth={self.depth}, not masked={self.share:.1%}"
        )
