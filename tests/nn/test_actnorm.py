"""ActNorm: its initialization from data, once and whole or not at all, and the affine map that it then is."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import assert_exact, assert_near

from flowkern import nn

TOLERANCE = 1e-11  # in float64: a few roundings of values below 1e3


def images(batch: int = 6) -> torch.Tensor:
    """(B, 3, 4, 5) with another mean and spread in each channel."""
    x = torch.randn(batch, 3, 4, 5, dtype=torch.float64)
    return x * torch.tensor([0.2, 3.0, 50.0]).double().view(3, 1, 1) + torch.tensor([-1.0, 0.0, 200.0]).double().view(3, 1, 1)


def initialized() -> tuple[nn.ActNorm, torch.Tensor]:
    layer, x = nn.ActNorm(3).double(), images()
    layer(x)
    return layer, x


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 4, 5), (7, 3, 1, 1)])
@pytest.mark.parametrize("grad", [True, False])
def test_first_forward_gives_zero_mean_and_unit_variance(shape: tuple[int, ...], grad: bool) -> None:
    layer = nn.ActNorm(3, eps=1e-12).double()
    x = 4.0 * torch.randn(shape, dtype=torch.float64) + 9.0
    with torch.set_grad_enabled(grad):
        z = layer(x)[0].transpose(0, 1).flatten(1)
    assert_near(z.mean(1), torch.zeros(3).double(), TOLERANCE)
    assert_near(z.var(1, correction=0), torch.ones(3).double(), TOLERANCE)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(torch.randn(shape, dtype=torch.float64))
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_map_and_log_determinant() -> None:
    layer, x = initialized()
    z, logabsdet = layer(x)
    s, t = layer.log_scale.exp().view(3, 1, 1), layer.shift.view(3, 1, 1)
    assert_near(z, s * x + t, TOLERANCE)
    assert_near(logabsdet, (20 * layer.log_scale.sum()).expand(6), TOLERANCE)
    assert_exact(layer, images(2)[:, :, :1, :2], tolerance=TOLERANCE)


def test_channels_last_and_half_inputs() -> None:
    layer = nn.ActNorm(3)
    x = images().float().to(memory_format=torch.channels_last)
    z, _ = layer(x)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert layer.inverse(z)[0].is_contiguous(memory_format=torch.channels_last)
    half, logabsdet = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert logabsdet.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x)[0], z)


def test_constant_channels_are_safe() -> None:
    layer = nn.ActNorm(2)
    x = torch.full((4, 2, 3, 3), 7.0)
    z, _ = layer(x)
    assert z.isfinite().all()
    torch.testing.assert_close(layer.log_scale.exp(), torch.full((2,), 1e3))
    torch.testing.assert_close(layer.inverse(z)[0], x)


def test_before_initialization_evaluation_and_inverse_apply_the_parameters() -> None:
    layer, x = nn.ActNorm(3).double(), images()
    assert torch.equal(layer.inverse(x)[0], x)
    layer.eval()
    assert torch.equal(layer(x)[0], x)
    assert not layer.initialized
    layer.train()(x)
    assert layer.initialized


def loaded(layer: nn.ActNorm, **how: bool) -> nn.ActNorm:
    fresh = nn.ActNorm(3).double()
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()), **how)
    return fresh


def averaged(layer: nn.ActNorm) -> nn.ActNorm:
    """A copy from before the initialization, whose tensors are then written in place."""
    average = torch.optim.swa_utils.AveragedModel(nn.ActNorm(3).double())
    average.update_parameters(layer)
    return average.module


COPIES: dict[str, Callable[[nn.ActNorm], nn.ActNorm]] = {
    "loaded": loaded,
    "assigned": lambda layer: loaded(layer, assign=True),
    "copied": copy.deepcopy,
    "pickled": lambda layer: pickle.loads(pickle.dumps(layer)),
    "averaged": averaged,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_stay_initialized(name: str) -> None:
    layer, x = initialized()
    twin = COPIES[name](layer)
    other = x + 1.0
    assert torch.equal(twin(other)[0], layer(other)[0])
    assert torch.equal(twin.log_scale, layer.log_scale)


def test_loading_an_uninitialized_state_initializes_again() -> None:
    layer, x = initialized()
    layer.load_state_dict(nn.ActNorm(3).double().state_dict())
    z = layer(2.0 * x)[0]
    assert_near(z.mean((0, 2, 3)), torch.zeros(3).double(), TOLERANCE)


def assert_untouched(layer: nn.ActNorm) -> None:
    assert not layer.initialized
    assert not layer.is_initialized()
    assert not layer.log_scale.any()
    assert not layer.shift.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_data_is_refused_and_nothing_changes(value: float) -> None:
    layer, x = nn.ActNorm(3), images().float()
    layer.label = "levels.0.steps.1"
    bad = x.clone()
    bad[2, 1, 3, 0] = value
    with pytest.raises(ValueError, match=r"ActNorm 'levels.0.steps.1': .* NaN or infinity in 1 of 3 channels \(the first: 1\)"):
        layer(bad)
    assert_untouched(layer)
    layer(x)
    assert layer.initialized


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (1, 3, 8, 8), (4, 3, 0, 2)])
def test_too_small_a_batch_is_refused_and_nothing_changes(shape: tuple[int, ...]) -> None:
    layer = nn.ActNorm(3)
    with pytest.raises(ValueError, match=r"ActNorm\(channels=3\): the initialization needs a batch of at least 2 samples"):
        layer(torch.rand(shape))
    assert_untouched(layer)


def test_wrong_inputs() -> None:
    for channels in (0, -1):
        with pytest.raises(ValueError, match="channels must be at least 1"):
            nn.ActNorm(channels)
    with pytest.raises(ValueError, match="eps must be positive"):
        nn.ActNorm(3, eps=0.0)
    layer = nn.ActNorm(3)
    for direction in (layer.forward, layer.inverse):
        for shape in ((4, 2), (3,), (4, 3, 5)):
            with pytest.raises(ValueError, match=r"expected \(B, 3\) or \(B, 3, H, W\), got shape"):
                direction(torch.rand(shape))
        with pytest.raises(TypeError, match="x: expected a floating dtype"):
            direction(torch.ones(4, 3, dtype=torch.int64))
    assert_untouched(layer)


def test_compiled_before_initialization_it_initializes() -> None:
    layer, plain, x = nn.ActNorm(3).double(), nn.ActNorm(3).double(), images()
    compiled = torch.compile(layer, backend="aot_eager")
    for data in (x, x + 1.0):
        assert_near(compiled(data)[0], plain(data)[0], TOLERANCE)
    assert layer.initialized


def test_inference_mode_initializes_too() -> None:
    layer, x = nn.ActNorm(3).double(), images()
    with torch.inference_mode():
        layer(x)
    assert layer.initialized
    layer(x)[0].sum().backward()
    assert layer.log_scale.grad is not None


def of_rank(x: torch.Tensor, rank: int) -> dict[str, Any]:
    """The state after one step and its outputs, and what was said of batches that were refused before it."""
    # Unequal shares: averages of the ranks' averages would be wrong. One of them is too small alone.
    share = x[:1] if rank == 0 else x[1:]
    layer, said = nn.ActNorm(3).double(), []
    model = torch.nn.parallel.DistributedDataParallel(layer)
    for bad in (share * torch.nan if rank == 0 else share, share[:0] if rank == 0 else share[:1]):
        with pytest.raises(ValueError, match="ActNorm") as error:
            layer(bad)
        said.append(str(error.value))
        assert not layer.initialized
    z, logabsdet = model(share)
    (z.square().sum() + logabsdet.sum()).backward()
    return {**layer.state_dict(), "z": z.detach(), "said": said}


@pytest.mark.slow
def test_ranks_initialize_alike_from_all_samples(in_two_processes: Callable[..., list[Any]]) -> None:
    x, alone = images(5), nn.ActNorm(3).double()
    first, second = in_two_processes(functools.partial(of_rank, x))
    z = alone(x)[0]
    for rank in (first, second):
        assert "NaN or infinity in 3 of 3 channels" in rank["said"][0]
        assert "at least 2 samples, got 1" in rank["said"][1]
    for key, value in alone.state_dict().items():
        assert torch.equal(first[key], second[key])
        assert_near(first[key], value, TOLERANCE)
    assert_near(torch.cat([first["z"], second["z"]]), z, TOLERANCE)
