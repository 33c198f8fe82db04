"""Vector quantization: each row's nearest code, a gradient that passes by the choice, and the losses that train both sides.

With c the code nearest to x, sg the stop-gradient, means over all values, and g, l the gradients of quantized and loss:

================ ===================================================================================================
quantized        c, differentiated as x + sg(c - x); rotation: as sg(|c|/|x| R) x, R the rotation of x/|x| onto c/|c|
loss             mean (sg(x) - c)^2 + beta mean (x - sg(c))^2
gradient of x    g + 2 beta l (x - c) / (N D); rotation: |c|/|x| (g - 2 r (r.g) + 2 e (q.g)) in place of g,
                 with e = x/|x|, q = c/|c|, r = (e + q)/|e + q|
of the codebook  2 l / (N D) times the sum of c - x over the rows of each code
================ ===================================================================================================

On a GPU the search is a kernel, and the rest of a step is torch's, 7 launches each way where averages move the codes. Forward
needs one pass, the gather, for the loss is a sum of the search's distances. Backward moves 8 values for each of x where one
kernel would move 4: of 16384 rows, 256 columns and 8192 codes that kernel would save at most 22 us, the time in which a copy
at 3.0 TB/s moves as much, of a step whose search takes 105 us at its counted ceiling of 655 TFLOP/s.

Sources: van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning" (2017), eq. 3; the rotation: Fifty
et al., "Restructuring Vector Quantization with the Rotation Trick" (2024), section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._core.checks import accumulation_dtype, check_floating, check_same_device
from .._core.code_sums import code_sums
from .._core.op import Law, Output, Sample, accumulated, as_index, normal, reference_runs, register
from .._core.reference import differentiate, outside_autocast, reference_differentiates
from ._nearest_code import _forward as nearest_code_kernel, nearest_code

__all__ = ["pass_gradient", "vector_quantize"]

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1, keepdim=True)


class _Rotation:
    """|c|/|x| R of every row, as constants; the identity where x or c is zero and has no direction."""

    def __init__(self, x: torch.Tensor, code: torch.Tensor):
        length, reach = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (x, code))
        self.defined = (length > 0) & (reach > 0)
        self.ratio = reach / length
        self.e, self.q = x / length, code / reach
        self.r = torch.nn.functional.normalize(self.e + self.q, dim=-1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._where(x, self.q, self.e)

    def transposed(self, grad: torch.Tensor) -> torch.Tensor:
        return self._where(grad, self.e, self.q)

    def _where(self, v: torch.Tensor, to: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        rotated = self.ratio * (v - 2 * self.r * _dot(self.r, v) + 2 * to * _dot(of, v))
        return torch.where(self.defined, rotated, v)


def _surrogate(x: torch.Tensor, code: torch.Tensor, rotation: bool) -> Triple:
    """(quantized, commitment, codebook term) in plain torch, for the code of every row; the terms as sums over values."""
    dtype, kind = accumulation_dtype(x, code), x.dtype
    x, code = x.to(dtype), code.to(dtype)
    frozen = code.detach()
    path = _Rotation(x.detach(), frozen)(x) if rotation else x
    # Exactly the code as value, also where x is not finite.
    quantized = frozen + (path - path.detach()).nan_to_num()
    return quantized.to(kind), (x - frozen).square().sum(), (x.detach() - code).square().sum()


def _loss(commitment: torch.Tensor, codebook_term: torch.Tensor, beta: float, codebook_loss: bool, values: int) -> torch.Tensor:
    total = beta * commitment + codebook_term if codebook_loss else beta * commitment
    return total / max(1, values)


@outside_autocast
def reference(
    x: torch.Tensor, codebook: torch.Tensor, *, beta: float = 0.25, codebook_loss: bool = True, rotation: bool = False
) -> Triple:
    """The definition in plain torch."""
    index, _ = nearest_code(x.detach(), codebook.detach())
    quantized, commitment, codebook_term = _surrogate(x, codebook.to(accumulation_dtype(x, codebook))[index], rotation)
    return quantized, index, _loss(commitment, codebook_term, beta, codebook_loss, x.numel())


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    randn = normal(device, dtype)
    for rotation in (False, True):
        kwargs = {"rotation": rotation}
        suffix = "-rotation" if rotation else ""
        yield Sample(f"rows{suffix}", (randn(9, 5), randn(7, 5)), kwargs)
        yield Sample(f"images{suffix}", (randn(2, 3, 4, 8), randn(6, 8)), kwargs)
        yield Sample(f"averaged{suffix}", (randn(6, 3), randn(4, 3)), {**kwargs, "codebook_loss": False, "beta": 1.0})
    yield Sample("empty-batch", (randn(0, 4), randn(3, 4)))
    yield Sample("strided", (randn(4, 6).t(), randn(9, 8)[::2, ::2]))
    yield Sample("mixed-dtypes", (randn(6, 5), randn(8, 5, dtype=torch.bfloat16)))
    yield Sample("one-element", (randn(1, 1), randn(1, 1)), {"beta": 2.0, "rotation": True})
    yield Sample("many-codes", (randn(40, 33), randn(70, 33)), {"beta": 0.7, "codebook_loss": False})
    yield Sample("half-state", (randn(7, 3, dtype=torch.float16), randn(5, 3)), {"rotation": True})


class _VectorQuantize(torch.autograd.Function):
    """Gather, straight-through and both terms of the loss, as float64 sums over values, in one node.

    It keeps the codes as they were: the codebook may then move. Weights are the caller's to multiply by: a compiler for
    dynamic shapes takes them for variables, and fails at arithmetic with them in here.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, codebook: torch.Tensor, index: torch.Tensor, sqdist: torch.Tensor, rotation: bool
    ) -> Triple:
        ctx.set_materialize_grads(False)
        ctx.rotation = rotation
        code = codebook.index_select(0, index)
        ctx.save_for_backward(x, code, index, codebook if ctx.needs_input_grad[1] else None)
        # In float64 the distances add up to the same float32 in any order.
        total = sqdist.sum(dtype=torch.float64)
        return code.to(x.dtype), total, total.clone()

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor | None, by_commitment: torch.Tensor | None, by_codebook: torch.Tensor | None
    ) -> Any:
        x, code, index, codebook = ctx.saved_tensors
        grads = grad, by_commitment, by_codebook
        if reference_differentiates(*grads):
            return *_differentiate(grads, ctx.rotation, *ctx.saved_tensors), None, None, None
        needs_x, needs_codebook = ctx.needs_input_grad[:2]
        dtype = accumulation_dtype(x, code)
        dx = dcodebook = None
        if by_codebook is not None and needs_codebook:
            sums = code_sums(x.to(dtype) - code.to(dtype), index, len(codebook))
            dcodebook = sums.mul_(-2 * by_codebook).to(codebook.dtype)
        if grad is not None and needs_x:
            dx = grad.to(dtype)
            if ctx.rotation:
                dx = _Rotation(x.to(dtype), code.to(dtype)).transposed(dx)
        if by_commitment is not None and needs_x:
            commitment = (x.to(dtype) - code.to(dtype)).mul_(2 * by_commitment)
            dx = commitment if dx is None else commitment.add_(dx)
        return None if dx is None else dx.to(x.dtype), dcodebook, None, None, None


