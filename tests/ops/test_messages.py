"""Bad input of every public function of ``flowkern.ops``: the error names the argument, what came and what was expected."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from comparison import assert_refused, samples, those_with

from flowkern import ops
from flowkern._core.op import Law, Op


@those_with(Law.INVERTIBLE)
def test_bad_input_is_named(op: Op) -> None:
    x, *rest = samples(op)[0].args
    second = list(inspect.signature(op.function).parameters)[1]
    cases = {
        "TypeError: x: expected a floating dtype .* got torch.int64": (x.long(), *rest),
        f"TypeError: {second}: expected a floating dtype": (x, *(a.long() for a in rest)),
        "TypeError: x: expected a tensor, got list": ([1.0], *rest),
        f"ValueError: {second}: expected device cpu .* got meta": (x, *(a.to("meta") for a in rest)),
        rf"ValueError: {second}: expected shape .* got \({len(rest[0])}, 1": (x, torch.cat([rest[0][:, :1]] * 17, 1), *rest[1:]),
        r"ValueError: x: expected \(B, C\) or \(B, C, H, W\)": (x[0], *rest),
    }
    assert_refused(op.function, cases)


def calls() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of every public function of ``flowkern.ops``, with every tensor that it takes."""
    x, square, index = torch.randn(4, 6), torch.eye(6), torch.tensor([0, 1, 4, 2])
    mask, seed = {"split": ops.FeatureMask(torch.arange(6) % 2 == 0)}, {"seed": torch.tensor([3])}
    network = ops.AutoregressiveNetwork(tuple(range(1, 7)), ((1, 2, 3, 4),))
    parameters = [p for i, o in itertools.pairwise(network.widths) for p in (torch.randn(o, i), torch.randn(o))]
    context = torch.randn(4, network.widths[1])
    noise = [torch.rand(2, 2, 3, 3), torch.rand(2, 1, 3, 3)]
    return {
        "additive_coupling": ((x, x[:, :3]), mask),
        "affine_coupling": ((x, x), mask),
        "autoregressive_inverse": ((x, parameters, network), {"contexts": [context]}),
        "dequantize": ((torch.arange(8).reshape(2, 4),), seed),
        "discretized_logistic_mixture": ((torch.zeros(2, 1, 3, 3), torch.randn(2, 6, 3, 3)), {}),
        "ema_update": ((x, index, torch.ones(5), torch.ones(5, 6)), {"decay": 0.9}),
        "gaussian_kl": ((x, x), seed),
        "invertible_linear": ((x, square, x[0]), {"weight_inverse": square, "logabsdet": torch.zeros(())}),
        "masked_linear": ((x, square, x[0], torch.arange(6), torch.arange(6)), {}),
        "nearest_code": ((x, square), {}),
        "plu_weight": ((square, square, x[0], torch.ones(6), torch.arange(6)), {}),
        "rational_quadratic_spline": ((x, torch.randn(4, 3, 23)), {**mask, "bounds": torch.tensor([[-1.0, 1.0]] * 3)}),
        "sample_discretized_logistic_mixture": ((torch.randn(2, 6, 3, 3),), {"channels": 1, "noise": noise}),
        "vector_quantize": ((x, square), {}),
    }


def elsewhere(value: Any) -> list[Any]:
    """``value`` with each of its tensors in turn on another device."""
    if isinstance(value, torch.Tensor):
        return [value.to("meta")]
    if isinstance(value, torch.nn.Module):
        return [copy.deepcopy(value).to("meta")]
    if not isinstance(value, list):
        return []
    return [[*value[:i], moved, *value[i + 1 :]] for i, v in enumerate(value) for moved in elsewhere(v)]


@pytest.mark.parametrize("name", sorted(n for n, f in vars(ops).items() if inspect.isfunction(f)))
def test_any_tensor_on_another_device_is_named(name: str) -> None:
    function, (args, kwargs) = getattr(ops, name), calls()[name]
    function(*args, **kwargs)
    names = {"parameters": "(weight|bias) . of network 0", "contexts": "context of network 0", "out_degrees": "(out|in)_degrees"}
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    for argument, value in [*bound.items()][1:]:
        known = names.get(argument, argument)
        for moved in elsewhere(value):
            with pytest.raises(ValueError, match=f"^{known}: .*(expected device .* got (meta|cpu)|is on (meta|cpu))"):
                function(**bound | {argument: moved})
