"""The loss of a block draft: head, Markov head, vocab-parallel loss and gradient in one function.

As ``soft_cross_entropy.py`` for an unroll, with three differences. Judged rows are a list, so a
chunk holds whole blocks, and the teacher evaluates the targets that these share once. The head is
frozen, and the Markov head's matrix W2 stands beside it: logits = [h ; e] · [Lm | W2]ᵀ is one
product, whose only trained columns are W2's. And a row's loss mixes several (``block_plan.py``).

Shape letters: M judged rows, U targets, Dp this rank's shard of the draft vocabulary, H hidden
size, r rank of the Markov head (0 without one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_eagle.loss import block_shard
from megatron_eagle.loss.block_plan import BlockPlan, BlockValues
from megatron_eagle.loss.block_rows import RowChunk
from megatron_eagle.loss.inputs import Budgets
from megatron_eagle.loss.reduction import (
    Overlap,
    ShardMass,
    reduce_gathered,
    shard_mass,
)
from megatron_eagle.loss.statistics import ShardStats, TeacherStats, gather_statistics
from megatron_eagle.parallel.products import add_outer_, product


class BlockResult(NamedTuple):
    """Result of :func:`block_loss`; all but the first without a gradient, the same on every rank.

    loss []: Σ weight * loss, differentiable in the inputs and W2, once. values: of the M rows.
    """

    loss: Tensor
    values: BlockValues


def block_loss(
    inputs: Tensor, joint: Tensor, markov: Tensor | None, plan: BlockPlan, budgets: Budgets
) -> BlockResult:
    """Return the weighted sum of the rows' losses, and what the rest needs of each row.

    Args:
        inputs: [M, H + r], the rows' normed hidden states and what the Markov head multiplies, full
            on every rank. Its gradient is this rank's partial sum.
        joint: [Dp, H + r], the frozen head's rows and W2's side by side; not differentiated.
        markov: [Dp, r], W2 itself, whose values ``joint`` holds; it gets the gradient.
        plan: rows, teacher, weights.
        budgets: memory limits; they decide whether chunks are kept for backward.

    Collectives over the tensor-parallel group, all in forward: none for one rank; within
    ``budgets`` one all-gather, else one per chunk, of 16 bytes per row (20 with labels) and 20 per
    target; as many all-reduces of 8 bytes per row more, if the acceptance rate is needed.
    """
    keep = (
        plan.gradient
        and not plan.one_rank
        and budgets.allow(inputs.unsqueeze(0), plan.teacher.draft_columns)
    )
    schedule = _Kept if keep else _AtOnce
    total, *values = schedule.apply(inputs, markov, joint, plan)
    return BlockResult(total, BlockValues(*values))


@dataclass(frozen=True)
class _Chunk:
    """Softmaxes of a chunk over this rank's shard, and their statistics.

    draft [rows, Dp]; teacher [targets, Dp] fp32; ``targets`` [rows]: the teacher's row of each.
    """

    where: RowChunk
    draft: Tensor
    teacher: Tensor
    targets: Tensor
    draft_stats: ShardStats
    teacher_stats: TeacherStats

    @classmethod
    def evaluate(cls, inputs: Tensor, joint: Tensor, plan: BlockPlan, where: RowChunk) -> _Chunk:
        teacher, teacher_stats = plan.teacher.rows(where.targets)
        targets = plan.rows.targets[where.rows] - where.targets.start
        draft = product(inputs[where.rows], joint)
        extra = None
        if plan.reads_labels:
            extra = torch.zeros(draft.shape[0], device=draft.device)
            if draft.shape[1]:
                column, inside = plan.rows.local_labels(plan.shard_ids, where.rows)
                extra = draft.gather(1, column.unsqueeze(1)).squeeze(1).float() * inside
            extra = extra.unsqueeze(0)
        stats = block_shard.softmax_(draft, teacher, targets, plan)
        ids = plan.shard_ids
        argmax = ids[stats.argmax.long()].float() if ids.numel() else stats.argmax
        stats = stats._replace(argmax=argmax, extra=extra)
        return cls(where, draft, teacher, targets, stats, teacher_stats)


def _reduce(chunks: Sequence[_Chunk], plan: BlockPlan) -> tuple[BlockValues, ShardMass]:
    """Reduce ``chunks`` together: values and this shard's masses of all their rows."""
    draft = ShardStats.concatenate([chunk.draft_stats for chunk in chunks])
    own = TeacherStats.concatenate([chunk.teacher_stats for chunk in chunks])
    index, before = [], 0
    for chunk in chunks:
        index.append(chunk.targets + before)
        before += chunk.teacher.shape[0]
    targets = torch.cat(index)
    drafts, teachers = gather_statistics(draft, own, plan.group)
    teachers = TeacherStats(*(field[:, targets] for field in teachers))
    rank = 0 if plan.one_rank else plan.group.rank()
    reduced = reduce_gathered(drafts, teachers, rank)
    mass = shard_mass(draft, TeacherStats(*(field[targets] for field in own)), reduced)
    if plan.options.needs_overlap:
        parts, row = [], 0
        for chunk in chunks:
            rows = slice(row, row + chunk.draft.shape[0])
            softmaxes = chunk.draft, chunk.teacher, chunk.targets
            parts.append(block_shard.overlap(*softmaxes, mass.take(rows)))
            row = rows.stop
        overlap = torch.cat(parts, dim=-1)
        if not plan.one_rank:
            torch.distributed.all_reduce(overlap, group=plan.group)
        reduced = replace(reduced, overlap=Overlap(*overlap))
    first, last = chunks[0].where, chunks[-1].where
    whole = RowChunk(
        slice(first.blocks.start, last.blocks.stop),
        slice(first.rows.start, last.rows.stop),
        slice(first.targets.start, last.targets.stop),
    )
    return plan.values(reduced, whole), mass


