"""Reversible memory: the gradients of storing, in memory that does not grow, and nothing else changed by running twice."""

from __future__ import annotations

import contextlib
import copy
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import reversible_ddp
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from flowkern import models, nn, ops
from flowkern._core import backend as _backend
from flowkern.nn.bijections import drift as _drift
from flowkern.nn.bijections import reversible as _reversible

BOUNDED = ops.ScaleMap.tanh(0.5)

Results = dict[str, torch.Tensor | None]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(inputs: int, outputs: int, *more: torch.nn.Module, width: int = 8) -> torch.nn.Module:
    """A small convolutional network whose last layer is not zero."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(inputs, width, 3, padding=1), *more, torch.nn.Tanh(), torch.nn.Conv2d(width, outputs, 3, padding=1)
    )


def coupling(channels: int, split: str = "channel", *more: torch.nn.Module) -> nn.AffineCoupling:
    half = channels // 2
    return nn.AffineCoupling(network(half, channels, *more), split=split, scale=BOUNDED)


def stack(steps: int, channels: int = 4, *more: Callable[[], torch.nn.Module], **options: Any) -> nn.Compose:
    """Couplings on halves that take turns."""
    return nn.Compose(
        *(coupling(channels, ("channel", "channel_swap")[i % 2], *(m() for m in more)) for i in range(steps)), **options
    )


def vectors(steps: int, context: int | None = None, dropout: float = 0.0, **options: Any) -> nn.Compose:
    return nn.Compose(
        *(
            nn.AffineCoupling(
                nn.MLP(3, 6, (16,), context=context, dropout=dropout, zero_init=False),
                split=("channel", "channel_swap")[i % 2],
                scale=BOUNDED,
            )
            for i in range(steps)
        ),
        **options,
    )


def remade(bijection: nn.Compose, **options: Any) -> nn.Compose:
    """A copy with other options."""
    return nn.Compose(*copy.deepcopy(bijection).bijections, **options)


def loss_of(z: torch.Tensor, logabsdet: torch.Tensor) -> torch.Tensor:
    return (0.5 * z.square().flatten(1).sum(1) - logabsdet).mean() + z.flatten(1)[:, 0].sin().sum()


def trained(
    bijection: nn.Bijection, x: torch.Tensor, context: torch.Tensor | None = None, *, inverse: bool = False, seed: int = 3
) -> Results:
    """Outputs and gradients of one step, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    context = None if context is None else context.detach().clone().requires_grad_()
    bijection.zero_grad()
    torch.manual_seed(seed)
    z, logabsdet = bijection.inverse(x, context) if inverse else bijection(x, context)
    loss_of(z, logabsdet).backward()
    results: Results = {"z": z.detach(), "logabsdet": logabsdet.detach(), "x": x.grad}
    if context is not None:
        results["context"] = context.grad
    return results | {name.replace("_orig_mod.", ""): p.grad for name, p in bijection.named_parameters()}


