"""What the GPU paths of the ops ask of the host and of a GPU: recorded behind stubs that launch nothing, on CPU tensors.

After its first call an op neither waits for the device nor copies from the host: then it can be captured in a CUDA graph. And no
call launches more, or more bytes, than bench/results/launches.csv says: ``python -m flowkern.bench.launches`` writes it.
"""

from __future__ import annotations

import pytest
import torch
from flowkern.bench import launches
from flowkern.bench.launches import Recorder

from flowkern import OPS
from flowkern._core import backend as _backend
from flowkern._core.op import Op

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(_backend.interpreting(), reason="launches nothing")

#: Degrees that are tensors are sorted on the host in each call, as the op's documentation says; those of a mask are not.
WAITING = {("masked_linear", "degrees")}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_no_call_waits_for_the_device_or_launches_more_than_before(op: Op) -> None:
    table, worse = launches.read_table(), []
    for key, recorder in launches.rows(op):
        assert recorder.waits == [] or key[:2] in WAITING, key
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
