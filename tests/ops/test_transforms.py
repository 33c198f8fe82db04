"""Every op of OPS under ``torch.func`` and forward-mode differentiation, as the reference."""

from __future__ import annotations

import torch
from comparison import Function, every_op, function_of_tensors, ways
from torch.autograd import forward_ad

from flowkern._core.op import Op


@every_op
def test_func_transforms(op: Op) -> None:
    for sample in ways(op, torch.float64, limit=110):
        function, inputs = function_of_tensors(op.function, sample)
        reference, _ = function_of_tensors(op.reference, sample)
        if not inputs or not inputs[0].numel():
            continue

        stacked = [torch.stack([a, 0.5 * a]) for a in inputs]
        for i, expected in enumerate((function(*inputs), function(*(0.5 * a for a in inputs)))):
            torch.testing.assert_close(tuple(y[i] for y in torch.vmap(function)(*stacked)), expected)
        if not any(y.differentiable for y in op.outputs):
            continue

        def loss(function: Function, x: torch.Tensor, rest: list[torch.Tensor] = inputs[1:]) -> torch.Tensor:
            return sum(y.square().sum() for y in function(x, *rest) if y.is_floating_point())

        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
            actual, expected = (transform(lambda x, f=f: loss(f, x))(inputs[0]) for f in (function, reference))
            torch.testing.assert_close(actual, expected)
        tangents = tuple(map(torch.ones_like, inputs))
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, inputs, tangents)
            found = [forward_ad.unpack_dual(y).tangent for y in function(*duals)]
        for tangent, expected in zip(found, torch.func.jvp(reference, tuple(inputs), tangents)[1], strict=True):
            if tangent is not None:
                torch.testing.assert_close(tangent, expected)