def assert_same(actual: Results, expected: Results, tolerance: float = 1e-4) -> None:
    """Outputs bit for bit, gradients to ``tolerance`` of each tensor's size.

    A gradient that is zero in exact arithmetic, as of a bias before a batch normalization, is measured by the largest.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-2 * max([float(g.norm()) for n, g in expected.items() if g is not None and n not in ("z", "logabsdet")], default=0)
    for name, value in expected.items():
        got = actual[name]
        if value is None:
            assert got is None, name
            continue
        assert got is not None, name
        if name in ("z", "logabsdet"):
            assert torch.equal(got, value), name
            continue
        assert got.dtype == value.dtype
        error, size = float((got - value).norm()), max(float(value.norm()), floor)
        assert error <= tolerance * size, f"{name}: {error / size:.1e}"


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_gradients_are_those_of_storing(steps: int, inverse: bool) -> None:
    stored, x = stack(steps), torch.randn(3, 4, 6, 5)
    assert_same(
        trained(remade(stored, memory="reversible"), x, inverse=inverse), trained(stored, x, inverse=inverse), tolerance=1e-4
    )


def test_gradients_in_float64_are_those_of_storing_to_rounding() -> None:
    stored, x = stack(16).double(), torch.randn(3, 4, 6, 5, dtype=torch.float64)
    assert_same(trained(remade(stored, memory="reversible", anchors=5), x), trained(stored, x), tolerance=1e-11)


def every_kind() -> tuple[nn.Compose, torch.Tensor]:
    """Each layer of the library that takes images, among them containers."""
    inner = nn.Compose(nn.AdditiveCoupling(network(8, 8)), nn.Compose(coupling(16, "channel_swap")), nn.Permutation.reverse(16))
    levels = nn.MultiScale(
        nn.Compose(nn.Squeeze(), coupling(16), inner),
        nn.Compose(coupling(8), nn.Scaling((8, 1, 1)), coupling(8, "channel_swap")),
        shape=(4, 4, 4),
    )
    mask = ops.FeatureMask(torch.arange(64) % 3 == 0)
    flat = nn.AffineCoupling(nn.MLP(42, 44, (8,), zero_init=False), split=mask, scale=BOUNDED, layout="interleaved_shift_scale")
    checkerboards = [
        nn.AffineCoupling(network(4, 8), split=split, scale=BOUNDED, shift_first=True)
        for split in ("checkerboard", "checkerboard_swap")
    ]
    layers = [nn.Logit(0.05), nn.Rescale(0.5, -0.1), *checkerboards, nn.Permutation.random(4, seed=1), levels, flat]
    return nn.Compose(*layers), torch.rand(3, 4, 4, 4)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("anchors", [None, 1, 3])
def test_every_layer_of_the_library(anchors: int | None, inverse: bool) -> None:
    stored, x = every_kind()
    if inverse:
        x = 0.3 * torch.randn(3, 64)
    reversible = remade(stored, memory="reversible", anchors=anchors)
    assert_same(trained(reversible, x, inverse=inverse), trained(stored, x, inverse=inverse))


def test_a_multiscale_inside_keeps_nothing_of_its_networks() -> None:
    stored, x = every_kind()
    reversible = remade(stored, memory="reversible")
    assert saved_bytes(reversible, x) < saved_bytes(stored, x) / 2


def glow(**options: Any) -> models.Glow:
    """With weights that are not zero, so that every part counts."""
    model = models.Glow((3, 8, 8), levels=2, steps=3, hidden=12, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    ("parametrization", "memory"), [(p, "reversible") for p in ("plu", "qr", "householder", "full")] + [("plu", "auto")]
)
def test_glow(parametrization: str, memory: str) -> None:
    options = {"parametrization": parametrization, "classes": 3, "dropout": 0.2}
    stored, reversible = glow(**options), glow(**options, memory=memory)
    reversible.load_state_dict(stored.state_dict())
    x, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 2, 1, 0])
    for _ in range(2):  # the first of them initializes ActNorm
        found = []
        for model in (reversible, stored):
            torch.manual_seed(4)
            model.zero_grad()
            log_prob = model(x, labels)
            log_prob.mean().backward()
            found.append({"log_prob": log_prob.detach()} | {name: p.grad for name, p in model.named_parameters()})
        assert_same(*found)
    assert torch.equal(reversible.sample(2, labels[:2], 0.5).isfinite(), torch.ones(2, 3, 8, 8, dtype=torch.bool))


def test_glow_evaluates_each_conditioner_once_in_the_backward() -> None:
    model, x = glow(memory="reversible"), torch.rand(4, 3, 8, 8)
    model(x)
    calls: list[bool] = []
    for module in model.modules():
        if isinstance(module, nn.ConvNet):
            module.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model(x).mean().backward()
    assert calls == [False] * 6 + [True] * 6


@pytest.mark.skipif(_backend.native is None, reason="the CPU extension is not built")
def test_a_step_of_glow_runs_each_kernel_once_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inverse and its gradient: what it computed in the forward is at hand."""
    step = nn.Compose(nn.GlowStep(4, network(2, 4)), memory="reversible")
    z, logabsdet = step(torch.randn(3, 4, 4, 4))
    called: list[str] = []
    native = _backend.call_native

    def watched(name: str, *args: Any) -> None:
        called.append(name)
        native(name, *args)

    monkeypatch.setattr(_backend, "call_native", watched)
    (z.sum() + logabsdet.sum()).backward()
    once = [f"{op}{part}" for op in ("affine_coupling", "invertible_linear", "plu_weight") for part in ("", "_backward")]
    assert sorted(called) == once


def test_layers_without_a_step_of_their_own_use_the_default() -> None:
    class Own(nn.Bijection):
        """z = x exp(a tanh(c)), evaluated with dropout: written without a thought of reversible memory."""

        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(0.3))
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            log_scale = self.a * self.dropout(torch.ones_like(x)).tanh()
            return x * log_scale.exp(), log_scale.sum(1)

        def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            log_scale = self.a * self.dropout(torch.ones_like(z)).tanh()
            return z * (-log_scale).exp(), -log_scale.sum(1)

    stored, x = nn.Compose(Own(), Own(), Own()), torch.randn(4, 6)
    assert_same(trained(remade(stored, memory="reversible", anchors=3), x), trained(stored, x))


# --- what a step costs


class Held(TorchDispatchMode):
    """Bytes of the storages that ops inside make: alive now, and at most. Those of ``known`` tensors do not count."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.alive: Any = WeakIdKeyDictionary()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, tuple | list) else (results,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.alive[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return results


def peak_bytes(bijection: nn.Bijection, x: torch.Tensor) -> int:
    """Of one training step, above x, the parameters and their gradients."""
    parameters = [*bijection.parameters()]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    with Held([x, *parameters, *(p.grad for p in parameters)]) as held:
        loss_of(*bijection(x)).backward()
    return held.peak


def saved_bytes(bijection: nn.Bijection, x: torch.Tensor) -> int:
    """What autograd saves from the forward for the backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in bijection.parameters()}
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = bijection(x)
    saved = sum(storages.values())
    del outputs
    return saved


