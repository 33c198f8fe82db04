"""``MaskedAutoregressive`` and ``InverseAutoregressive``: both directions, in flows, and beside nflows and zuko."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layers import assert_exact, assert_refused, fit, redrawn, remade, trained

import flowkern
from flowkern import nn, ops

ScaleMap = ops.ScaleMap
OPTIONS: list[dict[str, Any]] = [
    {},
    {"hidden": ()},
    {"hidden": (9,), "activation": "tanh", "scale": ScaleMap.softplus()},
    {"hidden": (8, 6), "residual": True, "activation": "silu", "order": "random"},
    {"context": 3, "degrees": "cyclic"},
    {"context": 3, "order": torch.tensor([2, 0, 1, 4, 3]), "degrees": "random"},
]
of_both = pytest.mark.parametrize("kind", [nn.MaskedAutoregressive, nn.InverseAutoregressive])


def layer(kind: type, features: int = 5, **options: Any) -> Any:
    return redrawn(kind(features, **{"hidden": (12, 7), **options}).double(), 0.0, around=1.5)


def inputs(module: Any, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor | None]:
    context = None if module.made.context is None else torch.randn(batch, module.made.context, dtype=torch.float64)
    return torch.randn(batch, module.made.features, dtype=torch.float64), context


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)) or "plain")
@of_both
def test_both_directions_are_exact(kind: type, options: dict[str, Any], backend: str) -> None:
    module = layer(kind, **options)
    x, context = inputs(module)
    with flowkern.backend(backend):
        assert_exact(module, x, context, tolerance=1e-7)
    row = None if context is None else context[:1]
    jacobian = torch.autograd.functional.jacobian(lambda v: module(v[None], row)[0][0], x[0])
    place = module.made.order.argsort()
    assert (jacobian[place][:, place].triu(1) == 0).all()


def test_the_gate_is_that_of_kingma() -> None:
    module = layer(nn.InverseAutoregressive, gated=True)
    z, _ = inputs(module)
    u, t = module.made(z).unbind(-1)
    s = torch.sigmoid(u + 2)
    x, logabsdet = module.inverse(z)
    torch.testing.assert_close(x, s * z + (1 - s) * t)
    torch.testing.assert_close(logabsdet, s.log().sum(1))
    torch.testing.assert_close(module(x)[0], z)
    with pytest.raises(ValueError, match="gated: expected a sigmoid scale"):
        nn.InverseAutoregressive(3, (4,), gated=True, scale=ScaleMap.exp())


@of_both
def test_in_a_flow(kind: type) -> None:
    layers = [layer(kind, context=2, activation="silu"), nn.Permutation.reverse(5), layer(kind, context=2, activation="elu")]
    x, context = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    stored = nn.Compose(*layers)
    reversible = remade(stored, memory="reversible")
    torch.testing.assert_close(trained(reversible, x, context), trained(stored, x, context))
    for chain in (stored, reversible):
        flow = nn.Flow(chain, nn.StandardNormal(5)).double()
        assert flow.log_prob(x, context).shape == (6,)
        drawn = flow.sample(6, context)
        torch.testing.assert_close(chain.inverse(chain(drawn, context)[0], context)[0], drawn)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each call of the op."""
    made: list[int] = []
    single = ops.autoregressive_inverse
    monkeypatch.setattr(ops, "autoregressive_inverse", lambda *a, **k: (made.append(1), single(*a, **k))[1])
    return made


