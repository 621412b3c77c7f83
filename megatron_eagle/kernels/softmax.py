"""Passes over logits: softmax and its statistics in place, and the gradient of a kept softmax.

One program per row reads it twice and writes it once, in fp32 inside, whatever the dtype.

Shape letters: K TTT steps, N target positions, Dp columns of this rank's shard of a vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 8192


def softmax_(logits: Tensor, teacher: Tensor | None, subtract: bool) -> Tensor:
    """Turn ``logits`` [K, N, Dp] into their softmax in place, or softmax minus ``teacher`` [N, Dp]
    fp32; return [4, K, N] fp32: maximum, sum of exp(z - max), Σ teacher z (without a teacher the
    maximum), position of the maximum, the first of equals. Dp > 0. No collective."""
    steps, positions, columns = logits.shape
    assert logits.is_contiguous() and (teacher is None or teacher.is_contiguous())
    statistics = logits.new_empty(4, steps, positions, dtype=torch.float32)
    rows = steps * positions
    if rows:
        _softmax[(rows,)](
            logits,
            logits if teacher is None else teacher,
            statistics,
            rows,
            positions,
            columns,
            HAS_TEACHER=teacher is not None,
            SUBTRACT=subtract,
            BLOCK=block_of(columns),
            num_warps=8,
        )
    return statistics


def rescale_(softmax: Tensor, mass: Tensor, teacher: Tensor, teacher_mass: Tensor) -> None:
    """Turn ``softmax`` [K, N, Dp] into softmax * ``mass`` [K, N] - ``teacher`` [N, Dp] *
    ``teacher_mass`` [N], in place."""
    steps, positions, columns = softmax.shape
    assert softmax.is_contiguous() and teacher.is_contiguous()
    block = block_of(columns)
    if softmax.numel():
        _rescale[(steps * positions, triton.cdiv(columns, block))](
            softmax,
            mass.contiguous(),
            teacher,
            teacher_mass.contiguous(),
            positions,
            columns,
            BLOCK=block,
            num_warps=8,
        )


def block_of(columns: int) -> int:
    """Return how many columns a program works on at a time."""
    return min(_LARGEST_BLOCK, triton.next_power_of_2(columns))


@triton.jit
def _softmax(
    logits,
    teacher,
    statistics,
    rows,
    positions,
    columns,
    HAS_TEACHER: tl.constexpr,
    SUBTRACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = logits + row * columns
    p_row = teacher + (row % positions) * columns
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    dot = tl.full((), 0.0, tl.float32)
    best = tl.full((), 0, tl.int32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        z = tl.load(z_row + at, mask=inside, other=float("-inf")).to(tl.float32)
        block_top = tl.max(z, axis=0)
        block_best = tl.argmax(z, axis=0).to(tl.int32) + start
        best = tl.where(block_top > top, block_best, best)
        new_top = tl.maximum(top, block_top)
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), axis=0)
        top = new_top
        if HAS_TEACHER:
            p = tl.load(p_row + at, mask=inside, other=0.0)
            dot += tl.sum(p * tl.where(inside, z, 0.0), axis=0)
    tl.store(statistics + row, top)
    tl.store(statistics + rows + row, total)
    if HAS_TEACHER:
        tl.store(statistics + 2 * rows + row, dot)
    else:
        tl.store(statistics + 2 * rows + row, top)
    tl.store(statistics + 3 * rows + row, best.to(tl.float32))
    scale = 1.0 / total
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        z = tl.load(z_row + at, mask=inside, other=float("-inf")).to(tl.float32)
        q = tl.exp(z - top) * scale
        if SUBTRACT:
            q -= tl.load(p_row + at, mask=inside, other=0.0)
        tl.store(z_row + at, q.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _rescale(softmax, mass, teacher, teacher_mass, positions, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    position = row % positions
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    q = tl.load(softmax + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(teacher + position * columns + at, mask=inside, other=0.0)
    scaled = q * tl.load(mass + row) - p * tl.load(teacher_mass + position)
    tl.store(softmax + row * columns + at, scaled.to(softmax.dtype.element_ty), mask=inside)
