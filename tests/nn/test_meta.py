"""Models and layers built without memory (on meta, fake), given memory that holds anything (``to_empty``), and loaded.

What is in no state_dict and indexes memory must be made anew: here such memory is poisoned, so that no test passes by luck.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from comparison import assert_same, needs_native
from layers import DEGREES, FEATURES, LAYERS, WORLD, redrawn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.export import Dim, export
from torch.utils._pytree import tree_leaves

from flowkern import models, nn, ops

#: Smaller than the defaults, by the argument's name and the type of its default.
SMALL: dict[str, Any] = {
    "hidden": 8, "steps": 2, "layers": 2, "couplings": 2, "depth": 1, "blocks": 1, "latent": 4, "dim": 4, "codes": 5,
    "components": 2, "flow_hidden": 8, "flow_layers": 2,
}  # fmt: skip

MIXTURE = {"kind": "mixture_logistic", "components": 2}

#: Settings with tensors of their own: (model, settings).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nice-random": ("nice", {"shape": 6, "hidden": 8, "permutation": "random", "context": 2}),
    "glow-classes": ("glow", {"shape": (3, 4, 4), "steps": 1, "hidden": 8, "classes": 3, "preprocess": {"rescale": [2.0, -1.0]}}),
    **{f"glow-{p}": ("glow", {"shape": (1, 4, 4), "steps": 1, "hidden": 8, "parametrization": p}) for p in nn.PARAMETRIZATIONS},
    "maf-batch-norm": ("maf", {"shape": 5, "hidden": [8, 6], "permutation": "random", "batch_norm": True, "components": 3}),
    "maf-residual": ("maf", {"shape": 5, "hidden": [8, 6], "layers": 2, "residual": True, "context": 2}),
    "iaf-gated": ("iaf", {"shape": (1, 2, 3), "hidden": [8], "layers": 3, "gated": True, "permutation": "random"}),
    "nsf-coupling": ("nsf", {"shape": 5, "hidden": [8], "layers": 2, "coupling": True, "tails": "circular", "context": 2}),
    "made-masks": ("made", {"shape": (1, 2, 3), "hidden": [8, 8], "masks": 3, "levels": 4, "context": 2}),
    "pixelcnn-colours": ("pixelcnn", {"shape": (3, 4, 4), "hidden": 8, "layers": 2, "levels": 4, "context": 2}),
    "dequantized-glow": ("dequantized", {"shape": (1, 4, 4), "levels": 4, "flow": "glow", "settings": {"steps": 1, "hidden": 8}}),
    **{f"vae-prior-{p}": ("vae", {"shape": 6, "hidden": [8], "latent": 4, "prior": p, "components": 3, "flow_hidden": [8]})
       for p in ("mixture", "vamp", "nice", "realnvp", "maf", "iaf")},
    **{f"vae-posterior-{p}": ("vae", {"shape": 6, "hidden": [8], "latent": 4, "posterior": p, "flow_hidden": [8]})
       for p in ("planar", "radial", "nice", "realnvp", "maf", "iaf")},
    "vae-two-layers": ("vae", {"shape": (1, 4, 4), "hidden": [8], "latent": 4, "upper": 2, "levels": 4}),
    "vae-conv": ("vae", {"shape": (1, 8, 8), "hidden": [8, 8], "latent": 4, "levels": 4, "network": "conv"}),
    "vqvae-prior": ("vqvae", {"shape": (1, 8, 8), "levels": 4, "hidden": 8, "dim": 4, "codes": 5, "prior": {"layers": 2}}),
    "realnvp-mixture": ("realnvp", {"shape": 6, "couplings": 2, "hidden": 8, "transformer": MIXTURE, "separate": True}),
    "glow-mixture": ("glow", {"shape": (1, 4, 4), "steps": 1, "levels": 1, "hidden": 8, "transformer": MIXTURE}),
    "maf-mixture": ("maf", {"shape": 5, "hidden": [8], "layers": 2, "transformer": MIXTURE}),
    "vqvae2-loss": ("vqvae2", {"shape": (1, 16, 16), "levels": 4, "hidden": 8, "dim": 4, "codes": 5, "decay": None}),
}  # fmt: skip


def shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings with small sizes, those in dicts among them."""
    small = {}
    for name, value in settings.items():
        size = (SMALL[name],) * 2 if name in SMALL and isinstance(value, Sequence) else SMALL.get(name, value)
        small[name] = shrunk(value) if isinstance(value, dict) else size
    return small


