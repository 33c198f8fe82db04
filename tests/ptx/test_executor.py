"""The executor of PTX, on small programs: what it computes, and that each of its checks finds the fault it is there for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import executor
import pytest
import torch
from executor import ExecutionError, Module, Options
from programs import kinds, program, run

pytestmark = pytest.mark.skipif(bool(executor.missing()), reason=executor.missing())

#: The register of each dtype, and its type in loads and stores.
REGISTERS = {
    torch.int32: ("%r", "b32"),
    torch.int64: ("%rd", "b64"),
    torch.float32: ("%f", "f32"),
    torch.float64: ("%d", "f64"),
    torch.float16: ("%h", "b16"),
    torch.bfloat16: ("%h", "b16"),
}


def access(kind: str, i: int, dtype: torch.dtype, register: str) -> str:
    """A load or a store of element %r0 of tensor i."""
    at, name = f"%rd{20 + i}", REGISTERS[dtype][1]
    found = f"mul.wide.u32 {at}, %r0, {dtype.itemsize};\nadd.s64 {at}, %rd{i}, {at};\n"
    return found + (f"ld.global.{name} {register}, [{at}];" if kind == "ld" else f"st.global.{name} [{at}], {register};")


def by_lane(text: str, *inputs: torch.Tensor, to: torch.dtype | None = None, options: Options | None = None) -> torch.Tensor:
    """What instructions make of $1, $2 and $3, the inputs' elements, in $0."""
    result = torch.zeros(len(inputs[0]), dtype=to or inputs[0].dtype)
    names = [f"{REGISTERS[t.dtype][0]}{10 + i}" for i, t in enumerate((result, *inputs))]
    body = [access("ld", i, t.dtype, names[i]) for i, t in enumerate(inputs, 1)]
    body.append(re.sub(r"\$(\d)", lambda match: names[int(match[1])], text))
    body.append(access("st", len(inputs) + 1, result.dtype, names[0]))
    assert run("\n".join(body), *inputs, result, threads=len(result), options=options).notes == ()
    return result


