"""The machine code of the Triton kernels, counted: bench/results/sass.csv must not become worse."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
kernels = importlib.import_module("flowkern.kernels.sass")

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") == "1", reason="TRITON_INTERPRET=1 replaces the compiler")

TABLE = Path(__file__).parents[2] / "bench" / "results" / "sass.csv"

CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0030*/              @!P2 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/              @P1  BRA `(.L_x_1) ;
        /*0050*/              @P3  BRA `(.L_x_2) ;
        /*0060*/                   FADD R4, R4, R5 ;
        /*0070*/                   LDGSTS.E.BYPASS.LTC128B.128 [R7], [R2.64] ;
.L_x_2:
        /*0080*/              @!UP0 BRA `(.L_x_0) ;
.L_x_3:
        /*0090*/                   NOP ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   MUFU.RCP R0, R0 ;
        /*00d0*/                   BRA `(.L_x_4) ;
"""


def test_code_is_taken_apart() -> None:
    sass = kernels.Sass.parse(CODE)
    assert sass.shape() == "4 + [5] + [[2]]"
    assert sass.loops[0] == kernels.Loop(5, 0.0, None, branch=2)
    assert sass.loops[1] == kernels.Loop(2, 64.0, 0)  # 64 x 128 x 16 multiply-adds on four tensor cores of 512 a cycle
    assert sass.count(r"LDG\..*\.128") == sass.count(r"LDGSTS\..*") == sass.count(r"STG\..*") == 1
    assert sass.executed([10, 3]) == (4 + 10 * (5 + 3 * 2), 10 * 3 * 64)
    assert sass.executed([(10, 0.25), 3])[0] == 4 + 10 * (5 - 0.75 * 2 + 3 * 2)
    with pytest.raises(ValueError, match="the code has 2 loops"):
        sass.executed([10])


def worse(row: Any, kept: Any) -> list[str]:
    """In which columns a row is worse than the one that is kept; of another Triton, by more than a tenth."""
    margin = 1.0 if row.triton == kept.triton else 1.1
    more = [name for name in ("spilled", "narrow", "instructions") if getattr(row, name) > margin * getattr(kept, name)]
    less = [name for name in ("asynchronous", "copy", "peak") if margin * getattr(row, name) < getattr(kept, name)]
    return more + less


@pytest.mark.slow
@pytest.mark.parametrize("op", kernels.op_names())
def test_no_kernel_becomes_worse(op: str) -> None:
    """Where one does on purpose, or becomes better, ``python -m flowkern.kernels.sass OP --csv bench/results/sass.csv``."""
    rows = list(kernels.rows_of(op))
    kept = [row for row in kernels.read(TABLE) if row.op == op]
    assert [row.key for row in rows] == [row.key for row in kept]
    assert {row.key: found for row, before in zip(rows, kept, strict=True) if (found := worse(row, before))} == {}
