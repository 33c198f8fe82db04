"""What the tests of layers share: a table of every layer, exact inverses, steps of training, and processes of one group."""

from __future__ import annotations

import copy
import datetime
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flowkern import nn, ops

#: What a step of training gives, by name: outputs, and gradients, of which some are absent.
Results = dict[str, torch.Tensor | None]


def redrawn(module: torch.nn.Module, size: float, seed: int = 1, around: float = 0.0) -> Any:
    """The module with noise of that size on ``around`` times each parameter: those at their start would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(around).add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    """In float64: some 1e3 roundings of 1e-16, amplified by condition numbers below 1e3, stay under 1e-9."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def log_volumes(function: Callable[..., Any], x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    """log|det d function(x) / dx| of each sample, from its own block of the whole Jacobian: (B,)."""
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x, context)[0], x)
    size = x[0].numel()
    blocks = jacobian.reshape(len(x), size, len(x), size).diagonal(dim1=0, dim2=2)
    return torch.linalg.slogdet(blocks.movedim(-1, 0)).logabsdet


def assert_exact(layer: nn.Bijection, x: torch.Tensor, context: torch.Tensor | None = None, tolerance: float = 1e-9) -> None:
    """``inverse`` undoes ``forward``, and both log-determinants are those of the Jacobians."""
    z, logabsdet = layer(x, context)
    assert z.shape == (len(x), *layer.output_shape(x.shape[1:]))
    assert (logabsdet.shape, logabsdet.dtype) == ((len(x),), torch.float64)
    back, negated = layer.inverse(z, context)
    assert_near(back, x, tolerance)
    assert_near(negated, -logabsdet, tolerance)
    assert_near(logabsdet, log_volumes(layer.forward, x, context), tolerance)
    assert_near(negated, log_volumes(layer.inverse, z.detach(), context), tolerance)


def assert_refused(*cases: tuple[Any, ...]) -> None:
    """Each case is (call, pattern) or (call, pattern, error): the call raises a ValueError, or the error, with such a message."""
    for call, pattern, *error in cases:
        with pytest.raises(error[0] if error else ValueError, match=pattern):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# Every layer

DEGREES = torch.tensor([1, 3, 2, 2]), torch.tensor([0, 2, 1, 1, 3])  # on the host, whatever the default device
MANY = torch.arange(512), torch.arange(1024) // 2
ORDER, FEATURES = torch.tensor([2, 0, 1, 3]), torch.tensor([True, False, False, True, True])

Layer = tuple[Callable[[], torch.nn.Module], tuple[int, ...], int | None]


def mask() -> ops.FeatureMask:
    return ops.FeatureMask(FEATURES)


def small_multiscale() -> nn.MultiScale:
    def coupling(split: str, inputs: int, outputs: int) -> nn.AffineCoupling:
        # A bounded scale: with random weights a sigmoid saturates, and the inverse is ill-conditioned.
        return nn.AffineCoupling(nn.ResNet(inputs, outputs, 4, 1, context=2), split=split, scale=ops.ScaleMap.tanh(1.0))

    first = nn.Compose(coupling("checkerboard", 1, 2), nn.Squeeze(), coupling("channel", 2, 4), coupling("channel_swap", 2, 4))
    second = nn.Compose(coupling("checkerboard_swap", 2, 4), nn.Permutation.reverse(2))
    return nn.MultiScale(first, second, shape=(1, 4, 4))


def interleaved() -> nn.AffineCoupling:
    how = {"scale": ops.ScaleMap.exp(), "layout": "interleaved_shift_scale", "shift_first": True}
    return nn.AffineCoupling(nn.MLP(2, 6, (8,)), split="channel_swap", **how)


def two_networks() -> nn.AffineCoupling:
    return nn.AffineCoupling(nn.Parallel(nn.MLP(3, 2, (8,), context=2), nn.MLP(3, 2, (8,), context=2)))


def step_of_glow(parametrization: str = "plu", context: int | None = None) -> nn.GlowStep:
    net = nn.ConvNet(3, 4, 8, context=context)
    return nn.GlowStep(5, net, parametrization=parametrization, scale=ops.ScaleMap.sigmoid(2.0, 1e-3))


#: Each public bijection of flowkern.nn, more than once where options lead other ways: how to build it, the shape of a sample
#: and the size of the context.
BIJECTIONS: dict[str, Layer] = {
    "ActNorm": (lambda: nn.ActNorm(4), (4,), None),
    "ActNorm-image": (lambda: nn.ActNorm(3), (3, 1, 2), None),
    "AdditiveCoupling": (lambda: nn.AdditiveCoupling(nn.MLP(3, 2, (8,), activation="tanh")), (5,), None),
    "AdditiveCoupling-mask": (lambda: nn.AdditiveCoupling(nn.MLP(2, 3, (8,)), split=mask()), (5,), None),
    "AdditiveCoupling-checkerboard": (
        lambda: nn.AdditiveCoupling(nn.ResNet(1, 1, 4, 1, context=2), split="checkerboard_swap"), (1, 4, 4), 2),
    "AffineCoupling": (lambda: nn.AffineCoupling(nn.MLP(3, 4, (8,))), (5,), None),
    "AffineCoupling-context": (lambda: nn.AffineCoupling(nn.MLP(3, 4, (8,), context=2)), (5,), 2),
    "AffineCoupling-interleaved": (interleaved, (5,), None),
    "AffineCoupling-mask": (
        lambda: nn.AffineCoupling(nn.MLP(2, 6, (8,)), split=mask(), scale=ops.ScaleMap.tanh(1.0)), (5,), None),
    "AffineCoupling-two-networks": (two_networks, (5,), 2),
    "AffineCoupling-checkerboard": (lambda: nn.AffineCoupling(nn.ResNet(2, 4, 4, 1), split="checkerboard"), (2, 3, 4), None),
    "AffineCoupling-image": (lambda: nn.AffineCoupling(nn.ResNet(2, 2, 4, 2, context=2, activation="silu")), (3, 3, 2), 2),
    "Autoregressive": (lambda: nn.Autoregressive(4, nn.MixtureLogistic(2), (5, 6), order="random"), (4,), None),
    "Autoregressive-spline": (lambda: nn.Autoregressive(4, nn.RationalQuadraticSpline(ops.SplineMap(3)), (5, 6)), (4,), None),
    "BatchNormFlow": (lambda: nn.BatchNormFlow(3), (3,), None),
    "BatchNormFlow-image": (lambda: nn.BatchNormFlow(3), (3, 2, 2), None),
    "Columns": (lambda: nn.Columns({1: nn.Logit(), (4, 0): nn.Inverse(nn.Exp()), range(2, 4): nn.ActNorm(2)}), (6,), None),
    "Columns-context": (lambda: nn.Columns({(3, 1): nn.AffineCoupling(nn.MLP(1, 2, (8,), context=2)), 2: nn.Tanh()}), (4,), 2),
    "Compose": (lambda: nn.Compose(nn.AffineCoupling(nn.MLP(2, 4, (8,))), nn.Permutation.reverse(4), nn.ActNorm(4)), (4,), None),
    "Compose-nothing": (nn.Compose, (4,), None),
    "Coupling": (lambda: nn.Coupling(nn.MLP(2, 16, (5,)), nn.MixtureLogistic(2)), (4,), None),
    "Coupling-spline": (
        lambda: nn.Coupling(nn.MLP(3, 18, (5,)), nn.RationalQuadraticSpline(ops.SplineMap(3, 2.0, "circular"))), (5,), None),
    "Exp": (nn.Exp, (2, 3), None),
    "Flatten": (lambda: nn.Flatten((2, 3, 2)), (2, 3, 2), None),
    **{f"GlowStep-{p}": (lambda p=p: step_of_glow(p, 2), (5, 2, 2), 2) for p in nn.PARAMETRIZATIONS},
    **{f"{kind.__name__}-{p}{'-bias' * bias}": (lambda k=kind, p=p, b=bias: k(5, p, bias=b), (5, *shape), None)
       for kind, shape in ((nn.InvertibleLinear, ()), (nn.InvertibleConv1x1, (1, 2)))
       for p in nn.PARAMETRIZATIONS for bias in (True, False)},
    "Interval": (lambda: nn.Interval(-0.5, 3.0), (2, 3), None),
    "Interval-columns": (lambda: nn.Interval(torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 5.0])), (2,), None),
    "Inverse": (lambda: nn.Inverse(nn.AffineCoupling(nn.MLP(2, 2, (8,), context=2))), (3,), 2),
    **{f"Inverse-{kind.__name__}": (lambda kind=kind: nn.Inverse(kind()), (3,), None)
       for kind in (nn.Exp, nn.Logit, nn.Softplus, nn.Tanh)},
    "InverseAutoregressive": (lambda: nn.InverseAutoregressive(4, (5, 6), order="random"), (4,), None),
    "Logit": (lambda: nn.Logit(0.05), (2, 3, 2), None),
    "MaskedAutoregressive": (lambda: nn.MaskedAutoregressive(4, (5, 6)), (4,), None),
    "MixtureLogisticCoupling": (lambda: nn.MixtureLogisticCoupling(nn.MLP(2, 16, (5,)), 2), (4,), None),
    "MultiScale": (small_multiscale, (1, 4, 4), 2),
    "NormalizedLinear": (lambda: nn.NormalizedLinear(nn.ActNorm(4), nn.InvertibleConv1x1(4)), (4, 2, 2), None),
    "Permutation": (lambda: nn.Permutation([2, 0, 1]), (3,), None),
    "Permutation-image": (lambda: nn.Permutation.random(4, seed=3), (4, 2, 3), None),
    **{f"{kind.__name__}-{n}-{context}": (lambda k=kind, n=n, c=context: k(n, c), (n,), context)
       for kind in (nn.Planar, nn.Radial) for n, context in ((1, None), (5, 3))},
    "Rescale": (lambda: nn.Rescale(17.0, -0.5), (6,), None),
    "Rescale-channels": (lambda: nn.Rescale(torch.tensor([2.0, -3.0]).view(2, 1, 1), torch.ones(2, 1, 1)), (2, 2, 3), None),
    "Scaling": (lambda: nn.Scaling((2, 3)), (2, 3), None),
    "Softplus": (nn.Softplus, (2, 3), None),
    "Squeeze": (nn.Squeeze, (3, 4, 6), None),
    "Standardize": (lambda: nn.Standardize(2).fit(torch.tensor([[1.0, -5.0], [2.0, 5.0], [4.0, 30.0]])), (2,), None),
    "Tanh": (nn.Tanh, (2, 3), None),
}  # fmt: skip


def vamp() -> nn.VAE:
    """The prior's encoder and posterior belong to its VAE."""
    encoder, posterior = nn.MLP(4, 4), nn.GaussianPosterior(2)
    return nn.VAE(encoder, nn.MLP(2, 8), nn.Gaussian(), nn.VampPrior(encoder, posterior, torch.zeros(2, 4)), posterior)