def randn(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(64, dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# What it computes

BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}
FLOATING = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_floating_point(name: str, dtype: torch.dtype) -> None:
    a, b = randn(dtype), randn(dtype)
    assert torch.equal(by_lane(f"{name}.{FLOATING[dtype]} $0, $1, $2;", a, b), BINARY[name](a, b))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_fused_products_are_rounded_once(dtype: torch.dtype) -> None:
    a = 1 + randn(dtype).abs() * torch.finfo(dtype).eps * 4
    actual = by_lane(f"fma.rn.{FLOATING[dtype]} $0, $1, $2, $3;", a, a, -torch.ones_like(a))
    exact = [float(math.fsum((float(x) * float(x), -1.0))) if dtype is not torch.float64 else None for x in a]
    if dtype is torch.float64:  # (1 + e) (1 + e) - 1 = 2 e + e e
        exact = [2 * (float(x) - 1) + (float(x) - 1) ** 2 for x in a]
    assert torch.equal(actual, torch.tensor(exact, dtype=torch.float64).to(dtype))


def test_signs() -> None:
    """Of single numbers, and of both halves of a pair."""
    for dtype, name in FLOATING.items():
        a = randn(dtype)
        assert torch.equal(by_lane(f"abs.{name} $0, $1;", a), a.abs())
        assert torch.equal(by_lane(f"neg.{name} $0, $1;", a), -a)
    pairs = torch.randint(-(2**31), 2**31, (64,), dtype=torch.int64).int()
    for name in ("f16x2", "bf16x2"):
        assert torch.equal(by_lane(f"abs.{name} $0, $1;", pairs), pairs & 0x7FFF7FFF)
        assert torch.equal(by_lane(f"neg.{name} $0, $1;", pairs), (pairs.long() ^ 0x80008000).int())


def test_a_sum_that_lies_between_two_bfloat16_is_rounded_once() -> None:
    # 1 + 2^-8 is a tie, to even; what lies far below decides, though float64 cannot hold it beside 1.
    a, b = torch.full((2,), 1 + 2.0**-7).bfloat16(), torch.ones(2).bfloat16()
    c = torch.tensor([2.0**-8 + 2.0**-70, 2.0**-8 - 2.0**-70])
    assert by_lane("fma.rn.bf16 $0, $1, $2, $3;", a, b, c.bfloat16()).tolist() == [1 + 2.0**-6, 1 + 2.0**-6]
    tiny = torch.tensor([2.0**-70, -(2.0**-70)]).bfloat16()
    half = torch.full((2,), 2.0**-4 + 2.0**-11).bfloat16()
    product = half.double() * half.double()
    up, down = by_lane("fma.rn.bf16 $0, $1, $2, $3;", half, half, tiny).double().tolist()
    assert up >= product[0].bfloat16().item() >= down


def test_integers() -> None:
    a = torch.randint(-(2**31), 2**31, (64,), dtype=torch.int64).int()
    b = torch.randint(1, 100, (64,)).int() * torch.tensor([1, -1]).repeat(32).int()
    wide = a.long() * b.long()
    for text, expected in {
        "add.s32 $0, $1, $2;": a + b,
        "sub.s32 $0, $1, $2;": a - b,
        "mul.lo.s32 $0, $1, $2;": wide.int(),
        "mul.hi.s32 $0, $1, $2;": (wide >> 32).int(),
        "mad.lo.s32 $0, $1, $2, $2;": (wide + b).int(),
        "div.s32 $0, $1, $2;": a.div(b, rounding_mode="trunc"),
        "rem.s32 $0, $1, $2;": a.fmod(b),
        "min.s32 $0, $1, $2;": torch.minimum(a, b),
        "and.b32 $0, $1, $2;": a & b,
        "xor.b32 $0, $1, $2;": a ^ b,
        "neg.s32 $0, $1;": -a,
        "not.b32 $0, $1;": ~a,
        "shl.b32 $0, $1, 3;": a << 3,
        "shr.s32 $0, $1, 5;": a >> 5,
        "shr.u32 $0, $1, 5;": ((a.long() & 0xFFFFFFFF) >> 5).int(),
        "bfe.u32 $0, $1, 4, 7;": (a >> 4) & 127,
        "prmt.b32 $0, $1, $2, 0x3210;": a,
        "{ .reg .pred %q; setp.lt.s32 %q, $1, $2; selp.b32 $0, $1, $2, %q; }": torch.minimum(a, b),
        "{ .reg .pred %q; setp.lo.u32 %q, $1, $2; selp.b32 $0, 1, 0, %q; }": (
            (a.long() & 0xFFFFFFFF) < (b.long() & 0xFFFFFFFF)
        ).int(),
    }.items():
        assert torch.equal(by_lane(text, a, b), expected), text
    assert torch.equal(by_lane("mul.wide.s32 $0, $1, $2;", a, b, to=torch.int64), wide)


def test_conversions() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 3e9, -3e9, float("nan"), 2.0**-149, 65519.0, 65520.0, 1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-20])
    to_int = torch.tensor([0, 2, -2, 2**31 - 1, -(2**31), 0, 0, 65519, 65520, 1, 1])
    assert torch.equal(by_lane("cvt.rni.s32.f32 $0, $1;", x, to=torch.int32), to_int.int())
    for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16"), (torch.float64, "f64")):
        rounding = "" if dtype is torch.float64 else ".rn"
        assert torch.equal(by_lane(f"cvt{rounding}.{name}.f32 $0, $1;", x, to=dtype).nan_to_num(7), x.to(dtype).nan_to_num(7))
    y = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1e40, 0.1], dtype=torch.float64)
    assert torch.equal(by_lane("cvt.rn.f32.f64 $0, $1;", y, to=torch.float32), y.float())
    exact = torch.tensor([1 + 2.0**-11, 1 + 2.0**-10, -1 - 3 * 2.0**-11])
    tf32 = torch.tensor([1 + 2.0**-10, 1 + 2.0**-10, -1 - 2 * 2.0**-10])
    assert torch.equal(by_lane("cvt.rna.tf32.f32 $0, $1;", exact), tf32)


