"""``nn.BatchNormFlow``."""

from __future__ import annotations

import pytest
import torch
from layers import assert_exact, assert_refused

from flowkern import nn


def layer() -> nn.BatchNormFlow:
    """One whose parameters and running averages are away from where they start."""
    made = nn.BatchNormFlow(3).double()
    with torch.no_grad():
        for value in (made.log_scale, made.shift, made.running_mean):
            value.normal_()
        made.running_variance.uniform_(0.5, 2.0)
    return made


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 5)])
def test_training_normalizes_by_the_batch(shape):
    made, x = layer(), 3.0 + 2.0 * torch.randn(shape, dtype=torch.float64)
    z, logabsdet = made(x)
    expected = torch.nn.functional.batch_norm(x, None, None, made.log_scale.exp(), made.shift, training=True, eps=made.eps)
    torch.testing.assert_close(z, expected)
    # The slope of z in x with the statistics as constants.
    variance = x.transpose(0, 1).flatten(1).var(1, correction=0)
    pixels = x.shape[2:].numel()
    torch.testing.assert_close(logabsdet, (pixels * (made.log_scale - (variance + made.eps).log() / 2).sum()).expand(len(x)))


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 2, 2)])
def test_evaluation_is_an_affine_map_with_an_exact_inverse(shape):
    assert_exact(layer().eval(), torch.randn(shape, dtype=torch.float64), tolerance=1e-7)


def test_running_averages_are_those_of_torch():
    made, theirs = nn.BatchNormFlow(3), torch.nn.BatchNorm1d(3)
    for _ in range(4):
        x = 2.0 + torch.randn(6, 3)
        made(x), theirs(x)
    torch.testing.assert_close(made.running_mean, theirs.running_mean)
    # torch averages the variance divided by the count less one.
    expected = 0.9**4 + (theirs.running_var - 0.9**4) * 5 / 6
    torch.testing.assert_close(made.running_variance, expected)


def test_gradients_flow_through_the_statistics():
    made, x = layer(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        made.momentum = 0.0  # gradcheck calls often
    assert torch.autograd.gradcheck(lambda *v: made(v[0]), (x, made.log_scale, made.shift))


def test_log_determinants_stay_exact_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        z, logabsdet = layer().float()(torch.randn(4, 3).bfloat16())
    assert (z.dtype, logabsdet.dtype) == (torch.bfloat16, torch.float32)


def test_reversible_memory_says_so_and_auto_stores():
    x = torch.randn(4, 3)
    with pytest.raises(NotImplementedError, match="no inverse in training mode"):
        nn.Compose(nn.BatchNormFlow(3), memory="reversible")(x)[0].sum().backward()
    made = nn.Compose(nn.BatchNormFlow(3), memory="auto")
    with pytest.warns(RuntimeWarning, match="no inverse in training mode"):
        made(x)[0].square().sum().backward()
    stored = nn.Compose(nn.BatchNormFlow(3))
    stored(x)[0].square().sum().backward()
    for a, b in zip(made.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for name, value in stored.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value, msg=f"{name} was updated twice")


def test_bad_input_is_named():
    x = torch.randn(4, 3, dtype=torch.float64)
    assert_refused(
        (lambda: layer().inverse(x), "no inverse in training mode", NotImplementedError),
        (lambda: nn.BatchNormFlow(0), "features must be at least 1, got 0"),
        (lambda: nn.BatchNormFlow(3, eps=0.0), r"eps > 0 and momentum from 0 to 1, got 0.0 and 0.1"),
        (lambda: nn.BatchNormFlow(3)(torch.randn(4, 2)), r"expected an input of shape \(B, 3\) or \(B, 3, H, W\), got \(4, 2\)"),
        (lambda: nn.BatchNormFlow(3)(torch.randn(1, 3)), r"at least 2 values of each feature, got 1; use eval"),
    )


def test_frozen_computes_the_same_and_leaves_the_averages():
    layer, twin, x = nn.BatchNormFlow(3), nn.BatchNormFlow(3), torch.randn(5, 3)
    with layer.frozen():
        frozen = layer(x)[0]
    assert torch.equal(frozen, twin(x)[0])
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer(x)[0], frozen)
    assert torch.equal(layer.running_mean, twin.running_mean)