def small(name: str) -> dict[str, Any]:
    """Settings of any model of the registry: those of its signature, made small."""
    cls = models.MODELS[name]
    sizes = {n: p.default for n, p in inspect.signature(cls.__init__).parameters.items() if n in SMALL}
    return {"shape": (1, 8, 8) if name == "vqvae2" else (1, 4, 4), **cls.config_for(4), **shrunk(sizes)}


def preset(name: str, source: str) -> dict[str, Any]:
    shape = (1, 8, 8) if source.startswith("digits") else (3, 8, 8)
    return {"shape": shape, **models.MODELS[name].config_for(17), **shrunk(models.PRESETS[name, source])}


FAST: dict[str, tuple[str, dict[str, Any]]] = {name: (name, small(name)) for name in models.MODELS} | VARIANTS
CASES = FAST | {f"{name}-{source}": (name, preset(name, source)) for name, source in models.PRESETS}


def inputs(model: models.Model, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor | None]:
    x = torch.rand(batch, *model.shape)
    return x, None if model.context is None else torch.randn(batch, model.context)


def trained(kind: str, settings: dict[str, Any]) -> models.Model:
    """A model that is nothing like a new one, in evaluation mode: every tensor of its state is moved or learned."""
    model = models.build(kind, settings)
    with torch.no_grad():
        model.train().objective(*inputs(model, 8))
    return redrawn(model.eval(), 0.1, around=1.0)