APPROXIMATE = {
    "ex2": torch.exp2,
    "lg2": torch.log2,
    "rcp": torch.reciprocal,
    "rsqrt": torch.rsqrt,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_are_exact_or_off_by_what_is_documented(name: str) -> None:
    x = randn(torch.float32).abs() + 2
    truth = APPROXIMATE[name](x.double())
    near = by_lane(f"{name}.approx.f32 $0, $1;", x)
    assert torch.equal(near, truth.float())
    off = by_lane(f"{name}.approx.f32 $0, $1;", x, options=Options(approximate=1))
    assert (off != near).any()
    assert ((off.double() - truth) / truth).abs().max() < (2.0**-10 if name == "tanh" else 2.0**-21)


def test_threads_that_part_meet_again() -> None:
    y, z = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    body = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
    setp.lt.u32 %p1, %r0, 7;
    @%p1 bra small;
    and.b32 %r3, %r0, 3;
loop:
    setp.ge.u32 %p2, %r1, %r3;
    @%p2 bra join;
    add.u32 %r1, %r1, 1;
    bra loop;
small:
    mov.u32 %r1, 100;
join:
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    """
    run("\n".join((body, access("st", 1, y.dtype, "%r1"), access("st", 2, z.dtype, "%r2"))), y, z, threads=64)
    expected = torch.where(torch.arange(64) < 7, 100, torch.arange(64) % 4).int()
    assert torch.equal(y, expected)
    assert torch.equal(z, expected[torch.arange(64) ^ 1])


def test_what_a_warp_does_together() -> None:
    x = torch.randperm(32).int()
    assert by_lane("redux.sync.max.s32 $0, $1, -1;", x).tolist() == [31] * 32
    assert by_lane("{ .reg .pred %q; setp.gt.s32 %q, $1, 15; vote.sync.ballot.b32 $0, %q, -1; }", x).unique().numel() == 1
    assert by_lane("{ .reg .pred %q; elect.sync $0|%q, -1; selp.b32 $0, 1, 0, %q; }", x).sum() == 1


# ---------------------------------------------------------------------------------------------------------------------
# What it finds

ADDRESS = """
    mov.u32 %r1, shared;
    mad.lo.u32 %r1, %r0, 4, %r1;  // this thread's place
    xor.b32 %r2, %r1, 128;        // that of its partner in the other warp
    xor.b32 %r3, %r1, 4;          // that of its neighbour
    cvt.u64.u32 %rd9, %r0;
    shl.b64 %rd9, %rd9, 2;
    add.s64 %rd10, %rd1, %rd9;
"""
COPY = """
    cp.async.ca.shared.global [%r1], [%rd10], 4;
    cp.async.commit_group;
"""
#: A program that is right, and what is found once a line of it is left out.
PROGRAMS: dict[str, tuple[str, dict[str, str]]] = {
    "warps": (
        ADDRESS + "st.shared.b32 [%r1], %r0;\nbar.sync 0;\nld.shared.b32 %r5, [%r2];",
        {"bar.sync": "race", "st.shared": "uninitialized"},
    ),
    "again": (
        ADDRESS
        + "st.shared.b32 [%r1], %r0;\nbar.sync 0;\nld.shared.b32 %r5, [%r2];\nbarrier.sync 0;\nadd.u32 %r5, %r5, 1;"
        + "\nst.shared.b32 [%r1], %r5;",
        {"barrier.sync": "race"},
    ),
    "neighbours": (
        ADDRESS + "st.shared.b32 [%r1], %r0;\nbar.warp.sync -1;\nld.shared.b32 %r5, [%r3];",
        {"bar.warp.sync": "race"},
    ),
    "global": (ADDRESS + "st.global.b32 [%rd10], %r0;\nbar.sync 0;\nld.global.b32 %r5, [%rd1];", {"bar.sync": "race"}),
    "copies": (
        ADDRESS + COPY + "cp.async.wait_group 0;\nbar.sync 0;\nld.shared.b32 %r5, [%r2];",
        {"cp.async.wait_group": "in flight", "cp.async.commit_group": "in flight", "bar.sync": "race"},
    ),
    "register": (ADDRESS + "mov.u32 %r5, 1;\nadd.u32 %r6, %r5, 1;", {"mov.u32 %r5": "uninitialized"}),
}


def without(body: str, line: str) -> str:
    """The body without its first line that contains ``line``."""
    lines = body.splitlines()
    lines.remove(next(each for each in lines if line in each))
    return "\n".join(lines)


@pytest.mark.parametrize("shuffle", [0, 1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_notes(name: str, shuffle: int) -> None:
    body, faults = PROGRAMS[name]

    def noted(text: str) -> set[str]:
        x = torch.arange(64, dtype=torch.int32)
        return kinds(run(text, x, threads=64, shared=256, options=Options(shuffle=shuffle)))

    assert noted(body) == set()
    for line, kind in faults.items():
        assert kind in noted(without(body, line)), line


def test_blocks_that_meet_in_memory() -> None:
    y = torch.zeros(64, dtype=torch.int32)
    assert kinds(run(access("st", 1, y.dtype, "%r0"), y, threads=64, grid=2)) == {"race"}
    atomic = "atom.global.add.u32 %r5, [%rd1], 1;"
    assert run(atomic, y, threads=64, grid=2).notes == ()
    assert y[0] == 128


PART = "setp.lt.u32 %p1, CHOICE;\n@%p1 bra one;\n"
FAULTS = {
    "out of bounds: write of global": "st.global.b32 [%rd1 + 256], %r0;",
    "out of bounds: read of global": "ld.global.b32 %r5, [%rd1 - 4];",
    "out of bounds: byte 256 of 256 of shared": "st.shared.b32 [256], %r0;",
    "misaligned access of 8 bytes": "ld.global.b64 %rd5, [%rd1 + 4];",
    "deadlock: warps wait at different": PART.replace("CHOICE", "%r0, 32") + "bar.sync 1;\nbra end;\none:\nbar.sync 2;\nend:",
    "deadlock: threads of a warp wait": PART.replace("CHOICE", "%r0, 16")
    + "bar.sync 0;\nbra end;\none:\nshfl.sync.idx.b32 %r2, %r0, 0, 31, -1;\nend:",
    "deadlock: all warps wait": """
        setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [0], 1;
        bar.sync 0;
    wait:
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [0], 0;
        @!%p2 bra wait;
    """,
    "threads of the warp are missing": "setp.eq.u32 %p1, %r0, 0;\nmov.u32 %r1, 0;\n"
    "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];",
    "the limit of instructions": "forever:\nbra forever;",
    "trap": "trap;",
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_end_a_launch(message: str) -> None:
    with pytest.raises(ExecutionError, match=message):
        run(FAULTS[message], torch.zeros(64, dtype=torch.int32), threads=64, shared=256, options=Options(limit=10**5))


@pytest.mark.parametrize("text", ["frobnicate.b32 %r1, %r0;", "add.saturating.s32 %r1, %r0, 1;", "cvt.rz.f32.f64 %f1, %d1;"])
def test_what_is_not_supported_is_refused_by_its_name_and_line(text: str) -> None:
    source = program(text, 1)
    line = next(i for i, each in enumerate(source.splitlines(), 1) if text in each)
    with pytest.raises(ExecutionError, match=re.escape(f"line {line}: not supported: {text[:-1]}")):
        Module(source)


def test_unknown_names_are_refused() -> None:
    for text in ("add.s32 %r1, %nobody, 1;", "bra nowhere;", "ld.global.b32 %r1, [missing];"):
        with pytest.raises(ExecutionError, match=r"line \d+: (unknown|no label)"):
            Module(program(text, 1))
    with pytest.raises(ValueError, match="unknown frobnicate"):
        executor.options_of("seed=3,frobnicate=1")


def test_lazy_copies_see_what_is_written_before_they_are_waited_for() -> None:
    body = (
        ADDRESS
        + COPY
        + "st.global.b32 [%rd10], 7;\ncp.async.wait_group 0;\nld.shared.b32 %r5, [%r1];\n"
        + access("st", 2, torch.int32, "%r5")
    )
    for lazy, expected in ((1, 7), (0, 1)):
        x, y = torch.ones(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
        run(body, x, y, threads=64, shared=256, options=Options(lazy=lazy))
        assert (y == expected).all()


# ---------------------------------------------------------------------------------------------------------------------
# Tensor cores

#: 16 bytes of the first tensor for each thread, to shared memory at [%r0 * 16]; then the second one behind 8192 bytes.
STAGE = """
    cvt.u64.u32 %rd9, %r0;
    shl.b64 %rd9, %rd9, 4;
    shl.b32 %r1, %r0, 4;
    mov.u32 %r2, shared;
    add.u32 %r1, %r1, %r2;
    setp.lt.u32 %p1, %r0, {chunks_a};
    setp.lt.u32 %p2, %r0, {chunks_b};
    add.s64 %rd10, %rd1, %rd9;
    add.s64 %rd11, %rd2, %rd9;
    @%p1 ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd10];
    @%p1 st.shared.v4.b32 [%r1], {{%r10, %r11, %r12, %r13}};
    @%p2 ld.global.v4.b32 {{%r14, %r15, %r16, %r17}}, [%rd11];
    @%p2 st.shared.v4.b32 [%r1 + 8192], {{%r14, %r15, %r16, %r17}};
