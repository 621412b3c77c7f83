"""Turn a shard of logits into its softmax in place, with the statistics that join the shards.

A shard's softmax is normalised over the shard alone; times sum * exp(max - log Z) it is the shard's
part of the softmax over the whole vocabulary. On a CPU the passes go over a few positions at a
time, which stay in a core's cache from the first pass to the last. On a GPU Triton kernels stand in
for them (megatron_eagle/kernels).

Shape letters: K TTT steps, N target positions, Dp columns of this rank's shard of a vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_eagle.kernels.choice import with_kernel
from megatron_eagle.loss.statistics import ShardStats
from megatron_eagle.parallel.vocab import EMPTY_SHARD_MAX, row_chunks
from megatron_eagle.platform.compiler import compilable, is_compiling

CACHED_BYTES = 2 << 20
_SPAN = 128


def shard_softmax_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn ``logits`` [N, Dp] into their softmax over this shard, in place.

    Returns fp32 [N] each: maximum, sum of exp(z - max), and the position of the maximum (the first
    of equals). An empty shard gives ``EMPTY_SHARD_MAX``, 0 and 0, which vanish in any combination.
    """
    top, sum_exp, _, position = _softmax_(logits.unsqueeze(0), None, False)[:, 0]
    return top, sum_exp, position


def draft_softmax_(logits: Tensor, teacher: Tensor | None, subtract: bool) -> ShardStats:
    """Turn ``logits`` [K, N, Dp] into their softmax over this shard, in place; with ``subtract``
    into softmax minus ``teacher`` [N, Dp] fp32.

    Returns the statistics [K, N], their ``argmax`` as the position in this shard; without a teacher
    the maximum in the place of ``dot``.
    """
    return ShardStats(*_softmax_(logits, teacher, subtract))


@with_kernel("megatron_eagle.kernels.softmax:rescale_")
def rescale_(softmax: Tensor, mass: Tensor, teacher: Tensor, teacher_mass: Tensor) -> None:
    """Turn ``softmax`` [K, N, Dp] into softmax * ``mass`` [K, N] - ``teacher`` [N, Dp] *
    ``teacher_mass`` [N], in place."""
    _, count, columns = softmax.shape
    for step, step_mass in zip(softmax, mass, strict=True):
        for rows in _blocks(count, columns, softmax.is_cuda):
            _rescale_block_(step[rows], step_mass[rows], teacher[rows], teacher_mass[rows])


def _softmax_(logits: Tensor, teacher: Tensor | None, subtract: bool) -> Tensor:
    """Turn logits [K, N, Dp] into their softmax in place; returns the statistics [4, K, N] of
    :func:`_softmax_block_`."""
    if logits.shape[-1]:
        return _by_blocks(logits, teacher, subtract)
    statistics = logits.new_zeros(4, *logits.shape[:2], dtype=torch.float32)
    statistics[0] = EMPTY_SHARD_MAX
    return statistics


@with_kernel("megatron_eagle.kernels.softmax:softmax_")
def _by_blocks(logits: Tensor, teacher: Tensor | None, subtract: bool) -> Tensor:
    """Run :func:`_softmax_block_` over logits [K, N, Dp]; returns its statistics [4, K, N]."""
    steps, count, columns = logits.shape
    statistics = logits.new_empty(4, steps, count, dtype=torch.float32)
    for rows in _blocks(count, columns, logits.is_cuda):
        block_teacher = None if teacher is None else teacher[rows]
        for step in range(steps):
            block = _softmax_block_(logits[step, rows], block_teacher, subtract)
            statistics[:, step, rows] = block
    return statistics


def _blocks(count: int, columns: int, on_gpu: bool) -> list[slice]:
    if on_gpu or is_compiling():
        return [slice(0, count)]
    return row_chunks(count, columns, CACHED_BYTES)


@compilable
def _softmax_block_(logits: Tensor, teacher: Tensor | None, subtract: bool) -> Tensor:
    """Turn ``logits`` [N, Dp] into their softmax in place; returns [4, N] fp32: maximum, sum of
    exp(z - max), Σ teacher z (without a teacher the maximum), position of the maximum."""
    top, index = row_max(logits)
    wide = logits.float()  # fp32 logits themselves
    dot = top if teacher is None else _row_dots(wide, teacher)
    softmax = torch.softmax(wide, -1, out=wide)
    total = softmax.gather(-1, index.unsqueeze(-1)).squeeze(-1).reciprocal()
    if subtract:
        assert teacher is not None
        torch.sub(softmax, teacher, out=logits)
    elif softmax is not logits:
        logits.copy_(softmax)
    return torch.stack([top.float(), total, dot, index.float()])


def _row_dots(rows: Tensor, others: Tensor) -> Tensor:
    """Return the dot product of each row of ``rows`` and ``others`` [N, Dp]: [N]."""
    if rows.is_cuda and not is_compiling():  # there vecdot writes the products and reads them again
        return torch.bmm(rows.unsqueeze(1), others.unsqueeze(2)).flatten()
    return torch.linalg.vecdot(rows, others)


@compilable
def _rescale_block_(softmax: Tensor, mass: Tensor, teacher: Tensor, teacher_mass: Tensor) -> None:
    mass, teacher_mass = mass.unsqueeze(-1), teacher_mass.unsqueeze(-1)
    scaled = softmax.mul_(mass) if softmax.dtype == torch.float32 else softmax * mass
    torch.addcmul(scaled, teacher, teacher_mass, value=-1.0, out=softmax)


def row_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum and its position, the first of equals, of each row of [N, Dp].

    PyTorch's own max with positions is not vectorised on a CPU, its amax is: first the maxima of
    short spans, then the position inside the first best span. The last two spans may overlap.
    """
    columns = logits.shape[-1]
    if logits.is_cuda or is_compiling() or columns < 2 * _SPAN:
        return logits.max(dim=-1)
    count = columns // _SPAN
    maxima = logits[:, : count * _SPAN].unflatten(1, (count, _SPAN)).amax(-1)
    if columns % _SPAN:
        maxima = torch.cat([maxima, logits[:, -_SPAN:].amax(-1, keepdim=True)], dim=1)
    start = (maxima.argmax(-1, keepdim=True) * _SPAN).clamp_(max=columns - _SPAN)
    span = logits.gather(1, start + torch.arange(_SPAN))
    top, inside = span.max(dim=-1)
    return top, start.squeeze(1) + inside
