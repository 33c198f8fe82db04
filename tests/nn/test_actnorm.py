"""ActNorm: its initialization from data, once and whole or not at all, and the affine map that it then is."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
import textwrap

import pytest
import torch

from flowkern import nn


def images(batch: int = 6) -> torch.Tensor:
    """(B, 3, 4, 5) with another mean and spread in each channel."""
    x = torch.randn(batch, 3, 4, 5, dtype=torch.float64)
    return x * torch.tensor([0.2, 3.0, 50.0]).double().view(3, 1, 1) + torch.tensor([-1.0, 0.0, 200.0]).double().view(3, 1, 1)


def initialized() -> tuple[nn.ActNorm, torch.Tensor]:
    layer, x = nn.ActNorm(3).double(), images()
    layer(x)
    return layer, x


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """In float64: a few roundings of values below 1e3."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 4, 5), (7, 3, 1, 1)])
@pytest.mark.parametrize("grad", [True, False])
def test_first_forward_gives_zero_mean_and_unit_variance(shape: tuple[int, ...], grad: bool) -> None:
    layer = nn.ActNorm(3, eps=1e-12).double()
    x = 4.0 * torch.randn(shape, dtype=torch.float64) + 9.0
    with torch.set_grad_enabled(grad):
        z = layer(x)[0].transpose(0, 1).flatten(1)
    assert_near(z.mean(1), torch.zeros(3).double())
    assert_near(z.var(1, correction=0), torch.ones(3).double())
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(torch.randn(shape, dtype=torch.float64))
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_map_log_determinant_and_gradients() -> None:
    layer, x = initialized()
    x.requires_grad_()
    z, logabsdet = layer(x)
    s, t = layer.log_scale.exp().view(3, 1, 1), layer.shift.view(3, 1, 1)
    assert_near(z, s * x + t)
    assert_near(logabsdet, (20 * layer.log_scale.sum()).expand(6))
    back, logabsdet_back = layer.inverse(z)
    assert_near(back, x)
    assert_near(logabsdet_back, -logabsdet)
    small, jacobian = images(1)[:, :, :1, :2], torch.autograd.functional.jacobian
    volume = torch.linalg.slogdet(jacobian(lambda v: layer(v)[0], small).reshape(6, 6)).logabsdet
    assert_near(layer(small)[1], volume[None])
    vector = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for direction in (layer.forward, layer.inverse):
        assert torch.autograd.gradcheck(lambda v, *_, d=direction: d(v), (vector, *layer.parameters()))


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


def state_dict_into_a_fresh_layer(layer: nn.ActNorm) -> nn.ActNorm:
    fresh = nn.ActNorm(3).double()
    fresh.load_state_dict(layer.state_dict())
    return fresh


def assigned(layer: nn.ActNorm) -> nn.ActNorm:
    fresh = nn.ActNorm(3).double()
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    return fresh


def pickled(layer: nn.ActNorm) -> nn.ActNorm:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(layer: nn.ActNorm) -> nn.ActNorm:
    """A copy from before the initialization, whose tensors are then written in place."""
    average = torch.optim.swa_utils.AveragedModel(nn.ActNorm(3).double())
    average.update_parameters(layer)
    return average.module


@pytest.mark.parametrize("duplicate", [state_dict_into_a_fresh_layer, assigned, copy.deepcopy, pickled, averaged])
def test_copies_stay_initialized(duplicate) -> None:
    layer, x = initialized()
    twin = duplicate(layer)
    other = x + 1.0
    assert torch.equal(twin(other)[0], layer(other)[0])
    assert torch.equal(twin.log_scale, layer.log_scale)


def test_loading_an_uninitialized_state_initializes_again() -> None:
    layer, x = initialized()
    layer.load_state_dict(nn.ActNorm(3).double().state_dict())
    z = layer(2.0 * x)[0]
    assert_near(z.mean((0, 2, 3)), torch.zeros(3).double())


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


def test_compiles_in_one_graph_once_initialized() -> None:
    layer, x = initialized()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x)[0], layer(x)[0])


def test_compiled_before_initialization_it_initializes() -> None:
    layer, plain, x = nn.ActNorm(3).double(), nn.ActNorm(3).double(), images()
    compiled = torch.compile(layer, backend="aot_eager")
    for data in (x, x + 1.0):
        assert_near(compiled(data)[0], plain(data)[0])
    assert layer.initialized


def test_inference_mode_initializes_too() -> None:
    layer, x = nn.ActNorm(3).double(), images()
    with torch.inference_mode():
        layer(x)
    assert layer.initialized
    layer(x)[0].sum().backward()
    assert layer.log_scale.grad is not None


_RANK = """
    import sys
    import torch
    import torch.distributed as dist
    from flowkern import nn

    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x = torch.load(f"{folder}/x.pt", weights_only=True)
    # Unequal shares: averages of the ranks' averages would be wrong. One of them is too small alone.
    share = x[:1] if rank == 0 else x[1:]
    layer = nn.ActNorm(3).double()
    model = torch.nn.parallel.DistributedDataParallel(layer)
    for bad in (share * torch.nan if rank == 0 else share, share[:0] if rank == 0 else share[:1]):
        try:
            layer(bad)
        except ValueError as error:
            print(error, file=sys.stderr)
        else:
            raise SystemExit("accepted")
        assert not layer.initialized
    z, logabsdet = model(share)
    (z.square().sum() + logabsdet.sum()).backward()
    torch.save({**layer.state_dict(), "z": z.detach()}, f"{folder}/{rank}.pt")
    del model  # it holds the process group
    dist.barrier()  # no rank leaves while another may still need it
    dist.destroy_process_group()
"""


def test_ranks_initialize_alike_from_all_samples(tmp_path) -> None:
    x = images(5)
    torch.save(x, tmp_path / "x.pt")
    (tmp_path / "rank.py").write_text(textwrap.dedent(_RANK))
    command = [sys.executable, str(tmp_path / "rank.py")]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in ranks:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
        assert "NaN or infinity in 3 of 3 channels" in errors
        assert "at least 2 samples, got 1" in errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = nn.ActNorm(3).double()
    z = alone(x)[0]
    for key, value in alone.state_dict().items():
        assert torch.equal(first[key], second[key])
        assert_near(first[key], value)
    assert_near(torch.cat([first["z"], second["z"]]), z)
