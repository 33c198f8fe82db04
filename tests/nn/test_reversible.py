"""Reversible memory: the gradients of storing, in memory that does not grow, and nothing else changed by running twice."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparison import needs_native
from layers import (
    WORLD,
    Results,
    assert_refused,
    assert_same,
    assert_trains_alike,
    gradients_of,
    loss_of,
    redrawn,
    remade,
    trained,
)
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from flowkern import models, nn, ops
from flowkern._core import backend as _backend
from flowkern.nn.bijections import drift as _drift, reversible as _reversible

BOUNDED = ops.ScaleMap.tanh(0.5)
TURNS = ("channel", "channel_swap")


def network(inputs: int, outputs: int, *more: torch.nn.Module, width: int = 8) -> torch.nn.Module:
    """A small convolutional network whose last layer is not zero."""
    first, last = torch.nn.Conv2d(inputs, width, 3, padding=1), torch.nn.Conv2d(width, outputs, 3, padding=1)
    return torch.nn.Sequential(first, *more, torch.nn.Tanh(), last)


def coupling(channels: int = 4, split: str = "channel") -> nn.AffineCoupling:
    return nn.AffineCoupling(network(channels // 2, channels), split=split, scale=BOUNDED)


def turns(steps: int, conditioner: Callable[[], torch.nn.Module], **options: Any) -> nn.Compose:
    """Couplings on halves that take turns."""
    couplings = (nn.AffineCoupling(conditioner(), split=TURNS[i % 2], scale=BOUNDED) for i in range(steps))
    return nn.Compose(*couplings, **options)


def stack(steps: int, *more: Callable[[], torch.nn.Module], width: int = 8, **options: Any) -> nn.Compose:
    """Couplings of four channels."""
    return turns(steps, lambda: network(2, 4, *(module() for module in more), width=width), **options)


def vectors(steps: int, context: int | None = None, dropout: float = 0.0, **options: Any) -> nn.Compose:
    """Couplings of six features."""
    return turns(steps, lambda: nn.MLP(3, 6, (16,), context=context, dropout=dropout, zero_init=False), **options)


def every_kind() -> nn.Compose:
    """Each layer of the library that takes images, among them containers."""
    inner = nn.Compose(nn.AdditiveCoupling(network(8, 8)), nn.Compose(coupling(16, "channel_swap")), nn.Permutation.reverse(16))
    second = nn.Compose(coupling(8), nn.Scaling((8, 1, 1)), coupling(8, "channel_swap"))
    levels = nn.MultiScale(nn.Compose(nn.Squeeze(), coupling(16), inner), second, shape=(4, 4, 4))
    mask = ops.FeatureMask(torch.arange(64) % 3 == 0)
    flat = nn.AffineCoupling(nn.MLP(42, 44, (8,), zero_init=False), split=mask, scale=BOUNDED, layout="interleaved_shift_scale")
    splits, how = ("checkerboard", "checkerboard_swap"), {"scale": BOUNDED, "shift_first": True}
    checkerboards = [nn.AffineCoupling(network(4, 8), split=split, **how) for split in splits]
    return nn.Compose(nn.Logit(0.05), nn.Rescale(0.5, -0.1), *checkerboards, nn.Permutation.random(4, seed=1), levels, flat)


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


def first_batches() -> nn.Compose:
    dropped = nn.AffineCoupling(torch.nn.Sequential(network(2, 4), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5)), scale=BOUNDED)
    return nn.Compose(dropped, FirstBatch(), coupling(4, "channel_swap"), FirstBatch())


def shared() -> nn.Compose:
    """One layer three times: its gradients add up."""
    layer = coupling()
    return nn.Compose(layer, nn.Permutation.reverse(4), layer, nn.Permutation.reverse(4), layer)


def frozen(every: int) -> nn.Compose:
    """One parameter of so many does not ask for a gradient."""
    chain = stack(6)
    for p in [*chain.parameters()][::every]:
        p.requires_grad_(False)
    return chain


def weight_normalized() -> nn.Compose:
    chain = vectors(4)
    for bijection in chain.bijections:
        torch.nn.utils.parametrizations.weight_norm(bijection.conditioner.layers[0])
    return chain


def with_sizes(constant: bool) -> tuple[nn.Compose, torch.Tensor]:
    """Features of different sizes, and an input in which one of them may be constant: it has no digits of its own to lose."""
    sizes = torch.tensor([1e-6, 1.0, 1e6, 1e-2])
    chain = nn.Compose(nn.Scaling((4,)), *turns(4, lambda: nn.MLP(2, 4, (8,), zero_init=False)).bijections)
    with torch.no_grad():
        chain.bijections[0].log_scale.copy_(-sizes.log())
    x = torch.randn(32, 4)
    if constant:
        x[:, 1] = 0.0
    return chain, x * sizes


def images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 4, 6, 5)


BATCH_NORMS = (lambda: torch.nn.BatchNorm2d(8), lambda: torch.nn.InstanceNorm2d(8, track_running_stats=True))

#: (a chain, its input, and a context if it takes one), and the options of the copy.
CASES: dict[str, tuple[Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    **{f"{steps}-steps": (lambda steps=steps: (stack(steps), images()), {}) for steps in (1, 2, 7, 32)},
    "float64": (lambda: (stack(16).double(), images().double()), {"anchors": 5}),
    **{f"every-kind-{n}": (lambda: (every_kind(), torch.rand(3, 4, 4, 4)), {"anchors": n}) for n in (None, 1, 3)},
    "own": (lambda: (nn.Compose(Own(), Own(), Own()), torch.randn(4, 6)), {"anchors": 3}),
    "dropout": (lambda: (vectors(6, dropout=0.5), torch.randn(8, 6)), {}),
    "batch-norm": (lambda: (stack(6, *BATCH_NORMS), images(5)), {}),
    "first-batches": (lambda: (first_batches(), 2 + images(4)), {"anchors": 4}),
    "context": (lambda: (vectors(9, context=3), torch.randn(5, 6), torch.randn(5, 3)), {}),
    **{f"frozen-{every}": (lambda every=every: (frozen(every), images()), {}) for every in (1, 3)},
    "channels-last": (lambda: (stack(6), images().to(memory_format=torch.channels_last)), {}),
    **{f"shared-{n}": (lambda: (shared(), images(2)), {"anchors": n}) for n in (None, 1, 5)},
    "weight-norm": (lambda: (weight_normalized(), torch.randn(5, 6)), {}),
    **{f"sizes-{constant}": (lambda constant=constant: with_sizes(constant), {"anchors": 5}) for constant in (False, True)},
}  # fmt: skip


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_storing(case: str, inverse: bool) -> None:
    build, options = CASES[case]
    stored, x, *context = build()
    if inverse:
        with torch.no_grad():
            x = stored(x, *context)[0]  # which also initializes what waits for data
    assert_trains_alike(stored, x, *context, inverse=inverse, **options)


def test_the_backward_of_an_inverse_initializes_nothing() -> None:
    """It runs forwards, in training mode, what the inverse took as it was."""
    waiting = nn.Compose(nn.ActNorm(4), coupling(), FirstBatch(), nn.GlowStep(4, network(2, 4)))
    assert_trains_alike(waiting, 2 + images(4), inverse=True)


def glow(**options: Any) -> models.Glow:
    """With weights that are not zero, so that every part counts."""
    return redrawn(models.Glow((3, 8, 8), levels=2, steps=3, hidden=12, **options), 0.05, seed=2, around=1.0)


@pytest.mark.parametrize(("parametrization", "memory"), [*((p, "reversible") for p in nn.PARAMETRIZATIONS), ("plu", "auto")])
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
            found.append({"log_prob": log_prob.detach()} | gradients_of(model))
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


@needs_native
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


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth() -> None:
    """Networks are twelve times as wide as the state, as in a small Glow, with few parameters: activations are what counts."""
    x = torch.randn(8, 4, 24, 24)
    few, many = (peak_bytes(stack(n, width=48, memory="reversible"), x) for n in (4, 64))
    assert many <= 1.1 * few
    assert peak_bytes(stack(64, width=48), x) > 5 * many


def test_only_the_states_at_the_anchors_are_saved() -> None:
    x = torch.randn(16, 4, 24, 24)
    state = x.nbytes
    by_default = saved_bytes(stack(32, memory="reversible"), x)
    assert 5 * state <= by_default < 5.2 * state  # the input and the ends of four segments
    assert 9 * state <= saved_bytes(stack(32, memory="reversible", anchors=4), x) < 9.2 * state
    assert saved_bytes(stack(32), x) > 60 * state


def test_a_multiscale_inside_keeps_nothing_of_its_networks() -> None:
    stored, x = every_kind(), torch.rand(3, 4, 4, 4)
    assert saved_bytes(remade(stored, memory="reversible"), x) < saved_bytes(stored, x) / 2


def test_no_gradient_asked_for_means_no_second_pass() -> None:
    bijection, x = stack(3, memory="reversible"), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        assert bijection(x)[0].grad_fn is None
    bijection.requires_grad_(False)
    assert bijection(x)[0].grad_fn is None


# --- running twice changes nothing


def test_lazy_networks_are_made_first() -> None:
    x = torch.randn(4, 6)
    net = torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.Tanh(), torch.nn.LazyLinear(6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = nn.Compose(nn.AffineCoupling(net, scale=BOUNDED))
    reversible = nn.Compose(*stored.bijections, memory="reversible")
    assert_same(trained(reversible, x), trained(stored, x))


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
        return {"z": z.detach(), "logabsdet": logabsdet.detach()} | gradients_of(bijection)

    expected = step(stored, inside=False)
    # The parameters come out of networks in bfloat16: where a rebuilt state rounds the other way, by 2^-9 of one activation.
    for inside in (False, True):
        assert_same(step(reversible, inside), expected, tolerance=2e-2)
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 2 * 2 * 8


def test_rounding_of_bfloat16_networks_is_no_drift() -> None:
    # Rebuilt inputs differ by 1e-7, which now and then rounds an activation to the neighbour 2^-8 away. What that does to
    # the gradient is less than what bfloat16 itself does.
    stored, x = stack(32, lambda: torch.nn.Conv2d(8, 8, 1)), torch.randn(16, 4, 16, 16)
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


# --- inputs and gradients of all kinds


def test_only_some_parameters_asked_for() -> None:
    stored, x = stack(6), torch.randn(3, 4, 5, 5)
    reversible = remade(stored, memory="reversible")
    some = [torch.autograd.grad(loss_of(*b(x)), [*b.bijections[4].parameters()]) for b in (reversible, stored)]
    torch.testing.assert_close(*some, rtol=1e-4, atol=1e-5)


#: What hands a chain gradients of other forms: none of one output, or strided ones.
LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "z": lambda z, _: z.square().sum(),
    "logabsdet": lambda _, logabsdet: logabsdet.sum(),
    "strided": lambda z, logabsdet: (z * torch.linspace(-1, 1, 360).view(5, 6, 4, 3).permute(3, 2, 1, 0)).sum() + logabsdet.sum(),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("loss", LOSSES)
def test_absent_and_strided_gradients(loss: str, layout: torch.memory_format) -> None:
    # The additive coupling in between has no log-determinant: nothing reaches the last network from there.
    stored = nn.Compose(coupling(), coupling(4, "channel_swap"), nn.AdditiveCoupling(network(2, 2))).to(memory_format=layout)
    x = images().to(memory_format=layout)
    reversible = assert_trains_alike(stored, x, anchors=2, loss=LOSSES[loss])
    assert reversible(x)[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(batch: int) -> None:
    assert_trains_alike(stack(3), images(batch), loss=lambda z, logabsdet: z.sum() + logabsdet.sum())


def test_nothing_and_views() -> None:
    x = torch.randn(2, 2, 3, 3, requires_grad=True)
    z, logabsdet = nn.Compose(memory="reversible")(x)
    assert z is x
    assert torch.equal(logabsdet, torch.zeros(2))
    z, logabsdet = nn.Compose(nn.Flatten((2, 3, 3)), memory="reversible")(x)
    z.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_two_backwards_through_one_graph_and_accumulation() -> None:
    stored, x = stack(5, BATCH_NORMS[0]), torch.randn(3, 4, 5, 5)
    reversible = remade(stored, memory="reversible")
    for bijection in (stored, reversible):
        loss = loss_of(*bijection(x))
        loss.backward(retain_graph=True)
        loss.backward()
        loss_of(*bijection(x + 1)).backward()
    assert_same(gradients_of(reversible), gradients_of(stored))
    for ours, theirs in zip(reversible.buffers(), stored.buffers(), strict=True):
        assert torch.equal(ours, theirs)


# --- when the inverse is not exact


class OneWay(nn.Bijection):
    """z = x exp(a), which has no inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.a.exp(), (x[0].numel() * self.a).expand(len(x))


