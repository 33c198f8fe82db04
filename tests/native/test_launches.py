"""What the GPU paths of the ops ask of the host and of a GPU: recorded behind stubs that launch nothing, on CPU tensors.

After its first call an op neither waits for the device nor copies from the host: then it can be captured in a CUDA graph. And no
call launches more, or more bytes, than bench/results/launches.csv says: ``python -m flowkern.bench.launches`` writes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from flowkern.bench import launches
from flowkern.bench.launches import Recorder

from flowkern import OPS, nn, ops
from flowkern._core import backend as _backend
from flowkern._core.op import Op

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(_backend.interpreting(), reason="launches nothing")


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_no_call_waits_for_the_device_or_launches_more_than_before(op: Op) -> None:
    table, worse = launches.read_table(), []
    for key, recorder in launches.rows(op):
        assert recorder.waits == [], key
        before = table[key]  # new samples have to be counted first
        if any(now > then for now, then in zip(recorder.count, before, strict=True)):
            worse.append(f"{', '.join(key)}: {before}, now {recorder.count}: {recorder.kernels}, {recorder.operations}")
    assert not worse, "\n".join(worse)
    assert {key for key in table if key[0] == op.name} == {key for key, _ in launches.rows(op)}


@pytest.mark.parametrize(
    ("wait", "call"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool(x.isnan().any())),
        ("nonzero", lambda x: x.nonzero()),
        ("index", lambda x: x[x > 0]),
        ("equal", lambda x: torch.equal(x, x)),
        ("lift_fresh", lambda x: torch.tensor([1.0, 2.0])),
        ("cpu", lambda x: x.cpu()),
        ("tolist", lambda x: x.tolist()),
        ("numpy", lambda x: x.numpy()),
    ],
)
def test_the_recorder_sees_what_waits(wait: str, call: object) -> None:
    x = torch.randn(3)
    with launches.recorded() as recorder, recorder:
        call(x)  # type: ignore[operator]
    assert wait in recorder.waits


def test_the_recorder_counts_launches_and_bytes() -> None:
    x = torch.randn(8)
    with launches.recorded() as recorder, recorder:
        (x.view(2, 4) + 1).t().detach()
        torch.empty_like(x)
    assert isinstance(recorder, Recorder)
    assert recorder.operations == ["add"]
    assert recorder.count == (0, 1, 64)


def test_an_inverse_of_mixtures_searches_in_one_launch() -> None:
    """Torch's operations launch for the gradient's two evaluations, and what stands around them; a search is 81 evaluations."""
    transformer, x, params = nn.MixtureLogistic(8), torch.randn(4, 5), torch.randn(4, 5, 26)
    with launches.recorded() as recorder, recorder:
        transformer.forward(x, params, True)
    assert recorder.kernels == ["kernel"]
    assert len(recorder.operations) <= 75
    assert not recorder.waits


def test_samples_of_a_made_are_placed_at_once() -> None:
    made = nn.MADEDensity(20, (32,), output="bernoulli")
    made.sample(3)
    with launches.recorded() as recorder, recorder:
        made.sample(3)
    assert len(recorder.operations) <= 200
    assert recorder.waits == ["nonzero", "lift_fresh"]  # the former on the host, the latter the places


# --- launches that pass Triton by ---


class Started(NamedTuple):
    """What starts a kernel: its code, the grid, stream, hooks, and the kernel's arguments."""

    code: tuple[str, ...]  # the kernel, and what it was specialized for
    grid: tuple[int, ...]
    stream: int
    arguments: tuple[Any, ...]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Started]]:
    """What is started of Triton kernels, which are not compiled."""
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    found: list[Started] = []

    class Code(CompiledKernel):  # type: ignore[misc]
        def __init__(self, *source: Any):
            self.source, self.name = tuple(map(str, source)), source[0]
            self.module, self.function, self.packed_metadata, self.src, self._run = None, 5, (), None, self._start

        def _init_handles(self) -> None:
            """It has none."""

        def _start(self, *given: Any) -> None:
            (*grid, stream, function, packed, metadata, enter, leave), arguments = given[:9], given[9:]
            assert (function, packed) == (self.function, self.packed_metadata)
            addresses = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
            for hook in (enter, leave):
                if hook is not None:
                    hook(metadata)
            found.append(Started(self.source, tuple(grid), stream, addresses))

    def compiled(self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, *_: Any) -> Any:
        code = self.device_caches[device][0][key] = Code(self.__name__, signature, constants, attributes, options, device)
        return code

    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    return found


