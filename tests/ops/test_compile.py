"""Every op of OPS for compilers and tracers: opcheck, whole graphs that hold the fused ops, any sizes, and inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import (
    Call,
    call_of,
    every_op,
    gradients,
    leaves,
    needs_native,
    outputs_of,
    parametrized,
    results,
    traceable,
    ways,
)
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_map_only

from flowkern import OPS
from flowkern._core.op import Law, Op, Sample


def recorded(op: Op, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...]]]:
    """The registered torch ops that one forward and backward calls, with the arguments of that call."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    with monkeypatch.context() as patch:
        for k in op.kernels:
            patch.setitem(k.__dict__, "run", lambda *a, k=k: (calls.append((k.overload, a)), k.overload(*a))[1])
        results(op.function, sample)
    return calls


@pytest.mark.slow
@needs_native
@every_op
def test_opcheck(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, traced = set(), {sample.name for sample in ways(op, coarse=True)}
    for sample in ways(op, limit=2500):
        calls = recorded(op, sample, monkeypatch)
        with torch.no_grad():
            calls += recorded(op, sample, monkeypatch)
        for overload, args in dict(calls).items():
            seen.add(overload)
            tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")[: 3 if sample.name in traced else 2]
            torch.library.opcheck(overload, tree_map_only(torch.Tensor, torch.Tensor.detach, args), test_utils=tests)
    assert seen == {kernel.overload for kernel in op.kernels}


def check_compiled(op: Op, sample: Sample, **options: Any) -> None:
    """Outputs and gradients, and outputs where none are recorded, as without a compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, **options)
    expected = results(op.function, sample)
    torch.testing.assert_close(results(compiled, sample), expected)
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(compiled, (sample.args, sample.kwargs)), expected[: len(op.outputs)])


@pytest.mark.slow
@every_op
def test_compile(op: Op) -> None:
    for sample in filter(traceable, ways(op, coarse=True)):
        check_compiled(op, sample, dynamic=False, backend="aot_eager")


@pytest.mark.slow
@parametrized(lambda op: [s for s in ways(op, coarse=True) if s.args[0].numel() > 8 and traceable(s)])
def test_two_calls_in_one_dynamic_graph(op: Op, sample: Sample) -> None:
    """What a second call shares with the first, such as constants, must be nothing that the compiler takes for a variable."""

    def twice(first: Call, second: Call) -> list[torch.Tensor]:
        return [y for call in (first, second) for y in outputs_of(op.function, call)]

    torch._dynamo.reset()
    calls = call_of(sample), call_of(sample)
    outputs = torch.compile(twice, fullgraph=True, dynamic=True, backend="aot_eager")(*calls)
    expected = twice(*calls)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients(outputs, leaves(calls)), gradients(expected, leaves(calls)))


@pytest.mark.slow
@parametrized(lambda op: [s for s in ways(op) if s.name == "image"] or [s for s in ways(op) if s.args[0].numel() > 8][:1])
def test_compile_with_inductor(op: Op, sample: Sample) -> None:
    check_compiled(op, sample)


@needs_native
@every_op
def test_compiled_graphs_hold_the_fused_ops(op: Op) -> None:
    torch._dynamo.reset()
    targets: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    results(torch.compile(op.function, fullgraph=True, backend=backend), ways(op)[0])
    for kernel in op.kernels:
        assert targets.count(f"flowkern.{kernel.name}.default") == 1


def test_laws_and_names_are_those_of_the_table() -> None:
    """Each op stands under its own name, and describes each of its results."""
    for name, op in OPS.items():
        assert op.name == name == op.function.__name__
        sample = ways(op)[0]
        assert len(outputs_of(op.function, (sample.args, sample.kwargs))) == len(op.outputs)
        assert (Law.LOG_DET in op.laws) <= (op.outputs[-1].name == "logabsdet")
