"""VQ-VAE: bounds that are bounds, codes to images and back, the two stages of training, and the commands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from built import assert_all_graded, assert_refused, fit

from flowkern import cli, models
from flowkern.models import _vqvae

SMALL: dict[str, Any] = {"levels": 4, "hidden": 8, "blocks": 1, "dim": 3, "codes": 4, "downsample": 1}
PRIOR = {"hidden": 8, "layers": 2}
MODELS = [models.VQVAE, models.VQVAE2]


def built(cls: Any, shape: tuple[int, ...] = (1, 4, 4), **settings: Any) -> Any:
    """The model in float64 and evaluation mode, its codebooks spread over what its encoder gives."""
    model = cls(shape, **SMALL | settings).double()
    if model.prior is None:
        model.train()(torch.rand(8, *model.shape, dtype=torch.float64))
    return model.eval()


def images(n: int, shape: tuple[int, ...] = (1, 4, 4), levels: int = 4) -> torch.Tensor:
    return (torch.randint(levels, (n, *shape)) + 0.5).double() / levels


# ---------------------------------------------------------------------------------------------------------------------
# The models


@pytest.mark.parametrize("likelihood", _vqvae.LIKELIHOODS)
@pytest.mark.parametrize("prior", [None, PRIOR])
@pytest.mark.parametrize("cls", MODELS)
def test_the_bound_is_below_the_probability(cls: Any, prior: Any, likelihood: str) -> None:
    """P(v) = sum over all maps of codes of P(codes) P(v | codes), for a model with so few that they can be listed."""
    model = built(cls, (1, 2, 2) if cls is models.VQVAE else (1, 4, 4), codes=2, likelihood=likelihood, prior=prior)
    sizes = model.autoencoder.sizes
    positions = [h * w for h, w in sizes]
    every = torch.cartesian_prod(*[torch.arange(2)] * sum(positions)).view(-1, sum(positions))
    codes = tuple(part.view(-1, *size) for part, size in zip(every.split(positions, 1), sizes, strict=True))
    x = images(4, model.shape)
    v = model.values(x)
    with torch.no_grad():
        if model.prior is None:
            log_prior = torch.full((len(every),), -sum(positions) * math.log(2.0), dtype=torch.float64)
        else:
            log_prior = model.prior.log_mass(codes)
        torch.testing.assert_close(log_prior.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
        maps = model.autoencoder.decode(codes)
        for sample, bound, own in zip(v, model.log_mass(v), torch.cat([c.flatten(1) for c in model.encode(x)], 1), strict=True):
            pixels = model.likelihood.image_log_prob(sample.expand(len(every), -1, -1, -1), maps)
            joint = pixels + log_prior
            assert bound <= joint.logsumexp(0)
            torch.testing.assert_close(bound, joint[(every == own).all(1)][0])


@pytest.mark.parametrize("cls", MODELS)
def test_codes_and_back(cls: Any) -> None:
    model, x = built(cls, (3, 8, 8)), images(5, (3, 8, 8))
    codes = model.encode(x)
    assert [tuple(c.shape) for c in codes] == [(5, *size) for size in model.autoencoder.sizes]
    assert all(c.dtype == torch.int64 and c.min() >= 0 and c.max() < 4 for c in codes)
    for used, c in zip(model.usage(x), codes, strict=True):
        assert used.used == len(c.unique()) / 4
    back = model.decode(*codes)
    torch.testing.assert_close(back, model.reconstruct(x))
    # The decoder has seen the very vectors that the codes stand for.
    with torch.no_grad():
        params = model.autoencoder(2.0 * model.values(x).double() / 3.0 - 1.0)[0]
    torch.testing.assert_close(model.autoencoder.decode(codes), params)
    torch.testing.assert_close(back * 4.0 - 0.5, model.likelihood.image_mean(params))
    torch.testing.assert_close(model.render(model.embed(x)), back)


@pytest.mark.parametrize("decay", [0.99, None])
@pytest.mark.parametrize("cls", MODELS)
def test_the_objective_adds_the_quantizers_loss(cls: Any, decay: float | None) -> None:
    model, x = built(cls, decay=decay), images(6)
    loss = model.autoencoder(2.0 * model.values(x).double() / 3.0 - 1.0)[2]
    assert loss > 0.0
    torch.testing.assert_close(model.objective(x), -model.log_prob(x) + 16.0 * loss)
    model.train().objective(x).mean().backward()
    assert_all_graded(model)


@pytest.mark.parametrize("cls", MODELS)
def test_a_prior_leaves_the_autoencoder_as_it_is(cls: Any) -> None:
    first, x = built(cls), images(6)
    model = built(cls, prior=PRIOR, context=2)
    model.load_autoencoder(first.state_dict())
    before = {k: v.clone() for k, v in model.autoencoder.state_dict().items()}
    context = torch.eye(2, dtype=torch.float64).repeat(3, 1)
    losses = fit(model.train(), lambda: model.objective(x, context), 30)
    assert losses[-1] < losses[0] - 1.0
    assert all(torch.equal(v, before[k]) for k, v in model.autoencoder.state_dict().items())
    torch.testing.assert_close(model.reconstruct(x), first.reconstruct(x))
    assert model.sample(3, context[:1]).shape == (3, 1, 4, 4)


def test_the_bottom_prior_sees_the_top_codes() -> None:
    model = built(models.VQVAE2, prior=PRIOR)
    top, bottom = torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1, 2, 2, dtype=torch.int64)
    given = [model.prior.log_mass((top + k, bottom)) - model.prior.maps[0].log_mass(top[:, None] + k) for k in range(2)]
    assert (given[0] - given[1]).abs() > 1e-6


def test_refusals() -> None:
    for cls, shape, settings, message in (
        (models.VQVAE, (5,), {}, r"shape: expected \(C, H, W\)"),
        (models.VQVAE, (1, 6, 6), {"downsample": 2}, "can be halved 2 times"),
        (models.VQVAE2, (1, 4, 4), {"downsample": 1, "top_downsample": 2}, "can be halved 3 times"),
        (models.VQVAE, (1, 4, 4), {"likelihood": "normal"}, "likelihood: unknown name 'normal'"),
        (models.VQVAE, (1, 4, 4), {"codes": 1}, "levels, codes"),
        (models.VQVAE, (1, 4, 4), {"context": 3}, "context: only the prior"),
        (models.VQVAE, (1, 4, 4), {"prior": {"layers": 0}}, "layers: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(shape, **SMALL | settings)
    model = built(models.VQVAE)
    assert_refused(
        (lambda: model.log_prob(images(2), torch.ones(2, 3)), "only the prior takes one"),
        (lambda: model.encode(images(2, (1, 4, 6))), "x: expected shape"),
    )


@pytest.mark.parametrize("cls", MODELS)
def test_values_that_are_no_codes_are_named(cls: Any) -> None:
    model = built(cls, prior=PRIOR)
    codes = model.encode(images(2))
    for i in range(len(codes)):
        for wrong in (-1, model.codes):
            changed = [c.clone() for c in codes]
            changed[i][0, 0, 0] = wrong
            with pytest.raises(ValueError, match=rf"index: expected codes from 0 to under {model.codes}, got"):
                model.decode(*changed)
            with pytest.raises(ValueError, match=rf"x: expected integers from 0 to {model.codes - 1}"):
                model.prior.log_mass(changed)


# ---------------------------------------------------------------------------------------------------------------------
# The commands

SET = [f"--set={name}={json.dumps(value)}" for name, value in (SMALL | {"likelihood": "categorical", "levels": 17}).items()]
SHORT = ["--batch-size=250", "--epochs=2", "--lr=1e-2", "--warmup=2"]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a small VQ-VAE-2 on digits; without what a run needs, all tests of it are skipped."""
    for package in ("lightning", "matplotlib", "PIL", "rich", "sklearn"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("vqvae")
    assert cli.main(["train", "vqvae2", "--data=digits", f"--out={out}", *SET, *SHORT]) == 0
    return out / "best.ckpt"


@pytest.fixture(scope="module")
def prior(autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prior")
    settings = ["--set=hidden=8", "--set=layers=2", "--conditional"]
    assert cli.main(["train", "prior", f"{autoencoder}", f"--out={out}", *settings, *SHORT]) == 0
    return out / "best.ckpt"


@pytest.mark.slow
def test_trained_in_two_stages(autoencoder: Path, prior: Path) -> None:
    first, second = models.load(autoencoder), models.load(prior)
    assert isinstance(first, models.VQVAE2)
    assert isinstance(second, models.VQVAE2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert second.context == 10
    assert second.config["prior"] == {"hidden": 8, "layers": 2, "dropout": 0.5}
    for folder in (autoencoder.parent, prior.parent):
        assert {"samples.png", "reconstructions.png", "curve.png"} <= {path.name for path in folder.iterdir()}
    nats = [json.loads((path.parent / "result.json").read_text())["test"]["nats"] for path in (autoencoder, prior)]
    assert nats[1] < nats[0]


def test_prior_resumes(autoencoder: Path, prior: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume = ["train", "prior", f"{autoencoder}", f"--out={prior.parent}", "--resume"]
    assert cli.main([*resume, "--epochs=3", "--set=hidden=8"]) == 0
    assert models.read_checkpoint(prior.parent / "last.ckpt")["epoch"] == 2
    capsys.readouterr()
    assert cli.main([*resume, "--set=hidden=9"]) == 2
    assert "cannot resume with config" in capsys.readouterr().err


def test_samples_of_a_class(prior: Path, tmp_path: Path) -> None:
    import numpy as np

    assert cli.main(["sample", f"{prior}", "-n", "3", "--label=7", "-o", f"{tmp_path / 'x.npy'}"]) == 0
    assert np.load(tmp_path / "x.npy").shape == (3, 1, 8, 8)
    assert cli.main(["sample", f"{prior}", "-n", "4", "-o", f"{tmp_path / 'x.png'}"]) == 0
    assert (tmp_path / "x.png").exists()


def test_commands_refuse(autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixelcnn = models.PixelCNN((1, 8, 8), levels=17, hidden=4, layers=1)
    models.save(pixelcnn, tmp_path / "pixelcnn.ckpt")
    models.save(models.VQVAE((1, 8, 8), **SMALL), tmp_path / "untrained.ckpt")
    cases = [
        (["prior"], "train prior: name the checkpoint of a vqvae or vqvae2"),
        (["prior", tmp_path / "none.ckpt"], "none.ckpt"),
        (["prior", tmp_path / "pixelcnn.ckpt"], "holds a pixelcnn, which has no codes"),
        (["prior", tmp_path / "untrained.ckpt"], "does not say what it was trained on"),
        (["prior", tmp_path / "untrained.ckpt", "--data=digits"], "is for images of shape (1, 8, 8) and 4 levels"),
        (["prior", autoencoder, "--data=nope"], "data: unknown source 'nope'"),
        (["prior", autoencoder, "--data=photos"], "is for images of shape (1, 8, 8) and 17 levels"),
        (["prior", autoencoder, "--set=levels=3"], "prior has no setting 'levels'; expected one of hidden"),
        (["prior", autoencoder, "--preset=x"], "preset: prior on digits has no 'x'"),
        (["vqvae", autoencoder, "--data=digits"], "train vqvae: takes no checkpoint"),
        (["vqvae"], "train vqvae: name the data (--data)"),
        (["vqvae", "--data=digits", "--conditional"], "context: only the prior"),
    ]
    for arguments, message in cases:
        assert cli.main(["train", *map(str, arguments), f"--out={tmp_path / 'run'}"]) == 2
        assert message in capsys.readouterr().err
