"""Additive coupling in one pass: y = x + t (or - t) on the transformed elements, y = x on the others."""

# mypy: allow-untyped-defs
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from flowkern._core.op import KERNELS
from flowkern._core.split import SPLITS

from ._coupling import DTYPES, FORMS, Grid, Launch, Strides, example, example_split, grid, keeps, locate, sample_strides, tile
from .lang import narrow

__all__ = ["forward"]


@triton.jit(do_not_specialize=["B"])
def forward_kernel(
    p_x, p_shift, p_place, p_y,
    B, N, C, H, W, kept, n_tiles,
    x_b, x_c, x_h, x_w, t_b, t_c, t_h, t_w,
    SPLIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, LINEAR: tl.constexpr, SKIP: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, ELEMENTS: tl.constexpr, INVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    CHECKERBOARD: tl.constexpr = SPLIT == "checkerboard" or SPLIT == "checkerboard_swap"
    i_b, m_b, n, m_n, i_tile = tile(B, N, n_tiles, ROWS, ELEMENTS, WIDE)
    c, h, w, m_moved_n, place = locate(n, m_n, C, H, W, kept, p_place, SPLIT, CHANNELS_LAST)
    m_inside, m_moved = m_b & m_n, m_b & m_moved_n  # [ROWS, ELEMENTS]

    o_x = n if LINEAR else c * x_c + h * x_h + w * x_w
    o_shift = n * t_w if CHECKERBOARD and LINEAR else place * t_c + h * t_h + w * t_w
    b_x = tl.load(p_x + i_b * x_b + o_x, mask=m_inside, other=0.0)
    if SKIP and keeps(i_tile, N, H, W, kept, SPLIT, ELEMENTS, WIDE):
        tl.store(p_y + i_b * N + n, b_x, mask=m_inside)
        return
    shift = tl.load(p_shift + i_b * t_b + o_shift, mask=m_inside if CHECKERBOARD else m_moved, other=0.0).to(ACC)
    out = b_x.to(ACC) - shift if INVERSE else b_x.to(ACC) + shift
    tl.store(p_y + i_b * N + n, tl.where(m_moved, narrow(out, b_x.dtype), b_x), mask=m_inside)


@functools.lru_cache(maxsize=4096)
def _grid(
    shape: tuple[int, ...], channels_last: bool, double: bool, x: Strides, shift: Strides, moved: int, split: int, inverse: bool
) -> Grid:
    how = grid(shape, channels_last, double, split, moved, [sample_strides(x)], [sample_strides(shift)])
    return replace(how, keywords={**how.keywords, "INVERSE": inverse})


def _launch(
    x: torch.Tensor, shift: torch.Tensor, place: torch.Tensor | None, split: int, inverse: bool, y: torch.Tensor
) -> Launch:
    double = torch.float64 in (x.dtype, shift.dtype)
    how = _grid(x.shape, not y.is_contiguous(), double, x.stride(), shift.stride(), shift.shape[1], split, inverse)
    return Launch(forward_kernel, (x, shift, place, y), how)


def forward(x: torch.Tensor, shift: torch.Tensor, *rest: Any) -> None:
    """``flowkern::additive_coupling``: fills y."""
    if x.numel() > 0:
        _launch(x, shift, *rest).run()


FACTORS = {"split": (*SPLITS, "mask"), "inverse": (False, True), "dtypes": tuple(DTYPES), "form": tuple(FORMS)}


def compile_cases(split: str, inverse: bool, dtypes: str, form: str) -> Iterator[tuple[str, Launch]]:
    """The launches (named) of one choice from FACTORS."""
    shape, code, place, moved = example_split(split, form)
    x = example(shape, DTYPES[dtypes][0], form)
    shift = example((shape[0], moved, *shape[2:]), DTYPES[dtypes][1], form)
    yield "forward", _launch(x, shift, place, code, inverse, KERNELS["additive_coupling"].outputs(x))