def wide(steps: int, **options: Any) -> nn.Compose:
    """Networks twelve times as wide as the state, as in a small Glow, and few parameters: activations are what counts."""
    splits = ("channel", "channel_swap")
    return nn.Compose(
        *(nn.AffineCoupling(network(2, 4, width=48), split=splits[i % 2], scale=BOUNDED) for i in range(steps)), **options
    )


def test_peak_memory_does_not_grow_with_depth() -> None:
    x = torch.randn(8, 4, 24, 24)
    few, many = (peak_bytes(wide(n, memory="reversible"), x) for n in (4, 64))
    assert many <= 1.1 * few
    assert peak_bytes(wide(64), x) > 5 * many


def test_only_the_states_at_the_anchors_are_saved() -> None:
    x = torch.randn(16, 4, 24, 24)
    state = x.nbytes
    by_default = saved_bytes(stack(32, memory="reversible"), x)
    assert 5 * state <= by_default < 5.2 * state  # the input and the ends of four segments
    assert 9 * state <= saved_bytes(stack(32, memory="reversible", anchors=4), x) < 9.2 * state
    assert saved_bytes(stack(32), x) > 60 * state


class Counted(torch.nn.Module):
    """A network that counts its evaluations, with and without gradients."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[bool] = []

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        self.calls.append(torch.is_grad_enabled())
        return self.inner(*args)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_one_evaluation_of_each_network_in_the_backward(inverse: bool) -> None:
    affine = nn.AffineCoupling(Counted(network(2, 4)), scale=BOUNDED)
    additive = nn.AdditiveCoupling(Counted(network(2, 2)), split="channel_swap")
    trained(nn.Compose(affine, additive, memory="reversible"), torch.randn(2, 4, 3, 3), inverse=inverse)
    assert affine.conditioner.calls == [False, True]
    assert additive.conditioner.calls == [False, True]


def test_no_gradient_asked_for_means_no_second_pass() -> None:
    bijection, x = stack(3, memory="reversible"), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        assert bijection(x)[0].grad_fn is None
    bijection.requires_grad_(False)
    assert bijection(x)[0].grad_fn is None


# --- running twice changes nothing


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_dropout_draws_the_same_mask_and_the_random_state_goes_on(inverse: bool) -> None:
    stored, x = vectors(6, dropout=0.5), torch.randn(8, 6)
    expected = trained(stored, x, inverse=inverse)
    after = torch.rand(3)
    assert_same(trained(remade(stored, memory="reversible"), x, inverse=inverse), expected)
    assert torch.equal(torch.rand(3), after)


def test_batch_normalization_updates_once() -> None:
    stored = stack(6, 4, lambda: torch.nn.BatchNorm2d(8), lambda: torch.nn.InstanceNorm2d(8, track_running_stats=True))
    reversible, x = remade(stored, memory="reversible"), torch.randn(5, 4, 6, 6)
    assert_same(trained(reversible, x), trained(stored, x))
    for (name, ours), theirs in zip(reversible.named_buffers(), stored.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(m.track_running_stats for m in reversible.modules() if isinstance(m, torch.nn.BatchNorm2d))
    reversible.eval()
    stored.eval()
    assert_same(trained(reversible, x), trained(stored, x))


class FirstBatch(nn.Bijection):
    """z = x - the first batch's mean: it initializes from data as ActNorm does."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(()))
        self.done = False
        self.initialized_with_graph = False

    def is_initialized(self) -> bool:
        return self.done

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if self.training and not self.done:
            with torch.no_grad():
                self.mean.copy_(x.mean())
            self.done = True
        return x - self.mean, x.new_zeros(len(x))

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return z + self.mean, z.new_zeros(len(z))