def coupling(x: torch.Tensor | None = None) -> Any:
    """The launch of an affine coupling."""
    x = torch.randn(3, 4) if x is None else x
    with launches.recorded() as recorder, recorder:
        ops.affine_coupling(x, torch.randn(3, 4))
    return recorder.launches[0]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_what_is_started_is_what_triton_starts(op: Op, started: list[Started]) -> None:
    for key, recorder in launches.rows(op):
        for launch in recorder.launches:
            with launches.stub_driver():
                launch.kernel[(launch.grid.programs,)](*launch.arguments(), **launch.keywords())
                for _ in range(3):
                    launch.run()
            assert started[-4] == started[-3] == started[-2] == started[-1], key
    assert all(launch.grid.started for launch in recorder.launches)


def test_triton_is_asked_once(started: list[Started], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    asked, run = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: asked.append(self) or run(self, *args, **kwargs))
    launch, other = coupling(), coupling(torch.randn(3, 4, dtype=torch.bfloat16))
    with launches.stub_driver() as stub:
        for _ in range(3):
            launch.run()
            other.run()
        assert len(asked) == 2  # once for each dtype
        stub.device = stub.current = stub.device + 100
        launch.run()
        launch.run()
        assert len(asked) == 3  # and for each device
    assert len(started) == 8


def test_tensors_that_are_not_aligned_have_code_of_their_own(started: list[Started]) -> None:
    x = torch.randn(3 * 4 + 1)
    aligned, other = x[:12].view(3, 4), x[1:].view(3, 4)
    with launches.stub_driver():
        for x in (aligned, other, aligned, other):
            coupling(x).run()
    assert started[0].code == started[2].code != started[1].code == started[3].code


def test_hooks_see_every_launch(started: list[Started]) -> None:
    from triton import knobs

    seen: list[str] = []
    runtime, launch = knobs.runtime, coupling()
    hooks = [
        (chain, lambda data, name=name: seen.append(name))
        for name, chain in (("in", runtime.launch_enter_hook), ("out", runtime.launch_exit_hook))
    ]
    with launches.stub_driver():
        launch.run()
        launch.run()
        assert not seen
        for chain, hook in hooks:
            chain.add(hook)
        try:
            launch.run()
        finally:
            for chain, hook in hooks:
                chain.remove(hook)
        launch.run()
    assert seen == ["in", "out"]
    assert len(started) == 4


@pytest.mark.parametrize("knob", ["debug", "pre_run_hook", "inspection", "instrumentation"])
def test_knobs_are_asked_at_every_launch(knob: str, started: list[Started], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    launch = coupling()
    with launches.stub_driver():
        launch.run()
        launch.run()
        seen: list[Any] = []
        with monkeypatch.context() as patch:
            if knob == "debug":
                patch.setattr(knobs.runtime, "debug", True)
            elif knob == "pre_run_hook":
                patch.setattr(launch.kernel, "pre_run_hooks", [lambda *args, **kwargs: seen.append(args)])
            elif knob == "inspection":
                patch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda: (seen.append(0), ("key", "hash"))[1])
            else:
                patch.setattr(knobs.compilation, "instrumentation_mode", "consan")
            launch.run()
        launch.run()
    first, second, other, last = started
    assert first == second == last
    assert seen if knob in ("pre_run_hook", "inspection") else other.code != first.code


def test_kernels_run_on_the_device_of_their_tensors(started: list[Started], monkeypatch: pytest.MonkeyPatch) -> None:
    launch = coupling()
    with launches.stub_driver() as stub:
        home = stub.device

        @contextlib.contextmanager
        def device_of(x: torch.Tensor) -> Iterator[None]:
            stub.current = stub.device
            yield
            stub.current = home

        monkeypatch.setattr(torch.cuda, "device_of", device_of)
        launch.run()
        stub.device = home + 100  # of the tensors
        launch.run()
        launch.run()
        assert stub.current == home
    assert [s.code[-1] for s in started] == [str(home), str(home + 100), str(home + 100)]
