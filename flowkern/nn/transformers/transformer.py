"""``Transformer``: an invertible map of single values, whose parameters a network gives."""

from collections.abc import Mapping
from typing import Any

import torch

from ..._core.checks import accumulation_dtype
from ..._core.named import Named
from ..._core.scale_map import ScaleMap, check_scale
from ..._core.split import Split, moved_channels, put, restrict, take
from ..bijections.bijection import Pair


def setting(name: str) -> Any:
    """A read-only attribute of a layer that its transformer holds."""
    return property(lambda layer: getattr(layer.transformer, name))


class Transformer(Named):
    """What ``nn.Coupling`` and ``nn.Autoregressive`` do to one value, given its parameters; derive from it to write your own.

    ``params_per_feature`` and ``forward`` are all that is asked for. One with parameters or buffers of its own derives from
    ``torch.nn.Module`` too. With a name, ``class Cubic(nn.Transformer, kind="cubic")``, it can be saved within a model: the
    arguments of its constructor, plain values, are then kept as attributes of the same names.
    """

    #: P, how many parameters a value takes.
    params_per_feature: int

    def forward(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        """y and log|dy / dx| of every element of x, both of its shape; ``params`` has that shape and a last dimension P.

        x and params come in one dtype, float32 or float64. With ``inverse`` it is the inverse map and its derivative.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def transform(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        """``forward`` of x (B, D), and the sums (B,) of log|dy / dx|. A transformer with an op of its own overrides this."""
        y, logabsdet = self.forward(x, params, inverse)
        return y, logabsdet.sum(1)

    def couple(self, x: torch.Tensor, params: torch.Tensor, split: Split, inverse: bool) -> Pair:
        """``forward`` on the elements that ``split`` moves: x (B, C, ...) to y and the sums (B,) of its logabsdet.

        ``params`` (B, P M, ...) holds the first parameter of all M moved channels, then the second, and so on. Raises ValueError
        for another shape. A transformer with an op of its own overrides this.
        """
        moved = moved_channels(split, x.shape[1])
        expected = (self.params_per_feature * moved, *x.shape[2:])
        if params.shape[1:] != expected:
            raise ValueError(f"params: expected shape (B, {', '.join(map(str, expected))}), got {tuple(params.shape)}")
        dtype = accumulation_dtype(x, params)
        params = restrict(params.to(dtype), split).unflatten(1, (self.params_per_feature, moved)).movedim(1, -1)
        y, logabsdet = self.forward(take(x, split).to(dtype), params, inverse)
        return put(x, y.to(x.dtype), split), restrict(logabsdet, split).flatten(1).sum(1)

    def undo(self, y: torch.Tensor, params: torch.Tensor, split: Split, inverse: bool) -> tuple[torch.Tensor, Pair]:
        """The x, a leaf, that ``couple`` makes y of, and the result of ``couple`` as a function of x and params.

        Reversible memory starts at y and needs both. Override this where the result is at hand once x is known.
        """
        x = self.couple(y, params.detach(), split, not inverse)[0].detach().requires_grad_()
        with torch.enable_grad():
            return x, self.couple(x, params, split, inverse)

    def network_options(self) -> dict[str, Any] | None:
        """What ``ops.AutoregressiveNetwork`` is told of this transformer; None if ``ops.autoregressive_inverse`` lacks it."""
        return None


def take_scale(transformer: Any) -> None:
    """Make ``scale`` of a frozen transformer a ``ScaleMap`` if it holds the fields of one. Raises TypeError for anything else."""
    if isinstance(transformer.scale, Mapping):
        object.__setattr__(transformer, "scale", ScaleMap(**transformer.scale))
    check_scale(transformer.scale)