#: Each public module of flowkern.nn in the same way.
LAYERS: dict[str, Layer] = BIJECTIONS | {
    "ConvDecoder": (lambda: nn.ConvDecoder(4, (1, 4, 4), 2, (5,)), (4,), None),
    "ConvEncoder": (lambda: nn.ConvEncoder((1, 4, 4), 2, (5,)), (1, 4, 4), None),
    "ConvNet": (lambda: nn.ConvNet(2, 3, 5), (2, 4, 4), None),
    "Dequantize": (nn.Dequantize, (4,), None),
    "DiagonalNormal": (lambda: nn.DiagonalNormal(4), (4,), None),
    "Flow": (lambda: nn.Flow(nn.Permutation.random(4, 0), nn.StandardNormal(4)), (4,), None),
    "FlowPosterior": (lambda: nn.FlowPosterior(2, nn.InverseAutoregressive(2, (5,))), (4,), None),
    "GatedMaskedConv": (lambda: nn.GatedMaskedConv(2), (2, 4, 4), None),
    "GaussianPosterior": (lambda: nn.GaussianPosterior(2), (4,), None),
    "HierarchicalPosterior": (lambda: nn.HierarchicalPosterior(2, 1, nn.MLP(2, 2, (5,))), (4,), None),
    "HierarchicalPrior": (lambda: nn.HierarchicalPrior(2, 2, nn.MLP(2, 4, (5,))), (4,), None),
    "MADE": (lambda: nn.MADE(4, (5, 6), degrees="random"), (4,), None),
    "MADE-cyclic": (lambda: nn.MADE(4, (5, 6, 6), degrees="cyclic", residual=False, order=ORDER), (4,), None),
    "MADEDensity": (lambda: nn.MADEDensity(4, (5,), masks=3), (4,), None),
    "MLP": (lambda: nn.MLP(4, 2, (5,)), (4,), None),
    "MaskedLinear": (lambda: nn.MaskedLinear(*DEGREES), (4,), None),
    "MaskedLinear-panels": (lambda: nn.MaskedLinear(*MANY), (512,), None),
    "Mixture": (lambda: nn.Mixture(4, 3), (4,), None),
    "Parallel": (lambda: nn.Parallel(nn.MLP(4, 2, (5,)), nn.MLP(4, 3, (5,))), (4,), None),
    "ResNet": (lambda: nn.ResNet(2, 3, 5), (2, 4, 4), None),
    "ResidualVectorQuantizer": (lambda: nn.ResidualVectorQuantizer(4, 5, 2), (4,), None),
    "StandardNormal": (lambda: nn.StandardNormal(4), (4,), None),
    "UniformDequantization": (nn.UniformDequantization, (4,), None),
    "VAE": (lambda: nn.VAE(nn.MLP(4, 4), nn.MLP(2, 8), nn.Gaussian(), nn.StandardNormal(2), nn.GaussianPosterior(2)), (4,), None),
    "VampPrior": (vamp, (4,), None),
    "VariationalDequantization": (lambda: nn.VariationalDequantization((1, 4, 4), 4, hidden=5), (1, 4, 4), None),
    "VectorQuantizer": (lambda: nn.VectorQuantizer(4, 5, heads=2), (4,), None),
    "VectorQuantizer-loss": (lambda: nn.VectorQuantizer(4, 5, decay=None, init="uniform", cosine=True), (4,), None),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Steps of training


def loss_of(z: torch.Tensor, logabsdet: torch.Tensor) -> torch.Tensor:
    return (0.5 * z.square().flatten(1).sum(1) - logabsdet).mean() + z.flatten(1)[:, 0].sin().sum()


def trained(
    bijection: nn.Bijection,
    x: torch.Tensor,
    context: torch.Tensor | None = None,
    *,
    inverse: bool = False,
    asks: bool = True,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = loss_of,
) -> Results:
    """Outputs and gradients of one step; ``asks``: the inputs ask for theirs too."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(asks)
    context = None if context is None else context.detach().clone().requires_grad_(asks)
    bijection.zero_grad()
    torch.manual_seed(3)
    z, logabsdet = bijection.inverse(x, context) if inverse else bijection(x, context)
    if z.requires_grad or logabsdet.requires_grad:
        loss(z, logabsdet).backward()
    results: Results = {"z": z.detach(), "logabsdet": logabsdet.detach(), "x": x.grad}
    if context is not None:
        results["context"] = context.grad
    return results | {name.replace("_orig_mod.", ""): p.grad for name, p in bijection.named_parameters()}


def fit(module: torch.nn.Module, loss: Callable[[], torch.Tensor], steps: int, lr: float) -> list[float]:
    """The losses of so many steps of Adam."""
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=lr), []
    for _ in range(steps):
        value = loss().mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def gradients_of(module: torch.nn.Module) -> Results:
    return {name: p.grad for name, p in module.named_parameters()}


def assert_same(actual: Results, expected: Results, tolerance: float = 1e-4) -> None:
    """Outputs bit for bit, gradients to ``tolerance`` of each tensor's size.

    A gradient that is zero in exact arithmetic, as of a bias before a batch normalization, is measured by the largest.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-2 * max([float(g.norm()) for n, g in expected.items() if g is not None and n not in ("z", "logabsdet")], default=0)
    for name, value in expected.items():
        got = actual[name]
        if value is None or got is None:
            assert got is value, name
            continue
        if name in ("z", "logabsdet"):
            assert torch.equal(got, value), name
            continue
        assert got.dtype == value.dtype
        error, size = float((got - value).norm()), max(float(value.norm()), floor)
        assert error <= tolerance * size, f"{name}: {error / size:.1e}"


def remade(bijection: nn.Compose, **options: Any) -> nn.Compose:
    """A copy with other options."""
    return copy.deepcopy(nn.Compose(*bijection.bijections, **options))


def assert_trains_alike(stored: nn.Compose, x: torch.Tensor, context: torch.Tensor | None = None, **how: Any) -> nn.Compose:
    """A reversible copy has the results of storing, in training and in evaluation mode, the same state and the same random
    numbers afterwards; options of ``Compose`` go to the copy, and the others to ``trained``. Returns the copy."""
    options = {name: how.pop(name) for name in ("memory", "anchors") if name in how}
    reversible = remade(stored, **{"memory": "reversible", **options})
    for training in (True, False):
        expected, after = trained(stored.train(training), x, context, asks=training, **how), torch.rand(3)
        found = trained(reversible.train(training), x, context, asks=training, **how)
        assert torch.equal(torch.rand(3), after)
        assert_same(found, expected, 1e-11 if x.dtype is torch.float64 else 1e-4)
        for (name, theirs), (ours, value) in zip(stored.state_dict().items(), reversible.state_dict().items(), strict=True):
            assert ours == name
            assert torch.equal(value, theirs), name
    return reversible.train()


# ---------------------------------------------------------------------------------------------------------------------
# Processes

WORLD = 2


def in_group(function: Callable[[int], Any], rank: int, folder: Path) -> bytes:
    """Runs in a process of its own: the function's result within the group of ``WORLD`` processes, saved."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rendezvous, limit = f"file://{folder}/rendezvous", datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=limit)
    try:
        file = io.BytesIO()
        torch.save(function(rank), file)
        return file.getvalue()
    finally:
        dist.destroy_process_group()  # which ends the other's wait for a process that failed


def unpacked(result: bytes) -> Any:
    return torch.load(io.BytesIO(result))
