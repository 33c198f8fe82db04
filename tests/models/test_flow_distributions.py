"""Every flow among the models as a ``torch.distributions.Distribution``, and the density of what no sample can be."""

from __future__ import annotations

import math

import pytest
import torch
from built import FLOWS, assert_near, assert_refused, built, one_hot, seeded
from torch.distributions import Independent

from flowkern import models, nn


@pytest.mark.parametrize("name", FLOWS)
def test_distribution(name: str) -> None:
    model, x, given = built(name)
    context = one_hot(model, given)
    distribution = model.distribution() if given is None else model.condition(given)
    assert distribution.event_shape == model.shape
    assert distribution.batch_shape == (() if given is None else (4,))
    expected = model.log_prob(x, given)
    assert_near(distribution.log_prob(x), expected)
    several = torch.stack([x, x.flip(0)])
    assert_near(distribution.log_prob(several), model.log_prob(several, context))
    assert_near(model.log_prob(several, context)[1], model.log_prob(x.flip(0), context))
    n = 3 if given is None else 12
    rows = None if given is None else context.repeat(3, 1)
    drawn = seeded(distribution.sample, (3,))
    assert drawn.shape == (3, *distribution.batch_shape, *model.shape)
    assert_near(drawn.reshape(n, *model.shape), seeded(model.sample, n, rows))
    assert distribution.has_rsample is isinstance(model.base, nn.StandardNormal)
    if given is not None:
        assert_near(model.log_prob(x, context[:1]), model.log_prob(x, context[:1].expand(4, -1)))
        assert_near(Independent(distribution, 1).log_prob(x), expected.sum())
        assert_near(model.log_prob(x[0], context[0]), expected[0])


@pytest.mark.parametrize("name", FLOWS)
def test_density_is_zero_outside_of_the_support(name: str) -> None:
    """A value of one sample, and none of the others."""
    model, x, given = built(name)
    expected = model.log_prob(x, given)
    logit = "logit" in (model.config["preprocess"] or {})
    for wrong in (math.inf, -math.inf, *((-0.06, 1.06, 5.0) if logit else ())):
        for place in (0, -1):
            outside = x.clone()
            outside[1].view(-1)[place] = wrong
            log_prob = model.log_prob(outside.requires_grad_(), given)
            assert log_prob[1] == -math.inf
            assert_near(log_prob[[0, 2, 3]], expected[[0, 2, 3]])
            distribution = model.distribution() if given is None else model.condition(given)
            assert not distribution.support.check(outside)[1] or math.isinf(wrong)
            assert distribution.log_prob(outside)[1] == -math.inf
    lost = x.clone()
    lost[1].view(-1)[0] = math.nan
    assert model.log_prob(lost, given).isnan().tolist() == [False, True, False, False]
    grads = torch.autograd.grad(log_prob.clamp_min(-1e6).sum(), [outside, *model.parameters()], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)


def test_contexts_that_do_not_fit_are_refused_at_once() -> None:
    plain, conditional, glow = models.MAF(3), models.RealNVP(4, context=2), built("glow-classes")[0]
    assert_refused(
        (lambda: plain.condition(torch.zeros(5, 2)), r"context: expected none, got shape \(5, 2\)"),
        (lambda: conditional.condition(torch.zeros(5, 3)), r"context: expected shape \(..., 2\), got shape \(5, 3\)"),
        (lambda: conditional.condition(torch.tensor(1.0)), r"context: expected shape \(..., 2\), got shape \(\)"),
        (lambda: conditional.condition(None), r"context: expected shape \(..., K\), got none"),
        (conditional.distribution, r"context: expected one of shape \(..., 2\)"),
        (lambda: glow.condition(torch.tensor([0, 3])), "labels: expected 0 to 2, got 3"),
        (lambda: conditional.log_prob(torch.zeros(2, 5, 3), torch.zeros(5, 2)), r"x: expected shape \(B, 4\), got \(2, 5, 3\)"),
    )


def test_each_label_has_samples_of_its_own() -> None:
    model, x, labels = built("glow-classes")
    drawn = seeded(model.sample, 2, labels, per_context=True)
    assert drawn.shape == (2, *x.shape)
    assert_near(drawn.flatten(0, 1), seeded(model.sample, 8, labels.repeat(2)))
    assert torch.equal(seeded(model.condition(labels).sample, (2,)), drawn)