def _differentiate(
    grads: tuple[torch.Tensor | None, ...], rotation: bool, *saved: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x and of the codebook by autograd of the reference, differentiable themselves."""
    x, code, index, codebook = saved

    def function(x: torch.Tensor, codebook: torch.Tensor | None = None) -> Triple:
        return _surrogate(x, code if codebook is None else codebook.to(dtype)[index], rotation)

    dtype = accumulation_dtype(x, code)  # in which the gradients of the rows of one code are summed too
    given = (grads[0], *(None if g is None else g.to(dtype) for g in grads[1:]))
    dx, *rest = differentiate(function, (x,) if codebook is None else (x, codebook), {}, given)
    return dx, rest[0] if rest else None


class _PassGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor, rotation: bool) -> torch.Tensor:
        ctx.rotation = rotation
        ctx.save_for_backward(*(x, value) if rotation else ())
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if not ctx.rotation:
            return grad, None, None
        x, value = (t.to(accumulation_dtype(*ctx.saved_tensors)) for t in ctx.saved_tensors)
        return _Rotation(x, value).transposed(grad.to(x.dtype)).to(grad.dtype), None, None


def pass_gradient(x: torch.Tensor, value: torch.Tensor, *, rotation: bool = False) -> torch.Tensor:
    """``value``, of x's shape and dtype, with the gradient that ``vector_quantize`` gives x: a constant otherwise."""
    return _PassGradient.apply(x, value.detach(), rotation)


def vector_quantize(
    x: torch.Tensor, codebook: torch.Tensor, *, beta: float = 0.25, codebook_loss: bool = True, rotation: bool = False
) -> Triple:
    """The nearest code of every row, with a gradient for x, and the loss that trains the codebook and the encoder.

    quantized = x + sg(c - x), in value exactly c, and loss = mean (sg(x) - c)^2 + beta mean (x - sg(c))^2, where c is the
    row of the codebook nearest to x and sg stops gradients. No tensor of rows times codes is made.

    Args:
        x: (..., D), any strides; float64, float32, bfloat16 or float16.
        codebook: (K, D). May differ from x in floating dtype; distances count in float64 either way.
        beta: the weight of the commitment term.
        codebook_loss: whether the loss holds the first term. Without it nothing moves the codebook: for one that is learned
            by moving averages.
        rotation: the gradient of the rotation trick instead of the straight-through one.

    Returns:
        quantized: (..., D) in the dtype of x.
        index: (...) int64, as ``nearest_code`` gives it: certified, the lowest of those at equal distance.
        loss: 0-d, float64 if x or the codebook is, else float32; also under autocast. Zero if there are no rows.

        A row that has a NaN gets code 0, and the loss is NaN. The codebook's gradient has the same bits for any number of
        threads and any order of rows.

    Raises:
        TypeError: an input that is not a floating tensor.
        ValueError: no codes, another shape or device.

    Sources: van den Oord et al., "Neural Discrete Representation Learning" (2017), eq. 3; Fifty et al., "Restructuring Vector
    Quantization with the Rotation Trick" (2024).
    """
    check_floating("x", x)
    check_floating("codebook", codebook)
    check_same_device("codebook", codebook, x)
    if codebook.ndim != 2 or not len(codebook):
        raise ValueError(f"codebook: expected shape (K, D) with at least one code, got {tuple(codebook.shape)}")
    if x.ndim < 1 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"x: expected shape (..., {codebook.shape[1]}), one value per column of the codebook, got {tuple(x.shape)}"
        )
    if reference_runs(x, own_torch=True):
        return reference(x, codebook, beta=beta, codebook_loss=codebook_loss, rotation=rotation)
    rows = x.reshape(-1, x.shape[-1])
    index, sqdist = nearest_code(rows.detach(), codebook.detach())
    quantized, commitment, codebook_term = _VectorQuantize.apply(rows, codebook, index, sqdist, rotation)
    loss = _loss(commitment, codebook_term, beta, codebook_loss, rows.numel()).to(sqdist.dtype)
    return quantized.view(x.shape), index.view(x.shape[:-1]), loss


register(
    vector_quantize,
    reference,
    _samples,
    (nearest_code_kernel,),
    outputs=(Output("quantized"), Output("index", as_index, differentiable=False), Output("loss", accumulated, per_sample=False)),
    per_sample=1,
    laws=Law.EXACT_INDEX | Law.SURROGATE,
)
