"""NICE and RealNVP: exact densities, structure as published, and checkpoints that are whole or refused."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import inspect
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from built import CASES, FLOWS, assert_near, assert_refused, built, log_volume, one_hot, seeded

from flowkern import models, nn, ops
from flowkern._core.version import __version__
from flowkern.models._budget import Budget


@pytest.mark.parametrize("name", FLOWS)
def test_density_is_that_of_the_whole_jacobian(name: str) -> None:
    model, x, given = built(name)
    context = one_hot(model, given)
    z, logabsdet = model.bijection(x, context)
    assert z.shape == (len(x), x[0].numel())
    back, logabsdet_back = model.bijection.inverse(z, context)
    assert_near(back, x)
    assert_near(logabsdet_back, -logabsdet)
    assert_near(logabsdet, log_volume(lambda x: model.bijection(x, context)[0], x))
    assert_near(logabsdet_back, log_volume(lambda z: model.bijection.inverse(z, context)[0], z.detach()))
    assert_near(model.log_prob(x, context), model.base.log_prob(z) + logabsdet)
    assert_near(model.log_prob(x, given), model.log_prob(x, context))
    if isinstance(model.base, nn.StandardNormal):  # a draw of a mixture has no density of its own
        drawn, log_prob = model.sample_and_log_prob(4, given)
        assert_near(model.log_prob(drawn, given), log_prob)


@pytest.mark.parametrize("name", FLOWS)
def test_reconstruction_and_interpolation(name: str) -> None:
    model, x, given = built(name)
    assert_near(model.render(model.embed(x, given), given), x)
    other = x.roll(1, 0)
    path = model.interpolate(x, other, 5, given)
    assert path.shape == (4, 5, *model.shape)
    assert_near(path[:, 0], x)
    assert_near(path[:, -1], other)
    context = one_hot(model, given)
    z0, z1, middle = (model.bijection(images, context)[0] for images in (x, other, path[:, 2]))
    assert_near(middle, (z0 + z1) / 2.0, 1e-7)


@pytest.mark.parametrize("name", CASES)
def test_rebuilt_copied_saved_and_loaded(name: str, tmp_path) -> None:
    model, x, context = built(name)
    assert list(model.config) == list(inspect.signature(type(model)).parameters)
    twin = models.build(CASES[name][0], json.loads(json.dumps(model.config))).double().eval()
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    path = tmp_path / "model.ckpt"
    models.save(model, path)
    assert os.listdir(tmp_path) == ["model.ckpt"]
    loaded = models.load(path)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    expected = seeded(model.log_prob, x, context)
    for other in (twin, copy.deepcopy(model), loaded):
        assert torch.equal(seeded(other.log_prob, x, context), expected)
    samples = seeded(model.sample, 4, context, temperature=0.7)
    assert samples.shape == x.shape
    assert samples.isfinite().all()
    assert torch.equal(seeded(loaded.sample, 4, context, temperature=0.7), samples)


def test_density_of_realnvp_integrates_to_one() -> None:
    torch.manual_seed(0)
    model = models.RealNVP(2, couplings=4, hidden=16, activation="tanh", zero_init=False).double()
    grid = torch.linspace(-10.0, 10.0, 301, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        total = model.log_prob(x).exp().sum() * (grid[1] - grid[0]) ** 2
    # The rectangle rule on a smooth density that vanishes at the edges converges faster than any power of the step.
    assert total.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["realnvp-image-context", "glow-classes"])
def test_compiles_in_one_graph(name: str) -> None:
    """A Glow once it is initialized."""
    model, x, context = built(name)
    compiled = torch.compile(model.log_prob, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_(), *model.parameters()]
    found = [torch.autograd.grad(function(x, context).sum(), leaves) for function in (compiled, model.log_prob)]
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def test_multiscale_structure_is_that_of_dinh_et_al() -> None:
    model = models.RealNVP((3, 32, 32), hidden=4, depth=1)
    multiscale = model.bijection.bijections[0]
    assert isinstance(multiscale, nn.MultiScale)
    splits = [[layer.split for layer in level.bijections if hasattr(layer, "split")] for level in multiscale.levels]
    checkerboards = ["checkerboard", "checkerboard_swap", "checkerboard"]
    assert splits == [[*checkerboards, "channel", "channel_swap", "channel"]] * 3 + [[*checkerboards, "checkerboard_swap"]]
    assert multiscale.latent_shapes == [(6, 16, 16), (12, 8, 8), (24, 4, 4), (24, 4, 4)]


def test_digits_recipe_is_the_published_one() -> None:
    """Against the recipe written out: z = ((xb - t) exp(-s)), flip; s and t of its sign are the networks' own."""
    torch.manual_seed(0)
    model = models.RealNVP(64, **models.PRESETS["realnvp", "digits-recipe"])
    image = models.RealNVP((1, 8, 8), **models.PRESETS["realnvp", "digits-recipe"])
    x = torch.rand(4, 64)

    def net() -> torch.nn.Sequential:
        linear, act = torch.nn.Linear, torch.nn.LeakyReLU
        return torch.nn.Sequential(linear(32, 256), act(), linear(256, 256), act(), linear(256, 32))

    couplings = [layer for layer in model.bijection.bijections if isinstance(layer, nn.AffineCoupling)]
    assert len(couplings) == 8
    z, log_prob = 17.0 * x, 64 * math.log(17.0)
    for coupling in couplings:
        pair = []
        for mine in coupling.conditioner.networks:
            theirs = net()
            theirs.load_state_dict(dict(zip(theirs.state_dict(), mine.state_dict().values(), strict=True)))
            pair.append(theirs)
        xa, xb = z.chunk(2, 1)
        s, t = -pair[0](xa).tanh(), -pair[1](xa)
        z = torch.cat([xa, (xb - t) * torch.exp(-s)], 1).flip(1)
        log_prob = log_prob - s.sum(1)
    log_prob = log_prob + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(model.log_prob(x), log_prob, rtol=1e-4, atol=1e-2)
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(model.parameters()), image.parameters())
    assert torch.equal(image.log_prob(x.view(4, 1, 8, 8)), model.log_prob(x))