class Sometimes(OneWay):
    """A layer that finds out late that it cannot be inverted."""

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("Sometimes: not for this z")


class Leaky(OneWay):
    """Its inverse is off by a factor: what an exploding inverse looks like at the anchor."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def inverse(self, z: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return z * (-self.a).exp() * (1 + self.error), (-z[0].numel() * self.a).expand(len(z))


def leaky(error: float, **options: Any) -> nn.Compose:
    return nn.Compose(*stack(2).bijections, Leaky(error), *stack(2).bijections, **options)


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


def offsets(*values: float, memory: str) -> nn.Compose:
    """Additive couplings of four features that lose digits where an offset is large."""
    splits = ("channel_swap", "channel", "channel")
    layers = (nn.AdditiveCoupling(Offset(2, 2, v), split=s) for v, s in zip(values, splits, strict=True))
    return nn.Compose(*layers, memory=memory, anchors=3)


@pytest.mark.parametrize("layout", ["vectors", "images", "channels_last", "double", "autocast"])
def test_digits_lost_beside_a_large_feature_are_seen(layout: str) -> None:
    x, large, said, how = torch.randn(16, 4), 1e7, r"more than 3\.5e-04", contextlib.nullcontext()
    if layout in ("images", "channels_last"):
        x = images(4).to(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    if layout == "double":
        x, large, said = x.double(), 1e16, r"more than 1\.5e-08"
    if layout == "autocast":
        said, how = r"more than 8\.8e-02", torch.autocast("cpu", dtype=torch.bfloat16)
    x[:, 0] += 1e4
    bijection = offsets(0.0, large, -large, memory="reversible").to(x.dtype)
    with pytest.warns(RuntimeWarning, match=said), how:
        trained(bijection, x)
    automatic = remade(bijection, memory="auto", anchors=3)
    with how:
        expected = trained(remade(bijection), x)
    with pytest.warns(RuntimeWarning, match="stored from now on"), how:
        assert_same(trained(automatic, x), expected)


def test_digits_that_only_an_inner_state_has_lost_are_seen() -> None:
    # The middle is 1e5 (x - 1) with x within 1e-5 of 1: going back from x it has two digits, and x has all.
    there, back = (nn.Rescale(1.0, -1.0), nn.Rescale(1e5)), (nn.Rescale(1e-5), nn.Rescale(1.0, 1.0))
    ranges = nn.Compose(*there, nn.AdditiveCoupling(Offset(2, 2, 0.0)), *back)
    x = 1 + 1e-5 * torch.randn(16, 4)
    with pytest.warns(RuntimeWarning, match="a rebuilt state inside is off by"):
        trained(remade(ranges, memory="reversible", anchors=5), x)
    automatic, expected = remade(ranges, memory="auto", anchors=5), trained(ranges, x)
    with pytest.warns(RuntimeWarning, match="stored from now on"):
        assert_same(trained(automatic, x), expected, tolerance=1e-4)


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


@pytest.mark.parametrize("wild", [pytest.param(True, marks=pytest.mark.slow), False])
def test_no_wrong_gradient_of_a_random_chain_goes_unseen(wild: bool) -> None:
    wrong, warned = 0, 0
    for seed in range(50):
        torch.manual_seed(seed)
        stored = random_chain(wild)
        x = torch.randn((1, 2, 5, 16, 64)[seed % 5], 4)
        if wild:
            x += 10 ** (4 * torch.rand(4)) * (torch.rand(4) < 0.3)
        expected = trained(stored, x)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = trained(remade(stored, memory="reversible", anchors=(None, 1, 3, 8)[seed % 4]), x)
        warned += bool(seen)
        try:
            assert_same(found, expected, 1e-3)
        except AssertionError:
            wrong += 1
            assert seen, f"seed {seed}"
    assert wrong >= 5 if wild else warned == wrong == 0, (wrong, warned)


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
    said = r"off by [34]\.\de-02 .*from the exact state, and activations are stored from now on"
    with pytest.warns(RuntimeWarning, match=said):
        assert_same(trained(automatic, x), expected)
    assert_same(trained(automatic, x), expected, tolerance=0.0)
    assert saved_bytes(automatic, x) == saved_bytes(stored, x) > before


def test_auto_is_reversible_as_long_as_that_serves() -> None:
    stored, x = stack(8, lambda: torch.nn.Dropout(0.5)), torch.randn(3, 4, 5, 5)
    automatic = assert_trains_alike(stored, x, memory="auto")
    stored.train()
    assert saved_bytes(automatic, x) == saved_bytes(remade(stored, memory="reversible"), x) < saved_bytes(stored, x)


def test_bijections_without_inverse() -> None:
    x = torch.randn(3, 4, 5, 5)
    stored = nn.Compose(coupling(), OneWay(), coupling())
    assert_same(trained(remade(stored, memory="auto"), x), trained(stored, x), tolerance=0.0)
    with pytest.raises(RuntimeError, match=r"bijection 1 \(OneWay\) has no inverse.*memory='store'"):
        remade(stored, memory="reversible")(x)
    late = nn.Compose(coupling(), Sometimes(), nn.Permutation.reverse(4))
    automatic = remade(late, memory="auto")
    with pytest.warns(RuntimeWarning, match="Sometimes: not for this z"):
        assert_same(trained(automatic, x), trained(late, x))
    with pytest.raises(NotImplementedError, match="not for this z"):
        trained(remade(late, memory="reversible"), x)


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
    automatic, reversible = (remade(stored, memory=memory) for memory in ("auto", "reversible"))
    for bijection in (stored, automatic, reversible):
        next(bijection.parameters()).register_hook(lambda g: 2 * g)
    assert_same(trained(automatic, x), trained(stored, x))
    with pytest.raises(RuntimeError, match=r"hook.*memory='store'"):
        reversible(x)


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
    linear = torch.nn.Linear(2, 2)
    assert_refused(
        (lambda: nn.Compose(memory="low"), "memory: expected one of 'store', 'reversible', 'auto', got 'low'"),
        (lambda: nn.Compose(memory="auto", anchors=0), "anchors: expected at least 1, or None, got 0"),
        (lambda: nn.Compose(memory="auto", drift=float("nan")), "drift: expected a positive number, or None, got nan"),
        (lambda: nn.Compose(linear, memory="reversible"), "needs every layer to be a Bijection, got Linear", TypeError),
    )
    assert "memory='auto', anchors=3" in repr(nn.Compose(memory="auto", anchors=3))


# --- compilers and processes

# Dynamo hides this warning of torch's from users, but not where warnings are errors.
hidden = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@hidden
@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, True], ids=["dropout", "batch-norm"])
def test_compiled_networks(norm: bool) -> None:
    stored, x = (stack(2, BATCH_NORMS[0]), images(5)) if norm else (vectors(2, dropout=0.3), torch.randn(8, 6))
    reversible = remade(stored, memory="reversible")
    for bijection in reversible.bijections:
        bijection.conditioner = torch.compile(bijection.conditioner, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_same(trained(reversible, x), trained(stored, x))
    for ours, theirs in zip(reversible.buffers(), stored.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@hidden
def test_a_compiled_stack_breaks_its_graph_and_is_right() -> None:
    stored, x = vectors(2, dropout=0.3), torch.randn(8, 6)
    reversible, base = remade(stored, memory="reversible"), nn.StandardNormal(6)
    for flow in (torch.compile(nn.Flow(reversible, base), backend="aot_eager"), nn.Flow(stored, base)):
        torch.manual_seed(5)
        flow(x).sum().backward()
    for ours, theirs in zip(reversible.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert_same(trained(reversible, x), trained(stored, x))
    with torch.no_grad():
        whole = torch.compile(reversible.eval(), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(whole(x)[0], stored.eval()(x)[0])


def flow_of(memory: str) -> nn.Flow:
    torch.manual_seed(0)
    return nn.Flow(vectors(12, memory=memory), nn.DiagonalNormal(6))


def batches() -> torch.Tensor:
    return torch.randn(2, WORLD * 8, 6, generator=torch.Generator().manual_seed(1))


def accumulated(flow: torch.nn.Module, first: torch.Tensor, second: torch.Tensor) -> Results:
    """The gradients of two batches, the first of them without synchronization."""
    with flow.no_sync() if isinstance(flow, DistributedDataParallel) else contextlib.nullcontext():
        (-flow(first).mean()).backward()
    (-flow(second).mean()).backward()
    return {name.removeprefix("module."): g for name, g in gradients_of(flow).items()}


def of_rank(rank: int) -> dict[str, Any]:
    """The gradients of a reversible and of a storing flow under DDP, and (gradients at hand, size) of each bucket at its turn."""
    share, found = batches()[:, rank * 8 : rank * 8 + 8], {}
    for memory in ("store", "reversible"):
        # Buckets of 1 kB: several, so that the first is reduced while later segments still compute.
        flow = DistributedDataParallel(flow_of(memory), bucket_cap_mb=0.001)
        ready, seen = [], []
        for p in flow.parameters():
            p.register_post_accumulate_grad_hook(lambda p, ready=ready: ready.append(p.shape))

        def reduced(state, bucket, ready=ready, seen=seen):  # DDP reads annotations, which are postponed here
            seen.append((len(ready), len(bucket.parameters())))
            return allreduce_hook(dist.group.WORLD, bucket)

        flow.register_comm_hook(None, reduced)
        (-flow(share[0]).mean()).backward()  # DDP forms its buckets after its first backward
        flow.zero_grad()
        ready.clear()
        seen.clear()
        found[memory] = accumulated(flow, *share)
        found[f"{memory}-buckets"] = seen
    return found


@pytest.mark.slow
def test_two_processes_under_ddp(in_two_processes: Callable[..., list[Any]]) -> None:
    ranks = in_two_processes(of_rank)
    for found in ranks:
        assert_same(found["reversible"], found["store"])
        counts, sizes = zip(*found["reversible-buckets"], strict=True)
        assert sum(sizes) == len(found["reversible"])
        # The first buckets go out while later segments are still to come.
        assert counts[0] < counts[-1] - len(found["reversible"]) // 2
    for name, gradient in ranks[0]["reversible"].items():
        assert torch.equal(gradient, ranks[1]["reversible"][name]), name
    # One process with the batches of both.
    assert_same(ranks[0]["reversible"], accumulated(flow_of("store"), *batches()))


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
