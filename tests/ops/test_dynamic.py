"""Whole models in graphs whose batch is a variable: exported without a tracer's strictness, and compiled with gradients."""

from __future__ import annotations

import pytest
import torch
from test_meta import FAST, inputs, trained
from torch.export import Dim, export

from flowkern import models


class LogProb(torch.nn.Module):
    """What is exported: ``export`` takes a module's ``forward``."""

    def __init__(self, model: models.Model):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        return self.model.log_prob(x, context)


#: Models whose density is an estimate draw numbers; a batch of another size draws others.
DRAWS = {"dequantized", "vae", "pixelvae"}


@pytest.mark.parametrize("name", [*models.MODELS, "glow-classes", "pixelcnn-colours"])
def test_exported_with_a_dynamic_batch(name: str) -> None:
    model = trained(name)
    x, context = inputs(model, 4)
    batch = Dim("batch", min=2, max=64)
    shapes = ({0: batch}, None if context is None else {0: batch})
    exported = export(LogProb(model), (x, context), dynamic_shapes=shapes, strict=False).module()
    for size in (4, 7):
        x, context = inputs(model, size)
        with torch.no_grad():
            actual, expected = (f(x, context) for f in (exported, model.log_prob))
        assert actual.shape == (size,)
        if FAST[name][0] not in DRAWS:
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow", "maf"])
def test_trained_in_a_dynamic_graph(name: str) -> None:
    """Several ops with one scale map stand in these graphs, whose constants are no variables."""
    torch._dynamo.reset()
    model = trained(name)
    compiled = torch.compile(model.log_prob, dynamic=True, backend="aot_eager")
    for size in (4, 7):
        x, context = inputs(model, size)
        grads = [torch.autograd.grad(f(x, context).sum(), [*model.parameters()]) for f in (compiled, model.log_prob)]
        torch.testing.assert_close(*grads)