@pytest.mark.parametrize("preset", models.PRESETS)
def test_presets_build(preset: tuple[str, str]) -> None:
    model = models.build(preset[0], {**models.PRESETS[preset], "shape": (1, 8, 8)})
    assert model.log_prob(torch.rand(2, 1, 8, 8)).isfinite().all()
    assert model.sample(2).shape == (2, 1, 8, 8)


#: A small model of each name, with every setting that it has by name.
SETTINGS: dict[str, dict[str, Any]] = {
    "nice": {"shape": 5, "hidden": 8, "context": 2},
    "realnvp": {"shape": (1, 4, 4), "couplings": 2, "hidden": 4, "depth": 1, "levels": 2, "context": 2},
    "glow": {"shape": (1, 4, 4), "levels": 1, "steps": 1, "hidden": 4, "classes": 2},
    "made": {"shape": 5, "hidden": [8], "levels": 4, "context": 2},
    "maf": {"shape": 5, "layers": 2, "hidden": [8], "components": 2, "context": 2, "permutation": "none"},
    "iaf": {"shape": 5, "layers": 2, "hidden": [8], "context": 2},
    "nsf": {"shape": 5, "bins": 4, "layers": 2, "hidden": [8], "context": 2, "coupling": True, "permutation": "alternate"},
    "vae": {"shape": (1, 4, 4), "levels": 4, "hidden": [8], "latent": 2, "upper": 2, "context": 2},
    "pixelcnn": {"shape": (1, 4, 4), "levels": 4, "hidden": 4, "layers": 2, "context": 2, "condition": 2},
    "pixelvae": {"shape": (1, 4, 4), "levels": 4, "hidden": [8], "pixelcnn": {"hidden": 4, "layers": 1}, "context": 2},
    "vqvae": {"shape": (1, 4, 4), "levels": 4, "hidden": 4, "blocks": 1, "downsample": 1, "dim": 2, "codes": 4},
    "vqvae2": {"shape": (1, 4, 4), "levels": 4, "hidden": 4, "blocks": 1, "downsample": 1, "dim": 2, "codes": 4},
    "dequantized": {"shape": (1, 4, 4), "levels": 4, "settings": {"hidden": 4, "couplings": 1}, "hidden": 4, "couplings": 1},
}


