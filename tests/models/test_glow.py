"""Glow: an exact density on images, its initialization, its latents, and the errors that it gives."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from built import GLOW_SHAPE, GLOWS, assert_all_graded, assert_near, assert_refused, built, fit, one_hot, seeded

from flowkern import models, nn

SHAPE = GLOW_SHAPE


def images(batch: int = 4, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", GLOWS)
def test_every_parameter_counts(name: str) -> None:
    model, x, context = built(f"glow-{name}")
    loss = (model.log_prob(x, context) * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum()
    for key, gradient in zip(dict(model.named_parameters()), torch.autograd.grad(loss, [*model.parameters()]), strict=True):
        assert gradient.isfinite().all(), key
        assert (gradient != 0.0).any(), key
    assert_near(model.reconstruct(x, context), x)
    # Once it is initialized, training changes nothing.
    assert torch.equal(copy.deepcopy(model).train().log_prob(x, context), model.log_prob(x, context))


def test_gradients_agree_with_differences() -> None:
    model, x, _ = built("glow-plain")
    loss = model.log_prob(x).mean()
    loss.backward()
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        with torch.no_grad():
            values = []
            for side in (1e-5, -2e-5):
                p.add_(side * direction)
                values.append(model.log_prob(x).mean())
            p.add_(1e-5 * direction)
        # The second difference of a loss of 1e2 with 1e-16 roundings, over 2e-5.
        assert_near((p.grad * direction).sum(), (values[0] - values[1]) / 2e-5, 1e-5)


def test_reversible_memory_gives_the_same_gradients() -> None:
    model, x, context = built("glow-reversible")
    stored = models.Glow(SHAPE, **{**GLOWS["reversible"], "memory": "store"}).double()
    stored.load_state_dict(model.state_dict())
    for twin in (model, stored):
        twin.log_prob(x, context).mean().backward()
    for (key, p), q in zip(model.named_parameters(), stored.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-8), key


@pytest.mark.parametrize("grad", [True, False])
def test_first_forward_in_training_initializes_every_actnorm(grad: bool) -> None:
    model, x = models.Glow(SHAPE, levels=2, steps=2, hidden=6).double(), images(64)
    model.eval()
    model.log_prob(x)
    actnorms = [m for m in model.modules() if isinstance(m, nn.ActNorm)]
    assert len(actnorms) == 4
    assert not any(m.initialized for m in actnorms)
    model.train()
    with torch.set_grad_enabled(grad):
        log_prob = model.log_prob(x)
    assert all(m.initialized for m in actnorms)
    assert_near(model.log_prob(x), log_prob)
    state = copy.deepcopy(model.state_dict())
    model.log_prob(images(8, seed=5))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    # Each ActNorm saw data that it normalizes: the first is checked from outside.
    z = actnorms[0](nn.Squeeze()(x)[0])[0].transpose(0, 1).flatten(1)
    assert_near(z.mean(1), torch.zeros(8).double())
    assert_near(z.var(1, correction=0), torch.ones(8).double(), 1e-4)


@pytest.mark.parametrize("bad", ["nan", "one", "context"])
def test_a_failed_initialization_leaves_nothing_half_done(bad: str) -> None:
    model = models.Glow(SHAPE, levels=2, steps=2, hidden=6, context=None if bad != "context" else 3).double()
    before, x = copy.deepcopy(model.state_dict()), images()
    given, message = {
        "nan": ((torch.where(x == x[2, 1, 3, 3], math.nan, x),), r"ActNorm 'bijection.*actnorm': the initialization saw NaN"),
        "one": ((x[:1],), r"ActNorm 'bijection.*actnorm': the initialization needs a batch of at least 2 samples, got 1"),
        "context": ((x, torch.zeros(4, 2).double()), r"context: expected shape \(4, 3\), got \(4, 2\)"),
    }[bad]
    with pytest.raises(ValueError, match=message):
        model.log_prob(*given)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.log_prob(images(), torch.zeros(4, 3).double() if bad == "context" else None)
    assert all(m.initialized for m in model.modules() if isinstance(m, nn.ActNorm))


def test_learned_gaussians_are_gaussians() -> None:
    """log p(x) = log p(z) + logabsdet of the steps, with the Gaussians written out."""
    model, x, _ = built("glow-plain")
    expected, h = torch.zeros(4, dtype=torch.float64), x
    levels = model.bijection.bijections[0].levels
    for i, level in enumerate(levels):
        squeeze, *steps, gaussian = level.bijections
        h, _ = squeeze(h)
        for step in steps:
            h, logabsdet = step(h)
            expected = expected + logabsdet
        kept = h[:, :0] if i == len(levels) - 1 else h[:, : h.shape[1] // 2]
        raw, shift = gaussian.conditioner(kept).chunk(2, 1)
        log_sigma = -3.0 * torch.tanh(raw / 3.0)
        z = h[:, kept.shape[1] :]
        expected = expected + torch.distributions.Normal(-shift, log_sigma.exp()).log_prob(z).flatten(1).sum(1)
        h = kept
    assert_near(model.log_prob(x), expected)


def test_samples_and_temperature() -> None:
    model, x, context = built("glow-classes")
    expected = seeded(model.sample, 4, one_hot(model, context), temperature=0.7)
    assert torch.equal(seeded(model.sample, 4, context, temperature=0.7), expected)
    assert not expected.requires_grad
    assert model.sample(4, torch.tensor([1])).shape == x.shape
    typical = model.sample(2, torch.tensor([1]), temperature=0.0)
    assert torch.equal(typical[0], typical[1])
    model.rsample(4, context).square().sum().backward()
    assert_all_graded(model)


def test_labels() -> None:
    model, x, context = built("glow-classes")
    assert (model.log_prob(x, context) != model.log_prob(x, torch.zeros(4, dtype=torch.int64))).sum() == 3
    plain, wrong = built("glow-plain")[0], torch.tensor([0, 9])
    integers = r"labels: expected integers of shape \(B,\) for 3 classes, got torch."
    assert_refused(
        (lambda: model.log_prob(x, torch.tensor([0, 1, 2, 3])), r"labels: expected 0 to 2, got 3 \(1 of 4 are no classes\)"),
        (lambda: model.log_prob(x, torch.tensor([0, -1, 2, 7])), r"labels: expected 0 to 2, got -1 \(2 of 4 are no classes\)"),
        (lambda: model.log_prob(x, torch.zeros(4, 3, dtype=torch.int64)), integers + "int64"),
        (lambda: model.log_prob(x, torch.zeros(4, dtype=torch.bool)), integers + "bool"),
        (lambda: model.log_prob(x, torch.zeros(3, dtype=torch.int64)), r"context: expected shape \(4, 3\), got \(3, 3\)"),
        (lambda: model.log_prob(x, None), r"context: expected shape \(4, 3\), got none"),
        (lambda: model.sample(2, wrong), "labels: expected 0 to 2, got 9"),
        (lambda: model.rsample(2, wrong), "labels: expected 0 to 2, got 9"),
        (lambda: model.sample_and_log_prob(2, wrong), "labels: expected 0 to 2, got 9"),
        (lambda: plain.log_prob(x, context), "built without"),
    )


def test_errors() -> None:
    for settings, message in (
        ({"levels": 3}, "levels: 3 of them need a height and width divisible by 2\\^3, got 12 x 8; at most 2 fit"),
        ({"parametrization": "lu"}, "parametrization: unknown name 'lu'"),
        ({"activation": "sin"}, "activation: unknown name 'sin'"),
        ({"memory": "none"}, "memory: expected one of .*, got 'none'"),
        ({"preprocess": {"logits": 0.05}}, "preprocess: expected"),
        ({"classes": 1}, "classes: expected at least 2"),
        ({"classes": 4, "context": 5}, "context: with 4 classes it is 4 or None, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            models.Glow((3, 12, 8), **settings)
    model, x, _ = built("glow-plain")
    shape = r"x: expected shape \(B, 2, 8, 4\), got"
    shapes = (12, (8,), (8, 8), (1, 2, 8, 8), (0, 8, 8))
    assert_refused(
        *((lambda bad=bad: models.Glow(bad), r"shape: Glow is for images \(C, H, W\)") for bad in shapes),
        (lambda: model.log_prob(x.to(torch.uint8)), r"x: expected a floating dtype .* got torch.uint8", TypeError),
        (lambda: models.Glow((1, 7, 8)), "halves the image at least once, but 7 x 8 has an odd side"),
        *((lambda bad=bad: model.log_prob(bad), shape) for bad in (x[:, :1], x[0, 0], x.flatten(1))),
        (lambda: model.interpolate(x[:, :1], x[:, :1], 3), "x0: expected shape"),
        (lambda: model.interpolate(x, x[:2], 3), "x1: expected shape"),
        (lambda: model.interpolate(x, x, 1), "steps: expected at least 2"),
    )


def test_default_levels() -> None:
    def levels(side: int) -> int:
        return models.Glow((1, side, side), steps=1, hidden=4).config["levels"]

    assert [levels(side) for side in (2, 4, 6, 8, 12, 32)] == [1, 2, 1, 3, 2, 3]


def test_autocast_keeps_state_and_density_in_float32() -> None:
    model, x = models.Glow((3, 8, 8), levels=2, steps=2, hidden=16), images(16, (3, 8, 8)).float()
    model.log_prob(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    seen = []
    for module in model.modules():
        if isinstance(module, nn.ConvNet):
            module.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    exact = model.log_prob(x)
    assert {*seen} == {(torch.float32, torch.float32)}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = model.log_prob(x)
        z, logabsdet = model.bijection(x)
    assert {*seen} == {(torch.float32, torch.bfloat16)}
    assert (log_prob.dtype, z.dtype, logabsdet.dtype) == (torch.float32,) * 3
    # bfloat16 has 8 bits: raw outputs of 0.1 err by 4e-4, in some 1000 elements and 4 steps, with random signs.
    torch.testing.assert_close(log_prob, exact, rtol=0.0, atol=0.5)
    log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_training_on_digits_lowers_the_loss(memory: str) -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    values = torch.tensor(sklearn_datasets.load_digits().images[:256], dtype=torch.float32)[:, None]
    config = {**models.PRESETS["glow", "digits"], "steps": 2, "hidden": 16, "memory": memory}
    model = models.Glow((1, 8, 8), **config)

    def loss() -> torch.Tensor:
        rows = values[torch.randint(256, (64,))]
        return -model((rows + torch.rand_like(rows)) / 17.0)

    losses = fit(model, loss, 1, lr=3e-3)
    assert model.sample(2).isfinite().all()
    losses += fit(model, loss, 29, lr=3e-3)
    assert sum(losses[-5:]) / 5 < losses[0] - 20.0


def test_channels_last_stays_through_the_levels() -> None:
    shape = (3, 8, 8)
    model = models.Glow(shape, levels=2, steps=2, hidden=8, preprocess={"logit": 0.05}).double()
    x = images(4, shape)
    expected, log_prob = model.bijection(x)[0], model.log_prob(x)
    seen = []
    for module in model.modules():
        if isinstance(module, nn.GlowStep):
            module.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))
    last = x.to(memory_format=torch.channels_last)
    assert_near(model.to(memory_format=torch.channels_last).log_prob(last), log_prob)
    assert len(seen) == 4
    assert all(t.is_contiguous(memory_format=torch.channels_last) for pair in seen for t in pair)
    assert_near(model.bijection.inverse(expected)[0], x)


def test_squeeze_keeps_the_memory_format() -> None:
    x = images(2, (3, 4, 6))
    for format in (torch.contiguous_format, torch.channels_last):
        z, _ = nn.Squeeze()(x.to(memory_format=format))
        assert torch.equal(z, torch.nn.functional.pixel_unshuffle(x, 2))
        back, _ = nn.Squeeze().inverse(z)
        assert torch.equal(back, x)
        assert z.is_contiguous(memory_format=format)
        assert back.is_contiguous(memory_format=format)