@of_both
def test_a_chain_runs_in_one_call(kind: type, calls: list[int]) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    layers = [
        nn.Permutation(order),
        layer(kind),
        nn.Permutation.reverse(5),
        nn.Permutation(order),
        layer(kind, residual=True, hidden=(6, 4)),
        layer(kind, order="random", seed=3),
        nn.Permutation(order),
    ]
    x, inverse = torch.randn(4, 5, dtype=torch.float64), kind is nn.MaskedAutoregressive
    expected, total = x, torch.zeros(4, dtype=torch.float64)
    for bijection in reversed(layers) if inverse else layers:
        expected, logabsdet = bijection.inverse(expected) if inverse else bijection(expected)
        total = total + logabsdet
    compose = nn.Compose(*layers)
    calls.clear()
    for _ in range(2):
        actual, logabsdet = compose.inverse(x) if inverse else compose(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(logabsdet, total)
    assert len(calls) == 2
    assert len(list(copy.deepcopy(compose).parameters())) == len(list(compose.parameters()))
    # Other orders, as a state_dict may bring them.
    with torch.no_grad():
        layers[3].order.copy_(torch.tensor([1, 0, 2, 4, 3]))
    back = compose(compose.inverse(x)[0])[0] if inverse else compose.inverse(compose(x)[0])[0]
    torch.testing.assert_close(back, x)


@of_both
def test_a_chain_with_contexts_and_others_between(kind: type[nn.Bijection], calls: list[int]) -> None:
    x, context = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    conditional = [layer(kind, context=2) for _ in range(4)]
    compose = nn.Compose(*conditional[:2], nn.ActNorm(5).double(), *conditional[2:]).eval()
    for inverse in (False, True):
        y = compose.inverse(x, context)[0] if inverse else compose(x, context)[0]
        back = compose(y, context)[0] if inverse else compose.inverse(y, context)[0]
        torch.testing.assert_close(back, x)
    assert len(calls) == 2 * 2
    assert_refused(
        (lambda: compose.inverse(x) if kind is nn.MaskedAutoregressive else compose(x), "context"),
        (lambda: nn.Compose(layer(kind, context=2), layer(kind)).inverse(x, context), "context"),
    )


def test_other_masks_are_followed() -> None:
    module = layer(nn.MaskedAutoregressive)
    x, _ = inputs(module)
    before = module.network
    module.made.resample_masks(torch.Generator().manual_seed(5))
    assert module.network is not before
    torch.testing.assert_close(module.inverse(module(x)[0])[0], x)


def test_bad_input_is_named() -> None:
    module = nn.MaskedAutoregressive(4, (5,), context=2)
    assert_refused(
        (lambda: module.inverse(torch.randn(3, 5)), r"x: expected shape \(B, 4\), got \(3, 5\)"),
        (lambda: module.inverse(torch.randn(3, 4)), r"context: expected shape \(3, 2\), got none"),
    )


@pytest.mark.slow
def test_reverse_kl_training_fits_a_correlated_normal() -> None:
    """Samples of the slow direction carry gradients: the divergence, whose normalizer is known, falls to almost nothing."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 2.0]])
    target = torch.distributions.MultivariateNormal(torch.tensor([1.0, -1.0]), covariance)
    flow = nn.Flow(nn.MaskedAutoregressive(2, (16,), activation="tanh"), nn.StandardNormal(2))

    def divergence() -> torch.Tensor:
        x, log_q = flow.sample_and_log_prob(256)
        return log_q - target.log_prob(x)

    assert fit(flow, divergence, 250, lr=0.02)[-1] < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Peers, with equal weights


def share_weights(module: Any, linears: list[Any]) -> None:
    """Give the peer larger weights, and the module the same ones."""
    with torch.no_grad():
        for own, other in zip(module.made.layers, linears, strict=True):
            own.weight.copy_(other.weight.mul_(3))
            own.bias.copy_(other.bias.add_(0.1))


def close_to(module: Any, theirs: Any, z: torch.Tensor) -> None:
    for backend in ("auto", "torch"):
        with flowkern.backend(backend):
            for actual, expected in zip(module.inverse(z), theirs(z), strict=True):
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("residual", [False, True])
def test_equals_nflows(residual: bool) -> None:
    pytest.importorskip("nflows")
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    how = {"num_blocks": 2, "use_residual_blocks": residual, "activation": torch.tanh}
    theirs = MaskedAffineAutoregressiveTransform(6, 10, **how).double()
    net = theirs.autoregressive_net
    blocks = [linear for b in net.blocks for linear in (b.linear_layers if residual else [b.linear])]
    options = {"activation": "tanh", "residual": residual, "degrees": "cyclic", "scale": ScaleMap.softplus(1e-3)}
    module = nn.MaskedAutoregressive(6, (10, 10, 10), **options).double()
    share_weights(module, [net.initial_layer, *blocks, net.final_layer])
    z = torch.randn(5, 6, dtype=torch.float64)
    close_to(module, theirs.inverse, z)
    torch.testing.assert_close(module(z), theirs(z))


def test_equals_zuko() -> None:
    zuko = pytest.importorskip("zuko")
    order = torch.tensor([2, 0, 1, 4, 3])
    theirs = zuko.flows.MaskedAutoregressiveTransform(5, order=order, hidden_features=(8, 8)).double()
    linears = [m for m in theirs.hyper if hasattr(m, "mask")]
    # The degree of a unit is the number of features that it sees; those of the first layer see features themselves.
    sees = linears[0].mask
    hidden = [sees.sum(1)]
    hidden.append((linears[1].mask.double() @ sees.double() > 0).sum(1))
    options = {"order": order, "degrees": hidden, "scale": ScaleMap.soft_clip(1e-3)}
    module = nn.MaskedAutoregressive(5, (8, 8), **options).double()
    share_weights(module, linears)
    last = module.made.layers[-1]
    with torch.no_grad():
        last.weight.copy_(last.weight.view(5, 2, 8).flip(1).flatten(0, 1))  # zuko's shift comes first
        last.bias.copy_(last.bias.view(5, 2).flip(1).flatten())
    z = torch.randn(5, 5, dtype=torch.float64)
    close_to(module, lambda v: theirs().inv.call_and_ladj(v), z)
    torch.testing.assert_close(module(z), theirs().call_and_ladj(z))