@functools.cache
def small(name: str) -> models.Model:
    """The model of these settings, which tests leave as it is."""
    return models.build(name, SETTINGS[name])


def numbers(name: str, kind: type = int) -> list[str]:
    """The settings of the model that are numbers of that kind, or several."""
    config = small(name).config
    found = {key: value[0] if isinstance(value, list) and value else value for key, value in config.items()}
    return [key for key, value in found.items() if isinstance(value, kind) and not isinstance(value, bool) and key != "seed"]


def with_number(name: str, setting: str, value: float) -> dict[str, Any]:
    config = json.loads(json.dumps(small(name).config))
    return {**config, setting: [value, *config[setting][1:]] if isinstance(config[setting], list) else value}


#: Of which there may be none.
MAY_BE_ZERO = {"depth", "blocks"}


def test_every_model_has_settings() -> None:
    assert set(SETTINGS) == set(models.MODELS)


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name in SETTINGS for setting in numbers(name)])
def test_sizes_are_checked(name: str, setting: str) -> None:
    for value in (-1, 0):
        if setting in MAY_BE_ZERO and value == 0:
            models.build(name, with_number(name, setting, value))
        elif setting != "flow_hidden":  # which only a flow as prior or posterior has
            with pytest.raises(ValueError, match=rf"{setting}.* got .*{value}"):
                models.build(name, with_number(name, setting, value))


@pytest.mark.parametrize("name", [name for name in SETTINGS if "dropout" in numbers(name, float)])
def test_dropout_is_checked(name: str) -> None:
    for value in (-0.1, 1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"dropout: expected at least 0 and less than 1, got {value}"):
            models.build(name, with_number(name, "dropout", value))


def test_errors_of_models() -> None:
    image = models.RealNVP((1, 8, 8), hidden=4)
    assert_refused(
        (lambda: models.build("nice", {"shape": 4, "widht": 3}), "widht", TypeError),
        (lambda: models.build("glow2", {"shape": 4}), "model: unknown name 'glow2'"),
        (lambda: models.RealNVP((4, 4)), r"or \(C, H, W\) for images"),
        (lambda: models.RealNVP(4, permutation="shuffle"), "permutation: unknown"),
        (lambda: models.RealNVP(1), "at least 2 features"),
        (lambda: models.RealNVP((1, 7, 8), levels=2), "divisible by 2"),
        (lambda: models.NICE(4, activation="sin"), "activation"),
        (lambda: models.RealNVP(4, scale={"kind": "cosine"}), "ScaleMap: unknown kind"),
        (lambda: models.RealNVP(4, scale={"kind": "tanh"}), "ScaleMap: 'tanh' needs its constant a > 0, got 0"),
        (lambda: models.RealNVP(4, scale={"kind": "atan"}), "ScaleMap: 'atan' needs its constant a > 0, got 0"),
        (lambda: models.RealNVP(4, scale={"kind": "soft_clip"}), "ScaleMap: 'soft_clip' needs its constant a > 0, got 0"),
        (lambda: models.NICE(4, preprocess={"logits": 0.05}), "preprocess: expected"),
        (lambda: models.NICE(4, preprocess={"logit": 0.05, "rescale": 2.0}), "preprocess: expected"),
        (lambda: models.NICE(4, preprocess={}), "preprocess: expected"),
        (lambda: image.log_prob(torch.rand(2, 64)), r"x: expected shape \(B, 1, 8, 8\), got \(2, 64\)"),
        (lambda: models.NICE(4).log_prob(torch.rand(2, 4), torch.rand(2, 3)), "built without"),
        (lambda: models.NICE(4, context=3).log_prob(torch.rand(2, 4)), r"context: expected shape \(2, 3\), got none"),
    )


def test_scale_map_survives_the_configuration() -> None:
    for scale in (ops.ScaleMap.soft_clip(1e-3), ops.ScaleMap.sigmoid(1.5, 1e-3), ops.ScaleMap.exp()):
        model = models.RealNVP(4, hidden=8, scale=scale)
        twin = models.build("realnvp", json.loads(json.dumps(model.config)))
        assert twin.bijection.bijections[0].scale == scale


