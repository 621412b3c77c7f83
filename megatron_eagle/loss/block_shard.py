"""Passes over a shard's softmaxes of judged rows, which share the teacher's.

Every judged row has a target, and neighbouring blocks have some in common: the teacher's softmax is
there once a target, not once a row. Passes take some rows at a time, so that what they make beside
the softmaxes is small, and on a CPU stays in a core's cache with these and their targets.

Shape letters: M judged rows, U targets, Dp this rank's shard of the draft vocabulary. Softmaxes are
normalized over the shard; ``ShardMass`` makes them parts of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_eagle.config.block_options import BlockOptions
from megatron_eagle.loss.block_plan import BlockPlan, BlockValues
from megatron_eagle.loss.reduction import ShardMass, shard_overlap
from megatron_eagle.loss.shard_softmax import CACHED_BYTES, draft_softmax_
from megatron_eagle.loss.statistics import ShardStats
from megatron_eagle.parallel.vocab import row_chunks

_GPU_BYTES = 256 << 20


def softmax_(logits: Tensor, teacher: Tensor, targets: Tensor, plan: BlockPlan) -> ShardStats:
    """Turn ``logits`` [M, Dp] into their softmax over this shard, in place; minus the teacher's
    [U, Dp] fp32 of each row's target, ``targets`` [M], if ``plan.subtracts``.

    Returns the statistics [1, M], their ``argmax`` as the position in this shard, and ``dot`` of no
    meaning if the loss does not read it. No collective.
    """
    return ShardStats.concatenate(
        [
            draft_softmax_(
                logits[rows].unsqueeze(0),
                teacher.index_select(0, targets[rows]) if plan.options.kl else None,
                plan.subtracts,
            )
            for rows in _some_rows(logits)
        ]
    )


def overlap(draft: Tensor, teacher: Tensor, targets: Tensor, mass: ShardMass) -> Tensor:
    """Return this shard's part of ``Overlap``, [2, 1, M], from the softmaxes ``draft`` [M, Dp] and
    ``teacher`` [U, Dp]; ``mass`` [1, M] and [M]. No collective."""
    parts = [
        shard_overlap(
            draft[rows].unsqueeze(0), teacher.index_select(0, targets[rows]), mass.take(rows)
        )
        for rows in _some_rows(draft)
    ]
    return torch.cat(parts, dim=-1)


def gradient_(
    draft: Tensor,
    teacher: Tensor,
    targets: Tensor,
    mass: ShardMass,
    values: BlockValues,
    plan: BlockPlan,
    label: tuple[Tensor, Tensor],
) -> Tensor:
    """Overwrite the softmax ``draft`` [M, Dp], as ``softmax_`` left it, and return factors [M]: the
    gradient of each row's loss on this shard's logits is the row times its factor.

    ``label``: the column of each row's token and whether the shard has one. No collective.
    """
    if plan.subtracts:
        return torch.full_like(values.loss, plan.options.kl)
    if plan.one_rank and not plan.reads_teacher and draft.dtype == torch.float32:
        _subtract_label_(draft, label, torch.ones_like(values.loss))
        return plan.options.ce * values.has_label
    for rows in _some_rows(draft):
        part = draft[rows]
        p = teacher.index_select(0, targets[rows]) if plan.reads_teacher else None
        own = BlockValues(*(field[rows] for field in values))
        wide = part.float()  # fp32 softmaxes themselves
        _gradient_(wide, p, mass.take(rows), own, plan.options)
        if plan.options.ce:
            _subtract_label_(
                wide, (label[0][rows], label[1][rows]), plan.options.ce * own.has_label
            )
        if wide is not part:
            part.copy_(wide)
    return torch.ones_like(values.loss)


def _gradient_(
    q: Tensor, p: Tensor | None, mass: ShardMass, values: BlockValues, options: BlockOptions
) -> None:
    """Turn the softmax ``q`` [M, Dp] fp32 into the gradient, all but the label's part, in place;
    ``p``: the teacher's of each row, if the loss reads it."""
    q.mul_(mass.draft[0].unsqueeze(-1))
    factor = options.ce * values.has_label + options.kl
    below = None
    if p is not None and options.l1:
        below = p * (mass.teacher * mass.coverage).unsqueeze(-1)
        below.gt_(q).mul_(q)  # q where it is less than the base's probability, else 0
        factor = factor + 2 * options.l1 * values.below
    q.mul_(factor.unsqueeze(-1))
    if below is not None:
        q.sub_(below, alpha=2 * options.l1)
    if p is not None and options.kl:
        q.addcmul_(p, mass.teacher.unsqueeze(-1), value=-options.kl)


def _subtract_label_(gradient: Tensor, label: tuple[Tensor, Tensor], weight: Tensor) -> None:
    """Subtract ``weight`` [M] from ``gradient`` [M, Dp] where each row's ``label`` is, if the shard
    has it."""
    column, inside = label
    if gradient.shape[1]:
        gradient.scatter_add_(1, column.unsqueeze(1), -(weight * inside).unsqueeze(1))


def _some_rows(softmax: Tensor) -> list[slice]:
    """Return slices of the rows of ``softmax`` [M, Dp], at least one."""
    rows, columns = softmax.shape
    budget = _GPU_BYTES if softmax.is_cuda else CACHED_BYTES
    return row_chunks(rows, columns, budget) or [slice(0, 0)]
