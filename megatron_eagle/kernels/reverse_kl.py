"""The two passes of the reverse Kullback-Leibler divergence over kept softmaxes.

Shape letters: K TTT steps, N target positions, Dp columns of this rank's shard of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_eagle.kernels.softmax import block_of

_LEAST = tl.constexpr(torch.finfo(torch.float32).tiny)
"""A smaller probability counts as this one, where its logarithm is taken."""


def divergence(draft: Tensor, teacher: Tensor) -> Tensor:
    """Return Σ q (log q - log p) of this shard's softmaxes q = ``draft`` [K, N, Dp] and p =
    ``teacher`` [N, Dp] fp32: [K, N] fp32. No collective."""
    steps, positions, columns = draft.shape
    assert draft.is_contiguous() and teacher.is_contiguous()
    sums = draft.new_zeros(steps, positions, dtype=torch.float32)
    if draft.numel():
        _divergence[(steps * positions,)](
            draft, teacher, sums, positions, columns, BLOCK=block_of(columns), num_warps=8
        )
    return sums


def gradient_(draft: Tensor, teacher: Tensor, mass: Tensor, offset: Tensor) -> None:
    """Overwrite the softmax q = ``draft`` with q * ``mass`` (log q - log p + ``offset``), both
    [K, N]; the others as in :func:`divergence`."""
    steps, positions, columns = draft.shape
    assert draft.is_contiguous() and teacher.is_contiguous()
    block = block_of(columns)
    if draft.numel():
        _gradient[(steps * positions, triton.cdiv(columns, block))](
            draft,
            teacher,
            mass.contiguous(),
            offset.contiguous(),
            positions,
            columns,
            BLOCK=block,
            num_warps=8,
        )


@triton.jit
def _divergence(draft, teacher, sums, positions, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        q = tl.load(draft + row * columns + at, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(teacher + (row % positions) * columns + at, mask=inside, other=0.0)
        ratio = tl.log(tl.maximum(q, _LEAST)) - tl.log(tl.maximum(p, _LEAST))
        total += tl.sum(q * ratio, axis=0)
    tl.store(sums + row, total)


@triton.jit
def _gradient(draft, teacher, mass, offset, positions, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    q = tl.load(draft + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(teacher + (row % positions) * columns + at, mask=inside, other=0.0)
    ratio = tl.log(tl.maximum(q, _LEAST)) - tl.log(tl.maximum(p, _LEAST))
    grad = q * tl.load(mass + row) * (ratio + tl.load(offset + row))
    tl.store(draft + row * columns + at, grad.to(draft.dtype.element_ty), mask=inside)