def results(model: models.Model, x: torch.Tensor, context: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return model.log_prob(x, context), model.sample(2, None if context is None else context[:2])


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that ``to_empty`` gives holds NaN, and numbers that no index can be."""
    empty_like = torch.empty_like

    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = empty_like(*args, **kwargs)
        if t.is_meta or t.dtype is torch.bool:
            return t
        return t.fill_(float("nan") if t.is_floating_point() else -(2**30))

    monkeypatch.setattr(torch, "empty_like", poison)


# ---------------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_model_gets_memory_and_is_loaded(case: str, poisoned: None) -> None:
    twin = trained(*CASES[case])
    x, context = inputs(twin)
    expected = results(twin, x, context)
    assert all(t.isfinite().all() for t in expected)
    with torch.device("meta"):
        model = models.build(*CASES[case])
        repr(model)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    for empty in (model, copy.deepcopy(twin).to("meta")):
        empty.to_empty(device="cpu").eval().load_state_dict(twin.state_dict())
        assert_same(results(empty, x, context), expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", FAST)
def test_model_of_fake_and_of_meta_tensors(case: str) -> None:
    twin = models.build(*CASES[case])
    expected = twin.objective(*inputs(twin))
    with FakeTensorMode():
        model = models.build(*CASES[case])
        assert all(isinstance(t, FakeTensor) for t in (*model.parameters(), *model.buffers()))
        x, context = inputs(model)
        found = [model.train(training).objective(x, context) for training in (False, True)]
        for actual in (*found, model.log_prob(x, context)):
            assert isinstance(actual, FakeTensor)
            assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
        found[1].sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is None or p.grad.shape == q.shape
    with torch.device("meta"):
        model = models.build(*CASES[case])
        for training in (False, True):
            objective = model.train(training).objective(*inputs(model))
            assert (objective.is_meta, objective.shape) == (True, (3,))


def test_labels_of_fake_tensors() -> None:
    with FakeTensorMode():
        model = models.build(*CASES["glow-classes"])
        assert model.log_prob(torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 2]) + torch.zeros(3, dtype=torch.int64)).shape == (3,)


# ---------------------------------------------------------------------------------------------------------------------
# Layers

#: What others derive from, and what has no forward of its own.
ABSTRACT = {"Base", "Bijection", "Posterior", "Quantizer"}


def test_every_public_module_is_among_the_layers() -> None:
    public = {name for name, value in vars(nn).items() if inspect.isclass(value) and issubclass(value, torch.nn.Module)}
    assert {name.split("-")[0] for name in LAYERS} == public - ABSTRACT


def called(layer: torch.nn.Module, x: torch.Tensor, context: torch.Tensor | None) -> list[torch.Tensor]:
    """Whatever the layer computes of x."""
    torch.manual_seed(1)
    if isinstance(layer, nn.Base):
        return [layer.log_prob(x), layer.sample(3)]
    if isinstance(layer, nn.Posterior):
        return tree_leaves(layer.sample_and_log_prob(x))
    more = (x,) if isinstance(layer, nn.GatedMaskedConv) else () if context is None else (context,)
    return tree_leaves(layer(x, *more))


def inputs_of(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    _, shape, context = LAYERS[name]
    return torch.rand(3, *shape), None if context is None else torch.randn(3, context)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gets_memory_and_is_loaded(name: str, poisoned: None) -> None:
    build, given = LAYERS[name][0], inputs_of(name)
    twin = redrawn(build().eval(), 0.1, around=1.0)
    expected = called(twin, *given)
    with torch.device("meta"):
        on_meta = build().eval()
    layers = [on_meta, build().to("meta").eval(), copy.deepcopy(on_meta), build().eval()]
    for layer in (*layers, *copies(layers[-1])):
        layer.to_empty(device="cpu").load_state_dict(twin.state_dict())
        assert_same(called(layer, *given), expected)


def copies(layer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """By pickle and by a file of torch's, made when it is their turn."""
    yield pickle.loads(pickle.dumps(layer))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_without_memory_has_shapes(name: str) -> None:
    def shapes(training: bool, kind: type) -> list[Any]:
        found = called(LAYERS[name][0]().train(training), *inputs_of(name))
        assert all(isinstance(t, kind) for t in found)
        return [(t.shape, t.dtype) for t in found]

    for training in (False, True):
        expected = shapes(training, torch.Tensor)
        with FakeTensorMode():
            assert shapes(training, FakeTensor) == expected
        with torch.device("meta"):
            assert shapes(training, torch.Tensor) == expected


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
def test_casts_leave_tables_alone(cast: str) -> None:
    for layer in (nn.MaskedLinear(*DEGREES), nn.AffineCoupling(nn.MLP(2, 6), split=ops.FeatureMask(FEATURES))):
        before = {name: t.clone() for name, t in layer.named_buffers()}
        getattr(layer, cast)()
        layer.type(torch.float64)  # of all tensors, those of integers included
        after = dict(layer.named_buffers())
        assert before.keys() == after.keys()
        for name, t in before.items():
            assert t.dtype is after[name].dtype
            assert torch.equal(t, after[name])


def test_no_table_is_in_a_state_dict() -> None:
    assert list(nn.MaskedLinear(*DEGREES).state_dict()) == ["weight", "bias"]
    coupling = nn.AffineCoupling(nn.MLP(2, 6), split=ops.FeatureMask(FEATURES))
    assert "split" in dict(coupling.named_children())
    assert not any(key.startswith("split") for key in coupling.state_dict())


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda t: ops.DegreeMask(t.long(), t.long()), "out_degrees"),
        (lambda t: ops.FeatureMask(t.bool()), "FeatureMask"),
        (lambda t: nn.MADE(3, (4,), order=t.long()), "order"),
        (lambda t: nn.MADE(3, (3,), degrees=[t.long()]), "degrees"),
    ],
)
def test_tables_cannot_be_made_of_tensors_without_values(build: Callable[[torch.Tensor], Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor that holds values, got one on meta"):
        build(torch.zeros(3, device="meta"))
    with FakeTensorMode():
        fake = torch.zeros(3)
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor that holds values, got a fake one"):
        build(fake)


def test_constants_without_values_are_loaded() -> None:
    with torch.device("meta"):
        layer = nn.Compose(nn.Rescale(torch.ones(4), torch.ones(4)), nn.Permutation(torch.arange(4)))
    twin = nn.Compose(nn.Rescale(torch.rand(4) + 1, torch.rand(4)), nn.Permutation.random(4, 1))
    layer.to_empty(device="cpu").load_state_dict(twin.state_dict())
    assert_same(layer(torch.ones(2, 4)), twin(torch.ones(2, 4)))


def test_a_distribution_keeps_its_values(poisoned: None) -> None:
    normal = torch.distributions.MultivariateNormal(torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    z, expected = torch.rand(3, 2), normal.log_prob(torch.ones(3, 2))
    flow = nn.Flow(nn.Scaling(2), normal)
    covariance, precision = normal.covariance_matrix.clone(), normal.precision_matrix.clone()
    for _ in range(2):
        flow = flow.to("meta").to_empty(device="cpu")
        flow.load_state_dict(nn.Scaling(2).state_dict(prefix="bijection."))
        assert torch.equal(flow.base.log_prob(torch.ones(3, 2)), expected)
        assert torch.equal(flow.base.distribution.covariance_matrix, covariance)
        torch.testing.assert_close(flow.base.distribution.precision_matrix, precision)
    assert flow.double().log_prob(z.double()).dtype is torch.float64
    with torch.device("meta"):
        empty = torch.distributions.Normal(torch.zeros(2), torch.ones(2), validate_args=False)
    with pytest.raises(ValueError, match="base: expected a distribution of tensors that hold values"):
        nn.Flow(nn.Scaling(2), empty).to_empty(device="cpu")


def test_tables_of_kernels_are_not_made_on_a_default_device() -> None:
    """They are kept: one call under another default device must not spoil those of all later calls."""
    layer = nn.MaskedAutoregressive(7, (11,), seed=5)
    z = torch.randn(3, 7)
    with torch.device("meta"):
        x, _ = layer.inverse(z)
        x.sum().backward()
    torch.testing.assert_close(layer(x)[0], z)
    density = nn.MADEDensity(3, (5,), masks=2)
    density.steps = 1
    with torch.device("meta"):
        assert int(density.state_dict()["steps"]) == 1
        assert not density.sample(2).is_meta


# ---------------------------------------------------------------------------------------------------------------------
# Kernels do not trust tables

#: Numbers of memory that nobody has written, and those beside what is allowed.
GARBAGE = (-1, -(2**30), 2**31 - 1)


def _masked(mask: Sequence[Any], backward: bool, batch: int, dtype: torch.dtype = torch.float32) -> Any:
    """The registered op on 5 outputs of 6 inputs."""
    x, weight, bias, grad = (torch.randn(shape, dtype=dtype) for shape in ((batch, 6), (5, 6), (5,), (batch, 5)))
    if backward:
        return torch.ops.flowkern.masked_linear_backward.default(grad, x, weight, bias, *mask, True, True, True)
    return torch.ops.flowkern.masked_linear.default(x, weight, bias, *mask)


@needs_native
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["reach", "first", "rows", "columns"])
def test_masked_linear_refuses_tables_that_are_none(name: str, backward: bool) -> None:
    mask = ops.DegreeMask(torch.tensor([3, 1, 2, 2, 5]), torch.tensor([2, 1, 4, 0, 3, 3]))
    tables = dict(zip(("reach", "first", "rows", "columns", "panels"), mask.indices, strict=True))
    if name == "first" and not backward:
        return  # which the forward does not read
    n = len(tables[name])
    allowed = 6 if name == "reach" else 5 if name == "first" else n - 1
    bad = [torch.full((n,), value, dtype=torch.int32) for value in (*GARBAGE, allowed + 1)]
    bad += [tables[name][:-1], tables[name].long(), tables[name][None], torch.zeros(1, dtype=torch.int32).expand(n)]
    bad += [tables[name].flip(0)] if name in ("reach", "first") else []
    for batch in (1, 3, 40):
        for table in bad:
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                _masked([*{**tables, name: table}.values()], backward, batch)
        _masked(mask.indices, backward, batch)


@needs_native
@pytest.mark.parametrize("backward", [False, True])
def test_masked_linear_on_any_tables(backward: bool) -> None:
    """Random tables, near ones that could be: each is refused, or gives outputs of the right shape."""
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(2000):
        reach = torch.randint(-1, 8, (5,), generator=generator, dtype=torch.int32).sort()[0]
        first, columns = (torch.randint(-1, n, (6,), generator=generator, dtype=torch.int32) for n in (7, 7))
        rows = torch.randint(0, 6, (5,), generator=generator, dtype=torch.int32)
        if torch.rand((), generator=generator) < 0.5:
            reach, rows, columns = reach.clamp(0, 6), rows.clamp(0, 4), columns.clamp(0, 5)
            first = torch.searchsorted(reach, torch.arange(6), right=True).int()
        try:
            found = tree_leaves(_masked((reach, first, rows, columns, []), backward, int(refused % 2) * 7 + 1))
        except ValueError:
            refused += 1
        else:
            assert [t.shape[-1] for t in found] == ([6, 6, 5] if backward else [5])
    assert 500 < refused < 1500


@needs_native
def test_a_layer_whose_table_was_written_over() -> None:
    layer = nn.MaskedLinear(*DEGREES)
    layer.mask.reach.fill_(2**30)
    with pytest.raises(ValueError, match=r"^reach: expected numbers from 0 to 4, got 1073741824"):
        layer(torch.randn(3, 4))


@needs_native
def test_couplings_refuse_ranks_that_need_other_parameters() -> None:
    x, params, shift, grad = (torch.randn(3, n) for n in (5, 6, 3, 5))
    right = ops.FeatureMask(FEATURES).place
    how = len(ops.SPLITS), 1, 2.0, 0.0, 0, False, False
    calls: list[Callable[[torch.Tensor], Any]] = [
        lambda rank: torch.ops.flowkern.affine_coupling.default(x, params, rank, *how),
        lambda rank: torch.ops.flowkern.affine_coupling_backward.default(x, params, grad, None, rank, *how),
        lambda rank: torch.ops.flowkern.additive_coupling.default(x, shift, rank, len(ops.SPLITS), False),
    ]
    for call in calls:
        call(right)
        for value in GARBAGE:
            with pytest.raises(ValueError, match=r"^place: expected as many transformed channels"):
                call(torch.full((5,), value, dtype=torch.int32))
        for rank in (right[:-1], right.repeat(2), right.long()):
            with pytest.raises(ValueError, match=r"^place: expected"):
                call(rank)


@needs_native
def test_plu_refuses_permutations_that_are_none() -> None:
    square, vector = torch.randn(4, 4), torch.randn(4)
    factors = square, square, vector, vector.sign()
    for values in (*GARBAGE, 4):
        forward = functools.partial(torch.ops.flowkern.plu_weight.default, *factors)
        for call in (forward, functools.partial(torch.ops.flowkern.plu_weight_backward.default, square, *factors)):
            call(torch.arange(4))
            for bad in (torch.full((4,), values), torch.arange(3), torch.arange(4).int()):
                with pytest.raises(ValueError, match=r"^permutation: expected"):
                    call(bad)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


#: The kinds whose tables are in no state_dict, and which initialize themselves from data.
SHARDED: dict[str, tuple[str, dict[str, Any]]] = {
    "maf": ("maf", {"shape": 6, "hidden": [16, 12], "layers": 3, "permutation": "random", "batch_norm": True}),
    "glow": ("glow", {"shape": (1, 8, 8), "levels": 2, "steps": 2, "hidden": 8}),
    "made": ("made", {"shape": (1, 2, 3), "hidden": [8, 8], "masks": 2, "levels": 4}),
}


def data_of(name: str) -> torch.Tensor:
    return torch.rand(4, *models.build(*SHARDED[name]).shape, generator=torch.Generator().manual_seed(1))


def of_rank(states: dict[str, Any], rank: int) -> dict[str, torch.Tensor]:
    """The log-densities of models that are built on meta, sharded, given memory and loaded."""
    mesh, found = init_device_mesh("cpu", (WORLD,)), {}
    for name in SHARDED:
        with torch.device("meta"):
            model = models.build(*SHARDED[name])
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        set_model_state_dict(model, states[name], options=StateDictOptions(full_state_dict=True))
        with torch.no_grad():
            found[name] = model.eval()(data_of(name))
    return found


@pytest.mark.slow
def test_sharded_on_meta_and_loaded(in_two_processes: Callable[..., list[Any]]) -> None:
    made = {name: models.build(*SHARDED[name]) for name in SHARDED}
    with torch.no_grad():
        for name, model in made.items():
            model.train()(data_of(name))
            redrawn(model.eval(), 0.1, around=1.0)
    for found in in_two_processes(functools.partial(of_rank, {name: model.state_dict() for name, model in made.items()})):
        for name, model in made.items():
            torch.testing.assert_close(found[name], model(data_of(name)))  # of other threads, whose sums are in other orders


# --- whole models in graphs whose batch is a variable ---


class LogProb(torch.nn.Module):
    """What is exported: ``export`` takes a module's ``forward``."""

    def __init__(self, model: models.Model):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        return self.model.log_prob(x, context)


#: Models whose density is an estimate draw numbers; a batch of another size draws others.
DRAWS = {"dequantized", "vae", "pixelvae"}


TRACED = (*models.MODELS, "glow-classes", "pixelcnn-colours")

#: Those that take long to trace.
SLOW = {"glow", "pixelvae", "vqvae2"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in TRACED])
def test_exported_with_a_dynamic_batch(name: str) -> None:
    model = trained(*FAST[name])
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


DYNAMIC: dict[str, dict[str, Any]] = {
    "nice": {"shape": 6, "couplings": 2, "hidden": 8, "depth": 1},
    "realnvp": {"shape": 6, "couplings": 2, "hidden": 8, "depth": 1},
    "glow": {"shape": (1, 4, 4), "levels": 1, "steps": 2, "hidden": 8},
    "maf": {"shape": 6, "layers": 2, "hidden": [8]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DYNAMIC)
def test_trained_in_a_dynamic_graph(name: str) -> None:
    """Several ops with one scale map stand in these graphs, whose constants are no variables."""
    torch._dynamo.reset()
    model = trained(name, DYNAMIC[name])
    compiled = torch.compile(model.log_prob, dynamic=True, fullgraph=True, backend="aot_eager")
    for size in (4, 7):
        x, context = inputs(model, size)
        grads = [torch.autograd.grad(f(x, context).sum(), [*model.parameters()]) for f in (compiled, model.log_prob)]
        torch.testing.assert_close(*grads)
