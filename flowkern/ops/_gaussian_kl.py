"""A draw from a diagonal Gaussian and its KL divergence to a standard normal, in one pass.

Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (2014), section 2.4 and appendix B. With s = exp(log_scale),
the noise eps of ``_philox.normal``, and g, k the gradients of z and of kl:

================ =====================================================
z                mean + s eps
kl               sum of (mean^2 + s^2 - 1) / 2 - log_scale
gradient of mean g + k mean
of log_scale     g s eps + k (s^2 - 1)
================ =====================================================

The backward makes eps again from its seed: nothing is stored but the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._core import philox as _philox
from .._core.checks import accumulation_dtype, check_floating, check_same_device
from .._core.op import Law, Output, Sample, accumulated, define, normal, recording, reference_runs, register
from .._core.reference import differentiate, outside_autocast, reference_differentiates

__all__ = ["gaussian_kl"]

Pair = tuple[torch.Tensor, torch.Tensor]


@outside_autocast
def reference(mean: torch.Tensor, log_scale: torch.Tensor, seed: _philox.Seed = None, offset: int = 0) -> Pair:
    """The definition in plain torch."""
    dtype = accumulation_dtype(mean, log_scale)
    seed = _philox.as_seed(seed, mean.device)
    noise = _philox.normal(seed, offset, mean.shape[0], mean.shape[1:].numel(), dtype).view(mean.shape)
    location, log_scale = mean.to(dtype), log_scale.to(dtype)
    z = location + log_scale.exp() * noise
    kl = 0.5 * (location.square() + _exp_less_tangent(2.0 * log_scale))
    return z.to(mean.dtype), kl.flatten(1).sum(1)


def _exp_less_tangent(t: torch.Tensor) -> torch.Tensor:
    """exp(t) - 1 - t, near 0, where that cancels, by its series: t^2 / 2 (1 + t / 3 (1 + t / 4 (1 + ...)))."""
    near = t.abs() < 0.5
    small = torch.where(near, t, 0.0)
    one = total = torch.ones_like(t)
    for k in range(16 if t.dtype is torch.float64 else 9, 2, -1):
        total = torch.addcmul(one, total, small, value=1.0 / k)
    return torch.where(near, 0.5 * small.square() * total, torch.expm1(t) - t)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    randn = normal(device, dtype)
    seed = {"seed": 7}
    yield Sample("vector", (randn(5, 6), randn(5, 6)), seed)
    yield Sample("image", (randn(2, 3, 4, 5), randn(2, 3, 4, 5)), {"seed": -3, "offset": 2**40})
    yield Sample("one-element", (randn(1, 1), randn(1, 1)), seed)
    yield Sample("wide", (randn(2, 20001), randn(2, 20001)), seed)
    yield Sample("empty-batch", (randn(0, 6), randn(0, 6)), seed)
    yield Sample("nothing", (randn(3, 0), randn(3, 0)), seed)
    yield Sample("strided", (randn(6, 4).t(), randn(4, 12)[:, ::2]), seed)
    yield Sample("expanded", (randn(1, 4).expand(3, 4), randn(3, 1).expand(3, 4)), seed)
    yield Sample("mixed-dtypes", (randn(3, 6), randn(3, 6, dtype=torch.bfloat16)), seed)
    yield Sample("seed", (randn(3, 64), randn(3, 64)), {"seed": torch.tensor([5], device=device)})


def _outputs(mean: torch.Tensor, log_scale: torch.Tensor, *_: Any) -> Pair:
    return mean.new_empty(mean.shape), mean.new_empty((mean.shape[0],), dtype=accumulation_dtype(mean, log_scale))


def _differentiate(mean: torch.Tensor, log_scale: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    seed, offset, *grads = rest
    return differentiate(lambda m, s: reference(m, s, seed, offset), (mean, log_scale), {}, grads)


# All are (B, N), but kl and its gradient (B,).
_INPUTS = "Tensor mean, Tensor log_scale, Tensor seed, int offset"

_forward = define(f"gaussian_kl({_INPUTS}) -> (Tensor, Tensor)", outputs=_outputs, torch_=reference, triton="gaussian_kl.forward")
_backward = define(
    f"gaussian_kl_backward({_INPUTS}, Tensor? grad, Tensor? grad_kl) -> (Tensor, Tensor)",
    outputs=lambda mean, log_scale, *_: (mean.new_empty(mean.shape), log_scale.new_empty(log_scale.shape)),
    torch_=_differentiate,
    triton="gaussian_kl.backward",
)


def _draw(mean: torch.Tensor, log_scale: torch.Tensor, seed: torch.Tensor, offset: int) -> Pair:
    if mean.ndim == 2:  # a view takes longer than the kernel of a few numbers
        return _forward(mean, log_scale, seed, offset)
    z, kl = _forward(mean.flatten(1), log_scale.flatten(1), seed, offset)
    return z.view(mean.shape), kl


class _GaussianKL(torch.autograd.Function):
    """Makes the noise again. An absent gradient stays absent but under a compiler, as in ``affine_coupling``."""

    @staticmethod
    def forward(ctx: Any, mean: torch.Tensor, log_scale: torch.Tensor, seed: torch.Tensor, offset: int) -> Pair:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, log_scale, seed)
        ctx.offset = offset
        return _draw(mean, log_scale, seed, offset)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, grad_kl: torch.Tensor | None) -> Any:
        mean, log_scale, seed = ctx.saved_tensors
        if reference_differentiates(grad, grad_kl):
            return *_differentiate(mean, log_scale, seed, ctx.offset, grad, grad_kl), None, None
        if mean.ndim == 2:
            return *_backward(mean, log_scale, seed, ctx.offset, grad, grad_kl), None, None
        flat = None if grad is None else grad.flatten(1)
        dmean, dlog_scale = _backward(mean.flatten(1), log_scale.flatten(1), seed, ctx.offset, flat, grad_kl)
        return dmean.view(mean.shape), dlog_scale.view(mean.shape), None, None


def gaussian_kl(mean: torch.Tensor, log_scale: torch.Tensor, *, seed: _philox.Seed = None, offset: int = 0) -> Pair:
    """z drawn from N(mean, exp(log_scale)^2), and the KL divergence of that to N(0, I): the two halves of a VAE's posterior.

    z = mean + exp(log_scale) eps, differentiable in both (the reparameterization trick);
    kl = sum over a sample's elements of (mean^2 + exp(2 log_scale) - 1) / 2 - log_scale.

    Args:
        mean: (B, ...), at least two dimensions, any strides; float64, float32, bfloat16 or float16.
        log_scale: as mean in shape; may differ in floating dtype.
        seed: of the noise eps, which is made again in the backward: an int, or an int64 tensor of one element on the device of
            mean. None takes one number from torch's generator, so that ``torch.manual_seed`` decides.
        offset: a number of 64 bits that tells draws of one seed apart.

    Returns:
        (z, kl): z as mean in shape and dtype; kl (B,) in nats, float64 if an input is, else float32.

    Raises:
        TypeError: inputs that are not floating tensors, or a seed or an offset that is no integer.
        ValueError: shapes that differ, or another device.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (2014), section 2.4 and appendix B.
    """
    check_floating("mean", mean)
    check_floating("log_scale", log_scale)
    check_same_device("log_scale", log_scale, mean, of="mean")
    if mean.ndim < 2:
        raise ValueError(f"mean: expected (B, ...) of at least two dimensions, got shape {tuple(mean.shape)}")
    if log_scale.shape != mean.shape:
        raise ValueError(f"log_scale: expected shape {tuple(mean.shape)} as mean has, got {tuple(log_scale.shape)}")
    inputs = mean, log_scale, _philox.as_seed(seed, mean.device), _philox.as_offset(offset)
    if reference_runs(mean):
        return reference(*inputs)
    return (_GaussianKL.apply if recording(mean, log_scale) else _draw)(*inputs)


register(
    gaussian_kl, reference, _samples, (_forward, _backward), outputs=(Output("z"), Output("kl", accumulated)), laws=Law.SEEDED
)