def refused(path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        models.load(path)
    return str(caught.value)


def test_damaged_foreign_and_newer_files_are_refused(tmp_path) -> None:
    path, model = tmp_path / "model.ckpt", models.NICE(4, hidden=8)
    models.save(model, path)
    whole, good = path.read_bytes(), torch.load(path, weights_only=True)
    for size in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "truncated" in refused(path)
    for place in (200, len(whole) // 3, len(whole) // 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "checksum" in refused(path)
    for raw in (b"", b"x = 1\n" * 100):
        path.write_bytes(raw)
        assert "not written by flowkern" in refused(path)
    for content, message in (
        ({"state_dict": {}}, "not written by flowkern"),
        ([1, 2], "not written by flowkern"),
        (model, "damaged or foreign"),
        ({**good, "flowkern": "999.0.1"}, f"written by flowkern 999.0.1, newer than this one ({__version__})"),
        ({**good, "plan": [1]}, "plan: expected a dict, got list"),
        ({**good, "data": [1]}, "data: expected a dict, got list"),
        ({**good, "model": {"name": "nice"}}, "missing"),
        ({**good, "model": {"name": "glow2", "config": {}}}, "unknown name 'glow2'"),
        ({**good, "model": {"name": "nice", "config": {"shape": 4, "hidden": 9}}}, "size mismatch"),
        ({**good, "model": {"name": "nice", "config": {"shape": 4, "width": 9}}}, "width"),
    ):
        torch.save(content, path)
        assert message in refused(path)
    with pytest.raises(FileNotFoundError):
        models.load(tmp_path / "none.ckpt")


def checkpoint(name: str = "nice", **entries: Any) -> dict[str, Any]:
    """The content of a whole one, with some entries exchanged."""
    model = small(name)
    described = {"name": name, "config": json.loads(json.dumps(model.config))}
    return {"flowkern": __version__, "model": described, "state_dict": dict(model.state_dict()), **entries}


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name in SETTINGS for setting in numbers(name)])
def test_configurations_that_the_weights_cannot_fill(tmp_path, name: str, setting: str) -> None:
    """Refused before much is made, whatever the setting, unless it changes nothing."""
    content = checkpoint(name)
    for number in (10**5, 10**9, 10**30):
        content["model"]["config"] = with_number(name, setting, number)
        torch.save(content, tmp_path / "m.ckpt")
        if setting in ("shape", "components", "blocks", "flow_layers", "flow_hidden", "levels"):
            with contextlib.suppress(ValueError):  # no parameter need depend on them
                models.load(tmp_path / "m.ckpt")
        else:
            assert "cannot rebuild the model" in refused(tmp_path / "m.ckpt")


def test_a_budget_is_kept_before_memory_is_taken(monkeypatch) -> None:
    """What is refused was never asked for: neither a tensor of 10^10 elements nor the thousandth parameter."""
    state = checkpoint()["state_dict"].values()
    made = []
    init = torch.nn.Linear.__init__
    monkeypatch.setattr(torch.nn.Linear, "__init__", lambda self, *a, **k: (made.append(a), init(self, *a, **k))[1])
    for settings in ({"hidden": 10**5}, {"depth": 10**9}, {"couplings": 10**9}):
        made.clear()
        with pytest.raises(ValueError, match=r"much larger than the \d+ bytes"), Budget(state):
            models.build("nice", {**SETTINGS["nice"], **settings})
        assert len(made) < 100
    with pytest.raises(ValueError, match="much larger"), Budget(state):
        torch.ones(10**5, 1) * torch.ones(10**5)
    with Budget(state):
        models.build("nice", SETTINGS["nice"])


