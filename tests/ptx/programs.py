"""Small PTX programs for ``test_executor.py``: a kernel around some instructions, and its launch on tensors."""

from __future__ import annotations

import re
from typing import Any

import torch
from executor import Launched, Module

TARGETS = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100a"}

KERNEL = """.version 8.7
.target {target}
.address_size 64
.extern .shared .align 1024 .b8 shared[];
.visible .entry kernel({parameters})
{{
    .reg .pred %p<20>;
    .reg .b16 %h<20>;
    .reg .b32 %r<200>;
    .reg .f32 %f<200>;
    .reg .b64 %rd<40>;
    .reg .f64 %d<20>;
{pointers}
    mov.u32 %r0, %tid.x;
{body}
    ret;
}}
"""


def program(body: str, tensors: int, target: str = "sm_90") -> str:
    """A kernel of so many pointers, which are in %rd1 and so on; %r0 is the thread."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(1, tensors + 1))
    pointers = "\n".join(f"    ld.param.u64 %rd{i}, [p{i}];" for i in range(1, tensors + 1))
    return KERNEL.format(target=TARGETS[target], parameters=parameters, pointers=pointers, body=body)


def run(body: str, *tensors: torch.Tensor, threads: int = 32, target: str = "sm_90", **given: Any) -> Launched:
    """What a launch of the program says."""
    module = Module(program(body, len(tensors), target))
    given = {"grid": 1, "threads": threads, **given}
    return module.launch("kernel", module.packed("kernel", tensors), tensors, **given)


def kinds(launched: Launched) -> set[str]:
    """What its notes are about."""
    return {re.split(", line", note)[0] for note in launched.notes}
