"""Models on a GPU: training steps, memory, streams and compilation. What needs no GPU runs on the CPU too, as a rehearsal."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from built import assert_near, built, seeded
from comparison import NEEDS_GPU, running
from flowkern.bench.memory import peak_extra_bytes

from flowkern import models

on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
#: One of each kind.
KINDS = ("nice-image", "realnvp-image", "realnvp-logit", "glow-classes", "glow-reversible", "maf-residual", "iaf-vector")
KINDS += ("vae-mixture", "vae-conv-logistic", "made", "pixelcnn", "vqvae")


def on(device: str, name: str) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """A model there, in float64 and training, an input and a context."""
    model, x, context = built(name)
    return model.to(device).train(), x.to(device), None if context is None else context.to(device)


@on_each_device
@pytest.mark.parametrize("name", KINDS)
def test_a_training_step_is_that_of_the_torch_code(name: str, device: str) -> None:
    """In float64: the loss, all gradients, and the model's state after a step."""
    found = []
    for backend in ("torch", "auto"):
        model, x, context = on(device, name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with running(backend):
            loss = seeded(model.objective, x, context).mean()
            loss.backward()
        optimizer.step()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.state_dict().values()])
    assert len(found[0]) == len(found[1])
    for actual, expected in zip(*found, strict=True):
        assert_near(actual, expected)


def step_bytes(device: str, steps: int, memory: str) -> int:
    """The most that a training step of a Glow holds above its gradients."""
    torch.manual_seed(0)
    model = models.Glow((3, 16, 16), levels=1, steps=steps, hidden=8, memory=memory).to(device)
    x = torch.rand(16, 3, 16, 16, device=device)
    model.log_prob(x)  # ActNorm starts from data
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> Any:
        return torch.autograd.grad(-model.log_prob(x).mean(), parameters, allow_unused=True)

    step()
    return peak_extra_bytes(step, torch.device(device))


@on_each_device
def test_reversible_memory_does_not_grow_with_depth(device: str) -> None:
    short, long = (step_bytes(device, steps, "reversible") for steps in (4, 12))
    assert long < 1.15 * short
    short, long = (step_bytes(device, steps, "store") for steps in (4, 12))
    assert long > 2 * short


@on_each_device
def test_reduced_overhead(device: str) -> None:
    """Compiled with CUDA graphs, the second call replays what the first one did."""
    model, x, _ = on(device, "realnvp-vector")
    torch._dynamo.reset()
    how: Any = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"}
    compiled = torch.compile(model.log_prob, **how)
    for _ in range(4):
        x = torch.rand_like(x)
        results = []
        for function in (compiled, model.log_prob):
            model.zero_grad()
            loss = function(x).mean()
            loss.backward()
            results.append([loss.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        for actual, expected in zip(*results, strict=True):
            assert_near(actual, expected)


@on_each_device
def test_two_streams_at_once(device: str) -> None:
    """Nothing that a call keeps is shared with one on another stream."""
    calls = [on(device, name) for name in ("glow-plain", "maf-residual", "realnvp-image")]
    expected = [model.log_prob(x) for model, x, _ in calls]
    if device == "cuda":
        torch.cuda.synchronize()
    streams = [torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext() for _ in range(2)]
    found: list[list[torch.Tensor]] = [[], []]
    for model, x, _ in calls:
        for stream, results in zip(streams, found, strict=True):
            with stream:
                results.append(model.log_prob(x))
    if device == "cuda":
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for results in found for a, b in zip(results, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_another_device_than_the_current_one() -> None:
    for name in ("glow-plain", "maf-residual"):
        model, x, _ = on("cuda:0", name)
        expected = model.log_prob(x)
        assert_near(model.to("cuda:1").log_prob(x.to("cuda:1")).to("cuda:0"), expected)
