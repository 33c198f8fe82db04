"""Compile the Triton kernels for GPUs that need not be there, and look at what comes out.

``python -m flowkern.kernels.compile`` compiles a pairwise sample of every op's configurations for every target;
``--all`` compiles them all. It prints one line per op and target and fails if a build spills registers, computes in
float64 without having been asked to, takes more shared memory than there is, or if a streaming build moves its data
in pieces of less than 16 bytes.

A kernel module takes part by having ``FACTORS``, the values of each choice with the streaming one first (one of them
is ``dtypes``), and ``compile_cases(**choice)``, which yields (name, launch). ``STREAMING = False`` says that none streams,
``FLOAT64`` names the launches that compute in float64 whatever their inputs, and ``BY_TARGET = True`` has the target's name
given to ``compile_cases`` as well.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowkern._core.op import OPS

__all__ = [
    "TARGETS",
    "Build",
    "compile_launch",
    "cubin_resources",
    "main",
    "op_names",
    "pairwise",
    "problems",
    "source",
    "streaming_problems",
]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Bytes of shared memory that one program may have.
_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def pairwise(factors: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Choices of one value per factor such that every two values of two factors meet in one of them.

    Greedy: each choice starts from a pair still missing, and takes what adds most pairs, or else the value used least.
    """
    names = list(factors)
    items = {name: [(name, i) for i in range(len(factors[name]))] for name in names}
    missing = {pair for a, b in itertools.combinations(names, 2) for pair in itertools.product(items[a], items[b])}

    used: collections.Counter[tuple[str, int]] = collections.Counter()

    def merit(row: dict[str, tuple[str, int]], item: tuple[str, int]) -> tuple[int, int]:
        return sum((other, item) in missing or (item, other) in missing for other in row.values()), -used[item]

    while missing:
        row = {item[0]: item for item in min(missing)}
        for name in names:
            if name not in row:
                row[name] = max(items[name], key=lambda item: merit(row, item))
        missing -= set(itertools.combinations([row[name] for name in names], 2))
        used.update(row.values())
        yield {name: factors[name][row[name][1]] for name in names}