def test_initialization_from_data_comes_first() -> None:
    dropped = nn.AffineCoupling(torch.nn.Sequential(network(2, 4), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5)), scale=BOUNDED)
    stored = nn.Compose(dropped, FirstBatch(), coupling(4, "channel_swap"), FirstBatch())
    reversible, x = remade(stored, memory="reversible", anchors=4), 2 + torch.randn(4, 4, 5, 5)
    assert_same(trained(reversible, x), trained(stored, x))
    for ours, theirs in zip(reversible.state_dict().values(), stored.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_lazy_networks_are_made_first() -> None:
    x = torch.randn(4, 6)
    net = torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.Tanh(), torch.nn.LazyLinear(6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = nn.Compose(nn.AffineCoupling(net, scale=BOUNDED))
    reversible = nn.Compose(*stored.bijections, memory="reversible")
    first = trained(reversible, x)
    assert_same(first, trained(stored, x))


def test_autocast_as_it_was_and_a_float32_state() -> None:
    stored, x = stack(8), torch.randn(3, 4, 6, 6)
    reversible = remade(stored, memory="reversible")
    seen: list[torch.dtype] = []
    for bijection in reversible.bijections:
        bijection.conditioner.register_forward_hook(lambda m, i, o: seen.append(o.dtype))

    def step(bijection: nn.Compose, inside: bool) -> Results:
        bijection.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, logabsdet = bijection(x)
            loss = loss_of(z, logabsdet)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert z.dtype == logabsdet.dtype == torch.float32
        return {"z": z.detach(), "logabsdet": logabsdet.detach()} | {n: p.grad for n, p in bijection.named_parameters()}

    expected = step(stored, inside=False)
    # The parameters come out of networks in bfloat16: where a rebuilt state rounds the other way, by 2^-9 of one activation.
    assert_same(step(reversible, inside=False), expected, tolerance=2e-2)
    assert_same(step(reversible, inside=True), expected, tolerance=2e-2)
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 2 * 2 * 8


def test_rounding_of_bfloat16_networks_is_no_drift() -> None:
    # Rebuilt inputs differ by 1e-7, which now and then rounds an activation to the neighbour 2^-8 away. What that does to
    # the gradient is less than what bfloat16 itself does.
    stored, x = stack(32, 4, lambda: torch.nn.Conv2d(8, 8, 1)), torch.randn(16, 4, 16, 16)
    reversible = remade(stored, memory="reversible", anchors=32)

    def gradient(bijection: nn.Compose, enabled: bool) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = loss_of(*bijection(x))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*bijection.parameters()])])

    exact, rounded, ours = gradient(stored, False), gradient(stored, True), gradient(reversible, True)
    assert (ours - rounded).norm() < (rounded - exact).norm()
    in_float32 = remade(stored, memory="reversible", anchors=32, drift=3.5e-4)
    gradient(in_float32, False)
    with pytest.warns(RuntimeWarning, match="the rebuilt input is off by"):
        gradient(in_float32, True)
    with pytest.warns(RuntimeWarning, match=r"more than 8\.8e-02"), torch.autocast("cpu", dtype=torch.bfloat16):
        trained(leaky(0.2, memory="reversible"), x)


# --- inputs of all kinds


def test_context_gets_its_gradient() -> None:
    stored, x, context = vectors(9, context=3), torch.randn(5, 6), torch.randn(5, 3)
    reversible = remade(stored, memory="reversible")
    assert_same(trained(reversible, x, context), trained(stored, x, context))
    z, logabsdet = reversible(x, context)  # neither input asks for a gradient
    loss_of(z, logabsdet).backward()


def test_frozen_parameters_and_inputs_without_gradient() -> None:
    stored, x = stack(6), torch.randn(3, 4, 5, 5)
    for i, p in enumerate(stored.parameters()):
        p.requires_grad_(i % 3 != 0)
    reversible = remade(stored, memory="reversible")
    for bijection in (stored, reversible):
        loss_of(*bijection(x)).backward()
    for (name, ours), theirs in zip(reversible.named_parameters(), stored.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not theirs.requires_grad), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    stored.requires_grad_(False)
    reversible.requires_grad_(False)
    assert_same(trained(reversible, x), trained(stored, x))


def test_only_some_parameters_asked_for() -> None:
    stored, x = stack(6), torch.randn(3, 4, 5, 5)
    reversible = remade(stored, memory="reversible")
    some = [torch.autograd.grad(loss_of(*b(x)), [*b.bijections[4].parameters()]) for b in (reversible, stored)]
    for ours, theirs in zip(*some, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["z", "logabsdet"])
