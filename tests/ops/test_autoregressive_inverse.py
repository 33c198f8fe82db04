"""``autoregressive_inverse``: the exact inverse of masked autoregressive layers for the work of one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparison import (
    assert_refused,
    assert_same,
    assert_threads_do_not_matter,
    call_of,
    leaves,
    needs_native,
    outputs_of,
    results,
    samples,
)
from networks import change_batch, density, made, parameters_of
from torch.utils._python_dispatch import TorchDispatchMode

import flowkern
from flowkern import OPS, ops
from flowkern._core import backend as _backend
from flowkern._core.op import Sample
from flowkern.ops import AutoregressiveNetwork, ScaleMap
from flowkern.ops.autoregressive import definition, inverse as op
from flowkern.ops.autoregressive.sweep import Parameters

OP = OPS["autoregressive_inverse"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps are so small that threads would only wait for each other; the test of threads asks for its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def named(name: str) -> Sample:
    return next(s for s in samples(OP) if s.name == name)


every_sample = pytest.mark.parametrize("sample", samples(OP, torch.float64), ids=lambda sample: sample.name)


@every_sample
def test_it_inverts_the_density_pass(sample: Sample) -> None:
    (z, *rest), options = call_of(sample, torch.float64)
    x, logabsdet = ops.autoregressive_inverse(z, *rest, **options)
    back, total = density(Sample("", (x, *rest), options))
    torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(total, -logabsdet)


def test_only_the_output_is_kept() -> None:
    call = call_of(named("several-panels"))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        x, _ = outputs_of(ops.autoregressive_inverse, call)
    given = {t.data_ptr() for t in leaves(call)[1:]}
    assert [t.shape for t in kept if t.data_ptr() not in given] == [x.shape]


@needs_native
@pytest.mark.parametrize("name", ["several-panels", "residual-panels", "chain"])
def test_same_bits_for_any_number_of_threads_and_any_company(name: str) -> None:
    sample = named(name)
    count = len(sample.args[0])
    grown = change_batch(sample, lambda t: t.repeat(-(-1200 // count), 1))
    assert_threads_do_not_matter(lambda: results(ops.autoregressive_inverse, grown))
    many, alone = (ops.autoregressive_inverse(*s.args, **s.kwargs) for s in (grown, sample))
    assert_same([y[:count] for y in many], alone)


@needs_native
@every_sample
def test_few_samples_and_many_agree(sample: Sample) -> None:
    """Few samples take a path of their own."""
    changes = [lambda t: t.repeat(5, 1), lambda t: t[:1], lambda t: t[:3]]
    given = [change_batch(sample, change) for change in changes]
    many, *others = (ops.autoregressive_inverse(*s.args, **s.kwargs) for s in given)
    for few in others:
        torch.testing.assert_close(few, tuple(y[: len(few[0])] for y in many), rtol=1e-12, atol=1e-12)


@needs_native
def test_both_directions_run_in_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    native = _backend.call_native
    monkeypatch.setattr(_backend, "call_native", lambda name, *args: (called.append(name), native(name, *args))[1])
    sample = named("chain")
    results(ops.autoregressive_inverse, sample)
    assert called.count("autoregressive_inverse") == 1
    assert called.count("autoregressive_inverse_backward") == len(sample.args[2])
    assert called.count("masked_linear_backward") == sum(network.layers for network in sample.args[2])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_round_trip_in_float32_at_784_features(backend: str) -> None:
    network = made(784, 1024, 1024)
    parameters, z = parameters_of(network), torch.randn(5, 784)
    with flowkern.backend(backend):
        x, logabsdet = ops.autoregressive_inverse(z, parameters, network)
    back, total = op.density(x, parameters, [network], [False])
    assert (back - z).abs().max() <= 1e-5 * z.abs().max()
    torch.testing.assert_close(total, -logabsdet)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_it_stays_finite_where_passes_over_half_known_features_overflow(backend: str) -> None:
    """z = x + (sum of the x before): x_i = z_i - z_(i-1) + x_(i-1) - ... is harmless, but passes over features of which
    the last are wrong make those grow by binomial coefficients, and infinity times a masked zero is NaN for all."""
    features = 200
    degrees = tuple(range(1, features + 1))
    network = AutoregressiveNetwork(degrees, (degrees + degrees,), scale=ScaleMap.exp())
    eye, before = torch.eye(features), torch.ones(features, features).tril(-1)
    output = torch.zeros(features, 2, 2 * features)
    output[:, 1] = torch.cat([before, -before], 1)  # relu(x) - relu(-x) = x
    zeros = torch.zeros(2 * features)
    parameters = [torch.cat([eye, -eye]), zeros, output.flatten(0, 1), zeros]
    x = torch.randn(3, features)
    z = op.density(x, parameters, [network], [False])[0]
    looped = torch.zeros_like(z)
    for _ in range(network.depth):
        u, t = definition.network_outputs(network, looped, Parameters(parameters[0::2], parameters[1::2], None))
        looped = (z - t) / u.exp()
    assert looped.isnan().any()
    with flowkern.backend(backend):
        actual, logabsdet = ops.autoregressive_inverse(z, parameters, network)
    torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4)
    assert (logabsdet == 0).all()


def test_depth_and_used_weights() -> None:
    full = made(5, 4)
    assert full.depth == 5
    # The first hidden layer knows features 1 and 4 alone: all that follows comes in three steps.
    few = AutoregressiveNetwork((1, 2, 3, 4, 5, 6), ((1, 4), (1, 2, 3, 4, 5)))
    assert few.depth == 3
    assert AutoregressiveNetwork((1, 1, 2, 2, 3, 3), ((1, 2, 2, 1, 9),)).depth == 3
    assert made(1, 3).depth == 1
    assert AutoregressiveNetwork((4, 7, 9), ((0,),)).depth == 1  # sees nothing
    assert AutoregressiveNetwork((2, 1, 3), ()).depth == 3
    assert made(784, 512, 512).depth == 513
    # in: degrees 1..4 see 1+2+3+4 of 4*5, out: 2 * (0+1+2+3+4) of 4*10; degree 4 of the hidden units is seen by feature 5.
    assert full.used_weights == pytest.approx(30 / 60)
    assert 0.50 < made(784, 1024, 1024).used_weights < 0.53


class _Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.mm):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("features", [16, 48, 96])
def test_work_is_linear_in_the_weights_that_are_not_masked(features: int) -> None:
    network = made(features, 3 * features, 2 * features)
    (plan,) = op.plans(network.text)
    parameters = parameters_of(network)
    given, z = Parameters(parameters[0::2], parameters[1::2], None), torch.randn(features, 7)
    with _Products() as products:
        op.invert(z, plan, given)
    unmasked = sum(int(mask.sum()) for mask in definition.masks(network, z.device))
    assert products.count == 7 * unmasked
    # The plan's own numbers, which the kernels follow: a row takes what was known before its panel, and then the rest.
    steps = range(plan.depth)
    layers = [*range(1, network.layers + 1), network.layers]  # of each feature, u and t
    assert unmasked == sum((e - b) * prefix for i in layers for step in steps for b, e, prefix in plan.groups(i, step))
    assert unmasked == round(network.used_weights * sum(w.numel() for w in parameters[0::2]))


def test_depth_is_bounded_by_the_degrees() -> None:
    random = torch.Generator().manual_seed(0)
    for features, *widths in ((784, 64, 32), (40, 300, 300), (30, 7, 90, 5), (12,)):
        hidden = tuple(tuple(torch.randint(1, max(2, features), (n,), generator=random).tolist()) for n in widths)
        network = AutoregressiveNetwork(tuple(torch.randperm(features, generator=random).add(1).tolist()), hidden)
        assert network.depth <= min(features, *(len({*degrees}) + 1 for degrees in hidden), features)


def test_plans_visit_every_unit_once_and_never_read_ahead() -> None:
    for sample in samples(OP):
        for network in sample.args[2]:
            (plan,) = op.plans(network.text)
            known = [0] * (network.layers)
            for step in range(plan.depth):
                for i in range(1, network.layers + 1):
                    for begin, end, prefix in plan.groups(i, step):
                        assert prefix <= known[i - 1]
                        if i < network.layers:
                            assert begin == known[i]
                            known[i] = end
                known[0] = plan.layers[0].ends[step + 1]
            assert known[0] == network.features
            assert [p.begin for p in plan.panels] + [plan.depth] == [0] + [p.end for p in plan.panels]


def test_text_holds_the_network() -> None:
    for sample in samples(OP):
        for network in sample.args[2]:
            assert AutoregressiveNetwork.from_text(network.text) == network


def test_leading_batch_dimensions() -> None:
    z, network = torch.randn(2, 3, 4), made(4, 6)
    parameters, context = parameters_of(network), torch.randn(2, 3, 6)
    x, logabsdet = ops.autoregressive_inverse(z, parameters, network, contexts=[context])
    assert x.shape == z.shape
    assert logabsdet.shape == (2, 3)
    for i in range(2):
        expected = ops.autoregressive_inverse(z[i], parameters, network, contexts=[context[i]])
        torch.testing.assert_close((x[i], logabsdet[i]), expected)
    one, value = ops.autoregressive_inverse(z[0, 0], parameters, network)
    assert one.shape == (4,)
    assert value.shape == ()


def test_bad_input_is_named() -> None:
    network = made(4, 6)
    z, parameters = torch.randn(3, 4), parameters_of(network)
    w, b, *rest = parameters
    cases = {
        r"TypeError: z: expected a floating dtype .* got torch.int64": (z.long(), parameters, network),
        r"ValueError: z: expected shape \(..., 4\) for network 0, got \(3, 5\)": (torch.randn(3, 5), parameters, network),
        r"ValueError: parameters: expected 4 .* got 3": (z, parameters[:-1], network),
        r"ValueError: weight 1 of network 0: expected shape \(8, 6\), got \(8, 5\)": (z, [w, b, rest[0][:, :5], b], network),
        r"ValueError: bias 0 of network 0: expected device cpu .* got meta": (z, [w, b.to("meta"), *rest], network),
        r"ValueError: context of network 0: expected shape \(3, 6\), got \(3, 5\)": (
            *(z, parameters, network),
            {"contexts": [torch.randn(3, 5)]},
        ),
        "ValueError: contexts: expected one for each of 1 networks, got 2": (
            *(z, parameters, network),
            {"contexts": [None, None]},
        ),
        "TypeError: networks: expected AutoregressiveNetworks, got str at 0": (z, parameters, ["made"]),
        "ValueError: networks: expected at least one": (z, [], []),
    }
    assert_refused(ops.autoregressive_inverse, cases)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "activation: unknown name 'swish'; expected one of 'relu'"),
        ({"layout": "rows"}, "layout: unknown name 'rows'"),
        ({"in_degrees": ()}, "in_degrees: expected at least one feature"),
        ({"in_degrees": (1.5, 2)}, "in_degrees: expected integers"),
        ({"hidden_degrees": ((1,), ())}, "hidden_degrees: a layer has no units"),
        ({"permutation": (0, 0)}, r"permutation: expected each of 0..1 once, got \(0, 0\)"),
        ({"gated": True}, "gated: expected a sigmoid scale, got ScaleMap"),
        ({"residual": True, "hidden_degrees": ((1,), (1,))}, "residual: expected one hidden layer and then pairs, got 2"),
        ({"residual": True, "hidden_degrees": ((1,), (1,), (2,))}, "residual: hidden layer 2 is added to layer 0, but has other"),
    ],
)
def test_bad_networks_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(AutoregressiveNetwork((1, 2), ((1, 1),)), **change)
