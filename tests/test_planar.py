"""Planar and radial flows: exact inverses, log-determinants and gradients, invertible whatever their parameters."""

from __future__ import annotations

import pytest
import torch

from flowkern import nn

LAYERS = {"planar": nn.Planar, "radial": nn.Radial}


def built(name: str, features: int, context: int | None = None, scale: float = 1.0) -> nn.Bijection:
    layer = LAYERS[name](features, context).double()
    generator = torch.Generator().manual_seed(features)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("context", [None, 3])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_inverse_and_log_determinants(name: str, context: int | None, scale: float) -> None:
    for features in (1, 5):
        layer = built(name, features, context, scale)
        z = 3.0 * torch.randn(40, features, dtype=torch.float64)
        rows = None if context is None else torch.randn(40, context, dtype=torch.float64)
        x, logabsdet = layer.inverse(z, rows)
        again, back = layer(x, rows)
        torch.testing.assert_close(again, z, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(back, -logabsdet, rtol=1e-6, atol=1e-6)
        for i in range(3):
            row = None if rows is None else rows[i : i + 1]
            jacobian = torch.autograd.functional.jacobian(lambda s, f=layer.inverse, row=row: f(s, row)[0], z[i : i + 1])
            expected = torch.linalg.slogdet(jacobian.view(features, features)).logabsdet
            torch.testing.assert_close(logabsdet[i], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_both_directions(name: str) -> None:
    layer = built(name, 3, 2)
    x, context = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    for direction in (layer.forward, layer.inverse):
        torch.autograd.gradcheck(direction, (x.requires_grad_(), context.requires_grad_()))


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


def test_errors() -> None:
    for layer in LAYERS.values():
        with pytest.raises(ValueError, match=r"context: expected shape \(2, 3\), got none"):
            layer(4, 3)(torch.zeros(2, 4))