class _GradientSums:
    """Gradients of the inputs [M, H + r] and of W2 [Dp, r], the latter in fp32 till the end."""

    def __init__(self, inputs: Tensor, joint: Tensor, markov: Tensor | None) -> None:
        self.inputs, self.joint, self.markov = inputs, joint, markov
        self.grad_inputs = torch.empty_like(inputs)
        self.grad_markov = None
        if markov is not None:
            self.grad_markov = torch.zeros_like(markov, dtype=torch.float32)

    def add(self, rows: slice, gradient: Tensor, weight: Tensor) -> None:
        """Add some rows: ``gradient`` on their logits [rows, Dp] times ``weight`` [rows]."""
        weight = weight.to(self.inputs.dtype).unsqueeze(-1)
        torch.mul(product(gradient, self.joint.t()), weight, out=self.grad_inputs[rows])
        if self.markov is not None:
            assert self.grad_markov is not None
            e = self.inputs[rows, -self.markov.shape[1] :] * weight
            add_outer_(self.grad_markov, gradient, e)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Return both in their inputs' dtypes."""
        if self.markov is None or self.grad_markov is None:
            return self.grad_inputs, None
        return self.grad_inputs, self.grad_markov.to(self.markov.dtype)


def _packed(values: Sequence[BlockValues]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(field) for field in zip(*values, strict=True))


class _AtOnce(torch.autograd.Function):
    """The gradient is made in forward, chunk by chunk; no softmax outlives its chunk."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, markov: Tensor | None, joint: Tensor, plan: BlockPlan
    ) -> tuple[Tensor, ...]:
        sums = _GradientSums(inputs, joint, markov) if plan.gradient else None
        results = []
        for where in plan.chunks():
            chunk = _Chunk.evaluate(inputs, joint, plan, where)
            values, mass = _reduce([chunk], plan)
            results.append(values)
            if sums is not None:
                softmaxes = chunk.draft, chunk.teacher, chunk.targets
                label = plan.rows.local_labels(plan.shard_ids, where.rows)
                factor = block_shard.gradient_(*softmaxes, mass, values, plan, label)
                sums.add(where.rows, chunk.draft, values.weight * factor)
                del softmaxes
            del chunk  # its memory is the next chunk's
        if sums is not None:
            ctx.save_for_backward(*sums.finish())
        packed = _packed(results)
        ctx.mark_non_differentiable(*packed)
        return (packed[0] * packed[1]).sum(), *packed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_inputs, grad_markov = ctx.saved_tensors
        if grad_markov is not None:
            grad_markov.mul_(grads[0])
        return grad_inputs.mul_(grads[0]), grad_markov, None, None


class _Kept(torch.autograd.Function):
    """One reduction for all chunks, whose softmaxes are kept for the gradient in backward."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, markov: Tensor | None, joint: Tensor, plan: BlockPlan
    ) -> tuple[Tensor, ...]:
        chunks = [_Chunk.evaluate(inputs, joint, plan, where) for where in plan.chunks()]
        values, mass = _reduce(chunks, plan)
        ctx.plan, ctx.where = plan, [chunk.where for chunk in chunks]
        softmaxes = []
        for chunk in chunks:
            teacher = chunk.teacher if plan.reads_teacher else chunk.teacher.new_empty(0)
            softmaxes += [chunk.draft, teacher, chunk.targets]
        ctx.save_for_backward(inputs, markov, joint, *mass, *values, *softmaxes)
        ctx.mark_non_differentiable(*values)
        return (values.loss * values.weight).sum(), *values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, markov, joint, *rest = ctx.saved_tensors
        mass, values = ShardMass(*rest[:3]), BlockValues(*rest[3:10])
        softmaxes = rest[10:]
        sums = _GradientSums(inputs, joint, markov)
        parts = zip(ctx.where, softmaxes[::3], softmaxes[1::3], softmaxes[2::3], strict=True)
        for where, draft, teacher, targets in parts:
            own = BlockValues(*(field[where.rows] for field in values))
            part = mass.take(where.rows)
            label = ctx.plan.rows.local_labels(ctx.plan.shard_ids, where.rows)
            factor = block_shard.gradient_(draft, teacher, targets, part, own, ctx.plan, label)
            sums.add(where.rows, draft, own.weight * factor * grads[0])
        return *sums.finish(), None, None
