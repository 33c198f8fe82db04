"""The coupling of Flow++, and the solver of its inverse."""

from __future__ import annotations

import functools

import pytest
import torch

from flowkern import nn
from flowkern.nn.bijections.root import solve_increasing
from flowkern.ops import FeatureMask

K = 3


class _Given(torch.nn.Module):
    """A conditioner that returns what it holds, whatever it is shown."""

    def __init__(self, params: torch.Tensor):
        super().__init__()
        self.params = torch.nn.Parameter(params)

    def forward(self, kept: torch.Tensor) -> torch.Tensor:
        return self.params


def layer(shape: tuple[int, ...], split: str | FeatureMask, moved: int, scale: float = 1.0) -> nn.MixtureLogisticCoupling:
    generator = torch.Generator().manual_seed(0)
    params = scale * torch.randn(shape[0], (2 + 3 * K) * moved, *shape[2:], generator=generator, dtype=torch.float64)
    return nn.MixtureLogisticCoupling(_Given(params), K, split=split)


CASES = {
    "channel": ((4, 5), "channel", 2),
    "channel_swap": ((4, 5), "channel_swap", 3),
    "checkerboard": ((4, 2, 3, 3), "checkerboard", 2),
    "mask": ((4, 4), FeatureMask(torch.tensor([True, False, True, True])), 3),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_inverse_and_log_determinants(name: str, scale: float) -> None:
    shape, split, moved = CASES[name]
    coupling = layer(shape, split, moved, scale)
    x = 2.0 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z, logabsdet = coupling(x)
    again, back = coupling.inverse(z)
    torch.testing.assert_close(again, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back, -logabsdet, rtol=1e-8, atol=1e-8)
    jacobian = torch.autograd.functional.jacobian(lambda x: coupling(x)[0], x)
    for i in range(len(x)):
        block = jacobian[i].flatten(0, x.ndim - 2)[:, i].flatten(1)
        torch.testing.assert_close(logabsdet[i], torch.linalg.slogdet(block).logabsdet, rtol=1e-9, atol=1e-9)


def test_values_by_the_distribution_function() -> None:
    coupling = layer((4, 2), "channel", 1)
    x = torch.randn(4, 2, dtype=torch.float64)
    raw, shift, *mixture = coupling.conditioner.params.unbind(1)
    logits, mean, raw_scales = (torch.stack(mixture[i * K : (i + 1) * K], 1) for i in range(3))
    distribution = (logits.softmax(1) * ((x[:, 1:] - mean) / coupling.scale(raw_scales)[0]).sigmoid()).sum(1)
    expected = coupling.scale(raw)[0] * distribution.logit() + shift
    torch.testing.assert_close(coupling(x)[0], torch.stack([x[:, 0], expected], 1))


def test_far_from_every_component() -> None:
    """Where F is 0 or 1 to every bit the map is still linear, finite and invertible, in float32 too."""
    coupling = layer((2, 2), "channel", 1).float()
    x = torch.tensor([[0.0, 1e4], [0.0, -1e4]])
    z, logabsdet = coupling(x)
    assert z.isfinite().all()
    assert logabsdet.isfinite().all()
    torch.testing.assert_close(coupling.inverse(z)[0], x, rtol=1e-5, atol=1e-3)


def test_gradients_of_both_directions() -> None:
    coupling = layer((2, 2), "channel", 1, 0.5)
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    params = coupling.conditioner.params.detach().clone().requires_grad_()
    for inverse in (False, True):
        couple = functools.partial(coupling.couple, inverse=inverse)
        assert torch.autograd.gradcheck(couple, (x, params))
        assert torch.autograd.gradgradcheck(couple, (x, params))


def test_trains_inside_a_flow() -> None:
    torch.manual_seed(0)
    make = lambda split: nn.MixtureLogisticCoupling(nn.MLP(1, 2 + 3 * K, (16,), zero_init=False), K, split=split)  # noqa: E731
    flow = nn.Flow(nn.Compose(make("channel"), make("channel_swap")), nn.StandardNormal(2))
    x = torch.randn(256, 2).sign() * 2 + 0.3 * torch.randn(256, 2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    first = -flow.log_prob(x).mean().item()
    for _ in range(60):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 0.5
    drawn = flow.sample(200)
    assert ((drawn.abs() - 2).abs() < 1.2).float().mean() > 0.8


def test_roots() -> None:
    """Of functions on which Newton's method alone runs away, from any bracket."""
    target = torch.linspace(-3.0, 3.0, 13, dtype=torch.float64)
    for function, slope in (
        (lambda x: x.tanh() * 3.1, lambda x: 3.1 * (1 - x.tanh().square())),
        (lambda x: x**3, lambda x: 3 * x**2),
        (lambda x: x.sinh(), lambda x: x.cosh()),
    ):
        root = solve_increasing(
            lambda x, f=function, s=slope: (f(x) - target, s(x)), torch.full_like(target, -50.0), torch.full_like(target, 70.0)
        )
        torch.testing.assert_close(function(root), target, rtol=1e-9, atol=1e-9)


def test_derivatives_of_roots() -> None:
    """Of the cube root, by autograd, forward mode and functional transforms."""
    t = torch.tensor([0.5, 2.0, -3.0], dtype=torch.float64, requires_grad=True)

    def cube_root(t: torch.Tensor) -> torch.Tensor:
        return solve_increasing(lambda x: (x**3 - t, 3 * x**2), torch.full_like(t, -4.0), torch.full_like(t, 5.0))

    root, derivative = cube_root(t), t.abs() ** (1 / 3) * t.sign()
    torch.testing.assert_close(root, derivative)
    for order in range(3):
        (root,) = torch.autograd.grad(root.sum(), t, create_graph=True)
        derivative = derivative * (1 / 3 - order) / t
        torch.testing.assert_close(root, derivative)
    slopes = t.detach().abs() ** (-2 / 3) / 3
    torch.testing.assert_close(torch.func.jvp(cube_root, (t.detach(),), (torch.ones_like(t),))[1], slopes)
    torch.testing.assert_close(torch.func.jacrev(cube_root)(t.detach()), slopes.diag())


def test_errors() -> None:
    with pytest.raises(ValueError, match="components: expected at least 1, got 0"):
        nn.MixtureLogisticCoupling(torch.nn.Identity(), 0)
    with pytest.raises(ValueError, match=r"params: expected shape \(B, 11\), got \(2, 1\)"):
        nn.MixtureLogisticCoupling(torch.nn.Identity(), K)(torch.zeros(2, 2))
