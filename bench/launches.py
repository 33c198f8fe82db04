"""What the GPU paths of the ops ask of a host and of a GPU, recorded where there is none: on CPU tensors, behind stubs.

``python -m flowkern.bench.launches`` writes the table of every op's launches, and prints the time that the host takes for a call.
tests/native/test_launches.py holds the ops to that table, and to asking nothing of the host: after its first call an op neither
waits for the device nor copies from the host, so that a CUDA graph can capture it.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo  # now: while the recorder stands in for attributes of tensors it would take them for torch's
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import flowkern
from flowkern import OPS
from flowkern._core import backend as _backend, nvrtc
from flowkern._core.op import Op, Sample
from flowkern.ops.autoregressive import cuda

from .row import write_atomically

__all__ = ["TABLE", "Count", "Recorder", "main", "read_table", "recorded", "rows", "stub_driver"]

TABLE = Path(__file__).parent / "results" / "launches.csv"

#: What takes a value to the host, or numbers from it to the device.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "lift_fresh_copy", "is_nonzero", "equal", "unique_dim"}
#: Methods of tensors that do so without torch's dispatcher where a tensor is on the CPU.
_READS = ("cpu", "numpy", "tolist")
#: What allocates and launches nothing.
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
#: What gives another view of a tensor, though its schema does not say so.
_VIEWS = {"detach", "lift_fresh", "_unsafe_view", "_reshape_alias"}


class Count(NamedTuple):
    """What one direction of a call asks for: launches, and the bytes of the tensors that they are given."""

    kernels: int  # launches of this library's kernels
    torch: int  # launches of torch's
    bytes: int


class Recorder(TorchDispatchMode):
    """Notes what is launched inside, and what waits. What a stubbed kernel would write is zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.kernels: list[str] = []
        self.launches: list[Any] = []  # of Triton's
        self.operations: list[str] = []
        self.bytes = 0
        self._sizes: dict[int, int] = {}  # by address: what a CUDA kernel is given is addresses

    @property
    def count(self) -> Count:
        return Count(len(self.kernels), len(self.operations), self.bytes)

    def triton_kernel(self, launch: Any) -> None:
        """Note the launch of a Triton kernel."""
        self.launches.append(launch)
        self.kernels.append(launch.kernel.__name__)
        self.bytes += sum(t.nbytes for t in launch.tensors if t is not None)

    def cuda_kernel(self, name: str, arguments: ctypes.Structure) -> None:
        """Note the launch of a CUDA kernel."""
        self.kernels.append(name)
        pointers = [getattr(arguments, field[0]) for field in arguments._fields_ if field[1] is ctypes.c_void_p]
        self.bytes += sum(self._sizes.get(address or 0, 0) for address in pointers)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        if name in WAITS or _finds_places(name, args):
            self.waits.append(name)
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self._sizes.update((t.data_ptr(), t.nbytes) for t in tensors)
        if name in _EMPTY:
            result.zero_()
        elif not function.is_view and name not in _VIEWS:
            self.operations.append(name)
            self.bytes += sum({t.data_ptr(): t.nbytes for t in tensors}.values())
        return result


def _finds_places(name: str, args: Any) -> bool:
    """Whether an operation indexes by a mask, and so waits for the number of its places."""
    return name == "index" and any(t is not None and t.dtype is torch.bool for t in args[1])


@contextlib.contextmanager
def recorded() -> Iterator[Recorder]:
    """Ops inside, on CPU tensors, take the paths of GPU tensors, and launch nothing. What they ask for is noted."""
    from flowkern.kernels.launch import Launch

    recorder = Recorder()

    def triton_kernel(launch: Launch) -> None:
        recorder.triton_kernel(launch)

    def choose(op: str, implementations: Any, tensors: Any) -> str:
        return next(name for name in ("cuda", "triton", "torch") if name in implementations)

    def noted(name: str) -> Callable[..., Any]:
        read = getattr(torch.Tensor, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            recorder.waits.append(name)
            return read(*args, **kwargs)

        return call

    patches: list[Any] = [
        mock.patch.object(Launch, "run", triton_kernel),
        mock.patch.object(nvrtc, "launch", lambda variant, arguments, **grid: recorder.cuda_kernel(variant.kernel, arguments)),
        mock.patch.object(cuda, "limits_of", return_value=(132, 232448)),
        mock.patch.object(_backend, "choose", choose),
        mock.patch.object(torch.Tensor, "is_cpu", False, create=True),
        mock.patch.object(torch.Tensor, "is_cuda", True, create=True),
        mock.patch.object(torch._C, "_len_torch_dispatch_stack", return_value=0),  # so that nobody knows of the recorder
        *(mock.patch.object(torch.Tensor, name, noted(name)) for name in _READS),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield recorder


def recordings(op: Op, sample: Sample) -> dict[str, Recorder]:
    """A second call of ``op``, by direction: forward, and backward where there is one. The first call makes what is kept."""
    args = tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), sample.args)
    inputs = [a for a in tree_leaves(args) if isinstance(a, torch.Tensor) and a.requires_grad]
    for _ in range(2):
        found = {}
        with recorded() as found["forward"], found["forward"]:
            results = tree_leaves(op.function(*args, **sample.kwargs))
        outputs = [y for y in results if isinstance(y, torch.Tensor) and y.requires_grad]
        grads = [torch.ones_like(y) for y in outputs]
        if outputs:
            with recorded() as found["backward"], found["backward"]:
                torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
    return found