"""


def rows_of_8(x: torch.Tensor) -> torch.Tensor:
    """A matrix as matrices of 8 rows of 16 bytes, one after the other, as tensor cores take it from shared memory."""
    entries = 16 // x.element_size()
    return x.reshape(len(x) // 8, 8, -1, entries).transpose(1, 2).contiguous()


def sum_by_lane(columns: int, name: str) -> str:
    """Stores the sum in registers, of the layout that mma and wgmma share, to a matrix of so many columns in %rd3."""
    text = """
    shr.u32 %r3, %r0, 5;
    shl.b32 %r3, %r3, 4;
    and.b32 %r4, %r0, 31;
    shr.u32 %r5, %r4, 2;
    add.u32 %r3, %r3, %r5;        // its row
    and.b32 %r4, %r4, 3;
    shl.b32 %r4, %r4, 1;
    mad.lo.u32 %r3, %r3, COLUMNS, %r4;
    mul.wide.u32 %rd9, %r3, 4;
    add.s64 %rd9, %rd3, %rd9;
    """.replace("COLUMNS", str(columns))
    for i in range(columns // 2):
        offset = 4 * (i // 4 * 8 + i % 2 + (8 * columns if i % 4 >= 2 else 0))
        text += f"st.global.f32 [%rd9 + {offset}], {name}{i};\n"
    return text


def wgmma(name: str, depth: int) -> str:
    registers = ", ".join(f"%f{i}" for i in range(8))
    # Distances of matrices of 8 rows: 128 bytes along a row, all of a row's from one row of matrices to the next.
    descriptor = 128 >> 4 << 16 | 256 >> 4 << 32
    transposed = "" if name == "tf32" else ", 0, 0"
    zeros = "\n".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(8))
    return (
        STAGE.format(chunks_a=128, chunks_b=32)
        + f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    {zeros}
    mov.b64 %rd12, {descriptor};
    mov.b64 %rd13, {descriptor | 8192 >> 4};
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k{depth}.f32.{name}.{name} {{{registers}}}, %rd12, %rd13, 1, 1, 1{transposed};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    """
        + sum_by_lane(16, "%f")
    )