def source(launch: Any) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for this launch, specialized on its arguments as a real launch is, and its options."""
    names, keywords = launch.kernel.arg_names, launch.keywords()
    values = dict(zip(names, launch.arguments(), strict=False))
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value, special = values.get(name, keywords.get(name)), not launch.kernel.params[i].do_not_specialize
        if name in keywords or value is None or (special and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if special and (value.data_ptr() if isinstance(value, torch.Tensor) else value) % 16 == 0:  # 0 without data
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in keywords.items() if name not in names}
    return ASTSource(launch.kernel, signature, constants, attributes), options


@dataclass
class Build:
    """One compiled kernel and what its artefacts say."""

    target: str
    float64: bool  # a tensor is float64, or the launch is one of its module's FLOAT64
    assembly: str
    shared: int  # bytes
    registers: int
    spilled: int  # bytes, or registers on AMD
    binary: bytes = b""  # the machine code, for NVIDIA
    problems: list[str] = field(default_factory=list)


def cubin_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) of the only kernel in NVIDIA machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _resources(compiled: Any) -> tuple[int, int]:
    """(registers, spills) of a compiled kernel."""
    if "cubin" in compiled.asm:
        return cubin_resources(compiled.asm["cubin"])
    text = compiled.asm["amdgcn"]
    spills = re.findall(r"^\s*\.(?:[sv]gpr_spill_count|private_segment_fixed_size):\s+(\d+)", text, re.MULTILINE)
    return max(map(int, re.findall(r"^\s*\.vgpr_count:\s+(\d+)", text, re.MULTILINE))), sum(map(int, spills))


def compile_launch(launch: Any, target: str) -> Build:
    """Compile ``launch`` for one of TARGETS. Raises TypeError if the launch gives the kernel what it does not take."""
    code, options = source(launch)
    if surplus := options.keys() - {"num_warps", "num_stages", "enable_fp_fusion"}:
        raise TypeError(f"{launch.kernel.__name__} takes no {', '.join(sorted(surplus))}")
    compiled = triton.compile(code, target=TARGETS[target], options=options)
    tensors = [t for t in launch.arguments() if isinstance(t, torch.Tensor)]
    return Build(
        target,
        any(t.dtype is torch.float64 for t in tensors),
        compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"],
        compiled.metadata.shared,
        *_resources(compiled),
        compiled.asm.get("cubin", b""),
    )


def problems(build: Build) -> list[str]:
    """What is wrong with a build; empty if nothing."""
    found = []
    if build.spilled:
        found.append(f"spills {build.spilled}")
    if build.shared > _SHARED[build.target]:
        found.append(f"takes {build.shared} bytes of shared memory, there are {_SHARED[build.target]}")
    if not build.float64 and re.search(r"\.f64|_f64", build.assembly):
        found.append("computes in float64 without a float64 input")
    return found


def streaming_problems(build: Build) -> list[str]:
    """What keeps a streaming build (for NVIDIA) from running at copy speed; empty if nothing."""
    accesses = re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*?(?:\.(v\d))?\.[a-z](\d+)\b", build.assembly)
    widths = [int(vector[1:] or 1) * int(bits) // 8 if vector else int(bits) // 8 for vector, bits in accesses]
    narrow = sum(width < 16 for width in widths)
    found = []
    # Of a whole tile each thread has eight elements; what is read or written once per sample comes in one piece.
    if narrow > 2 or widths.count(16) < 2:
        found.append(f"{narrow} accesses of global memory under 16 bytes, {widths.count(16)} of 16")
    # The program's own tile is found with one division.
    if (divisions := len(re.findall(r"\b(?:div|rem)\.[su]\d+", build.assembly))) > 1:
        found.append(f"{divisions} integer divisions")
    return found


@dataclass(frozen=True)
class _Job:
    op: str
    choice: tuple[tuple[str, Any], ...]
    target: str
    streaming: bool


def _jobs(op: str, everything: bool) -> Iterator[_Job]:
    module = importlib.import_module(f"flowkern.kernels.{op}")
    factors = {**module.FACTORS, "target": tuple(TARGETS)}
    product = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
    for choice in product if everything else pairwise(factors):
        target = choice.pop("target")
        yield _Job(op, tuple(choice.items()), target, False)
    first = {name: values[0] for name, values in factors.items() if name != "target"}
    if not getattr(module, "STREAMING", True):
        return
    for target, dtype in itertools.product(("sm_80", "sm_90", "sm_100"), ("float32", "bfloat16")):
        yield _Job(op, tuple({**first, "dtypes": dtype}.items()), target, True)


def _run(job: _Job) -> list[tuple[str, Build]]:
    module = importlib.import_module(f"flowkern.kernels.{job.op}")
    by_target = {"target": job.target} if getattr(module, "BY_TARGET", False) else {}
    builds = []
    for name, launch in module.compile_cases(**dict(job.choice), **by_target):
        build = compile_launch(launch, job.target)
        build.float64 = build.float64 or name in getattr(module, "FLOAT64", ())
        build.problems = problems(build) + (streaming_problems(build) if job.streaming else [])
        label = ", ".join(value if isinstance(value, str) else f"{key}={value}" for key, value in job.choice)
        builds.append((f"{job.op} {name} ({label})", build))
    return builds


def op_names() -> list[str]:
    """The ops that have Triton kernels of their own."""
    kernels = {kernel.name: kernel for op in OPS.values() for kernel in op.kernels}
    return [name for name in OPS if name in kernels and "triton" in kernels[name].implementations]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the number of builds with problems, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m flowkern.kernels.compile", description="Compile the Triton kernels.")
    parser.add_argument("ops", nargs="*", default=op_names(), help="the ops to compile, all by default")
    parser.add_argument("--all", action="store_true", help="every configuration instead of a pairwise sample")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set; the interpreter compiles nothing")
    jobs = [job for op in options.ops for job in _jobs(op, options.all)]
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        run = pool.map(_run, jobs) if options.jobs > 1 else map(_run, jobs)
        builds = [(job.op, name, build) for job, named in zip(jobs, run, strict=True) for name, build in named]
    for op, target in itertools.product(options.ops, TARGETS):
        mine = [build for name, _, build in builds if (name, build.target) == (op, target)]
        registers = max(build.registers for build in mine)
        wrong = sum(bool(build.problems) for build in mine)
        print(f"{op:<30}{target:<8}{len(mine):>5} builds, up to {registers} registers, {wrong} with problems")
    failed = [(name, build) for _, name, build in builds if build.problems]
    for name, build in failed:
        print(f"{name} for {build.target}: {'; '.join(build.problems)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
