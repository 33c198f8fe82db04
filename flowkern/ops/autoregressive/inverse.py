"""The exact inverse of masked autoregressive affine layers, for the work of one pass, and its log-determinant.

A layer f takes x to z: y = x[:, permutation], (u, t) = network(y), z = s(u) y + t (gated: s y + (1 - s) t), L = sum log s.
Given z, a feature follows from features of lower degree: y_i = (z_i - t_i) / s_i. With the units sorted by degree each sees a
prefix of the layer before; the sweep computes every hidden unit once, as soon as what it sees is known, and reads nothing else.

Gradients are implicit: of the forward only x is kept. With g and l the gradients of x and of logabsdet = -L, and J = dz/dx:

=============== ==================================================================
of z            v, which solves J^T v = g - l dL/dx: the sweep, highest degree first
of a parameter  -(v^T dz + l dL) by it: as one pass of f at x has it
=============== ==================================================================

Sources: Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation" (2017), eq. 3 to 5; Kingma et
al., "Improved Variational Inference with Inverse Autoregressive Flow" (2016), eq. 14.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..._core.checks import accumulation_dtype, check_floating, check_tensor, empty_as
from ..._core.op import LOGABSDET, Law, Output, Sample, define, normal, recording, reference_runs, register
from ..._core.reference import differentiate, outside_autocast, reference_differentiates
from ..._core.scale_map import LAYOUTS, ScaleMap
from . import cpp as _autoregressive_cpp, cuda as _autoregressive_cuda, cuda_backward as _cuda_backward
from .definition import density, reference
from .network import ACTIVATIONS, AutoregressiveNetwork, plans
from .sweep import chain, invert, pull_back

__all__ = ["autoregressive_inverse"]

Pair = tuple[torch.Tensor, torch.Tensor]
Tensors = Sequence[torch.Tensor]
Networks = Sequence[AutoregressiveNetwork]


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    randn = normal(device, dtype)

    def made(features: int, *widths: int, **options: Any) -> AutoregressiveNetwork:
        top = max(1, features - 1)
        hidden = tuple(tuple(i % top + min(1, features - 1) for i in range(width)) for width in widths)
        return AutoregressiveNetwork(tuple(range(1, features + 1)), hidden, **options)

    def tensors(*networks: AutoregressiveNetwork, dtype: torch.dtype = dtype) -> list[torch.Tensor]:
        found = []
        for network in networks:
            for columns, rows in itertools.pairwise(network.widths):
                found += [0.5 * randn(rows, columns, dtype=dtype) / columns**0.5, 0.3 * randn(rows, dtype=dtype)]
        return found

    def sample(name: str, z: torch.Tensor, *networks: AutoregressiveNetwork, **kwargs: Any) -> Sample:
        return Sample(name, (z, kwargs.pop("parameters", None) or tensors(*networks), [*networks]), kwargs)

    shuffled = AutoregressiveNetwork((3, 1, 4, 2, 5), ((4, 1, 2, 0, 3, 2), (1, 3, 5, 2, 2)), permutation=(2, 0, 4, 1, 3))
    for activation in ACTIVATIONS:
        yield sample(f"activation-{activation}", randn(5, 4), made(4, 7, 6, activation=activation))
        residual = made(4, 6, 5, 6, activation=activation, residual=True)
        yield sample(f"residual-{activation}", randn(3, 4), residual)
    maps = (
        ScaleMap.exp(),
        ScaleMap.sigmoid(),
        ScaleMap.sigmoid(1.0, 1e-3),
        ScaleMap.softplus(),
        ScaleMap.tanh(2.0),
        ScaleMap.atan(1.5),
    )
    for scale, layout in zip(maps, LAYOUTS, strict=True):
        yield sample(f"scale-{scale.kind}-{scale.b}-{layout}", randn(4, 3), made(3, 5, scale=scale, layout=layout))
    gate = ScaleMap.sigmoid(1.0)
    yield sample("gated", randn(6, 5), AutoregressiveNetwork((1, 2, 3, 4, 5), ((1, 2, 3, 4, 1, 2),), scale=gate, gated=True))
    yield sample("shuffled", randn(9, 5), shuffled)
    yield sample("equal-degrees", randn(4, 6), AutoregressiveNetwork((1, 1, 2, 2, 3, 3), ((1, 2, 2, 1, 9),)))
    yield sample("few-degrees", randn(4, 6), AutoregressiveNetwork((1, 2, 3, 4, 5, 6), ((1, 4), (1, 2, 3, 4, 5))))
    yield sample("no-hidden", randn(4, 5), AutoregressiveNetwork((2, 1, 3, 5, 4), ()))
    yield sample("one-feature", randn(4, 1), made(1, 3, 2))
    yield sample("one-element", randn(1, 1), made(1, 1))
    yield sample("empty-batch", randn(0, 4), made(4, 5))
    chain = shuffled, made(5, 6, 6, activation="elu"), made(5, 4, 4, 4, residual=True, permutation=(4, 3, 2, 1, 0))
    yield sample("chain", randn(5, 5), *chain, contexts=[randn(5, 6), None, randn(5, 4)])
    yield sample("context-expanded", randn(4, 3), made(3, 5), contexts=[randn(1, 5).expand(4, 5)])
    yield sample("context-no-hidden", randn(4, 3), made(3), contexts=[randn(4, 6)])
    yield sample("several-panels", randn(37, 40), made(40, 90, 50), made(40, 70, permutation=tuple(reversed(range(40)))))
    yield sample("residual-panels", randn(19, 30), made(30, 60, 50, 60, 40, 60, residual=True, activation="silu"))
    strided = [t.t().contiguous().t() if t.ndim == 2 else t.repeat_interleave(2)[::2] for t in tensors(made(6, 8))]
    yield sample("strided", randn(4, 12)[:, ::2], made(6, 8), parameters=strided)
    yield sample("expanded", randn(1, 3).expand(4, 3), made(3, 5))
    yield sample("bfloat16-weights", randn(5, 4), made(4, 9), parameters=tensors(made(4, 9), dtype=torch.bfloat16))
    yield sample("half-state", randn(5, 4, dtype=torch.float16), made(4, 9))


def _outputs(z: torch.Tensor, tensors: Tensors, text: str, contexts: Sequence[bool]) -> Pair:
    return empty_as(z), z.new_empty((z.shape[0],), dtype=accumulation_dtype(z, *tensors))


def _gradients(x: torch.Tensor, tensors: Tensors, *rest: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    needs_parameters = rest[-1]
    return empty_as(x), [t.new_empty(t.shape if needs_parameters else (0,)) for t in tensors]


@outside_autocast
def _torch_forward(z: torch.Tensor, tensors: Tensors, *rest: Any) -> None:
    *described, x, logabsdet = rest
    state, total = z.to(logabsdet.dtype).t(), torch.zeros_like(logabsdet)
    for plan, p in reversed(chain(tensors, *described)):
        state, logs = invert(state, plan, p)
        total -= logs
    x.copy_(state.t())
    logabsdet.copy_(total)


@outside_autocast
def _torch_backward(x: torch.Tensor, tensors: Tensors, *rest: Any) -> None:
    grad, grad_logabsdet, text, contexts, needs_parameters, dz, outputs = rest
    dtype = accumulation_dtype(x, *tensors)
    state, v = x.to(dtype).t(), None if grad is None else grad.to(dtype).t()
    grad_log = None if grad_logabsdet is None else grad_logabsdet.to(dtype)
    for (plan, p), (_, outs) in zip(chain(tensors, text, contexts), chain(outputs, text, contexts), strict=True):
        state, v, gradients = pull_back(state, v, grad_log, plan, p, needs_parameters)
        if gradients is not None:
            for out, value in zip(outs.flat, gradients.flat, strict=True):
                out.copy_(value)
    assert v is not None
    dz.copy_(v.t())


_forward = define(
    "autoregressive_inverse(Tensor z, Tensor[] tensors, str networks, bool[] contexts) -> (Tensor, Tensor)",
    outputs=_outputs,
    torch_=_torch_forward,
    fills=True,
    cpp=_autoregressive_cpp.forward,
    cuda=_autoregressive_cuda.forward,
)
_backward = define(
    "autoregressive_inverse_backward(Tensor x, Tensor[] tensors, Tensor? grad, Tensor? grad_logabsdet, str networks,"
    " bool[] contexts, bool needs_parameters) -> (Tensor, Tensor[])",
    outputs=_gradients,
    torch_=_torch_backward,
    fills=True,
    cpp=_autoregressive_cpp.backward,
    cuda=_cuda_backward.backward,
)


class _AutoregressiveInverse(torch.autograd.Function):
    """Saves the output alone. An absent gradient stays absent but under a compiler, as in ``affine_coupling``."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, text: str, contexts: list[bool], *tensors: torch.Tensor) -> Pair:
        ctx.set_materialize_grads(False)
        ctx.text, ctx.contexts = text, contexts
        x, logabsdet = _forward(z, [*tensors], text, contexts)
        ctx.save_for_backward(x, *tensors)
        return x, logabsdet

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, grad_logabsdet: torch.Tensor | None) -> Any:
        x, *tensors = ctx.saved_tensors
        if reference_differentiates(grad, grad_logabsdet):
            dz, *grads = _differentiate((grad, grad_logabsdet), x, tensors, ctx.text, ctx.contexts)
            return dz, None, None, *grads
        needs = any(ctx.needs_input_grad[3:])
        dz, grads = _backward(x, tensors, grad, grad_logabsdet, ctx.text, ctx.contexts, needs)
        return dz, None, None, *(grads if needs else (None for _ in tensors))


