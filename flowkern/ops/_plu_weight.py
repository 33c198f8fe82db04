"""An invertible matrix from its PLU factors: W = P L U, whose log|det W| is a sum over a diagonal.

Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (2018), eq. 10 and 11. With the
gradient G of L U, which is that of W with its rows where they came from:

==================== ========================================================================
L                    strict lower triangle of ``lower``, and 1 on the diagonal
U                    strict upper triangle of ``upper``, and sign * exp(log_diagonal)
W                    row i is row permutation[i] of L U
gradient of lower    strict lower triangle of G U^T
of upper             strict upper triangle of L^T G
of log_diagonal      diagonal of L^T G, times that of U
==================== ========================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._core.checks import accumulation_dtype, check_floating, check_same_device, empty_as
from .._core.op import Output, Sample, accumulated, define, normal, recording, reference_runs, register
from .._core.reference import differentiate, outside_autocast, reference_differentiates

__all__ = ["compact_plu", "plu_weight"]

Pair = tuple[torch.Tensor, torch.Tensor]


@outside_autocast
def reference(
    lower: torch.Tensor, upper: torch.Tensor, log_diagonal: torch.Tensor, sign: torch.Tensor, permutation: torch.Tensor
) -> torch.Tensor:
    """The definition in plain torch."""
    dtype = accumulation_dtype(lower, upper, log_diagonal)
    unit = torch.eye(len(sign), dtype=dtype, device=lower.device)
    diagonal = sign.detach().to(dtype) * log_diagonal.to(dtype).exp()
    product = (lower.to(dtype).tril(-1) + unit) @ (upper.to(dtype).triu(1) + diagonal.diag())
    return product.index_select(0, permutation)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    randn = normal(device, dtype)

    def factors(channels: int) -> tuple[torch.Tensor, ...]:
        sign = torch.where(randn(channels) > 0, 1.0, -1.0).to(dtype)
        return (*(randn(channels, channels) for _ in range(2)), 0.3 * randn(channels), sign, torch.randperm(channels).to(device))

    for channels in (1, 2, 5, 12, 17, 40, 120):
        yield Sample(f"{channels}-channels", factors(channels))
    yield Sample("no-channels", factors(0))
    lower, upper, log_diagonal, sign, permutation = factors(6)
    halves = log_diagonal.repeat_interleave(2)[::2], sign.repeat_interleave(2)[::2], permutation.repeat_interleave(2)[::2]
    yield Sample("strided", (lower.t(), upper[:, ::2].repeat_interleave(2, 1), *halves))
    yield Sample("mixed-dtypes", (lower, upper.to(torch.bfloat16), log_diagonal, sign.float(), permutation))


def _output(lower: torch.Tensor, upper: torch.Tensor, log_diagonal: torch.Tensor, *_: Any) -> torch.Tensor:
    return lower.new_empty(lower.shape, dtype=accumulation_dtype(lower, upper, log_diagonal))


def _differentiate(grad: torch.Tensor, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    *variables, sign, permutation = factors
    return differentiate(lambda *v: reference(*(*v, sign, permutation)), variables, {}, (grad,))


_FACTORS = "Tensor lower, Tensor upper, Tensor log_diagonal, Tensor sign, Tensor permutation"

_forward = define(f"plu_weight({_FACTORS}) -> Tensor", outputs=_output, torch_=reference, triton="plu_weight.forward")
_backward = define(
    f"plu_weight_backward(Tensor grad, {_FACTORS}) -> (Tensor, Tensor, Tensor)",
    outputs=lambda grad, lower, upper, log_diagonal, *_: (empty_as(lower), empty_as(upper), empty_as(log_diagonal)),
    torch_=_differentiate,
    triton="plu_weight.backward",
)


class _PLUWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*factors)
        return _forward(*factors)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        differentiated = _differentiate if reference_differentiates(grad) else _backward
        return *differentiated(grad, *ctx.saved_tensors), None, None


def plu_weight(
    lower: torch.Tensor, upper: torch.Tensor, log_diagonal: torch.Tensor, sign: torch.Tensor, permutation: torch.Tensor
) -> torch.Tensor:
    """The matrix W = P L U of an invertible linear map, in one pass; log|det W| is ``log_diagonal.sum()``.

    L = strict lower triangle of ``lower`` + I, U = strict upper triangle of ``upper`` + diag(sign * exp(log_diagonal)).

    Args:
        lower: (C, C), of which only what lies below the diagonal counts; the rest has gradient zero.
        upper: (C, C), of which only what lies above the diagonal counts; may be the same tensor as ``lower``.
        log_diagonal: (C,), the logarithms of the magnitudes of U's diagonal.
        sign: (C,), their signs: constants.
        permutation: (C,) int64: row i of W is row ``permutation[i]`` of L U.

    Returns:
        W, (C, C): float64 if lower, upper or log_diagonal is, else float32; also under autocast.

    Raises:
        TypeError: factors that are not floating tensors, or a permutation that is not int64.
        ValueError: a wrong shape or device; a permutation that holds something else than the numbers of rows, where
            the values can be seen at no cost (on a CPU).

    Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (2018), eq. 10 and 11.
    """
    check_floating("lower", lower)
    if lower.ndim != 2 or lower.shape[0] != lower.shape[1]:
        raise ValueError(f"lower: expected a square matrix, got shape {tuple(lower.shape)}")
    if not isinstance(permutation, torch.Tensor) or permutation.dtype is not torch.int64:
        raise TypeError(f"permutation: expected an int64 tensor, got {getattr(permutation, 'dtype', type(permutation).__name__)}")
    channels = lower.shape[0]
    for name, value in (("upper", upper), ("log_diagonal", log_diagonal), ("sign", sign), ("permutation", permutation)):
        if value is not permutation:
            check_floating(name, value)
        check_same_device(name, value, lower, of="lower")
        expected = (channels, channels) if name == "upper" else (channels,)
        if value.shape != expected:
            raise ValueError(
                f"{name}: expected shape {expected} for lower of shape {tuple(lower.shape)}, got {tuple(value.shape)}"
            )
    factors = lower, upper, log_diagonal, sign, permutation
    if reference_runs(lower):
        return reference(*factors)
    return (_PLUWeight.apply if recording(*factors[:3]) else _forward)(*factors)


register(
    plu_weight,
    reference,
    _samples,
    (_forward, _backward),
    outputs=(Output("weight", accumulated, per_sample=False),),
    per_sample=0,
)


class _CompactPLU(torch.autograd.Function):
    """One node where autograd would have seven: views of the diagonal and sums of gradients take longer than the kernels."""

    @staticmethod
    def forward(ctx: Any, lu: torch.Tensor, sign: torch.Tensor, permutation: torch.Tensor) -> Pair:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lu, sign, permutation)
        diagonal = lu.diagonal()
        return _forward(lu, lu, diagonal, sign, permutation), diagonal.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, grad_sum: torch.Tensor | None) -> Any:
        lu, sign, permutation = ctx.saved_tensors
        if grad is None:
            return None if grad_sum is None else grad_sum * torch.eye(len(lu), dtype=lu.dtype, device=lu.device), None, None
        differentiated = _differentiate if reference_differentiates(grad, grad_sum) else _backward
        dlower, dupper, dlog = differentiated(grad, lu, lu, lu.diagonal(), sign, permutation)
        dlu = dlower.add_(dupper)
        dlu.diagonal().add_(dlog if grad_sum is None else dlog + grad_sum)
        return dlu, None, None


def compact_plu(lu: torch.Tensor, sign: torch.Tensor, permutation: torch.Tensor) -> Pair:
    """(W, log|det W|) of ``plu_weight`` whose L, U and logarithms of U's diagonal stand in one matrix: LAPACK's form.

    All in the dtype of lu, which is float32 or float64.
    """
    if torch.compiler.is_compiling() or reference_runs(lu) or not recording(lu):
        log_diagonal = lu.diagonal()
        # Dynamo refuses one tensor as two inputs of an autograd Function.
        upper = lu.view_as(lu) if torch.compiler.is_compiling() else lu
        return plu_weight(lu, upper, log_diagonal, sign, permutation), log_diagonal.sum()
    return _CompactPLU.apply(lu, sign, permutation)