def tcgen05(name: str) -> str:
    registers = ", ".join(f"%f{i}" for i in range(16))
    descriptor = 128 >> 4 << 16 | 256 >> 4 << 32 | 1 << 46
    kind, code = ("tf32", 2) if name == "tf32" else ("f16", int(name == "bf16"))
    instruction = 1 << 4 | code << 7 | code << 10 | 16 >> 3 << 17 | 128 >> 4 << 24
    stores = "\n".join(f"st.global.f32 [%rd9 + {4 * i}], %f{i};" for i in range(16))
    return (
        STAGE.format(chunks_a=256, chunks_b=32)
        + f"""
    setp.eq.u32 %p3, %r0, 0;
    setp.lt.u32 %p4, %r0, 32;
    @!%p4 bra allocated;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [16384], 32;
allocated:
    @%p3 mbarrier.init.shared::cta.b64 [16392], 1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    ld.shared.b32 %r20, [16384];
    mov.b64 %rd12, {descriptor};
    mov.b64 %rd13, {descriptor | 8192 >> 4};
    mov.b32 %r21, {instruction};
    setp.ne.u32 %p5, %r0, %r0;
    @%p3 tcgen05.mma.cta_group::1.kind::{kind} [%r20], %rd12, %rd13, %r21, %p5;
    @%p3 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [16392];
    bar.sync 0;
wait:
    mbarrier.try_wait.parity.shared::cta.b64 %p6, [16392], 0;
    @!%p6 bra wait;
    setp.ge.u32 %p7, %r0, 128;    // four warps reach all of tensor memory
    @%p7 bra loaded;
    shr.u32 %r22, %r0, 5;
    shl.b32 %r22, %r22, 21;
    add.u32 %r22, %r22, %r20;
    tcgen05.ld.sync.aligned.32x32b.x16.b32 {{{registers}}}, [%r22];
    tcgen05.wait::ld.sync.aligned;
loaded:
    bar.sync 0;
    @%p7 ret;
    @%p4 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r20, 32;
    mul.wide.u32 %rd9, %r0, 64;
    add.s64 %rd9, %rd3, %rd9;
    {stores}
    """
    )


TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


def factors(name: str, rows: int, columns: int, whole: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices, whose products are exact if they are ``whole``, with 32 bytes in each row."""
    depth = 32 // TYPES[name].itemsize
    a, b = (torch.randn(n, depth) * (4 if whole else 1) for n in (rows, columns))
    a, b = (t.round() if whole else t for t in (a, b))
    return a.to(TYPES[name]), b.to(TYPES[name])


def test_mma_with_ldmatrix() -> None:
    a, b = torch.randint(-9, 9, (16, 16)).half(), torch.randint(-9, 9, (16, 8)).half()
    body = (
        STAGE.format(chunks_a=32, chunks_b=16)
        + """
    bar.sync 0;
    and.b32 %r3, %r0, 15;         // lanes 0 to 15 have the rows of the left matrices, the others those of the right ones
    shl.b32 %r4, %r3, 5;
    and.b32 %r5, %r0, 16;
    add.u32 %r4, %r4, %r5;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r4];
    shl.b32 %r4, %r3, 4;
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r24, %r25}, [%r4 + 8192];
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r20, %r21, %r22, %r23}, {%r24, %r25},
        {0f00000000, 0f00000000, 0f00000000, 0f00000000};
    """
        + sum_by_lane(8, "%f")
    )
    y = torch.zeros(16, 8)
    assert run(body, a, b, y, threads=32, shared=16384, target="sm_80").notes == ()
    assert torch.equal(y, a.float() @ b.float())


def test_mma_of_tf32_ignores_the_last_bits() -> None:
    a, b = factors("tf32", 16, 8, whole=False)
    body = """
    and.b32 %r1, %r0, 3;
    shr.u32 %r2, %r0, 2;
    mad.lo.u32 %r3, %r2, 8, %r1;  // (lane / 4, lane % 4) of a matrix with 8 columns
    mul.wide.u32 %rd9, %r3, 4;
    add.s64 %rd10, %rd1, %rd9;
    add.s64 %rd11, %rd2, %rd9;
    ld.global.b32 %r10, [%rd10];
    ld.global.b32 %r11, [%rd10 + 256];
    ld.global.b32 %r12, [%rd10 + 16];
    ld.global.b32 %r13, [%rd10 + 272];
    ld.global.b32 %r14, [%rd11];
    ld.global.b32 %r15, [%rd11 + 16];
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0, %f1, %f2, %f3}, {%r10, %r11, %r12, %r13}, {%r14, %r15},
        {0f00000000, 0f00000000, 0f00000000, 0f00000000};
    """ + sum_by_lane(8, "%f")
    y = torch.zeros(16, 8)
    run(body, a, b, y, target="sm_80")
    a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for t in (a, b))
    assert torch.equal(y, (a @ b.t()).float())


@pytest.mark.parametrize("name", TYPES)
def test_wgmma(name: str) -> None:
    a, b = factors(name, 64, 16)
    body = wgmma(name, 32 // a.element_size())
    y = torch.zeros(64, 16)

    def launched(text: str, **options: int) -> set[str]:
        return kinds(run(text, rows_of_8(a), rows_of_8(b), y, threads=128, shared=16384, options=Options(**options)))

    for lazy in (1, 0):
        y.zero_()
        assert launched(body, lazy=lazy, shuffle=1) == set()
        assert torch.equal(y, a.float() @ b.float().t())
    for line, kind in {
        "fence.proxy": "fence",
        "wgmma.fence": "fence",
        "wgmma.wait_group": "in flight",
        "bar.sync": "race",
    }.items():
        assert kind in launched(without(body, line)), line


@pytest.mark.parametrize("name", TYPES)
def test_tcgen05(name: str) -> None:
    a, b = factors(name, 128, 16)
    body = tcgen05(name)
    y = torch.zeros(128, 16)

    inputs = rows_of_8(a), rows_of_8(b), y

    def launched(text: str, **options: int) -> set[str]:
        return kinds(run(text, *inputs, threads=256, shared=16400, target="sm_100", options=Options(**options)))

    for lazy in (1, 0):
        y.zero_()
        assert launched(body, lazy=lazy, shuffle=1) == set()
        assert torch.equal(y, a.float() @ b.float().t())
    assert "fence" in launched(without(body, "fence.proxy"))
    assert "race" in launched(without(body, "bar.sync"))
    assert "in flight" in launched(without(without(body, "mbarrier.try_wait"), "bra wait"))


def test_sums_that_are_truncated() -> None:
    """Terms lose what lies below the 24th bit of the largest; the order of magnitude of the error is that of the bound."""
    a, b = factors("bf16", 64, 16, whole=False)
    a[:, 0], b[:, 0], a[:, 1], b[:, 1] = 256.0, 256.0, -256.0, 256.0
    exact = a.double() @ b.double().t()
    error = []
    for truncate in (0, 1):
        y = torch.zeros(64, 16)
        run(wgmma("bf16", 16), rows_of_8(a), rows_of_8(b), y, threads=128, shared=16384, options=Options(truncate=truncate))
        error.append((y - exact).abs().max().item())
    assert error[0] < 2.0**-20
    assert 2.0**-9 < error[1] < 18 * 2.0 ** (16 - 23)
