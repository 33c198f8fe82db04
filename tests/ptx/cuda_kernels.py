"""The CUDA kernels of csrc/cuda, executed from the PTX that NVRTC makes of them: the plugin ``on_ptx`` runs this file."""

from __future__ import annotations

import pytest
import test_cuda
import torch

from flowkern._core import nvrtc
from flowkern.ops.autoregressive import cuda

pytestmark = pytest.mark.skipif(bool(nvrtc.missing()), reason=nvrtc.missing())

every_tile = pytest.mark.parametrize(("dtype", "tile"), test_cuda.EVERY_TILE, ids=str)


# What a GPU has, and one that holds little: blocks take several tiles, whose values lie in a scratch buffer.
@pytest.fixture(params=[(132, 232448), (2, 8000)], ids=["large", "small"], autouse=True)
def _gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "limits_of", lambda device: request.param)


@every_tile
def test_the_forward(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    test_cuda.use_tile(monkeypatch, tile)
    test_cuda.assert_right(dtype)


@every_tile
def test_the_backward(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    test_cuda.use_tile(monkeypatch, tile)
    test_cuda.assert_pulled_back_right(dtype)


@pytest.mark.parametrize("features", [10, 16, 32])
def test_staged_weights_of_wide_layers(features: int) -> None:
    network = test_cuda.made(features, 512, 512)
    test_cuda.run(test_cuda.Sample("", (torch.randn(5, features), test_cuda.parameters_of(network), [network])))
