"""Quantizers: ``nn.VectorQuantizer``, ``nn.ResidualVectorQuantizer`` and a user's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import assert_refused
from torch.nn.parallel import DistributedDataParallel

from flowkern import nn, ops


class FSQ(nn.Quantizer, kind="test-fsq"):
    """A user's own, finite scalar quantization: each channel is rounded to one of ``levels`` (odd) values in [-1, 1]."""

    def __init__(self, dim: int = 3, levels: int = 5, channels_first: bool = True):
        super().__init__()
        self.dim, self.levels, self.channels_first = dim, levels, channels_first
        self.codes = levels**dim

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        bounded, half = self.channels_last(x).tanh(), self.levels // 2
        rounded = (bounded * half).round()
        place = self.levels ** torch.arange(self.dim, device=x.device)
        index = ((rounded.long() + half) * place).sum(-1)
        return self.as_given(bounded + (rounded / half - bounded).detach()), index, x.new_zeros(())

    def decode(self, index: torch.Tensor) -> torch.Tensor:
        self.check_index(index)
        half, place = self.levels // 2, self.levels ** torch.arange(self.dim, device=index.device)
        return self.as_given((index[..., None] // place % self.levels - half) / half)


def test_a_users_own_quantizer() -> None:
    fsq, x = FSQ(), torch.randn(2, 3, 4, 5, requires_grad=True)
    quantized, index, _ = fsq(x)
    assert index.shape == (2, 4, 5)
    torch.testing.assert_close(fsq.decode(index), quantized)
    assert torch.equal(fsq.encode(quantized.atanh().clamp(-9, 9)), index)
    torch.testing.assert_close(torch.autograd.grad(quantized.sum(), x)[0], 1 - x.tanh().square())
    counts = index.flatten().bincount(minlength=125) / 40
    usage = fsq.usage(index)
    torch.testing.assert_close(usage.perplexity, (-torch.special.xlogy(counts, counts).sum()).exp())
    torch.testing.assert_close(usage.used, (counts > 0).float().mean())
    assert_refused(
        (lambda: fsq.decode(torch.tensor([125])), "index: expected codes from 0 to under 125, got 125 to 125"),
        (lambda: fsq(torch.randn(2, 4)), r"x: expected shape \(B, 3, ...\), channels first, got \(2, 4\)"),
    )
    for call in (nn.Quantizer().forward, nn.Quantizer().decode):
        with pytest.raises(NotImplementedError, match=r"Quantizer has no (forward|decode)"):
            call(x)


def test_config_round_trip() -> None:
    options = {"decay": 0.9, "commitment": 0.5, "init": "uniform", "revive_below": 0.1, "rotation": True, "channels_first": True}
    vector, residual = nn.VectorQuantizer(6, 8, heads=2, cosine=True, **options), nn.ResidualVectorQuantizer(6, 8, 3, **options)
    for made in (vector, residual, FSQ(2, levels=7)):
        again = nn.Quantizer.of(made.config())
        assert type(again) is type(made) is nn.QUANTIZERS[made.config()["kind"]]
        assert repr(again) == repr(made)
        assert again.config() == made.config()
        assert (again.dim, again.codes, again.index_shape) == (made.dim, made.codes, made.index_shape)
    index = torch.tensor([[0, 1, 7], [1, 1, 7]])
    torch.testing.assert_close(residual.usage(index).used, torch.tensor((2 + 1 + 1) / 3 / 8))


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def clusters(per_cluster: int = 20, dim: int = 5, count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows close to their centres, shuffled, and the centres."""
    centres = 10 * torch.randn(count, dim)
    rows = centres.repeat(per_cluster, 1) + 0.01 * torch.randn(per_cluster * count, dim)
    return rows[torch.randperm(len(rows))], centres


@pytest.mark.parametrize("spatial", [(), (5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("heads", [1, 2])
def test_shapes_of_any_dimensions_and_both_layouts(spatial: tuple[int, ...], heads: int) -> None:
    last = nn.VectorQuantizer(6, 8, heads=heads)
    first = nn.VectorQuantizer(6, 8, heads=heads, channels_first=True)
    x = torch.randn(2, *spatial, 6)
    for _ in range(2):  # the first step initializes
        quantized, index, loss = last(x)
        by_first = first(x.movedim(-1, 1))
    assert quantized.shape == x.shape
    assert index.shape == (2, *spatial, *[2] * (heads > 1))
    assert loss.shape == ()
    assert all(map(torch.equal, by_first, (quantized.movedim(-1, 1), index, loss)))
    assert_equal(state(first), state(last))
    for made, given in ((last, x), (first, x.movedim(-1, 1))):
        made.eval()
        assert torch.equal(made.encode(given), made(given)[1])
        assert torch.equal(made.decode(made(given)[1]), made(given)[0])


def test_heads_are_quantizers_of_parts() -> None:
    both, x = nn.VectorQuantizer(6, 8, heads=2, init="uniform"), torch.randn(40, 6)
    with torch.no_grad():
        both.codebook.normal_()
    parts = [nn.VectorQuantizer(3, 8, init="uniform") for _ in range(2)]
    for i, part in enumerate(parts):
        part.codebook.copy_(both.codebook[i : i + 1])
        part.sums.copy_(part.codebook)
    both.sums.copy_(both.codebook)
    quantized, index, loss = both(x)
    expected = [part(x[:, 3 * i : 3 * i + 3]) for i, part in enumerate(parts)]
    assert torch.equal(quantized, torch.cat([e[0] for e in expected], 1))
    assert torch.equal(index, torch.stack([e[1] for e in expected], 1))
    torch.testing.assert_close(loss, (expected[0][2] + expected[1][2]) / 2)
    assert torch.equal(both.codebook, torch.cat([part.codebook for part in parts]))


def test_moving_averages_are_those_of_the_paper() -> None:
    made = nn.VectorQuantizer(3, 6, decay=0.8, init="uniform")
    codes, counts, sums = (t[0].double() for t in (made.codebook, made.counts, made.sums))
    far = torch.full((3,), 100.0)
    made.codebook[0, 5] = far  # never the nearest
    codes[5] = far.double()
    for _ in range(5):
        x = torch.randn(20, 3)
        quantized, index, loss = made(x)
        assert torch.equal(index, torch.cdist(x.double(), codes).argmin(1))
        torch.testing.assert_close(quantized, codes[index].float())
        torch.testing.assert_close(loss, 0.25 * (x - codes[index]).square().mean().float())
        hot = torch.nn.functional.one_hot(index, 6).double()
        counts, sums = 0.8 * counts + 0.2 * hot.sum(0), 0.8 * sums + 0.2 * hot.t() @ x.double()
        used = hot.sum(0) > 0
        codes[used] = sums[used] / counts[used, None]
        torch.testing.assert_close(made.codebook[0], codes.float())
        torch.testing.assert_close(made.counts[0], counts.float())
        codes = made.codebook[0].double()
        counts, sums = made.counts[0].double(), made.sums[0].double()
    assert torch.equal(made.codebook[0, 5], far)


def test_a_loss_driven_codebook_is_a_parameter() -> None:
    x = torch.randn(30, 4, requires_grad=True)
    made = nn.VectorQuantizer(4, 6, decay=None, commitment=0.5)
    _, index, loss = made(x)
    assert made.initialized
    before = state(made)
    expected = ops.vector_quantize(x, made.codebook[0], beta=0.5)
    assert torch.equal(loss, expected[2])
    assert torch.equal(index, expected[1])
    gradients = torch.autograd.grad(loss, (x, made.codebook))
    assert all(map(torch.equal, gradients, torch.autograd.grad(expected[2], (x, made.codebook))))
    assert gradients[1].abs().sum() > 0
    assert_equal(state(made), before)
    averaged = nn.VectorQuantizer(4, 6)
    assert not list(averaged.parameters())
    assert averaged(x)[2] < loss


def test_evaluation_changes_nothing() -> None:
    made = nn.VectorQuantizer(4, 6, revive_below=0.9).eval()
    before = state(made)
    for x in (torch.randn(9, 4), torch.randn(0, 4)):
        assert made(x)[2].isfinite()
    assert_equal(state(made), before)
    made.train()(torch.randn(9, 4))
    trained = state(made)
    assert not torch.equal(trained["codebook"], before["codebook"])
    made.eval()(torch.randn(9, 4))
    assert_equal(state(made), trained)


def test_kmeans_is_lloyds_iteration() -> None:
    x = torch.randn(100, 5)
    made = nn.VectorQuantizer(5, 14)
    quantized, _, _ = made(x)
    rows = x.double()
    start = centres = rows[torch.randperm(100, generator=torch.Generator().manual_seed(0))[:14]]
    for _ in range(10):
        hot = torch.nn.functional.one_hot(torch.cdist(rows, centres).argmin(1), 14).double()
        assert (hot.sum(0) > 0).all()
        centres = hot.t() @ rows / hot.sum(0)[:, None]
    expected = centres[torch.cdist(rows, centres).argmin(1)]
    torch.testing.assert_close(quantized, expected.float())
    assert made.initialized
    assert (expected - rows).square().mean() < 0.9 * torch.cdist(rows, start).min(1).values.square().mean() / 5


def test_kmeans_of_fewer_rows_than_codes() -> None:
    x = torch.randn(3, 4)
    made = nn.VectorQuantizer(4, 10)
    quantized, _, loss = made(x)
    torch.testing.assert_close(quantized, x)
    torch.testing.assert_close(loss, torch.tensor(0.0))
    assert made.codebook.isfinite().all()
    with pytest.raises(ValueError, match="initialization needs at least one row"):
        nn.VectorQuantizer(4, 10)(torch.randn(0, 4))


def test_the_random_state_is_left_alone() -> None:
    made = nn.VectorQuantizer(4, 10, revive_below=0.9)
    before = torch.get_rng_state()
    for _ in range(3):
        made(torch.ones(20, 4).cumsum(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_state_dict_round_trip_goes_on_alike() -> None:
    made, again = (nn.VectorQuantizer(4, 10, revive_below=0.5) for _ in range(2))
    made(torch.randn(30, 4))
    again.load_state_dict(made.state_dict())
    assert again.initialized
    for _ in range(3):
        x = torch.randn(30, 4)
        assert all(map(torch.equal, made(x), again(x)))
    assert_equal(state(made), state(again))
    fresh = nn.VectorQuantizer(4, 10)
    again.load_state_dict(fresh.state_dict())  # one that is still to be initialized
    again(torch.randn(30, 4))
    assert again.initialized


def test_revival_renews_code_and_averages() -> None:
    made = nn.VectorQuantizer(4, 8, decay=0.9, init="uniform", revive_below=0.5)
    twin = nn.VectorQuantizer(4, 8, decay=0.9, init="uniform")
    with torch.no_grad():
        made.codebook.normal_()
        made.codebook[0, 3:5] = 50.0 + torch.arange(2.0)[:, None]  # far from all rows
        made.sums.copy_(made.codebook)
        made.counts.fill_(2.0)
        made.counts[0, 3] = 0.5
    twin.load_state_dict(made.state_dict())
    x = torch.randn(16, 4)
    made(x), twin(x)
    least = 0.5 * 16 / 8
    dead = twin.counts[0] < least
    assert dead[3]
    assert not dead[4]
    assert not dead.all()
    for code in dead.nonzero().flatten():
        assert (x == made.codebook[0, code]).all(1).any()
        assert made.counts[0, code] == least
        torch.testing.assert_close(made.sums[0, code] / least, made.codebook[0, code])
    for name in ("codebook", "counts", "sums"):
        assert torch.equal(getattr(made, name)[0, ~dead], getattr(twin, name)[0, ~dead])
    _, index, _ = made(x)
    assert (index == 3).any()


def test_revival_brings_dead_codes_to_life() -> None:
    torch.manual_seed(1)
    x, _ = clusters(count=30)
    usage = {}
    for below in (None, 0.1):
        made = nn.VectorQuantizer(5, 30, decay=0.9, init="uniform", revive_below=below)
        for _ in range(40):
            _, index, _ = made(x)
        usage[below] = made.usage(index)
    assert usage[None].used < 0.7
    assert usage[0.1].used > 0.8
    assert usage[0.1].perplexity > usage[None].perplexity


def test_rows_that_are_not_finite_are_left_out() -> None:
    x = torch.randn(20, 4)
    bad = torch.cat([x, torch.full((2, 4), torch.nan), torch.full((1, 4), torch.inf)])
    made = nn.VectorQuantizer(4, 6, init="uniform")
    twin = copy.deepcopy(made)
    made(x), twin(bad)
    assert_equal(state(made), state(twin))
    started = nn.VectorQuantizer(4, 6, revive_below=0.9)
    for _ in range(4):
        started(bad)
    for value in state(started).values():
        assert value.isfinite().all()


def test_cosine_works_on_the_sphere() -> None:
    x = torch.randn(30, 4, requires_grad=True)
    for decay in (0.9, None):
        made = nn.VectorQuantizer(4, 6, decay=decay, cosine=True)
        for _ in range(3):
            quantized, index, _ = made(x)
        torch.testing.assert_close(quantized.norm(dim=1), torch.ones(30))
        expected = torch.nn.functional.cosine_similarity(x[:, None], made.eval().decode(torch.arange(6))[None], dim=2)
        assert torch.equal(made.encode(x), expected.argmax(1))
        gradient = torch.autograd.grad(quantized.sum(), x)[0]
        torch.testing.assert_close((gradient * x).sum(1), torch.zeros(30), rtol=0, atol=1e-5)  # tangential
        assert index.shape == (30,)


def test_usage_is_perplexity_and_share() -> None:
    made = nn.VectorQuantizer(4, 8)
    torch.testing.assert_close(made.usage(torch.tensor([[0, 1], [2, 3]])), (torch.tensor(4.0), torch.tensor(0.5)))
    index = torch.tensor([0, 0, 0, 5])
    probability = torch.tensor([0.75, 0.25])
    torch.testing.assert_close(made.usage(index).perplexity, (-(probability * probability.log()).sum()).exp())
    assert nn.VectorQuantizer(4, 8, heads=2).usage(torch.zeros(3, 2, dtype=torch.int64)).used == 1 / 8


def test_half_precision_and_autocast() -> None:
    made = nn.VectorQuantizer(4, 6, revive_below=0.1).bfloat16()
    assert made.codebook.dtype is made.counts.dtype is made.sums.dtype is torch.float32
    assert nn.VectorQuantizer(4, 6).double().codebook.dtype is torch.float64
    assert nn.VectorQuantizer(4, 6, decay=None).bfloat16().codebook.dtype is torch.bfloat16
    x = torch.randn(20, 4).bfloat16().requires_grad_()
    for _ in range(3):
        quantized, _, loss = made(x)
    assert quantized.dtype is torch.bfloat16
    assert loss.dtype is torch.float32
    assert torch.autograd.grad(quantized.sum() + loss, x)[0].dtype is torch.bfloat16
    for cosine in (False, True):
        plain = nn.VectorQuantizer(4, 6, cosine=cosine)
        cast = copy.deepcopy(plain)
        for _ in range(2):
            x = torch.randn(20, 4)
            with torch.autocast("cpu", torch.bfloat16):
                actual = cast(x)
            assert all(map(torch.equal, actual, plain(x)))
        assert_equal(state(plain), state(cast))


@pytest.mark.parametrize("how", [pytest.param({"heads": 2, "revive_below": 0.9}, marks=pytest.mark.slow), {"decay": None}])
def test_compiles_whole_with_initialization_and_revival(how: dict[str, Any]) -> None:
    torch._dynamo.reset()
    made = nn.VectorQuantizer(4, 6, **how)
    twin = copy.deepcopy(made)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic="heads" in how)
    for _ in range(3):
        x = torch.randn(8, 4, requires_grad=True)
        torch.testing.assert_close(made(x), compiled(x))
        gradients = [torch.autograd.grad(q.sum() + loss, x)[0] for q, _, loss in (made(x), compiled(x))]
        torch.testing.assert_close(*gradients)
        assert_equal(state(made), state(twin))


# --- residual ---


def test_residual_levels_add_up() -> None:
    made = nn.ResidualVectorQuantizer(5, 8, 3)
    x = torch.randn(4, 10, 5, requires_grad=True)
    for _ in range(2):
        made(x)
    made.eval()
    quantized, index, loss = made(x)
    assert index.shape == (4, 10, 3)
    torch.testing.assert_close(made.decode(index), quantized)
    torch.testing.assert_close(made.decode(index[..., :1]), made.levels[0](x)[0])
    errors = [(made.decode(index[..., : n + 1]) - x).square().mean() for n in range(3)]
    assert errors[0] > errors[1] > errors[2]
    torch.testing.assert_close(loss, 0.25 * sum(errors))
    # Once, not once per level.
    assert torch.equal(torch.autograd.grad(quantized.sum(), x, retain_graph=True)[0], torch.ones_like(x))
    by_loss = sum(0.5 * (x - made.decode(index[..., : n + 1])) / x.numel() for n in range(3))
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], by_loss)


def test_residual_channels_first_rotated_and_compiled() -> None:
    torch._dynamo.reset()
    made = nn.ResidualVectorQuantizer(5, 8, 2, init="uniform", rotation=True, channels_first=True, revive_below=0.5)
    compiled = torch.compile(twin := copy.deepcopy(made), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(3, 5, 4, requires_grad=True)
        quantized, index, _ = made(x)
        torch.testing.assert_close(made(x), compiled(x) and compiled(x))
    assert quantized.shape == x.shape
    assert index.shape == (3, 4, 2)
    assert_equal(state(made), state(twin))
    g = torch.randn_like(x)
    gradient = torch.autograd.grad(quantized, x, g)[0]
    torch.testing.assert_close((gradient * x).sum(1), (g * quantized).sum(1))
    assert made.eval().decode(index).shape == x.shape


# --- processes ---


#: What is trained in two processes and in one, and for how many steps; ``few``: with more codes than there are rows.
KINDS = {"ddp": 50, "heads": 10, "cosine": 10, "few": 10, "residual": 10}
BATCH, DIM, CODES = 24, 6, 16


class Scaled(torch.nn.Sequential):
    """A quantizer behind a parameter, without which DDP has nothing to do."""

    def __init__(self, quantizer: torch.nn.Module) -> None:
        super().__init__(quantizer)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.scale * x)


def quantizer(kind: str) -> torch.nn.Module:
    """Of codes that die and are revived."""
    torch.manual_seed(0)
    how = {"decay": 0.7, "revive_below": 0.6}
    if kind == "residual":
        return nn.ResidualVectorQuantizer(DIM, CODES, 2, **how)
    heads, codes = 1 + (kind == "heads"), 4 * BATCH if kind == "few" else CODES
    return nn.VectorQuantizer(DIM, codes, heads=heads, cosine=kind == "cosine", **how)


def states_of(kind: str, rank: int | None = None) -> list[dict[str, torch.Tensor]]:
    """The states over the steps, of the process with its shares of the batches (None: with all of them).

    Shares are unequal, and now and then a process has nothing, also at the first step.
    """
    made = Scaled(quantizer(kind)) if kind == "ddp" else quantizer(kind)
    run = made if kind != "ddp" or rank is None else DistributedDataParallel(made)
    states = []
    for step in range(KINDS[kind]):
        x = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(step)) * 0.9**step + step / 10
        cut = (0, 7, BATCH, 12)[step % 4]
        loss = run(x if rank is None else x[:cut] if rank == 0 else x[cut:])[2]
        if kind == "ddp":
            loss.backward()
        if step % 7 == 0 or step == KINDS[kind] - 1:
            states.append(state(made))
    return states


def of_rank(rank: int) -> dict[str, list[dict[str, torch.Tensor]]]:
    return {kind: states_of(kind, rank) for kind in KINDS}


@pytest.mark.slow
def test_two_processes_have_the_codebooks_of_one(in_two_processes: Callable[..., list[Any]]) -> None:
    ranks = in_two_processes(of_rank)
    for kind in KINDS:
        joined = states_of(kind)
        assert len(joined) > 1
        for one, other, together in zip(ranks[0][kind], ranks[1][kind], joined, strict=True):
            assert_equal(one, other)
            assert_equal(one, together)
        first, last = joined[0], joined[-1]
        assert any(not torch.equal(first[name], last[name]) for name in first if name.endswith("codebook"))


# --- errors ---


def test_bad_arguments_and_input_are_named() -> None:
    made, first = nn.VectorQuantizer(4, 8, heads=2), nn.VectorQuantizer(4, 8, channels_first=True)
    residual = nn.ResidualVectorQuantizer(4, 8, 2)
    assert_refused(
        (lambda: nn.VectorQuantizer(0, 8), "dim, codes and heads must be at least 1, got 0, 8 and 1"),
        (lambda: nn.VectorQuantizer(4, 0), "dim, codes and heads must be at least 1, got 4, 0 and 1"),
        (lambda: nn.VectorQuantizer(4, 8, heads=3), "heads must divide dim, got 3 heads of dim 4"),
        (lambda: nn.VectorQuantizer(4, 8, decay=1.0), "expected a decay from 0 to under 1, or None, got 1.0"),
        (lambda: nn.VectorQuantizer(4, 8, init="zeros"), "unknown init 'zeros'; expected one of 'kmeans', 'uniform'"),
        (lambda: nn.VectorQuantizer(4, 8, revive_below=1.5), "expected revive_below between 0 and 1, or None, got 1.5"),
        (lambda: nn.VectorQuantizer(4, 8, revive_below=0.1, decay=None), "revive_below needs the counts of moving averages"),
        (lambda: nn.ResidualVectorQuantizer(4, 8, 0), "levels must be at least 1, got 0"),
        (lambda: made(torch.ones(3, 4, dtype=torch.int64)), r"x: expected a floating dtype .* got torch.int64", TypeError),
        (lambda: made(torch.randn(3, 5)), r"x: expected shape \(B, ..., 4\), got \(3, 5\)"),
        (lambda: first(torch.randn(3, 5, 4)), r"x: expected shape \(B, 4, ...\), channels first, got \(3, 5, 4\)"),
        (lambda: made.decode(torch.ones(3, 2)), r"index: expected an int64 tensor, got torch.float32", TypeError),
        (lambda: made.decode(torch.ones(3, dtype=torch.int64)), r"index: expected shape \(..., 2\), got \(3,\)"),
        (lambda: residual.decode(torch.ones(3, 5).long()), r"index: expected shape \(..., 2\) or fewer levels, got \(3, 5\)"),
        (lambda: made(torch.randn(3, 4, device="meta")), r"x: expected device cpu \(that of the codebook\), got meta"),
    )


QUANTIZERS = [nn.VectorQuantizer(4, 8), nn.VectorQuantizer(4, 8, heads=2), nn.ResidualVectorQuantizer(4, 8, 2)]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=["one", "heads", "residual"])
def test_indices_that_are_no_codes_are_named(quantizer: Any) -> None:
    for function in (quantizer.decode, quantizer.usage):
        index = torch.tensor([[0, 7], [3, 1]])
        function(index)
        function(index[:0])
        for wrong in (-1, 8):
            index[1, 0] = wrong
            said = rf"index: expected codes from 0 to under 8, got {min(wrong, 0)} to {max(wrong, 7)}"
            with pytest.raises(ValueError, match=said):
                function(index)
        with pytest.raises(ValueError, match=r"index: expected device cpu \(that of the codebook\), got meta"):
            function(index.to("meta"))
