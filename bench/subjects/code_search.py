"""The certified nearest code beside one matrix product of its size, and vector-quantize-pytorch.

"GEMM" is ``torch.mm(x, codebook.t())`` in float32, which every unfused search begins with. The kernels run on every
instruction set of this machine, "flowkern-bf16" with the screen in bfloat16 where the processor multiplies that. The index of
some rows is first compared with that of all distances in float64, and all variants with one another; of the peer, which computes
in float32, it is said how many rows got another code. Memory is what the process holds at most during a call, above what it held
before: inputs are not counted, results are.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import flowkern
from flowkern import OPS, ops
from flowkern._core import backend

from ..comparison import FLOWKERN, Comparison, Options, peer, peers_of
from ..timing import Call

__all__ = ["DEVICES", "comparisons"]

DEVICES = ("cpu",)
#: (rows, codes, depth).
SIZES = ((16384, 8192, 256), (16384, 1024, 64), (64, 65536, 256))
QUICK = ((300, 200, 16), (20, 600, 16))
PEER = "vector-quantize-pytorch"
#: Of the rows, how many are compared with all distances in float64.
_COMPARED = 64

Search = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def comparisons(options: Options) -> Iterator[Comparison]:
    """One of each size; the library's own choices are what they were afterwards."""
    screen, isa = backend.multiply_bfloat16, backend.native.isa() if backend.native else None
    try:
        for rows, codes, depth in QUICK if options.quick else SIZES:
            case = f"N{rows}-K{codes}-D{depth}"
            if options.wants(case):
                yield searched(case, rows, codes, depth)
    finally:
        backend.multiply_bfloat16 = screen
        if isa:
            backend.native.use_isa(isa)  # type: ignore[union-attr]


def searches() -> dict[str, Search]:
    """The index by every way this library has."""
    found: dict[str, Search] = {f"{FLOWKERN}-torch": functools.partial(_search, "torch", None, False)}
    if backend.native is not None:
        found |= {f"{FLOWKERN}-{isa}": functools.partial(_search, "cpp", isa, False) for isa in backend.native.isas()}
        found[f"{FLOWKERN}-bf16"] = functools.partial(_search, "cpp", backend.native.isas()[0], True)
    return found


def _search(name: str, isa: str | None, pairs: bool, x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The index by one backend, with one instruction set and screen."""
    if isa is not None:
        backend.native.use_isa(isa)  # type: ignore[union-attr]
    backend.multiply_bfloat16 = pairs
    with flowkern.backend(name):
        return ops.nearest_code(x, codebook)[0]


@peer("code_search", PEER)
def by_peer(codebook: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The index by the peer's layer in evaluation, with this codebook."""
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(dim=codebook.shape[1], codebook_size=len(codebook)).eval()
    layer._codebook.embed.data.copy_(codebook[None])
    return lambda x: layer(x[None])[1][0]


def peak_resident(call: Call, device: torch.device) -> int | None:
    """The most bytes that the process holds during the call, above what it held before; None where the system does not say."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(text.split()[1]) for text in lines if text.startswith(name))


@torch.no_grad()
def searched(case: str, rows: int, codes: int, depth: int) -> Comparison:
    """The searches at one size."""
    generator = torch.Generator().manual_seed(0)
    x, codebook = (torch.randn(n, depth, generator=generator) for n in (rows, codes))
    expected = OPS["nearest_code"].reference(x[:_COMPARED], codebook)[0]
    calls: dict[str, Call] = {"GEMM": lambda: torch.mm(x, codebook.t())}
    failures: dict[str, str] = {}
    results = {}
    for name, search in searches().items():
        calls[name] = functools.partial(search, x, codebook)
        results[name] = calls[name]()
        wrong = int((results[name][:_COMPARED] != expected).sum())
        wrong = wrong or int((results[name] != results[f"{FLOWKERN}-torch"]).sum())
        failures[name] = f"another index for {wrong} rows" if wrong else ""
    for name, make in peers_of("code_search").items():
        calls[name] = functools.partial(make(codebook), x)
        other = int((calls[name]() != results[f"{FLOWKERN}-torch"]).sum())
        if other:
            print(f"{name}: not the nearest code for {other} of {len(x)} rows", file=sys.stderr)
        failures[name] = "another index for most rows" if other > len(x) / 100 else ""
    return Comparison(case, "forward", calls, "GEMM", failures=failures, seconds=6.0, memory=peak_resident)