def rows(op: Op) -> Iterator[tuple[tuple[str, str, str], Recorder]]:
    """((op, sample, direction), what it asks for) of every sample of an op, in float32."""
    torch.manual_seed(0)
    for sample in op.samples("cpu", torch.float32):
        for direction, recorder in recordings(op, sample).items():
            yield (op.name, sample.name, direction), recorder


def read_table() -> dict[tuple[str, ...], Count]:
    """The table that was written: counts by op, sample and direction."""
    with open(TABLE, newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    return {tuple(row[:3]): Count(*map(int, row[3:])) for row in rows}


# --- the host's time ---


#: Each stub has a device of its own: what is kept for a device is not taken for a real one.
_DEVICES = itertools.count(1000)


class StubDriver:
    """Stands in for Triton's driver, with an H100 that runs nothing."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.device = self.current = next(_DEVICES)  # of the tensors, and torch's
        self.target = GPUTarget("cuda", 90, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *args: (1, 2, 32, 0, 1024),
            unload_module=lambda module: None,
        )
        self.launcher_cls = lambda source, metadata: _nothing

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> Any:
        return self.target


def _always() -> bool:
    return True


def _nothing(*args: Any) -> None:
    """Starts no kernel."""


@contextlib.contextmanager
def stub_driver() -> Iterator[StubDriver]:
    """Ops inside, on CPU tensors, run as on a GPU up to the driver: their Triton kernels are compiled for it, and not started."""
    from triton.runtime import driver

    stub, previous = StubDriver(), driver._active

    def get_device(x: torch.Tensor) -> int:
        return stub.device

    patches: list[Any] = [
        mock.patch.dict(_backend._AUTO, cpu=_backend._AUTO["cuda"]),
        mock.patch.object(_backend, "interpreting", _always),
        mock.patch.object(torch.Tensor, "is_cpu", False, create=True),
        mock.patch.object(torch.Tensor, "is_cuda", True, create=True),
        mock.patch.object(torch.Tensor, "get_device", get_device),
    ]
    driver.set_active(stub)
    with contextlib.ExitStack() as stack:
        stack.callback(driver.set_active, previous)
        for patch in patches:
            stack.enter_context(patch)
        yield stub


def host_time(call: Callable[[], Any], repetitions: int = 200, calls: int = 20) -> tuple[float, float]:
    """(median, least) microseconds of the host for a call."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(1e6 * (time.perf_counter() - start) / calls)
    return statistics.median(times), min(times)


def _timed() -> Iterator[tuple[str, Callable[[], Any]]]:
    x, params = torch.randn(4, 12, 4, 4), torch.randn(4, 12, 4, 4)
    recorded_x, recorded_params = (t.clone().requires_grad_() for t in (x, params))
    grads = torch.randn_like(x), torch.randn(4)

    def both() -> None:
        outputs = flowkern.ops.affine_coupling(recorded_x, recorded_params)
        torch.autograd.grad(outputs, (recorded_x, recorded_params), grads)

    yield "affine_coupling forward", lambda: flowkern.ops.affine_coupling(x, params)
    yield "affine_coupling forward+backward", both
    rows, codebook = torch.randn(64, 16), torch.randn(64, 16)
    yield "nearest_code forward", lambda: flowkern.ops.nearest_code(rows, codebook)


def main() -> None:
    """Write the table, and print the times."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("op", "sample", "direction", *Count._fields))
    for op in OPS.values():
        for key, recorder in rows(op):
            writer.writerow((*key, *recorder.count))
            for wait in recorder.waits:
                print(f"{', '.join(key)}: waits for {wait}")
    write_atomically(TABLE, text.getvalue())
    print(f"written: {TABLE}")
    torch.set_num_threads(1)
    with stub_driver():
        for name, call in _timed():
            call()
            print("{}: {:.1f} us of the host, {:.1f} at best".format(name, *host_time(call)))


if __name__ == "__main__":
    main()
