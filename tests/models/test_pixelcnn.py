"""PixelCNN, alone and in a VAE: a proper distribution that sees what it may and no more, sampled by the work of one pass."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from built import assert_refused, fit, seeded
from torch.utils.flop_counter import FlopCounterMode

from flowkern import models

CONFIGS: dict[str, dict[str, Any]] = {
    "gray": {"shape": (1, 5, 6), "levels": 4, "layers": 3},
    "wide": {"shape": (1, 6, 5), "levels": 3, "layers": 2, "kernel": 5},
    "colour": {"shape": (3, 4, 3), "levels": 5, "layers": 2},
    "context": {"shape": (1, 4, 4), "levels": 4, "layers": 2, "context": 3, "dropout": 0.3},
    "condition": {"shape": (1, 4, 5), "levels": 4, "layers": 2, "condition": 2},
    "both": {"shape": (2, 3, 4), "levels": 3, "layers": 2, "context": 2, "condition": 3},
}


def built(name: str) -> tuple[models.PixelCNN, dict[str, torch.Tensor]]:
    """The model in float64 with large random parameters (small ones would hide mistakes), and its conditions for 3 samples."""
    model = models.PixelCNN(hidden=6, **CONFIGS[name]).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.copy_(0.6 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    model.mix.bias.fill_(1.0)
    for last in model.last:
        last.weight.mul_(0.4)
        last.bias.zero_()
    given = {}
    if model.context is not None:
        given["context"] = torch.randn(3, model.context, generator=generator, dtype=torch.float64)
    if model.condition is not None:
        given["condition"] = torch.randn(3, model.condition, *model.shape[1:], generator=generator, dtype=torch.float64)
    return model, given


def naive_draw(model: models.PixelCNN, n: int, temperature: float, **given: torch.Tensor) -> torch.Tensor:
    """A whole pass for every value, with the random numbers of ``draw``."""
    channels, height, width = model.shape
    uniform = torch.rand(n, *model.shape, dtype=torch.float64)
    v = torch.zeros(n, *model.shape, dtype=torch.int64)
    for i, j, c in itertools.product(range(height), range(width), range(channels)):
        p = (model.logits(v, **given)[:, :, c, i, j] / temperature).softmax(1)
        v[:, c, i, j] = torch.searchsorted(p.cumsum(1), uniform[:, c, i, j, None].contiguous(), right=True)[:, 0]
    return v


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_samples_are_those_of_the_naive_method(name: str) -> None:
    model, given = built(name)
    cached = seeded(model.draw, 3, temperature=0.8, **given)
    assert torch.equal(cached, seeded(naive_draw, model, 3, 0.8, **given))
    assert len(cached.unique()) == model.levels


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_are_those_of_the_whole_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowkern.models import _pixelcnn

    seen, choose = [], _pixelcnn._choose
    monkeypatch.setattr(_pixelcnn, "_choose", lambda logits, u: choose(seen.append(logits) or logits, u))
    model, given = built(name)
    v = model.draw(3, **given)
    whole = model.logits(v, **given).permute(3, 4, 2, 0, 1).flatten(0, 2)
    torch.testing.assert_close(torch.stack(seen), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_sampling_costs_one_pass(name: str) -> None:
    model, given = built(name)
    v = torch.zeros(3, *model.shape, dtype=torch.int64)
    counts = []
    for run in (lambda: model.logits(v, **given), lambda: model.draw(3, **given)):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", ["gray", "wide", "colour"])
def test_logits_see_all_values_before_and_no_other(name: str) -> None:
    """The derivative of each logit by the embedding of each value; layers enough that nothing before is out of reach."""
    model = models.PixelCNN(hidden=6, **{**CONFIGS[name], "layers": 6}).double().eval()
    torch.nn.init.constant_(model.mix.bias, 3.0)  # no unit is dead
    shown: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return shown.append(output.detach().requires_grad_()) or shown[-1]

    channels, height, width = model.shape
    for embedding in (*model.embeddings, *model.before):
        embedding.register_forward_hook(keep)
    v = torch.randint(model.levels, (1, *model.shape))
    logits = model.logits(v)
    for i, j, c in itertools.product(range(height), range(width), range(channels)):
        grads = torch.autograd.grad(logits[0, :, c, i, j].sum(), shown, retain_graph=True, allow_unused=True)
        reached = torch.zeros(model.shape)
        # The embeddings of the channels, then, in the order of their use, those of the channels before each channel.
        sources = [*range(channels), *(k for d in range(channels) for k in range(d))]
        for k, grad in zip(sources, grads, strict=True):
            if grad is not None:
                reached[k] += grad[0].abs().sum(-1)
        place = torch.arange(channels * height * width).view(height, width, channels).permute(2, 0, 1)
        assert torch.equal(reached > 0, place < place[c, i, j]), (i, j, c)


def test_probabilities_sum_to_one() -> None:
    model = models.PixelCNN((2, 1, 2), levels=3, hidden=4, layers=2).double().eval()
    v = torch.cartesian_prod(*[torch.arange(3)] * 4).view(-1, 2, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.log_mass(v).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
        x = (v + 0.5) / 3
        torch.testing.assert_close(model.log_prob(x), model.log_mass(v) + 4 * torch.tensor(3.0).log().double())


def test_learns_what_depends_on_class_and_neighbour() -> None:
    """Rows of one value, drawn by the class: 1 + 1 values an image are to be learned, the rest follows."""
    torch.manual_seed(0)
    labels = torch.arange(64) % 2
    v = (torch.randint(2, (64, 1, 3, 1)) + 2 * labels.view(-1, 1, 1, 1)).expand(-1, -1, -1, 4)
    context = torch.nn.functional.one_hot(labels, 2).float()
    model = models.PixelCNN((1, 3, 4), levels=4, hidden=16, layers=3, context=2)
    fit(model, lambda: model.objective((v + 0.5) / 4, context), 80)
    nats = -model.log_mass(v, context).mean()
    assert nats < 3 * torch.tensor(2.0).log() + 0.3
    drawn = model.draw(64, context)
    assert ((drawn // 2).flatten(1) == labels[:, None]).float().mean() > 0.95
    assert (drawn[..., 1:] == drawn[..., :-1]).float().mean() > 0.95


def test_samples_do_not_change_with_their_number_of_conditions() -> None:
    model, given = built("context")
    row = given["context"][:1]
    assert torch.equal(seeded(model.draw, 3, row), seeded(model.draw, 3, row.expand(3, -1)))
    assert model.sample(2, row).dtype == torch.float32


def test_refusals() -> None:
    def small(**settings: Any) -> models.PixelCNN:
        return models.PixelCNN((1, 2, 2), hidden=4, **settings)

    assert_refused(
        (lambda: models.PixelCNN((5,)), r"shape: expected \(C, H, W\)"),
        (lambda: models.PixelCNN((1, 2, 2), levels=1), "levels: expected at least 2, got 1"),
        (lambda: models.PixelCNN((1, 2, 2), kernel=4), "kernel: expected an odd number, got 4"),
        (lambda: small().log_mass(torch.zeros(1, 1, 2, 3).long()), "x: expected shape"),
        (lambda: small().logits(torch.full((1, 1, 2, 2), -1)), "x: expected integers from 0 to 255"),
        (lambda: small().draw(2, torch.ones(2, 1)), "context: got shape"),
        (lambda: small(condition=2).draw(2), "condition: expected shape .*, got none"),
        (lambda: small().draw(2, temperature=0.0), "temperature"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# As the decoder of a VAE


def pixelvae(**config) -> models.PixelVAE:
    torch.manual_seed(0)
    return models.PixelVAE((1, 2, 2), levels=2, latent=2, hidden=[8], pixelcnn={"hidden": 16, "layers": 2}, **config)


@pytest.mark.slow
def test_probabilities_of_the_vae_sum_to_one() -> None:
    model = pixelvae().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    v = torch.tensor(list(itertools.product(range(2), repeat=4))).view(-1, 1, 2, 2)
    probability, error = model.importance_log_prob(v, samples=4000, chunk=1000)
    assert abs(probability.exp().sum() - 1.0) < 5 * (error * probability.exp()).square().sum().sqrt()
    with torch.no_grad():
        assert model.elbo(v, samples=200).exp().sum() < 1.0


def test_latents_reach_the_pixels_and_train() -> None:
    """Two kinds of images that only a latent, or the first pixel, can tell apart."""
    model = pixelvae(objective={"free_bits": 0.2}, context=3)
    x = (torch.randint(2, (64, 1, 1, 1)).expand(-1, -1, 2, 2) + torch.rand(64, 1, 2, 2)) / 2
    context = torch.zeros(64, 3)
    losses = fit(model, lambda: model.objective(x, context), 80)
    assert losses[-1] < losses[0] - 1.0
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert model.render(model.embed(x, context), context).shape == x.shape
    assert model.sample(3, context[:1], temperature=0.8).shape == (3, 1, 2, 2)


def test_reconstructions_and_errors_of_the_vae() -> None:
    model = pixelvae()
    v = torch.randint(2, (5, 1, 2, 2))
    again = model.reconstruct(v)
    assert again.shape == v.shape
    assert set(again.unique().tolist()) <= {0.0, 1.0}
    with pytest.raises(NotImplementedError, match="the parameters of a pixel follow from the pixels before"):
        model.decode(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="pixelcnn: levels follow from the other settings"):
        models.PixelVAE((1, 2, 2), levels=2, pixelcnn={"levels": 3})
    v[0, 0, 0, 0] = 2
    with pytest.raises(ValueError, match="expected integers from 0 to 1, got 1 of 20 others"):
        model.elbo(v)
