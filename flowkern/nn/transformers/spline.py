"""The transformer of neural spline flows: values pass through a monotone rational-quadratic spline."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ... import ops
from ..._core.spline_map import check_spline
from ..._core.split import Split
from ..bijections.bijection import Pair
from .transformer import Transformer

_SPLINE = ops.SplineMap(8)


@dataclass(frozen=True)
class RationalQuadraticSpline(Transformer, kind="rational_quadratic_spline"):
    """y = the monotone rational-quadratic spline of x by K bins, log|dy / dx| that of its slope; both directions in closed form.

    Args:
        spline: from the P = ``spline.params_per_feature`` parameters of a value (widths, heights, slopes) to its spline, and what
            is outside of its interval: an ``ops.SplineMap``, or its fields ``{"bins", "bound", ...}``.

    By name, ``transformer="spline"`` of a model, it has the default: 8 bins on [-5, 5], the identity outside.

    Raises TypeError for another spline, ValueError for fields that ``SplineMap`` refuses.
    Source: Durkan et al., "Neural Spline Flows" (2019), eq. 4 to 8.
    """

    spline: ops.SplineMap = _SPLINE

    def __post_init__(self) -> None:
        if isinstance(self.spline, Mapping):
            object.__setattr__(self, "spline", ops.SplineMap(**self.spline))
        check_spline(self.spline)

    @property
    def params_per_feature(self) -> int:  # type: ignore[override]
        return self.spline.params_per_feature

    def forward(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        # Every value is a sample of its own, so that the op's sums are the logarithms of single slopes.
        count = self.params_per_feature
        y, log_slope = ops.rational_quadratic_spline(
            x.reshape(-1, 1), params.reshape(-1, 1, count), spline=self.spline, inverse=inverse
        )
        return y.reshape(x.shape), log_slope.reshape(x.shape)

    def transform(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> Pair:
        return ops.rational_quadratic_spline(x, params, spline=self.spline, inverse=inverse)

    def couple(self, x: torch.Tensor, params: torch.Tensor, split: Split, inverse: bool) -> Pair:
        return ops.rational_quadratic_spline(x, params, spline=self.spline, split=split, layout="blocks", inverse=inverse)


Transformer.kinds["spline"] = RationalQuadraticSpline  # what people call it; saved under the whole name
