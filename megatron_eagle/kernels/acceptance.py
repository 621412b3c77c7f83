"""The two passes of an acceptance loss (tv, lk-alpha, lk-lambda) over kept softmaxes.

q = softmax * mass is this shard's part of the draft's softmax, p = teacher * mass that of the
base's over the draft vocabulary, P = p * coverage that of the base's whole one.

Shape letters: K TTT steps, N target positions, Dp columns of this rank's shard of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_eagle.kernels.softmax import block_of


def overlap(
    draft: Tensor, teacher: Tensor, mass: Tensor, teacher_mass: Tensor, coverage: Tensor
) -> Tensor:
    """Return [2, K, N] fp32: Σ min(P, q), and Σ q over the tokens where q < P, of this shard.

    draft [K, N, Dp] and teacher [N, Dp] fp32 are softmaxes over the shard; mass [K, N],
    teacher_mass [N], coverage [N]. No collective.
    """
    steps, positions, columns = draft.shape
    assert draft.is_contiguous() and teacher.is_contiguous()
    sums = draft.new_zeros(2, steps, positions, dtype=torch.float32)
    if draft.numel():
        _overlap[(steps * positions,)](
            draft,
            teacher,
            mass.contiguous(),
            (teacher_mass * coverage).contiguous(),
            sums,
            steps * positions,
            positions,
            columns,
            BLOCK=block_of(columns),
            num_warps=8,
        )
    return sums


def acceptance_gradient_(
    draft: Tensor,
    teacher: Tensor,
    mass: Tensor,
    teacher_mass: Tensor,
    coverage: Tensor,
    below: Tensor,
    kl_factor: Tensor,
    alpha_factor: Tensor,
) -> None:
    """Overwrite the softmax ``draft`` with kl_factor (q - p) + alpha_factor q (below - [q < P]).

    ``below``, ``kl_factor`` and ``alpha_factor`` are [K, N]; the others as in :func:`overlap`.
    """
    steps, positions, columns = draft.shape
    assert draft.is_contiguous() and teacher.is_contiguous()
    block = block_of(columns)
    per_row = (x.float().contiguous() for x in (mass, below, kl_factor, alpha_factor))
    if draft.numel():
        _gradient[(steps * positions, triton.cdiv(columns, block))](
            draft,
            teacher,
            *per_row,
            teacher_mass.contiguous(),
            coverage.contiguous(),
            positions,
            columns,
            BLOCK=block,
            num_warps=8,
        )


@triton.jit
def _overlap(draft, teacher, mass, full_mass, sums, rows, positions, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    position = row % positions
    q_mass = tl.load(mass + row)
    p_mass = tl.load(full_mass + position)
    alpha = tl.full((), 0.0, tl.float32)
    below = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        q = tl.load(draft + row * columns + at, mask=inside, other=0.0).to(tl.float32) * q_mass
        full = tl.load(teacher + position * columns + at, mask=inside, other=0.0) * p_mass
        alpha += tl.sum(tl.minimum(q, full), axis=0)
        below += tl.sum(tl.where(q < full, q, 0.0), axis=0)
    tl.store(sums + row, alpha)
    tl.store(sums + rows + row, below)


@triton.jit
def _gradient(
    draft,
    teacher,
    mass,
    below,
    kl_factor,
    alpha_factor,
    teacher_mass,
    coverage,
    positions,
    columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = row % positions
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    q = tl.load(draft + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    q *= tl.load(mass + row)
    p = tl.load(teacher + position * columns + at, mask=inside, other=0.0)
    p *= tl.load(teacher_mass + position)
    full = p * tl.load(coverage + position)
    slope = q * (tl.load(below + row) - tl.where(q < full, 1.0, 0.0))
    grad = tl.load(kl_factor + row) * (q - p) + tl.load(alpha_factor + row) * slope
    tl.store(draft + row * columns + at, grad.to(draft.dtype.element_ty), mask=inside)
