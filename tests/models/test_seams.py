"""Transformers and quantizers of a user's own inside models: trained, sampled from, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowkern import models, nn


class Slope(nn.Transformer, torch.nn.Module, kind="test-slope"):
    """y = x exp(power tanh(a)) + b with a power of its own."""

    params_per_feature = 2

    def __init__(self, start: float = 0.5):
        super().__init__()
        self.start = start
        self.power = torch.nn.Parameter(torch.tensor(start))

    def forward(self, x: torch.Tensor, params: torch.Tensor, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        log_scale, shift = self.power * params[..., 0].tanh(), params[..., 1]
        if inverse:
            return (x - shift) * (-log_scale).exp(), -log_scale
        return x * log_scale.exp() + shift, log_scale


class Nameless(Slope):
    """One that cannot be saved."""


class Signs(nn.Quantizer, kind="test-signs"):
    """Each channel becomes 1 or -1."""

    def __init__(self, dim: int, channels_first: bool = True):
        super().__init__()
        self.dim, self.codes, self.channels_first = dim, 2**dim, channels_first

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        last = self.channels_last(x)
        signs = torch.where(last > 0, 1.0, -1.0)
        index = ((last > 0) * 2 ** torch.arange(self.dim, device=x.device)).sum(-1)
        return self.as_given(last + (signs - last).detach()), index, x.new_zeros(())

    def decode(self, index: torch.Tensor) -> torch.Tensor:
        self.check_index(index)
        bits = index[..., None] // 2 ** torch.arange(self.dim, device=index.device) % 2
        return self.as_given(2.0 * bits - 1.0)


TRANSFORMERS: dict[str, Any] = {
    "own": lambda: Slope(0.25),
    "mixture": lambda: {"kind": "mixture_logistic", "components": 2},
    "spline": lambda: "spline",
}
KINDS = {"own": "test-slope", "mixture": "mixture_logistic", "spline": "rational_quadratic_spline"}
FLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "realnvp": ("realnvp", {"shape": 4, "couplings": 2, "hidden": 8, "zero_init": False}),
    "realnvp-separate": ("realnvp", {"shape": (1, 4, 4), "couplings": 1, "hidden": 4, "depth": 1, "separate": True}),
    "glow": ("glow", {"shape": (1, 4, 4), "steps": 2, "hidden": 4}),
    "maf": ("maf", {"shape": 4, "layers": 2, "hidden": [8]}),
    "iaf": ("iaf", {"shape": 4, "layers": 2, "hidden": [8]}),
}


def assert_trains_and_comes_back(model: models.Model, path: Path) -> models.Model:
    x = torch.rand(4, *model.shape)
    model.train().objective(x).mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    models.save(model.eval(), path)
    again = models.load(path)
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again.log_prob(x), model.log_prob(x))
        assert again.sample(2).shape == (2, *model.shape)
    return again


@pytest.mark.parametrize("transformer", TRANSFORMERS)
@pytest.mark.parametrize("case", FLOWS)
def test_flows_of_other_transformers(case: str, transformer: str, tmp_path: Path) -> None:
    name, settings = FLOWS[case]
    model = models.build(name, settings | {"transformer": TRANSFORMERS[transformer]()})
    assert model.config["transformer"]["kind"] == KINDS[transformer]
    if transformer == "own":
        found = [m for m in model.modules() if isinstance(m, Slope)]
        assert len({id(m) for m in found}) == len(found) >= 2
        x = torch.rand(3, *model.shape)
        model.log_prob(x).sum().backward()
        assert all(m.power.grad is not None for m in found)
    again = assert_trains_and_comes_back(model, tmp_path / "model.pt")
    x = torch.rand(3, *model.shape)
    torch.testing.assert_close(again.render(again.embed(x)), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_codes_of_another_quantizer(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"shape": (1, 8, 8), "levels": 4, "hidden": 8, "blocks": 1, "downsample": 1}
    model = models.build(name, settings | {"quantizer": Signs(3)})
    assert model.config["quantizer"] == {"kind": "test-signs", "dim": 3, "channels_first": True}
    assert (model.config["dim"], model.config["codes"], model.codes) == (3, 8, 8)
    again = assert_trains_and_comes_back(model, tmp_path / "model.pt")
    x = torch.rand(3, 1, 8, 8)
    assert all(map(torch.equal, again.encode(again.reconstruct(x)), model.encode(model.reconstruct(x))))
    torch.testing.assert_close(again.render(again.embed(x)), again.reconstruct(x))
    assert all(0 < usage.used <= 1 for usage in model.usage(x))
    prior = models.build(name, model.config | {"prior": {"hidden": 8, "layers": 2}})
    prior.load_autoencoder(model.state_dict())
    assert_trains_and_comes_back(prior, tmp_path / "prior.pt")


def test_what_cannot_be_saved_or_built_says_so(tmp_path: Path) -> None:
    model = models.RealNVP(4, couplings=2, hidden=8, transformer=Nameless())
    assert model.log_prob(torch.rand(3, 4)).shape == (3,)
    with pytest.raises(TypeError, match=r"Nameless: it has no name to be saved by; declare it as class Nameless\(\.\.\., kind"):
        models.save(model, tmp_path / "model.pt")
    assert not [*tmp_path.iterdir()]
    for build in (models.RealNVP, models.MAF, models.IAF):
        with pytest.raises(ValueError, match="transformer: unknown kind 'cubic'"):
            build(4, transformer="cubic")
    several = {"kind": "residual_vector", "dim": 4, "codes": 5, "levels": 2, "channels_first": True}
    for wrong in (Signs(3, channels_first=False), several):
        with pytest.raises(ValueError, match="quantizer: expected one with channels_first=True and one code for each vector"):
            models.VQVAE((1, 8, 8), quantizer=wrong)