def test_a_missing_gradient(which: str) -> None:
    # The additive coupling in between has no log-determinant: nothing reaches the last network from there.
    stored = nn.Compose(coupling(4), coupling(4, "channel_swap"), nn.AdditiveCoupling(network(2, 2)))
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    for bijection in (stored, reversible := remade(stored, memory="reversible", anchors=2)):
        z, logabsdet = bijection(x)
        (z.square().sum() if which == "z" else logabsdet.sum()).backward()
    for (name, ours), theirs in zip(reversible.named_parameters(), stored.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_channels_last_and_strided_gradients() -> None:
    stored, x = stack(6), torch.randn(3, 4, 6, 5).to(memory_format=torch.channels_last)
    reversible = remade(stored, memory="reversible").to(memory_format=torch.channels_last)
    stored = stored.to(memory_format=torch.channels_last)
    assert_same(trained(reversible, x), trained(stored, x))
    assert reversible(x)[0].is_contiguous(memory_format=torch.channels_last)
    weights = torch.randn(5, 6, 4, 3).permute(3, 2, 1, 0)
    found = []
    for bijection in (reversible, stored):
        leaf = x.clone().requires_grad_()
        z, logabsdet = bijection(leaf)
        torch.autograd.backward((z, logabsdet), (weights, torch.ones(1).expand(3)))
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(batch: int) -> None:
    stored, x = stack(3), torch.randn(batch, 4, 5, 5)
    z, logabsdet = remade(stored, memory="reversible")(x.requires_grad_())
    (z.sum() + logabsdet.sum()).backward()
    assert x.grad.shape == x.shape


def test_shared_layers_get_the_sum_of_their_gradients() -> None:
    shared = coupling(4)
    stored, x = nn.Compose(shared, nn.Permutation.reverse(4), shared, nn.Permutation.reverse(4), shared), torch.randn(2, 4, 5, 5)
    for anchors in (None, 1, 5):
        assert_same(trained(remade(stored, memory="reversible", anchors=anchors), x), trained(stored, x))


def test_nothing_and_views() -> None:
    x = torch.randn(2, 2, 3, 3, requires_grad=True)
    z, logabsdet = nn.Compose(memory="reversible")(x)
    assert z is x
    assert torch.equal(logabsdet, torch.zeros(2))
    z, logabsdet = nn.Compose(nn.Flatten((2, 3, 3)), memory="reversible")(x)
    z.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_two_backwards_through_one_graph_and_accumulation() -> None:
    stored, x = stack(5, 4, lambda: torch.nn.BatchNorm2d(8)), torch.randn(3, 4, 5, 5)
    reversible = remade(stored, memory="reversible")
    for bijection in (stored, reversible):
        loss = loss_of(*bijection(x))
        loss.backward(retain_graph=True)
        loss.backward()
        loss_of(*bijection(x + 1)).backward()
    ours, theirs = ({name: p.grad for name, p in b.named_parameters()} for b in (reversible, stored))
    assert_same(ours, theirs)
    for ours, theirs in zip(reversible.buffers(), stored.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_weight_normalization_trains_its_own_parameters() -> None:
    stored, x = vectors(4), torch.randn(5, 6)
    for bijection in stored.bijections:
        torch.nn.utils.parametrizations.weight_norm(bijection.conditioner.layers[0])
    assert_same(trained(remade(stored, memory="reversible"), x), trained(stored, x))


def test_training_goes_the_same_way() -> None:
    stored, x = vectors(6), torch.randn(64, 6) * torch.linspace(0.5, 2, 6)
    reversible = remade(stored, memory="reversible")
    losses = []
    for bijection in (stored, reversible):
        optimizer = torch.optim.Adam(bijection.parameters(), 1e-2)
        flow, curve = nn.Flow(bijection, nn.StandardNormal(6)), []
        for _ in range(15):
            optimizer.zero_grad()
            loss = -flow(x).mean()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_reverse_kl_through_the_inverse() -> None:
    stored = vectors(8)
    flows = [nn.Flow(b, nn.StandardNormal(6)) for b in (stored, remade(stored, memory="reversible"))]
    found = []
    for flow in flows:
        torch.manual_seed(1)
        x, log_prob = flow.sample_and_log_prob(16)
        (log_prob + x.square().sum(1)).mean().backward()
        found.append([p.grad for p in flow.bijection.parameters()])
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


# --- when the inverse is not exact


class Leaky(nn.Bijection):
    """z = x exp(a) whose inverse is off by a factor: what an exploding inverse looks like at the anchor."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.1))
        self.error = error

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.a.exp(), (x[0].numel() * self.a).expand(len(x))

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return z * (-self.a).exp() * (1 + self.error), (-z[0].numel() * self.a).expand(len(z))


def leaky(error: float, **options: Any) -> nn.Compose:
    layers = [coupling(4), coupling(4, "channel_swap"), Leaky(error), coupling(4), coupling(4, "channel_swap")]
    return nn.Compose(*layers, **options)


def test_drift_is_reported_once_with_the_step_and_the_figure() -> None:
    bijection, x = leaky(0.03, memory="reversible", anchors=2), torch.randn(3, 4, 5, 5)
    with pytest.warns(RuntimeWarning, match=r"bijections 2 \(Leaky\) to 3 \(AffineCoupling\).* 3\.\de-02 .* 3\.5e-04.*anchors"):
        trained(bijection, x)
    trained(bijection, x)  # warnings are errors here: it does not come again
    trained(remade(bijection, memory="reversible", drift=0.05), x)
    with pytest.warns(RuntimeWarning, match=r"more than 2\.0e-02"):
        trained(remade(bijection, memory="reversible", drift=0.02), x)


class Offset(torch.nn.Module):
    """An ordinary function of the kept features, and an offset of any size beside it."""

    def __init__(self, kept: int, outputs: int, offset: float) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(kept, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs))
        self.register_buffer("offset", torch.tensor(offset))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.3 * self.inner(x.movedim(1, -1)).movedim(-1, 1) + self.offset


def offsets(*values: float, splits: Sequence[str] = ("channel_swap", "channel", "channel"), **options: Any) -> nn.Compose:
    """Additive couplings of four features that lose digits where an offset is large."""
    layers = [nn.AdditiveCoupling(Offset(2, 2, v), split=s) for v, s in zip(values, splits, strict=True)]
    return nn.Compose(*layers, **options)


def one_large(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ordinary features, but the first, which is near 1e4."""
    x = torch.randn(*shape, dtype=dtype)
    x[:, 0] += 1e4
    return x


def lost(layout: str, memory: str) -> tuple[nn.Compose, torch.Tensor, str, contextlib.AbstractContextManager[Any]]:
    """A chain that loses digits, its input, what is said of the drift, and how to run it."""
    large, said, how = 1e7, r"more than 3\.5e-04", contextlib.nullcontext()
    x = one_large(16, 4) if layout in ("vectors", "double", "autocast") else one_large(4, 4, 6, 5)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "double":
        x, large, said = one_large(16, 4, dtype=torch.float64), 1e16, r"more than 1\.5e-08"
    if layout == "autocast":
        said, how = r"more than 8\.8e-02", torch.autocast("cpu", dtype=torch.bfloat16)
    return offsets(0.0, large, -large, memory=memory, anchors=3).to(x.dtype), x, said, how


@pytest.mark.parametrize("layout", ["vectors", "images", "channels_last", "double", "autocast"])
def test_digits_lost_beside_a_large_feature_are_seen(layout: str) -> None:
    bijection, x, said, how = lost(layout, "reversible")
    with pytest.warns(RuntimeWarning, match=said), how:
        trained(bijection, x)
    automatic = remade(bijection, memory="auto", anchors=3)
    with how:
        expected = trained(remade(bijection), x)
    with pytest.warns(RuntimeWarning, match="stored from now on"), how:
        assert_same(trained(automatic, x), expected, tolerance=1e-4)


def test_digits_that_only_an_inner_state_has_lost_are_seen() -> None:
    # The middle is 1e5 (x - 1) with x within 1e-5 of 1: going back from x it has two digits, and x has all.
    ranges = nn.Compose(
        nn.Rescale(1.0, -1.0), nn.Rescale(1e5), nn.AdditiveCoupling(Offset(2, 2, 0.0)), nn.Rescale(1e-5), nn.Rescale(1.0, 1.0)
    )
    x = 1 + 1e-5 * torch.randn(16, 4)
    with pytest.warns(RuntimeWarning, match="a rebuilt state inside is off by"):
        trained(remade(ranges, memory="reversible", anchors=5), x)
    automatic, expected = remade(ranges, memory="auto", anchors=5), trained(ranges, x)
    with pytest.warns(RuntimeWarning, match="stored from now on"):
        assert_same(trained(automatic, x), expected, tolerance=1e-4)


def test_features_of_different_sizes_are_no_drift() -> None:
    turns = ("channel", "channel_swap") * 2
    sizes = torch.tensor([1e-6, 1.0, 1e6, 1e-2])
    for constant in (False, True):
        scaled, bare = (
            nn.Compose(
                nn.Scaling((4,)), *(nn.AffineCoupling(nn.MLP(2, 4, (8,), zero_init=False), split=s, scale=BOUNDED) for s in turns)
            ),
            torch.randn(32, 4),
        )
        with torch.no_grad():
            scaled.bijections[0].log_scale.copy_(-sizes.log())
        if constant:  # no digits of its own to lose
            bare[:, 1] = 0.0
        x = bare * sizes
        assert_same(trained(remade(scaled, memory="reversible", anchors=5), x), trained(scaled, x))


def random_chain(wild: bool) -> nn.Compose:
    """Couplings of four features; wild ones have offsets and log-scales over many magnitudes, and some take one back."""
    layers: list[nn.Bijection] = []
    offsets = [0.0]
    for _ in range(int(torch.randint(2, 9, ()))):
        offset = float(10 ** (4 + 4 * torch.rand(())) * (torch.rand(()) < 0.7)) if wild else 0.0
        offsets.append(-offsets[-1] if torch.rand(()) < 0.4 else offset)
        split = ("channel", "channel_swap")[int(torch.randint(2, ()))]
        if torch.rand(()) < 0.5:
            layers.append(nn.AdditiveCoupling(Offset(2, 2, offsets[-1]), split=split))
        else:
            log_scale = float(torch.empty(()).uniform_(-12, 12)) if wild else 0.0
            layers.append(nn.AffineCoupling(Offset(2, 4, 0.0), split=split, scale=ops.ScaleMap.exp()))
            torch.nn.init.constant_(layers[-1].conditioner.inner[-1].bias[:2], log_scale)
    return nn.Compose(*layers)


def differs(actual: Results, expected: Results, tolerance: float) -> bool:
    try:
        assert_same(actual, expected, tolerance)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("wild", [True, False])
def test_no_wrong_gradient_of_a_random_chain_goes_unseen(wild: bool) -> None:
    wrong, warned = 0, 0
    for seed in range(100):
        torch.manual_seed(seed)
        stored = random_chain(wild)
        x = torch.randn((1, 2, 5, 16, 64)[seed % 5], 4)
        if wild:
            x += 10 ** (4 * torch.rand(4)) * (torch.rand(4) < 0.3)
        expected = trained(stored, x)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = trained(remade(stored, memory="reversible", anchors=(None, 1, 3, 8)[seed % 4]), x)
        wrong += (off := differs(found, expected, 1e-3))
        warned += bool(seen)
        assert seen or not off, f"seed {seed}"
    assert wrong >= 10 if wild else warned == wrong == 0, (wrong, warned)


def test_a_loss_in_any_sample_is_seen_when_its_turn_comes() -> None:
    state = torch.arange(20.0 * 6).reshape(20, 1, 2, 3)
    seen = torch.cat([_drift.spot(state, turn).flatten() for turn in range(0, 16 * 400, 16)])
    assert len(seen.unique()) == state.numel()
    watched = [turn for turn in range(1000) if _drift.evenly(turn) * _reversible.WATCH_EVERY < 1.0]
    assert watched[0] == 0
    assert max(b - a for a, b in itertools.pairwise(watched)) <= 34


def test_exploding_scales_are_seen() -> None:
    # s = exp(-18) loses eight of seven digits.
    steps = [nn.AffineCoupling(torch.nn.Conv2d(2, 4, 1), scale=ops.ScaleMap.exp()) for _ in range(2)]
    for step in steps:
        torch.nn.init.constant_(step.conditioner.bias, -18.0)
    with pytest.warns(RuntimeWarning, match="the rebuilt input is off by"):
        trained(nn.Compose(*steps, memory="reversible"), torch.randn(3, 4, 5, 5))


def test_a_state_that_is_not_finite_is_no_drift() -> None:
    bijection, x = stack(4, memory="reversible"), torch.randn(3, 4, 5, 5)
    x[1, 0, 0, 0] = float("nan")
    trained(bijection, x)


@pytest.mark.parametrize("anchors", [1, 2, 5])
def test_auto_computes_from_the_exact_state_and_stores_from_then_on(anchors: int) -> None:
    automatic, x = leaky(0.03, memory="auto", anchors=anchors), torch.randn(3, 4, 5, 5)
    stored = remade(automatic)
    expected = trained(stored, x)
    before = saved_bytes(automatic, x)
    with pytest.warns(
        RuntimeWarning, match=r"off by [34]\.\de-02 .*from the exact state, and activations are stored from now on"
    ):
        assert_same(trained(automatic, x), expected)
    assert_same(trained(automatic, x), expected, tolerance=0.0)
    assert saved_bytes(automatic, x) == saved_bytes(stored, x) > before


def test_auto_is_reversible_as_long_as_that_serves() -> None:
    stored, x = stack(8, 4, lambda: torch.nn.Dropout(0.5)), torch.randn(3, 4, 5, 5)
    automatic = remade(stored, memory="auto")
    assert_same(trained(automatic, x), trained(stored, x))
    assert saved_bytes(automatic, x) == saved_bytes(remade(stored, memory="reversible"), x) < saved_bytes(stored, x)


class OneWay(nn.Bijection):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.a.exp(), (x[0].numel() * self.a).expand(len(x))


class Sometimes(OneWay):
    """A layer that finds out late that it cannot be inverted."""

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("Sometimes: not for this z")


def test_bijections_without_inverse() -> None:
    x = torch.randn(3, 4, 5, 5)
    stored = nn.Compose(coupling(4), OneWay(), coupling(4))
    assert_same(trained(remade(stored, memory="auto"), x), trained(stored, x), tolerance=0.0)
    with pytest.raises(RuntimeError, match=r"bijection 1 \(OneWay\) has no inverse.*memory='store'"):
        remade(stored, memory="reversible")(x)
    late = nn.Compose(coupling(4), Sometimes(), nn.Permutation.reverse(4))
    automatic = nn.Compose(*late.bijections, memory="auto")
    expected = trained(late, x)
    with pytest.warns(RuntimeWarning, match="Sometimes: not for this z"):
        assert_same(trained(automatic, x), expected)
    with pytest.raises(NotImplementedError, match="not for this z"):
        trained(nn.Compose(*late.bijections, memory="reversible"), x)


# --- what it refuses


def test_a_second_derivative_is_refused() -> None:
    bijection, x = stack(2, memory="reversible"), torch.randn(2, 4, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"create_graph.*memory='store'"):
        torch.autograd.grad(loss_of(*bijection(x)), x, create_graph=True)


def test_transforms_store_under_auto_and_are_refused_otherwise() -> None:
    stored = vectors(3).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    reversible, automatic = remade(stored, memory="reversible"), remade(stored, memory="auto")

    def total(b: nn.Compose) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: loss_of(*b(x))

    torch.testing.assert_close(torch.func.grad(total(automatic))(x), torch.func.grad(total(stored))(x))
    torch.testing.assert_close(torch.func.jvp(total(automatic), (x,), (x,))[1], torch.func.jvp(total(stored), (x,), (x,))[1])
    with pytest.raises(RuntimeError, match=r"torch\.func.*memory='store'"):
        torch.func.grad(total(reversible))(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(automatic(dual)[0]).tangent is not None
        with pytest.raises(RuntimeError, match=r"forward-mode.*memory='store'"):
            reversible(dual)


def test_hooks_on_parameters_run_once() -> None:
    stored, x = vectors(3), torch.randn(4, 6)
    automatic = remade(stored, memory="auto")
    for bijection in (stored, automatic):
        next(bijection.parameters()).register_hook(lambda g: 2 * g)
    assert_same(trained(automatic, x), trained(stored, x))
    hooked = _hooked(stored)
    with pytest.raises(RuntimeError, match=r"hook.*memory='store'"):
        hooked(x)


def _hooked(stored: nn.Compose) -> nn.Compose:
    """A reversible copy with a hook: copies do not carry them over."""
    reversible = remade(stored, memory="reversible")
    next(reversible.parameters()).register_hook(lambda g: g)
    return reversible


def test_hooks_after_accumulation_are_served() -> None:
    bijection, x, seen = vectors(5, memory="reversible"), torch.randn(4, 6), []
    for p in bijection.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    trained(bijection, x)
    assert len(seen) == len({id(p) for p in seen}) == len([*bijection.parameters()])


def test_parameters_that_changed_before_the_backward_are_noticed() -> None:
    bijection, x = vectors(3, memory="reversible"), torch.randn(4, 6)
    loss = loss_of(*bijection(x))
    with torch.no_grad():
        next(bijection.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified in place between forward and backward"):
        loss.backward()
    other = {name: p.detach().clone().requires_grad_() for name, p in bijection.named_parameters()}
    loss = loss_of(*torch.func.functional_call(bijection, other, (x,)))
    with pytest.raises(RuntimeError, match=r"bijection \d \(AffineCoupling\) were replaced"):
        loss.backward()
    computed = {name: p * 2 for name, p in other.items()}
    with pytest.raises(RuntimeError, match="not a leaf"):
        torch.func.functional_call(bijection, computed, (x,))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="memory: expected one of 'store', 'reversible', 'auto', got 'low'"):
        nn.Compose(memory="low")
    with pytest.raises(ValueError, match="anchors: expected at least 1, or None, got 0"):
        nn.Compose(memory="auto", anchors=0)
    with pytest.raises(ValueError, match="drift: expected a positive number, or None, got nan"):
        nn.Compose(memory="auto", drift=float("nan"))
    with pytest.raises(TypeError, match="needs every layer to be a Bijection, got Linear"):
        nn.Compose(torch.nn.Linear(2, 2), memory="reversible")  # type: ignore[arg-type]
    assert "memory='auto', anchors=3" in repr(nn.Compose(memory="auto", anchors=3))


def test_copies_and_state_dicts() -> None:
    stored, x = vectors(4), torch.randn(4, 6)
    twin = copy.deepcopy(remade(stored, memory="reversible"))
    assert_same(trained(twin, x), trained(stored, x))
    assert twin.state_dict().keys() == stored.state_dict().keys()


# --- compilers and processes

# Dynamo hides this warning of torch's from users, but not where warnings are errors.
hidden = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@hidden
def test_compiled_networks() -> None:
    stored, x = vectors(4, dropout=0.3), torch.randn(8, 6)
    reversible = remade(stored, memory="reversible")
    for bijection in reversible.bijections:
        bijection.conditioner = torch.compile(bijection.conditioner, backend="aot_eager", fullgraph=True)
    assert_same(trained(reversible, x), trained(stored, x))


@hidden
def test_compiled_networks_with_batch_normalization() -> None:
    stored, x = stack(3, 4, lambda: torch.nn.BatchNorm2d(8)), torch.randn(5, 4, 6, 6)
    reversible = remade(stored, memory="reversible")
    for bijection in reversible.bijections:
        bijection.conditioner = torch.compile(bijection.conditioner, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_same(trained(reversible, x), trained(stored, x))
    for ours, theirs in zip(reversible.buffers(), stored.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@hidden
def test_a_compiled_stack_breaks_its_graph_and_is_right() -> None:
    stored, x = vectors(4, dropout=0.3), torch.randn(8, 6)
    reversible = remade(stored, memory="reversible")
    expected = trained(stored, x)
    compiled = torch.compile(nn.Flow(reversible, nn.StandardNormal(6)), backend="aot_eager")
    flow = nn.Flow(stored, nn.StandardNormal(6))
    for f in (compiled, flow):
        torch.manual_seed(5)
        f.zero_grad()
        f(x).sum().backward()
    for ours, theirs in zip(reversible.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert expected.keys() == trained(reversible, x).keys()
    with torch.no_grad():
        reversible.eval()
        whole = torch.compile(reversible, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(whole(x)[0], stored.eval()(x)[0])


def test_two_processes_under_ddp(tmp_path: Path) -> None:
    script = Path(__file__).with_name("reversible_ddp.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(reversible_ddp.WORLD)]
    for found in ranks:
        assert_same(found["reversible"], found["store"])
        counts, sizes = zip(*found["reversible-buckets"], strict=True)
        assert sum(sizes) == len(found["reversible"])
        # The first buckets go out while later segments are still to come.
        assert counts[0] < counts[-1] - len(found["reversible"]) // 2
    for name, gradient in ranks[0]["reversible"].items():
        assert torch.equal(gradient, ranks[1]["reversible"][name]), name
    # One process with the batches of both.
    assert_same(ranks[0]["reversible"], reversible_ddp.gradients(reversible_ddp.stack("store")))


def test_checkpoints_offloading_and_export() -> None:
    stored, x = vectors(4, dropout=0.2), torch.randn(5, 6)
    reversible = remade(stored, memory="reversible")

    class Checkpointed(nn.Bijection):
        def __init__(self) -> None:
            super().__init__()
            self.bijections = reversible.bijections

        def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            return checkpoint(reversible, x, context, use_reentrant=False)

    expected = trained(stored, x)
    assert_same(trained(Checkpointed(), x), expected)
    with torch.autograd.graph.save_on_cpu():
        assert_same(trained(reversible, x), expected)
    exported = torch.export.export(reversible.eval(), (x,)).module()
    torch.testing.assert_close(exported(x)[0], stored.eval()(x)[0])
