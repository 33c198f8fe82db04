"""Learned invertible linear maps of the channels: 1x1 convolutions for images, and the same for vectors."""

from typing import Any

import torch
from torch import nn

from ... import ops
from ..._core.checks import accumulation_dtype, values_can_be_read
from ..._core.state import CheckedState, require
from ...ops.parts import compact_plu, undo_invertible_linear
from ..densities.base import check_name
from .bijection import Bijection, Pair, Replay
from .permutation import check_order

#: W and the logarithm of its |det|, or None where only a factorization of W tells.
Weight = tuple[torch.Tensor, torch.Tensor | None]


def _random_rotation(channels: int) -> torch.Tensor:
    """A matrix drawn uniformly from the orthogonal group, in float64."""
    q, r = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
    return q * r.diagonal().sign()


class _Full(nn.Module):
    """W itself."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(_random_rotation(channels).to(torch.get_default_dtype()))

    def forward(self) -> Weight:
        return self.weight.to(accumulation_dtype(self.weight)), None


class _PLU(CheckedState):
    """W = P L U with a fixed permutation P, a unit lower triangular L, and U = strict upper part + diag(sign exp(d)).

    ``lu`` holds L below the diagonal, U above it and d on it, so that all its elements count.
    """

    sign: torch.Tensor  # (C,) of the diagonal of U
    permutation: torch.Tensor  # (C,): row i of W is row permutation[i] of L U

    def __init__(self, channels: int):
        super().__init__()
        p, lower, upper = torch.linalg.lu(_random_rotation(channels))
        diagonal = upper.diagonal()
        compact = lower.tril(-1) + upper.triu(1) + diagonal.abs().log().diag()
        self.lu = nn.Parameter(compact.to(torch.get_default_dtype()))
        self.register_buffer("sign", diagonal.sign().to(torch.get_default_dtype()))
        self.register_buffer("permutation", p.argmax(1))

    def check_state(self, state: dict[str, torch.Tensor]) -> None:
        if "sign" in state:
            require(state["sign"].abs() == 1, "sign", "1 or -1 everywhere")
        if "permutation" in state:
            check_order("permutation", state["permutation"])

    def forward(self) -> Weight:
        return compact_plu(self.lu.to(accumulation_dtype(self.lu)), self.sign, self.permutation)


class _Householder(nn.Module):
    """W = H_1 ... H_K with the reflections H_k = I - 2 v_k v_k^T / |v_k|^2; log|det W| = 0.

    C reflections reach every orthogonal matrix. They are multiplied all at once: with the vectors as the rows of V,
    W = I - V^T S^-1 V, where S is upper triangular, the strict upper part of V V^T with half of its diagonal
    (Joffrain et al., "Accumulating Householder transformations, revisited", 2006). In float64, so that W stays orthogonal.
    """

    def __init__(self, channels: int):
        super().__init__()
        # The one reflection of a single channel would not depend on its vector.
        self.vectors = nn.Parameter(torch.randn(channels if channels > 1 else 0, channels))

    def orthogonal(self) -> torch.Tensor:
        """W in float64."""
        v = self.vectors.double()
        gram = v @ v.t()
        s = gram.triu(1) + 0.5 * gram.diagonal().diag()
        eye = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
        return eye - v.t() @ torch.linalg.solve_triangular(s, v, upper=True)

    def forward(self) -> Weight:
        q = self.orthogonal().to(accumulation_dtype(self.vectors))
        return q, q.new_zeros(())


class _QR(nn.Module):
    """W = Q R: an orthogonal Q of Householder reflections and R = strict upper part + diag(exp(log_diagonal)), I at first."""

    def __init__(self, channels: int):
        super().__init__()
        self.q = _Householder(channels)
        self.upper = nn.Parameter(torch.zeros(channels * (channels - 1) // 2))  # row by row
        self.log_diagonal = nn.Parameter(torch.zeros(channels))

    def forward(self) -> Weight:
        q, log_diagonal = self.q.orthogonal(), self.log_diagonal
        rows, columns = torch.triu_indices(len(q), len(q), 1, device=q.device).unbind()
        r = log_diagonal.double().exp().diag().index_put((rows, columns), self.upper.double())
        dtype = accumulation_dtype(log_diagonal)
        return (q @ r).to(dtype), log_diagonal.to(dtype).sum()


#: The parametrizations of an invertible matrix by name.
PARAMETRIZATIONS: dict[str, type[nn.Module]] = {"plu": _PLU, "qr": _QR, "householder": _Householder, "full": _Full}


class _Inverse:
    """The last W that was inverted, its inverse and log|det W|.

    What it holds belongs to the values of W and not to a tensor, so it can never be stale: W is compared with them.
    """

    def __init__(self) -> None:
        self._known: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def of(self, weight: torch.Tensor) -> Pair:
        """(W^-1, log|det W|) of one LU factorization in float64; not finite where W is singular."""
        known = self._known
        if known is None or known[0].dtype != weight.dtype or not torch.equal(known[0], weight):
            # A tensor made in inference mode could not be saved for a backward pass later.
            with torch.inference_mode(False), torch.no_grad():
                lu, pivots, _ = torch.linalg.lu_factor_ex(weight.double())
                inverse = torch.linalg.lu_solve(lu, pivots, torch.eye(len(weight), dtype=lu.dtype, device=lu.device))
                logabsdet = lu.diagonal().abs().log().sum()
                known = self._known = weight.clone(), inverse.to(weight.dtype), logabsdet.to(weight.dtype)
        return known[1:]


class InvertibleLinear(Bijection):
    """z = W x + b for vectors with a learned invertible W, at first a random rotation; logabsdet = log|det W|, in nats.

    =================== =========================================================== ======================================
    parametrization     W                                                           log|det W|
    =================== =========================================================== ======================================
    ``"plu"``           P L U: P fixed, L unit lower triangular, U upper triangular the sum of log|diagonal of U|
    ``"qr"``            Q R: Q a product of Householder reflections                 the sum of log of the diagonal of R
    ``"householder"``   a product of Householder reflections: orthogonal            0
    ``"full"``          any matrix                                                  from one LU factorization in float64
    =================== =========================================================== ======================================

    The inverse multiplies by W^-1, computed in float64. While W is not being trained it is kept between calls (on the CPU) and
    used again only if W has exactly the values that it belongs to.

    Args:
        channels: C, the number of features.
        parametrization: one of the names above.
        bias: learn b, zero at first; otherwise there is none.

    Shapes: x and z (B, C), logabsdet (B,). Raises ValueError for an unknown parametrization, fewer than one channel and an input
    of another shape. A W that has become singular gives a logabsdet that is not finite; ``check`` raises.

    Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (2018), eq. 9 to 11; for QR
    Hoogeboom, van den Berg and Welling, "Emerging Convolutions for Generative Normalizing Flows" (2019), section 4.3.
    """

    label: str | None = None  # the layer's name in a larger model, for messages
    _dimensions: tuple[int, ...] = (2,)
    _expected = "(B, {})"

    def __init__(self, channels: int, parametrization: str = "plu", *, bias: bool = False):
        super().__init__()
        check_name("parametrization", parametrization, PARAMETRIZATIONS)
        if channels < 1:
            raise ValueError(f"{type(self).__name__}: channels must be at least 1, got {channels}")
        self.channels, self.parametrization = channels, parametrization
        self.matrix = PARAMETRIZATIONS[parametrization](channels)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self._kept = _Inverse()

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files have no use for what can be computed again.
        return {**self.__dict__, "_kept": _Inverse()}

    @property
    def weight(self) -> torch.Tensor:
        """W (C, C), assembled from its parameters, differentiably."""
        return self.assemble()[0]

    def assemble(self) -> Weight:
        """(W, log|det W|), differentiable, in float32 or float64 and never in autocast's dtype; None if only an LU tells."""
        device = next(self.matrix.parameters()).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return self.matrix()
        with torch.autocast(device, enabled=False):
            return self.matrix()

    def folded(
        self, x: torch.Tensor, inverse: bool, log_scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> Pair:
        """The layer on exp(log_scale) x + shift as one linear map: W' = W diag(exp(log_scale)), b' = W shift + b."""
        weight, bias, logabsdet, weight_inverse = self._fold(inverse, log_scale, shift)
        return ops.invertible_linear(x, weight, bias, inverse=inverse, weight_inverse=weight_inverse, logabsdet=logabsdet)

    def _fold(
        self, inverse: bool, log_scale: torch.Tensor | None, shift: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """W', b', log|det W'| and W'^-1: None where there is no b', and for what is not known without a factorization."""
        weight, logabsdet = self.assemble()
        bias: torch.Tensor | None = self.bias
        weight_inverse: torch.Tensor | None = None
        trained = torch.is_grad_enabled() and weight.requires_grad
        if not trained and (inverse or logabsdet is None) and values_can_be_read(weight):
            weight_inverse, exact = self._kept.of(weight)
            logabsdet = exact if logabsdet is None else logabsdet
        if log_scale is not None and shift is not None:
            log_scale = log_scale.to(weight.dtype)
            scale = log_scale.exp()
            # Not a matrix product, which autocast would round.
            offset = (weight * shift).sum(1)
            bias = offset if bias is None else bias + offset
            weight = weight * scale
            weight_inverse = None if weight_inverse is None else weight_inverse / scale.detach()[:, None]
            logabsdet = None if logabsdet is None else logabsdet + log_scale.sum()
        return weight, bias, logabsdet, weight_inverse if inverse else None

    def backward_folded(
        self, y: torch.Tensor, replay: Replay, log_scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``backward_step`` of ``folded``, forwards: W is assembled once, and the output at hand not computed again."""
        with torch.enable_grad():
            weight, bias, logabsdet, _ = self._fold(False, log_scale, shift)
        x, mapped = undo_invertible_linear(y, weight, bias, logabsdet)
        replay.differentiate(*mapped, x)
        return x.detach()

    def backward_step(self, y: torch.Tensor, context: torch.Tensor | None, replay: Replay, inverse: bool = False) -> torch.Tensor:
        return super().backward_step(y, context, replay, inverse) if inverse else self.backward_folded(y, replay)

    def _check_shape(self, x: torch.Tensor) -> None:
        if x.ndim not in self._dimensions or x.shape[1] != self.channels:
            expected = self._expected.format(self.channels)
            raise ValueError(f"{self._name()}: expected an input of shape {expected}, got {tuple(x.shape)}")

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self._check_shape(x)
        return self.folded(x, inverse=False)

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> Pair:
        self._check_shape(z)
        return self.folded(z, inverse=True)

    @torch.no_grad()
    def check(self) -> None:
        """Raise ValueError, naming the layer, if W is not finite or is singular to the precision of its dtype."""
        weight, _ = self.assemble()
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{self._name()}: the weight holds NaN or infinity")
        values = torch.linalg.svdvals(weight.double())
        if not values[-1] > values[0] * torch.finfo(weight.dtype).eps:
            raise ValueError(
                f"{self._name()}: the weight is singular: its singular values run from {float(values[0]):.3g} down to "
                f"{float(values[-1]):.3g}"
            )

    def _name(self) -> str:
        kind = type(self).__name__
        return f"{kind} {self.label!r}" if self.label else f"{kind}(channels={self.channels})"

    def extra_repr(self) -> str:
        return f"channels={self.channels}, parametrization={self.parametrization!r}, bias={self.bias is not None}"


class InvertibleConv1x1(InvertibleLinear):
    """z = W x + b at every pixel of images: ``InvertibleLinear`` with logabsdet = H W log|det W|, in nats.

    Arguments, errors and sources as there. Shapes: x and z (B, C, H, W), logabsdet (B,).
    """

    _dimensions = (4,)
    _expected = "(B, {}, H, W)"
