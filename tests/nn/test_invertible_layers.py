"""Invertible linear layers and the step of Glow: exact in both directions, and never with a stale inverse."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from layers import assert_near, assert_refused, fit, redrawn, step_of_glow, trained
from torch._subclasses.fake_tensor import FakeTensorMode

from flowkern import nn

NAMES = tuple(nn.PARAMETRIZATIONS)


def made(name: str, image: bool = True, channels: int = 5, bias: bool = True) -> tuple[nn.InvertibleLinear, torch.Tensor]:
    kind = nn.InvertibleConv1x1 if image else nn.InvertibleLinear
    x = torch.randn(3, channels, *(2, 4) if image else (), dtype=torch.float64)
    return redrawn(kind(channels, name, bias=bias).double(), 0.2, around=1.0), x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_log_determinants(name: str, image: bool, bias: bool) -> None:
    layer, x = made(name, image, bias=bias)
    z, logabsdet = layer(x)
    expected = torch.einsum("ij,bj...->bi...", layer.weight, x)
    if bias:
        expected = expected + layer.bias.view(-1, *[1] * (x.ndim - 2))
    assert_near(z, expected)
    assert_near(logabsdet, (x.shape[2:].numel() * torch.linalg.slogdet(layer.weight).logabsdet).expand(3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_every_element_of_every_parameter_counts(name: str, channels: int) -> None:
    layer, x = made(name, channels=channels)
    z, logabsdet = layer(x)
    loss = (z * torch.randn_like(z)).sum() + 0.3 * logabsdet.sum()
    for key, parameter in layer.named_parameters():
        gradient = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
        assert (gradient != 0.0).all(), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 2, 12])
def test_starts_as_a_random_rotation(name: str, channels: int) -> None:
    first, second = (nn.InvertibleConv1x1(channels, name) for _ in range(2))
    eye = torch.eye(channels)
    torch.testing.assert_close(first.weight @ first.weight.t(), eye, rtol=0.0, atol=1e-5)
    assert abs(float(first(torch.rand(1, channels, 8, 8))[1].detach())) < 1e-3
    if channels > 1:
        assert not torch.equal(first.weight, second.weight)
    torch.manual_seed(3)
    third = nn.InvertibleConv1x1(channels, name)
    torch.manual_seed(3)
    assert torch.equal(third.weight, nn.InvertibleConv1x1(channels, name).weight)


def test_householder_products_are_products_of_reflections() -> None:
    layer, _ = made("householder", bias=False)
    expected = torch.eye(5, dtype=torch.float64)
    for v in layer.matrix.vectors:
        expected = expected @ (torch.eye(5).double() - 2.0 * torch.outer(v, v) / v.dot(v))
    assert_near(layer.weight, expected)
    assert not layer(torch.rand(2, 5, 3, 3).double())[1].any()


def test_plu_and_qr_are_what_they_say() -> None:
    layer, _ = made("plu", bias=False)
    plu = layer.matrix
    eye = torch.eye(5, dtype=torch.float64)
    upper = plu.lu.triu(1) + (plu.sign * plu.lu.diagonal().exp()).diag()
    assert_near(layer.weight, ((plu.lu.tril(-1) + eye) @ upper)[plu.permutation])
    layer, _ = made("qr", bias=False)
    r = layer.matrix.q.orthogonal().t() @ layer.weight
    assert_near(r.tril(-1), torch.zeros(5, 5).double())
    assert_near(r.diagonal(), layer.matrix.log_diagonal.exp())
    assert_near(r[0, 1:], layer.matrix.upper[:4])


# What may happen to a layer between two uses of its inverse, each of which must see the new weights.


def matrix_of(layer: nn.InvertibleLinear) -> torch.nn.Parameter:
    return next(p for p in layer.matrix.parameters() if p.ndim == 2)


def load(layer: nn.InvertibleLinear, **how: bool) -> None:
    layer.load_state_dict(redrawn(copy.deepcopy(layer), 0.2, seed=5, around=1.0).state_dict(), **how)


@torch.no_grad()
def edit(layer: nn.InvertibleLinear) -> None:
    matrix_of(layer)[0, 1] += 0.25


def edit_data(layer: nn.InvertibleLinear) -> None:
    matrix_of(layer).data[0, 1] += 0.25


def replace_data(layer: nn.InvertibleLinear) -> None:
    matrix_of(layer).data = matrix_of(layer).data.flip(0) + 0.1


def edit_through_numpy(layer: nn.InvertibleLinear) -> None:
    matrix_of(layer).detach().numpy()[1, 0] -= 0.5


def optimize(layer: nn.InvertibleLinear) -> None:
    x = torch.randn(4, 5, 2, 2, dtype=torch.float64)
    fit(layer, lambda: layer(x)[0].pow(4).sum() - 3.0 * layer(x)[1].sum(), 1, lr=0.1)


def swap(layer: nn.InvertibleLinear) -> None:
    name, parameter = next(layer.matrix.named_parameters())
    setattr(layer.matrix, name, torch.nn.Parameter(parameter.detach() + 0.2))


#: name -> (what happens to the layer, or what makes another one of it; what happens to that).
CHANGES: dict[str, tuple[Callable[[nn.InvertibleLinear], nn.InvertibleLinear | None], ...]] = {
    "loaded": (load,),
    "assigned": (lambda layer: load(layer, assign=True),),
    "edited": (edit,),
    "data-edited": (edit_data,),
    "data-replaced": (replace_data,),
    "through-numpy": (edit_through_numpy,),
    "float32": (lambda layer: layer.float(),),
    "there-and-back": (lambda layer: layer.bfloat16().double(),),
    "edited-copy": (copy.deepcopy, edit_data),
    "edited-pickle": (lambda layer: torch.load(io.BytesIO(pickle_of(layer)), weights_only=False), edit),
    "optimized": (optimize,),
    "swapped": (swap,),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("evaluation", [True, False])
def test_nothing_stale_is_used(change: str, name: str, evaluation: bool) -> None:
    layer, x = made(name)
    layer.train(not evaluation)

    def results(layer: nn.InvertibleLinear) -> list[torch.Tensor]:
        with torch.no_grad():
            return [*layer(x), *layer.inverse(x)]

    before, again = results(layer), results(layer)
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
    changed = layer
    for act in CHANGES[change]:
        changed = act(changed) or changed
    after = results(changed)
    assert not torch.equal(before[2], after[2])
    weight = changed.weight.detach().double()
    b = changed.bias.detach().double()[:, None, None]
    expected = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(weight), x - b)
    assert_near(after[2], expected, 1e-4 if changed.bias.dtype == torch.float32 else 1e-9)
    assert_near(after[3], -after[1])


def test_the_inverse_is_kept_while_the_weight_is(monkeypatch) -> None:
    layer, x = made("plu")
    calls = []
    factor = torch.linalg.lu_factor_ex
    monkeypatch.setattr(torch.linalg, "lu_factor_ex", lambda *a, **k: calls.append(1) or factor(*a, **k))
    with torch.no_grad():
        layer.inverse(x)
        once = len(calls)
        layer.inverse(x)
    assert len(calls) == once
    assert len(pickle_of(layer)) == len(pickle_of(made("plu")[0]))


def pickle_of(layer: torch.nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(layer, file)
    return file.getvalue()


def test_gradient_of_the_input_where_the_weights_are_frozen() -> None:
    for name in NAMES:
        layer, x = made(name)
        x.requires_grad_()
        expected = torch.autograd.grad(layer.inverse(x)[0].square().sum(), x)[0]
        layer.requires_grad_(False)
        assert_near(torch.autograd.grad(layer.inverse(x)[0].square().sum(), x)[0], expected)


def test_an_inverse_from_inference_mode_serves_gradients_later() -> None:
    for name in NAMES:
        layer, x = made(name)
        layer.requires_grad_(False)
        with torch.inference_mode():
            expected = layer.inverse(x)[0].clone()
        x.requires_grad_()
        z, _ = layer.inverse(x)
        assert torch.equal(z, expected)
        z.sum().backward()
        assert x.grad is not None


def test_transforms_and_fake_tensors() -> None:
    layer, x = made("full")
    layer.requires_grad_(False)
    mapped = torch.func.vmap(lambda v: layer.inverse(v[None])[0][0])(x)
    assert_near(mapped, layer.inverse(x)[0])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer.inverse(mode.from_tensor(x))[0].shape == x.shape


def test_singular_weights() -> None:
    layer, plu, nearly = nn.InvertibleConv1x1(3, "full"), nn.InvertibleLinear(3), nn.InvertibleLinear(3, "full").double()
    x = torch.rand(2, 3, 2, 2)
    plu.check()
    with torch.no_grad():
        layer.matrix.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [0.0, 1.0, 1.0]]))
        plu.matrix.lu[1, 1] = -torch.inf
        nearly.matrix.weight.copy_(torch.arange(9.0).view(3, 3))
        assert not layer(x)[1].isfinite().any()
        assert not layer.inverse(x)[1].isfinite().any()
    assert not layer(x)[1].isfinite().any()
    assert not plu(x[..., 0, 0])[1].isfinite().any()
    assert_refused(
        (layer.check, r"InvertibleConv1x1\(channels=3\): the weight is singular"),
        (plu.check, r"InvertibleLinear\(channels=3\): the weight is singular"),
        (nearly.check, "the weight is singular"),
    )
    layer.label = "levels.1.steps.4"
    with torch.no_grad():
        plu.matrix.lu[1, 1] = torch.nan
    assert_refused(
        (layer.check, r"InvertibleConv1x1 'levels.1.steps.4': the weight is singular"),
        (plu.check, "the weight holds NaN or infinity"),
    )


@pytest.mark.parametrize("name", NAMES)
def test_half_inputs_autocast_and_channels_last(name: str) -> None:
    layer = nn.InvertibleConv1x1(6, name, bias=True)
    x = torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last)
    z, logabsdet = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        same, same_logabsdet = layer(x)
    assert torch.equal(same, z)
    assert torch.equal(same_logabsdet, logabsdet)
    assert z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(z, layer(x.contiguous())[0])
    half, half_logabsdet = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half_logabsdet.dtype == torch.float32
    assert layer.bfloat16()(x.bfloat16())[1].dtype == torch.float32
    empty, none = layer(x[:0].bfloat16())
    assert empty.shape == (0, 6, 4, 5)
    assert none.shape == (0,)


def test_errors() -> None:
    assert_refused(
        (lambda: nn.InvertibleConv1x1(4, "svd"), "parametrization: unknown name 'svd'; expected one of 'plu', 'qr'"),
        (lambda: nn.InvertibleConv1x1(0), "InvertibleConv1x1: channels must be at least 1, got 0"),
        (lambda: nn.NormalizedLinear(nn.ActNorm(3), nn.InvertibleConv1x1(4)), "3 channels in ActNorm, but 4 in the linear map"),
    )
    for layer, shape, wanted in (
        (nn.InvertibleConv1x1(4), (2, 3, 5, 5), r"\(B, 4, H, W\), got \(2, 3, 5, 5\)"),
        (nn.InvertibleConv1x1(4), (2, 4), r"\(B, 4, H, W\), got \(2, 4\)"),
        (nn.InvertibleLinear(4), (2, 4, 5, 5), r"\(B, 4\), got \(2, 4, 5, 5\)"),
    ):
        for direction in (layer.forward, layer.inverse):
            with pytest.raises(ValueError, match=wanted):
                direction(torch.rand(shape))


# ---------------------------------------------------------------------------------------------------------------------
# The step of Glow


def step(name: str = "plu", dtype: torch.dtype = torch.float64) -> tuple[nn.GlowStep, torch.Tensor]:
    """A step whose ActNorm is initialized and whose parameters are all off their start."""
    made, x = step_of_glow(name).double(), 3.0 * torch.randn(4, 5, 4, 6, dtype=torch.float64) + 1.0
    made(x)
    return redrawn(made, 0.2, around=1.0).to(dtype), x.to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inverse", [False, True])
def test_step_equals_the_three_layers(name: str, dtype: torch.dtype, inverse: bool) -> None:
    made, x = step(name, dtype)
    written_out = nn.Compose(made.actnorm, made.linear, made.coupling)
    # float32: a few hundred roundings of 6e-8 in sums of a few thousand terms of order one.
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    weights = torch.linspace(-1.0, 1.0, x.numel(), dtype=dtype).view_as(x)
    how = {"inverse": inverse, "loss": lambda z, logabsdet: (z * weights).sum() + 0.1 * logabsdet.sum()}
    found, expected = (trained(layer, x, **how) for layer in (made, written_out))
    for a, e in zip(found.values(), expected.values(), strict=True):
        assert_near(a, e, tolerance * max(1.0, float(e.abs().max())))
    with torch.no_grad():
        for layer in (made, written_out):
            z, logabsdet = layer.inverse(x) if inverse else layer(x)
            assert_near(z, found["z"], tolerance)
            assert_near(logabsdet, found["logabsdet"], 10 * tolerance)


def test_step_keeps_its_state_in_float32_under_autocast() -> None:
    made, x = step(dtype=torch.float32)
    normalized = made.bijections[0]
    with torch.autocast("cpu", torch.bfloat16):
        z, logabsdet = normalized(x)
        back, logabsdet_back = normalized.inverse(z)
        whole, _ = made(x)
    assert torch.equal(z, normalized(x)[0])
    assert torch.equal(back, normalized.inverse(z)[0])
    assert {t.dtype for t in (logabsdet, logabsdet_back, whole)} == {torch.float32}


@pytest.mark.parametrize("activation", nn.ACTIVATIONS)
@pytest.mark.parametrize("context", [None, 3])
def test_conditioner_of_glow(activation: str, context: int | None) -> None:
    net = nn.ConvNet(2, 4, 8, activation=activation, context=context, zero_init=False).double()
    x, rows = torch.randn(3, 2, 4, 5).double(), None if context is None else torch.randn(3, context).double()
    act = nn.ACTIVATIONS[activation]
    h = net.first(x)
    if context is not None:
        h = h + net.projection(rows)[:, :, None, None]
    expected = net.last(act(net.second(act(h))))
    assert_near(net(x, rows), expected)
    actual = torch.autograd.grad(net(x, rows).pow(3).sum(), [*net.parameters()])
    for a, e in zip(actual, torch.autograd.grad(expected.pow(3).sum(), [*net.parameters()]), strict=True):
        assert_near(a, e)
    for bad in (None, torch.randn(2, 3).double()) if context else (torch.randn(3, 3).double(),):
        with pytest.raises(ValueError, match="context"):
            net(x, bad)


def test_step_initializes_its_actnorm_once_and_whole() -> None:
    net = nn.ConvNet(2, 4, 8)
    fused, plain = nn.GlowStep(4, net), nn.ActNorm(4)
    x = 5.0 * torch.randn(6, 4, 4, 4) - 2.0
    shape = r"expected \(B, 4\) or \(B, 4, H, W\)"
    assert_refused((lambda: fused(x[:1]), "at least 2 samples"), (lambda: fused(x[:, :3]), shape))
    assert not fused.actnorm.initialized
    fused(x)
    plain(x)
    assert torch.equal(fused.actnorm.log_scale, plain.log_scale)
    assert torch.equal(fused.actnorm.shift, plain.shift)
    twin = nn.GlowStep(4, nn.ConvNet(2, 4, 8))
    twin.load_state_dict(fused.state_dict())
    assert torch.equal(twin(2.0 * x)[0], fused(2.0 * x)[0])
