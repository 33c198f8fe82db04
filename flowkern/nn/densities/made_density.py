"""MADE as a density model of its own: a distribution for every feature, given the features before it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..._core.checks import accumulation_dtype
from ..._core.mixture import log_sum
from ..networks.made import MADE
from .base import any_of, check_sizes
from .flow import context_rows
from .likelihood import likelihood


class MADEDensity(nn.Module):
    """log p(x) = sum_i log p(x_i | the features before i), with the parameters of each factor from one pass of a ``MADE``.

    Args:
        features, hidden, context, activation, residual, order, degrees, seed: as for ``MADE``.
        output: the distribution of a feature: ``"gaussian"`` (mean and log-scale, standard deviations from 1e-3 to 1e3),
            ``"mixture"`` (of ``components`` such), ``"bernoulli"`` (x in {0, 1}) or ``"categorical"`` (x in 0..levels-1).
        masks: how many sets of masks the network has. With several, each set has an order of the features and degrees of its
            own, drawn with ``seed``: training takes the next set at each step, evaluation averages the probability over all.
            Which one is next is kept in a state_dict, as ``steps``; the sets themselves follow from ``masks`` and ``seed``.

    Called as a module it returns ``log_prob``. Raises ValueError for an unknown name or a wrong size.

    Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation" (2015), sections 3 and 4 (order-agnostic and
    connectivity-agnostic training, and averaging over masks).
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (512, 512),
        *,
        output: str = "gaussian",
        components: int = 10,
        levels: int = 256,
        masks: int = 1,
        seed: int = 0,
        **network: Any,
    ):
        super().__init__()
        check_sizes(masks=masks)
        self.output, self.distribution = output, likelihood(output, components, levels)
        self.network = MADE(features, hidden, self.distribution.params, seed=seed, **network)
        self.mask_sets = nn.ModuleList([nn.ModuleList(self.network.masks())])
        self.steps = 0  # of training, by which the next set of masks is chosen
        if masks > 1:
            generator = torch.Generator().manual_seed(seed)
            self.mask_sets = nn.ModuleList(self._drawn_masks(generator) for _ in range(masks))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if len(self.mask_sets) > 1:
            destination[f"{prefix}steps"] = torch.tensor(self.steps, device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A number, not a buffer: it is read at each step, and a GPU would be waited for. Older states are without.
        name = f"{prefix}steps"
        if len(self.mask_sets) > 1 and name in state_dict:
            self.steps = int(state_dict[name])
            state_dict = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _drawn_masks(self, generator: torch.Generator) -> nn.ModuleList:
        self.network.resample_masks(generator)
        return nn.ModuleList(self.network.masks())

    def resample_masks(self, generator: torch.Generator) -> None:
        """Draw every set of masks anew: another order of the features and other degrees of the hidden units."""
        self.mask_sets = nn.ModuleList(self._drawn_masks(generator) for _ in self.mask_sets)

    def _log_prob(self, masks: nn.Module, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        self.network.use_masks([*masks.children()])
        infinite = x.isinf()  # the network would make NaN of them
        x = torch.where(infinite, 0, x)
        shown = self.distribution.encode(x if x.is_floating_point() else x.to(next(self.network.parameters()).dtype))
        dtype = accumulation_dtype(shown)
        params = self.network(shown, context)
        return self.distribution.total(x.to(dtype), params.to(dtype)).masked_fill(any_of(infinite), -math.inf)

    def log_prob(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, D), context (B, C) or None -> (B,) in nats, float64 if x is, else float32.

        -inf for values that no sample can have. Raises ValueError for a wrong shape.
        """
        if self.training:
            masks = self.mask_sets[self.steps % len(self.mask_sets)]
            self.steps += 1
            return self._log_prob(masks, x, context)
        parts = [self._log_prob(masks, x, context) for masks in self.mask_sets]
        return parts[0] if len(parts) == 1 else log_sum(torch.stack(parts), 0) - math.log(len(parts))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.log_prob(x, context)

    @torch.no_grad()
    def sample(self, n: int, context: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """n samples (n, D); ``context`` (n, C), or (1, C) for all. With several sets of masks each sample draws one.

        Level by level, for the work of one pass: every unit is computed once. On a GPU too that is in torch's operations,
        5 to 20 launches for each level: ``autoregressive_inverse`` has a kernel, but one for this would have to draw from every
        distribution itself, with torch's random numbers.
        ``temperature``, above 0, multiplies standard deviations and divides the logits of discrete values.
        Raises ValueError for a context of a wrong shape and for another temperature.
        """
        if not temperature > 0.0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        context = context_rows(context, n)
        x = next(self.network.parameters()).new_zeros((n, self.network.features))
        which = torch.randint(len(self.mask_sets), (n,), device="cpu")
        for i, masks in enumerate(self.mask_sets):
            mine = (which == i).nonzero().flatten().to(x.device)
            self.network.use_masks([*masks.children()])
            x[mine] = self._sample(x[mine], None if context is None else context[mine], temperature)
        return x

    def _sample(self, x: torch.Tensor, context: torch.Tensor | None, temperature: float) -> torch.Tensor:
        order: list[int] = []
        values: list[torch.Tensor] = []

        def draw(features: list[int], params: torch.Tensor) -> torch.Tensor:
            # What the network is shown is the sample as it is returned, in the parameters' dtype.
            drawn = self.distribution.sample(params, temperature).to(x.dtype)
            order.extend(features)
            values.append(drawn)
            return self.distribution.encode(drawn)

        self.network.generate(x.shape[0], draw, context)
        x[:, order] = torch.cat(values, 1)  # at once: each list of places is copied to the device, which a GPU waits for
        return x

    def extra_repr(self) -> str:
        return f"output={self.output!r}, masks={len(self.mask_sets)}"