def test_weights_of_other_kinds_are_refused(tmp_path) -> None:
    content, path = checkpoint(), tmp_path / "m.ckpt"
    for change, message in (
        (lambda state: {name: value.int() for name, value in state.items()}, "expected a floating dtype, got torch.int32"),
        (lambda state: {name: value.to(torch.complex64) for name, value in state.items()}, "got torch.complex64"),
        (lambda state: {name: value.to(torch.float8_e4m3fn) for name, value in state.items()}, "got torch.float8_e4m3fn"),
        (lambda state: {name: value > 0 for name, value in state.items()}, "got torch.bool"),
        (lambda state: dict(enumerate(state.values(), 7)), "expected strings as keys, got 7"),
        (lambda state: {(name,): value for name, value in state.items()}, r"expected strings as keys, got \('"),
        (lambda state: dict.fromkeys(state, 3.0), "expected a tensor, got float"),
        (lambda state: {name: value.to("meta") for name, value in state.items()}, "expected a dense tensor with values"),
        (lambda state: {name: value.to_sparse() for name, value in state.items()}, "expected a dense tensor with values"),
        (lambda state: [*state.values()], "state_dict is missing"),
    ):
        torch.save({**content, "state_dict": change(content["state_dict"])}, path)
        assert re.search(message, refused(path))


def test_configurations_of_other_kinds_are_refused(tmp_path) -> None:
    for described in (
        {"name": [], "config": {}},
        {"name": "nice", "config": 3},
        {"name": "nice", "config": {1: 2}},
        {"name": "nice", "config": {"shape": [[[4]]]}},
        {"name": "nice", "config": {"shape": 4, "preprocess": 3}},
        {"name": "glow", "config": {"shape": [1, 8, 8], "scale": "x"}},
        {"name": "vae", "config": {"shape": 4, "objective": {"kind": []}}},
    ):
        torch.save(checkpoint(model=described), tmp_path / "m.ckpt")
        refused(tmp_path / "m.ckpt")


GLOW = ("glow", {"shape": (1, 4, 4), "steps": 1, "hidden": 4})


@pytest.mark.parametrize(
    ("described", "buffer", "change", "message"),
    [
        (GLOW, "sign", torch.zeros_like, "1 or -1 everywhere"),
        (GLOW, "permutation", torch.zeros_like, "each of 0..3 once"),
        (GLOW, "permutation", lambda p: p + 10**6, "each of 0..3 once"),
        (("nice", {"shape": 4, "permutation": "random"}), "order", lambda p: p - 1, "each of 0..3 once"),
        (("nice", {"shape": 4, "preprocess": {"rescale": 3.0}}), "scale", torch.zeros_like, "finite numbers that are not 0"),
        (("maf", {"shape": 4, "hidden": [8], "batch_norm": True}), "running_variance", torch.neg, "at least 0 everywhere"),
    ],
)
def test_buffers_that_mean_something_are_checked(tmp_path, described: Any, buffer: str, change: Any, message: str) -> None:
    model = models.build(*described)
    models.save(model, tmp_path / "m.ckpt")
    content = models.read_checkpoint(tmp_path / "m.ckpt")
    key = next(key for key in content["state_dict"] if key.endswith(f".{buffer}"))
    content["state_dict"][key] = change(content["state_dict"][key])
    torch.save(content, tmp_path / "m.ckpt")
    assert re.search(rf"{re.escape(key)}: expected {message}", refused(tmp_path / "m.ckpt"))
    owner = model.get_submodule(key.rpartition(".")[0])
    before = copy.deepcopy(owner.state_dict())
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(content["state_dict"])
    assert all(torch.equal(value, before[k]) for k, value in owner.state_dict().items())