def _differentiate(
    grads: Sequence[torch.Tensor | None], x: torch.Tensor, tensors: Tensors, text: str, contexts: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    """Gradients that can be differentiated: those of the reference at the z that x came from."""
    networks = [plan.network for plan in plans(text)]
    z = density(x, tensors, networks, contexts)[0].to(x.dtype)

    def function(z: torch.Tensor, *tensors: torch.Tensor) -> Pair:
        return reference(z, tensors, networks, contexts)

    # As variables of their own: z depends on the tensors too, and on this very node.
    return differentiate(function, [t.view_as(t) for t in (z, *tensors)], {}, grads)


def autoregressive_inverse(
    z: torch.Tensor,
    parameters: Tensors,
    networks: AutoregressiveNetwork | Networks,
    *,
    contexts: Sequence[torch.Tensor | None] | None = None,
) -> Pair:
    """Exact inverse of a masked autoregressive affine layer, or of a chain of them, for the work of one pass each.

    A layer takes x to z: y = x[:, permutation], (u, t) = network(y), z = s(u) * y + t (gated: s * y + (1 - s) * t); the
    layers of a chain follow each other. Returned are the x that they take to z, and log|det dx/dz| = -sum log s. Weights that the
    masks hide are never read; a hidden unit is evaluated once, when what it sees is known.

    Args:
        z: (..., D); float64, float32, bfloat16 or float16; any strides.
        parameters: weight (out, in) and bias (out,) of every linear layer of the first network, then those of the next. They may
            differ from z in floating dtype.
        networks: what the layers are, in the order in which they take x to z.
        contexts: for each network a term (..., H) that is added to its first hidden layer before the activation, or None.

    Returns:
        (x, logabsdet): x as z in shape and dtype; logabsdet of shape (...) in nats, float64 if z or a parameter is, else
        float32.

    Gradients with respect to z, the parameters and the contexts are implicit: only x is kept for them, and they cost one pass
    and one sweep in reverse. With ``create_graph=True``, and in ``torch.func`` transforms, they are those of ``depth`` passes.

    Raises:
        TypeError: an input that is not a floating tensor, or a network that is no ``AutoregressiveNetwork``.
        ValueError: a wrong number of parameters, a wrong shape or device; the message says what was expected.

    Sources: Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation" (2017), eq. 3 to 5; Kingma
    et al., "Improved Variational Inference with Inverse Autoregressive Flow" (2016), eq. 14.
    """
    networks = [networks] if isinstance(networks, AutoregressiveNetwork) else [*networks]
    given: list[torch.Tensor | None] = [None for _ in networks] if contexts is None else [*contexts]
    _check(z, parameters, networks, given)
    if z.ndim != 2:
        leading = z.shape[:-1]
        flat = [None if c is None else c.flatten(0, -2) for c in given]
        x, logabsdet = autoregressive_inverse(z.reshape(-1, z.shape[-1]), parameters, networks, contexts=flat)
        return x.view(z.shape), logabsdet.view(leading)
    tensors, flags = _with_contexts(parameters, networks, given)
    if reference_runs(z, own_torch=True):
        return reference(z, tensors, networks, flags)
    dtype = accumulation_dtype(z, *tensors)
    if z.dtype is not dtype:  # what is kept for the gradients is not rounded
        x, logabsdet = autoregressive_inverse(z.to(dtype), parameters, networks, contexts=contexts)
        return x.to(z.dtype), logabsdet
    text = "\n".join([network.text for network in networks])
    if recording(z, *tensors):
        return _AutoregressiveInverse.apply(z, text, flags, *tensors)
    return _forward(z, tensors, text, flags)


def _with_contexts(
    parameters: Tensors, networks: Networks, contexts: Sequence[torch.Tensor | None]
) -> tuple[list[torch.Tensor], list[bool]]:
    """The parameters of each network and then its context, if it has one, in one list; and which networks have one."""
    remaining, tensors = iter(parameters), []
    for network, context in zip(networks, contexts, strict=True):
        tensors += [next(remaining) for _ in range(2 * network.layers)] + ([] if context is None else [context])
    return tensors, [context is not None for context in contexts]


def _by_passes(
    z: torch.Tensor, parameters: Tensors, networks: Networks, *, contexts: Sequence[torch.Tensor | None] | None = None
) -> Pair:
    """The reference, called as ``autoregressive_inverse`` is."""
    tensors, flags = _with_contexts(parameters, networks, [None for _ in networks] if contexts is None else contexts)
    return reference(z, tensors, networks, flags)


register(
    autoregressive_inverse,
    _by_passes,
    _samples,
    (_forward, _backward),
    outputs=(Output("x"), LOGABSDET),
    per_sample=1,
    laws=Law.LOG_DET | Law.MASKED,
)


def _check(z: torch.Tensor, parameters: Tensors, networks: Networks, contexts: Sequence[torch.Tensor | None]) -> None:
    check_floating("z", z)
    if not networks:
        raise ValueError("networks: expected at least one")
    for i, network in enumerate(networks):
        if not isinstance(network, AutoregressiveNetwork):
            raise TypeError(f"networks: expected AutoregressiveNetworks, got {type(network).__name__} at {i}")
        if z.ndim < 1 or z.shape[-1] != network.features:
            raise ValueError(f"z: expected shape (..., {network.features}) for network {i}, got {tuple(z.shape)}")
    if len(contexts) != len(networks):
        raise ValueError(f"contexts: expected one for each of {len(networks)} networks, got {len(contexts)}")
    expected = 2 * sum(network.layers for network in networks)
    if len(parameters) != expected:
        raise ValueError(f"parameters: expected {expected} (a weight and a bias for each layer), got {len(parameters)}")
    remaining = iter(parameters)
    for i, (network, context) in enumerate(zip(networks, contexts, strict=True)):
        for layer, (columns, rows) in enumerate(itertools.pairwise(network.widths)):
            check_tensor(f"weight {layer} of network {i}", next(remaining), (rows, columns), z, "z", "")
            check_tensor(f"bias {layer} of network {i}", next(remaining), (rows,), z, "z", "")
        if context is not None:
            check_tensor(f"context of network {i}", context, (*z.shape[:-1], network.widths[1]), z, "z", "")
