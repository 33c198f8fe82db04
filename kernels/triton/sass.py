"""Count the machine code of the Triton kernels for an H100, where none need be: ``python -m flowkern.kernels.sass [OP ...]``.

Each row of bench/results/sass.csv is one launch of one configuration. Its ceiling is what perfect issue would allow: every
instruction that is not in a subroutine runs, one a cycle on each of 132 x 4 schedulers at 1.755 GHz, and memory moves each byte
of the launch's tensors once at 3.0 TB/s, the speed of a copy. Tensor cores take the time of their peak; a multiprocessor that
has room for one program does nothing beside it. Expect half to two thirds of a ceiling: latency, banks and caches are left out.

A kernel module takes part by what ``compile.py`` asks of it. Where its kernels have loops it says with ``trips(name, launch)``
how often each runs, in the order of the code; a pair says also in which share of the turns its longest branch is taken.
``COUNTED`` lists the choices that are counted, as changes to the first one; else they are float32 and the first of 16 bits.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import triton

from .compile import compile_launch, op_names

__all__ = ["Row", "Sass", "main", "read", "rows_of"]

TARGET = "sm_90"
_MULTIPROCESSORS, _SCHEDULERS, _CLOCK, _COPY = 132, 4, 1.755e9, 3.0e12
#: Multiply-adds of one scheduler's tensor core in a cycle.
_TENSOR = {"BF16": 512, "F16": 512, "TF32": 256, "F64": 32}
#: What a multiprocessor has.
_REGISTERS, _SHARED, _THREADS = 65536, 227 * 1024, 2048
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TARGET_LABEL = re.compile(r"`\((\.L_x_\d+)\)")
_LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)


@dataclass(frozen=True)
class Loop:
    """A loop of the machine code, without those inside it."""

    instructions: int
    tensor: float  # cycles of one scheduler's tensor core, for one warp
    outer: int | None = None  # the number of the loop around it
    branch: int = 0  # instructions that the longest branch in it jumps over


@dataclass(frozen=True)
class Sass:
    """What a kernel's machine code consists of, subroutines left out."""

    straight: Loop  # what is in no loop
    loops: tuple[Loop, ...]
    opcodes: tuple[str, ...]

    @classmethod
    def of(cls, cubin: bytes) -> Sass:
        """Read the only kernel of NVIDIA machine code."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(cubin)
            command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
            return cls.parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    @classmethod
    def parse(cls, text: str) -> Sass:
        """Read what nvdisasm prints. A branch back to a label makes a loop."""
        found = [(match.start(), int(match[1], 16), match[2], match[3]) for match in _INSTRUCTION.finditer(text)]
        end = max(place for place, _, opcode, _ in found if opcode == "EXIT")
        found = [instruction for instruction in found if instruction[0] <= end and instruction[2] != "NOP"]
        labels = {match[1]: match.start() for match in _LABEL.finditer(text)}
        jumps = [(place, _TARGET_LABEL.search(rest)) for place, _, opcode, rest in found if opcode == "BRA"]
        branches = [(place, labels[label[1]]) for place, label in jumps if label]
        # Of several branches back to one label the last ends the loop.
        ranges = sorted({to: place for place, to in branches if to <= place}.items())
        inside: list[list[tuple[int, str]]] = [[] for _ in range(len(ranges) + 1)]
        for place, _, opcode, _ in found:
            around = [i for i, (first, last) in enumerate(ranges) if first <= place <= last]
            inside[around[-1] if around else -1].append((place, opcode))

        def loop(opcodes: Sequence[tuple[int, str]], outer: int | None) -> Loop:
            jumped = [sum(place < at < to for at, _ in opcodes) for place, to in branches if place in dict(opcodes)]
            return Loop(len(opcodes), sum(_tensor_cycles(opcode) for _, opcode in opcodes), outer, max(jumped, default=0))

        outer = [[k for k, (a, b) in enumerate(ranges[:i]) if a <= at <= b] for i, (at, _) in enumerate(ranges)]
        loops = tuple(loop(inside[i], around[-1] if around else None) for i, around in enumerate(outer))
        return cls(loop(inside[-1], None), loops, tuple(opcode for _, _, opcode, _ in found))

    def count(self, pattern: str) -> int:
        """How many opcodes match the whole of a regular expression."""
        return sum(bool(re.fullmatch(pattern, opcode)) for opcode in self.opcodes)

    def executed(self, trips: Sequence[float | tuple[float, float]]) -> tuple[float, float]:
        """(instructions, cycles of the tensor core) of one warp whose loops run so often, nested ones at each turn."""
        if len(trips) != len(self.loops):
            raise ValueError(f"the code has {len(self.loops)} loops ({self.shape()}), trips are given for {len(trips)}")
        instructions, tensor = float(self.straight.instructions), self.straight.tensor
        times: list[float] = []
        for loop, trip in zip(self.loops, trips, strict=True):
            turns, taken = trip if isinstance(trip, tuple) else (trip, 1.0)
            times.append(turns * (1.0 if loop.outer is None else times[loop.outer]))
            instructions += times[-1] * (loop.instructions - (1.0 - taken) * loop.branch)
            tensor += times[-1] * loop.tensor
        return instructions, tensor

    def shape(self) -> str:
        """The number of instructions outside of loops, and of each loop: ``120 + [88] + [[40]]``."""
        depth = [0] * len(self.loops)
        for i, loop in enumerate(self.loops):
            depth[i] = 1 if loop.outer is None else depth[loop.outer] + 1
        inner = (f"{'[' * n}{loop.instructions}{']' * n}" for n, loop in zip(depth, self.loops, strict=True))
        return " + ".join([str(self.straight.instructions), *inner])


def _tensor_cycles(opcode: str) -> float:
    """Cycles that one warp's share of an instruction takes on its scheduler's tensor core; 0 if it is for no such core."""
    kind = next((rate for name, rate in _TENSOR.items() if f".{name}" in opcode), _TENSOR["F16"])
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):  # of the four warps of a group together
        return int(match[1]) * int(match[2]) * int(match[3]) / 4 / kind
    shapes = {"16816": 2048, "1688": 1024, "1684": 512}
    if match := re.match(r"HMMA\.(16816|1688|1684)", opcode):
        return shapes[match[1]] / kind
    return 16 * 8 * 4 / _TENSOR["F64"] if opcode.startswith("DMMA.1684") else 256 / _TENSOR["F64"] * opcode.startswith("DMMA")


@dataclass(frozen=True)
class Row:
    """One launch, counted; the fields are the columns of the table."""

    op: str
    kernel: str
    choice: str
    registers: int
    spilled: int
    shared: int  # bytes
    code: str  # instructions outside of loops + [those of a loop] + ...
    wide: int  # accesses of global memory of 16 bytes, those into shared memory included
    narrow: int  # smaller ones
    asynchronous: int  # copies into shared memory of 16 bytes
    tensor: str  # the tensor cores' instruction
    instructions: int  # executed by all warps, in thousands
    megabytes: float
    copy: int  # the ceiling in percent of a copy
    peak: int  # the ceiling in percent of the tensor cores' peak, 949 TFLOP/s in 16 bits
    triton: str = triton.__version__
    before: str = ""  # thousands of instructions, and ceilings, when kernels were first counted

    @property
    def key(self) -> tuple[str, str, str]:
        """What names the row."""
        return self.op, self.kernel, self.choice


def _row(op: str, kernel: str, choice: str, launch: Any, trips: Sequence[float | tuple[float, float]]) -> Row:
    build = compile_launch(launch, TARGET)
    sass, warps = Sass.of(build.binary), launch.keywords().get("num_warps", 4)
    try:
        instructions, tensor = sass.executed(trips)
    except ValueError as error:
        raise ValueError(f"{op} {kernel} ({choice}): {error}") from None
    programs = launch.grid.programs
    tensors = [t for t in launch.tensors if t is not None]
    moved = sum(t.numel() * t.element_size() for t in tensors)
    schedulers = _MULTIPROCESSORS * _SCHEDULERS
    issue, product = (cycles * programs * warps / schedulers / _CLOCK for cycles in (instructions, tensor))
    threads = 32 * warps
    alone = min(_REGISTERS // (build.registers * threads), _SHARED // max(build.shared, 1), _THREADS // threads) < 2
    busy = issue + product if alone else max(issue, product)
    accesses, wide = (sass.count(rf"(LDG|STG|LDGSTS)\..*{width}") for width in ("", r"\.128(\..*)?"))
    return Row(
        op, kernel, choice, build.registers, build.spilled, build.shared, sass.shape(),
        wide=wide,
        narrow=accesses - wide,
        asynchronous=sass.count(r"LDGSTS\..*\.128(\..*)?"),
        tensor=next((opcode for opcode in sass.opcodes if re.match(r"H(G)?MMA|DMMA", opcode)), ""),
        instructions=round(instructions * programs * warps / 1000),
        megabytes=round(moved / 1e6, 3),
        copy=round(100 * moved / _COPY / busy),
        peak=round(100 * product / max(busy, moved / _COPY)),
    )  # fmt: skip


def rows_of(op: str) -> Iterator[Row]:
    """The rows of an op that has Triton kernels."""
    module = importlib.import_module(f"flowkern.kernels.{op}")
    half = next((name for name in module.FACTORS["dtypes"] if name in ("bfloat16", "float16")), "float32")
    counted = getattr(module, "COUNTED", tuple({"dtypes": dtype} for dtype in dict.fromkeys(("float32", half))))
    first = {name: values[0] for name, values in module.FACTORS.items()}
    by_target = {"target": TARGET} if getattr(module, "BY_TARGET", False) else {}
    trips = getattr(module, "trips", lambda name, launch: ())
    for change in counted:
        choice = ", ".join(value if isinstance(value, str) else f"{name} {value}" for name, value in change.items())
        for name, launch in module.compile_cases(**{**first, **change}, **by_target):
            yield _row(op, name, choice, launch, trips(name, launch))


def read(path: Path) -> list[Row]:
    """The rows of a table."""
    kinds = {field.name: {"int": int, "float": float, "str": str}[str(field.type)] for field in fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and write the rows of the ops that are named into the table; what they were before stays."""
    parser = argparse.ArgumentParser(prog="python -m flowkern.kernels.sass", description="Count the kernels' machine code.")
    parser.add_argument("ops", nargs="*", default=op_names(), help="the ops to count, all by default")
    parser.add_argument("--csv", type=Path, help="the table to write into; without it the rows are printed")
    options = parser.parse_args(arguments)
    kept = read(options.csv) if options.csv and options.csv.exists() else []
    before = {row.key: row.before for row in kept}
    rows = [replace(row, before=before.get(row.key, "")) for op in options.ops for row in rows_of(op)]
    if not options.csv:
        for row in rows:
            print(*asdict(row).values(), sep="\t")
        return 0
    rows = sorted([*rows, *(row for row in kept if row.op not in options.ops)], key=lambda row: op_names().index(row.op))
    with options.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
