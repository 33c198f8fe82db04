"""``python -m bench nearest_code``: the certified nearest code beside one matrix product of its size, and a peer.

"GEMM" is ``torch.mm(x, codebook.t())`` in float32, which every unfused implementation begins with. The kernels run on every
instruction set of this machine, "flowkern-bf16" with the screen in bfloat16 where the processor multiplies that. The index of
some rows is first compared with that of all distances in float64, and all variants with one another; of the peer, which computes
in float32, it is said how many rows got another code. Memory is what the process holds at most during a call, above what it held
before: inputs are not counted, results are. A peer that is not installed (``pip install vector-quantize-pytorch``) is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import flowkern
from flowkern import ops
from flowkern._core import backend
from flowkern.ops import _nearest_code

from ..files import slug, write_atomically
from ..provenance import provenance
from .glow import FLOWKERN, Call, Row, as_csv, installed, line, timed

__all__ = ["main"]

#: (rows, codes, depth).
SIZES = ((16384, 8192, 256), (16384, 1024, 64), (64, 65536, 256))
QUICK = ((300, 200, 16), (20, 600, 16))
PEER = "vector-quantize-pytorch"
#: Of the rows, how many are compared with all distances in float64.
_COMPARED = 64

Search = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def searches() -> dict[str, Search]:
    """The index by every way this library has."""
    found: dict[str, Search] = {f"{FLOWKERN}-torch": _on("torch", None, False)}
    if backend.native is not None:
        found |= {f"{FLOWKERN}-{isa}": _on("cpp", isa, False) for isa in backend.native.isas()}
        found[f"{FLOWKERN}-bf16"] = _on("cpp", backend.native.isas()[0], True)
    return found


def _on(name: str, isa: str | None, pairs: bool) -> Search:
    """The search on one backend, with one instruction set and screen."""

    def run(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        if isa is not None:
            backend.native.use_isa(isa)  # type: ignore[union-attr]
        backend.multiply_bfloat16 = pairs
        with flowkern.backend(name):
            return ops.nearest_code(x, codebook)[0]

    return run


def by_peer(codebook: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The index by the peer's layer in evaluation, with this codebook."""
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(dim=codebook.shape[1], codebook_size=len(codebook)).eval()
    layer._codebook.embed.data.copy_(codebook[None])
    return lambda x: layer(x[None])[1][0]


def compared(x: torch.Tensor, codebook: torch.Tensor) -> tuple[dict[str, Call], dict[str, str]]:
    """(the calls, what is wrong with them)."""
    expected = _nearest_code.reference(x[:_COMPARED], codebook)[0]
    calls: dict[str, Call] = {}
    failures: dict[str, str] = {}
    results = {}
    for name, search in searches().items():
        calls[name] = functools.partial(search, x, codebook)
        results[name] = calls[name]()
        wrong = int((results[name][:_COMPARED] != expected).sum())
        wrong = wrong or int((results[name] != results[f"{FLOWKERN}-torch"]).sum())
        failures[name] = f"another index for {wrong} rows" if wrong else ""
    if installed(PEER.replace("-", "_")):
        calls[PEER] = functools.partial(by_peer(codebook), x)
        other = int((calls[PEER]() != results[f"{FLOWKERN}-torch"]).sum())
        if other:
            print(f"{PEER}: not the nearest code for {other} of {len(x)} rows", file=sys.stderr)
        failures[PEER] = "another index for most rows" if other > len(x) / 100 else ""
    return calls, failures


def peak_resident(call: Call) -> int | None:
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
def measured(rows: int, codes: int, depth: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of one size."""
    generator = torch.Generator().manual_seed(0)
    x, codebook = (torch.randn(n, depth, generator=generator) for n in (rows, codes))
    calls, failures = compared(x, codebook)
    good = {"GEMM": lambda: torch.mm(x, codebook.t()), **{n: call for n, call in calls.items() if not failures[n]}}
    held = {name: peak_resident(call) for name, call in good.items()}
    for row in timed(f"N{rows}-K{codes}-D{depth}", "forward", good, failures, "GEMM", seconds):
        extra = held.get(row["variant"])
        yield row | {"peak_extra_mb": None if extra is None else extra / 2**20}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench nearest_code", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it works, not to quote")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    folder: dict[str, Any] = {"nargs": "?", "type": Path, "const": Path("bench/results"), "metavar": "DIR"}
    parser.add_argument("--csv", help="write nearest_code-DEVICE.csv there", **folder)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    common = {"threads": arguments.threads, **provenance("cpu")}
    missing = {field.name: None for field in fields(Row)} | {"against": "", "failure": ""}
    screen, isa = backend.multiply_bfloat16, backend.native.isa() if backend.native else None
    found = []
    try:
        for size in QUICK if arguments.quick else SIZES:
            for value in measured(*size, seconds=0.2 if arguments.quick else 6.0):
                found.append(Row(**{**missing, **common, **value}))
                print(line(found[-1]), flush=True)
    finally:
        backend.multiply_bfloat16 = screen
        if isa:
            backend.native.use_isa(isa)  # type: ignore[union-attr]
    if arguments.csv is not None:
        path = arguments.csv / f"nearest_code-{slug(common['device'])}.csv"
        write_atomically(path, as_csv(found))
        print(f"written: {path}")
    return int(any(row.failure for row in found))
