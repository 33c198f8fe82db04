"""Planar and radial flows: exact inverses, log-determinants and gradients, invertible whatever their parameters."""

from __future__ import annotations

import pytest
import torch
from layers import assert_exact, assert_refused, redrawn

from flowkern import nn

LAYERS = {"planar": nn.Planar, "radial": nn.Radial}


def built(name: str, features: int, context: int | None = None, scale: float = 1.0) -> nn.Bijection:
    return redrawn(LAYERS[name](features, context).double(), scale, seed=features)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("context", [None, 3])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_inverse_and_log_determinants(name: str, context: int | None, scale: float) -> None:
    for features in (1, 5):
        z = 3.0 * torch.randn(40, features, dtype=torch.float64)
        rows = None if context is None else torch.randn(40, context, dtype=torch.float64)
        layer = built(name, features, context, scale)
        assert_exact(layer, layer.inverse(z, rows)[0].detach(), rows, tolerance=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_both_directions(name: str) -> None:
    layer = built(name, 3, 2)
    inputs = [torch.randn(4, n, dtype=torch.float64, requires_grad=True) for n in (3, 2)]
    for direction in (layer.forward, layer.inverse):
        assert torch.autograd.gradcheck(direction, inputs)
        assert torch.autograd.gradgradcheck(direction, inputs)


@pytest.mark.parametrize("name", LAYERS)
def test_special_points(name: str) -> None:
    """No direction at all (planar), and the centre itself (radial): values and gradients stay finite."""
    layer = LAYERS[name](2)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    x = torch.zeros(1, 2, requires_grad=True)
    for direction in (layer.forward, layer.inverse):
        y, logabsdet = direction(x)
        gradients = torch.autograd.grad(y.sum() + logabsdet.sum(), [x, *layer.parameters()])
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("raw", [-5.0, -20.0, -60.0, -200.0])
def test_planar_close_to_the_limit_of_invertibility_in_float32(raw: float) -> None:
    """1 + u.w = softplus(raw) keeps its digits: the map is nearly flat where w.e + b = 0."""
    layer = nn.Planar(2)
    with torch.no_grad():
        layer.parameters_of.constants.copy_(torch.tensor([raw, 0.5, 1.0, 0.0, 0.0]))
    e = torch.tensor([[0.0, 0.3], [1e-4, 0.3], [0.2, -1.0], [-3.0, 2.0]])
    h = e[:, 0].double().tanh()
    slope = torch.nn.functional.softplus(torch.tensor(raw, dtype=torch.float64)).clamp_min(torch.finfo(torch.float32).tiny)
    expected = (h.square() + (1.0 - h.square()) * slope).log()
    z, logabsdet = layer.inverse(e.requires_grad_())
    torch.testing.assert_close(logabsdet.double(), expected, rtol=1e-5, atol=1e-6)
    back, negative = layer(z.detach().requires_grad_())
    torch.testing.assert_close(back[2:], e[2:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(negative[2:], -logabsdet[2:], rtol=1e-3, atol=1e-3)
    for outputs in ((z, logabsdet), (back, negative)):
        gradients = torch.autograd.grad(outputs, [*layer.parameters()], [*map(torch.ones_like, outputs)])
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("raw", [-5.0, -20.0, -60.0, -200.0])
def test_radial_close_to_the_limit_of_invertibility_in_float32(raw: float) -> None:
    """alpha + beta = softplus(raw) keeps its digits: the map is nearly flat at the centre."""
    layer = nn.Radial(2)
    with torch.no_grad():
        layer.parameters_of.constants.copy_(torch.tensor([0.0, 0.0, 1.0, raw]))
    e = torch.tensor([[0.0, 0.0], [1e-4, 0.0], [0.2, -1.0], [-3.0, 2.0]])
    r = e.double().norm(dim=1)
    alpha, total = torch.nn.functional.softplus(torch.tensor([1.0, raw], dtype=torch.float64)).clamp_min(1.17549435e-38)
    expected = ((total + r) / (alpha + r)).log() + ((r * (r + 2 * alpha) + alpha * total) / (alpha + r).square()).log()
    z, logabsdet = layer.inverse(e)
    torch.testing.assert_close(logabsdet.double(), expected, rtol=1e-5, atol=1e-6)
    back, negative = layer(z.detach()[1:])  # at the centre the way back is as steep as 1 / softplus(raw)
    torch.testing.assert_close(back[1:], e[2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(negative[1:], -logabsdet[2:], rtol=1e-4, atol=1e-4)
    for outputs in ((z, logabsdet), (back, negative)):
        gradients = torch.autograd.grad(outputs, [*layer.parameters()], [*map(torch.ones_like, outputs)])
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_other_inputs_are_refused(layer: type[nn.Bijection]) -> None:
    assert_refused(
        (lambda: layer(4, 3)(torch.zeros(2, 4)), r"context: expected shape \(2, 3\), got none"),
        (lambda: layer(0), "features: expected at least 1, got 0"),
    )
    for call in (layer(3), layer(3).inverse):
        for shape in ((2, 4), (2, 1), (2,), (2, 3, 3)):
            with pytest.raises(ValueError, match=rf"{layer.__name__}: expected x of shape \(B, 3\), got \({shape[0]}"):
                call(torch.zeros(shape))
        with pytest.raises(TypeError, match="x: expected a floating dtype"):
            call(torch.ones(2, 3, dtype=torch.int64))