def test_compressed_files_are_refused(tmp_path) -> None:
    """Unpacked they might be of any size."""
    torch.save(checkpoint(), tmp_path / "m.ckpt")
    with zipfile.ZipFile(tmp_path / "m.ckpt") as whole, zipfile.ZipFile(tmp_path / "c.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert "it is compressed" in refused(tmp_path / "c.ckpt")


@pytest.mark.slow
def test_loading_does_not_import_the_compiler(tmp_path) -> None:
    models.save(models.NICE(4, hidden=8), tmp_path / "m.ckpt")
    script = "import sys, flowkern.models as m; m.load(sys.argv[1]); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, tmp_path / "m.ckpt"], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_names_that_are_not_utf8(tmp_path) -> None:
    path = tmp_path / os.fsdecode(b"m\xff\xe9.ckpt")
    models.save(models.NICE(4, hidden=8), path)
    assert models.load(path).shape == (4,)


STORED: dict[str, Any] = json.loads(Path(__file__).with_name("checkpoints_0.1.0.json").read_text())


def stored_content(name: str) -> dict[str, Any]:
    """A checkpoint as version 0.1.0 wrote it: its configuration, keys, shapes and buffers; the parameters are made up."""
    state = {}
    for key, value in STORED["models"][name]["state_dict"].items():
        if isinstance(value, dict):
            state[key] = torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
        else:
            state[key] = 0.1 * torch.arange(1.0, math.prod(value) + 1).sin().view(value)
    described = {"name": name, "config": STORED["models"][name]["config"]}
    return {"flowkern": STORED["flowkern"], "model": described, "state_dict": state}


@pytest.mark.parametrize("name", STORED["models"])
def test_checkpoints_of_0_1_0_mean_what_they_meant(tmp_path, name: str) -> None:
    """The model that the stored log-probabilities come from, to the three digits that are stored."""
    content = stored_content(name)
    torch.save(content, tmp_path / "m.ckpt")
    model = models.load(tmp_path / "m.ckpt")
    assert content["model"]["config"].items() <= model.config.items()
    assert list(model.state_dict()) == list(content["state_dict"])
    x = torch.linspace(0.0, 0.99, 2 * math.prod(model.shape)).view(2, *model.shape)
    torch.manual_seed(0)
    log_prob = model.log_prob(x, None if model.context is None else torch.eye(2, model.context))
    assert log_prob.tolist() == pytest.approx(STORED["models"][name]["log_prob"], abs=2e-3)
    models.save(model, tmp_path / "again.ckpt")
    assert models.read_checkpoint(tmp_path / "again.ckpt").keys() == content.keys()


AFFINE: dict[str, tuple[str, dict[str, Any]]] = {
    "realnvp": ("realnvp", {"shape": [4], "couplings": 2, "hidden": 8, "transformer": {"kind": "affine"}}),
    "glow": ("glow", {"shape": [1, 4, 4], "steps": 1, "hidden": 8, "transformer": {"kind": "affine"}}),
    "maf": ("maf", {"shape": [4], "layers": 2, "hidden": [8], "transformer": {"kind": "affine"}}),
    "dequantized": (
        "dequantized",
        {"shape": [1, 4, 4], "levels": 4, "settings": {"transformer": {"kind": "affine"}, "hidden": 4}},
    ),
}


@pytest.mark.parametrize("name", AFFINE)
def test_a_transformer_that_was_saved_without_its_scale(tmp_path, name: str) -> None:
    """It had a sigmoid then, the default of another time; now a checkpoint holds it whole."""
    kind, config = AFFINE[name]
    models.save(models.build(kind, config), tmp_path / "m.ckpt")
    now = models.read_checkpoint(tmp_path / "m.ckpt")
    for content, scale in ((now, "soft_clip"), ({**now, "model": {"name": kind, "config": config}}, "sigmoid")):
        torch.save(content, tmp_path / "m.ckpt")
        model = models.load(tmp_path / "m.ckpt")
        couplings = [m for m in getattr(model, "flow", model).modules() if hasattr(m, "transformer")]
        assert scale in {m.transformer.scale.kind for m in couplings} <= {scale, "tanh"}  # a Glow's Gaussians have tanh


def test_extra_keys_are_kept_for_the_trainer(tmp_path) -> None:
    path, model = tmp_path / "model.ckpt", models.NICE(4, hidden=8)
    models.save(model, path)
    models.write_atomically({**models.read_checkpoint(path), "epoch": 7}, path)
    assert models.read_checkpoint(path)["epoch"] == 7
    assert models.load(path).config == model.config


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path, model = tmp_path / "model.ckpt", models.NICE(4, hidden=8)
    models.save(model, path)
    before = path.read_bytes()

    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        models.save(models.NICE(4, hidden=16), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.ckpt"]


def test_only_known_models_are_saved(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"expected one of flowkern\.models"):
        models.save(nn.Flow(nn.Compose(), nn.StandardNormal(2)), tmp_path / "model.ckpt")
    with pytest.raises(FileNotFoundError):
        models.save(models.NICE(4), tmp_path / "none" / "model.ckpt")
