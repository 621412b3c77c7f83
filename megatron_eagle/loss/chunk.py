"""Evaluate a chunk of target positions on this rank's vocabulary shard, reduce it over the shards,
and add up its gradients.

Shape letters: K TTT steps, M target positions of a micro-batch, c positions of a chunk, N positions
of several chunks, H hidden size, Dp this rank's shard of the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_eagle.loss.head_gradient import HeadGradient, no_gradient
from megatron_eagle.loss.inputs import LossPlan
from megatron_eagle.loss.reduction import (
    Overlap,
    ReducedStats,
    ShardMass,
    reduce_shards,
    shard_mass,
    shard_overlap,
)
from megatron_eagle.loss.row_loss import RowValues
from megatron_eagle.loss.shard_softmax import draft_softmax_
from megatron_eagle.loss.statistics import ShardStats, TeacherStats
from megatron_eagle.parallel.products import add_outer_, product


@dataclass(frozen=True)
class ShardChunk:
    """Softmaxes over this rank's shard at c target positions, and their statistics."""

    draft: Tensor
    """[K, c, Dp]; the gradient on the logits already if ``subtracted``."""
    teacher: Tensor
    """[c, Dp] fp32."""
    draft_stats: ShardStats
    teacher_stats: TeacherStats
    subtracted: bool

    @classmethod
    def evaluate(cls, hidden: Tensor, weight: Tensor, plan: LossPlan, chunk: slice) -> ShardChunk:
        """Evaluate the teacher and the head ``weight`` [Dp, H] at the positions ``chunk`` of hidden
        [K, M, H]. No collective."""
        loss, ids = plan.loss, plan.rows.shard_ids
        teacher, teacher_stats = plan.teacher.rows(chunk)  # computed now, in this call
        logits = product(hidden[:, chunk].flatten(0, 1), weight)
        draft = logits.unflatten(0, (hidden.shape[0], -1))
        extra = loss.extra_statistic(draft, teacher) if loss.extra_from == "logits" else None
        # A whole vocabulary's softmax needs no other rank: its gradient is in reach at once.
        subtract = plan.one_rank and plan.gradient and loss.fuses_subtraction
        stats = draft_softmax_(draft, teacher, subtract)
        if loss.extra_from == "softmax":
            extra = loss.extra_statistic(draft, teacher)
        argmax = ids[stats.argmax.long()].float() if ids.numel() else stats.argmax
        stats = stats._replace(argmax=argmax, extra=extra)
        return cls(draft, teacher, stats, teacher_stats, subtract)


@dataclass(frozen=True)
class ReducedChunks:
    """Statistics and losses at the N positions of some chunks, reduced over all shards; and this
    shard's mass, for its gradient."""

    stats: ReducedStats
    mass: ShardMass
    values: RowValues

    @classmethod
    def reduce(cls, chunks: Sequence[ShardChunk], plan: LossPlan) -> ReducedChunks:
        """Reduce all ``chunks`` together: one all-gather over ``plan.group``, and one all-reduce if
        the loss needs the overlap; neither for a single rank."""
        draft = ShardStats.concatenate([chunk.draft_stats for chunk in chunks])
        teacher = TeacherStats.concatenate([chunk.teacher_stats for chunk in chunks])
        stats = reduce_shards(draft, teacher, plan.group)
        mass = shard_mass(draft, teacher, stats)
        if plan.loss.needs_overlap:
            stats = replace(stats, overlap=_overlap(chunks, mass, plan))
        return cls(stats, mass, plan.loss.value(stats))


def _overlap(chunks: Sequence[ShardChunk], mass: ShardMass, plan: LossPlan) -> Overlap:
    """Reduce the overlap at the positions of all ``chunks``, which follow each other."""
    parts, start = [], 0
    for chunk in chunks:
        stop = start + chunk.teacher.shape[0]
        parts.append(shard_overlap(chunk.draft, chunk.teacher, mass.take(slice(start, stop))))
        start = stop
    overlap = torch.cat(parts, dim=-1)
    if not plan.one_rank:
        torch.distributed.all_reduce(overlap, group=plan.group)
    return Overlap(*overlap)


class GradientSums:
    """Gradients of hidden [K, M, H] and head weight [Dp, H]; the weight's, if it needs one, in
    fp32, until :meth:`finish` or in ``elsewhere``. K TTT steps, M target positions, Dp this rank's
    draft vocabulary."""

    def __init__(self, hidden: Tensor, weight: Tensor, elsewhere: HeadGradient | None) -> None:
        self.hidden, self.weight, self.elsewhere = hidden, weight, elsewhere
        self.grad_hidden = torch.empty_like(hidden)
        self.grad_weight: Tensor | None = None
        if elsewhere is not None:
            self.grad_weight = elsewhere.total
        elif weight.requires_grad:
            self.grad_weight = torch.zeros_like(weight, dtype=torch.float32)

    def add(
        self, chunk: slice, grad_logits: Tensor, row_weight: Tensor, scale: Tensor | None = None
    ) -> None:
        """Add the c positions ``chunk``: the gradient of each loss on its logits [K, c, Dp], times
        ``row_weight`` [K, c], and in the weight's times ``scale``. No collective."""
        grad = grad_logits.flatten(0, 1)
        factor = row_weight.to(self.hidden.dtype).unsqueeze(-1)
        out = self.grad_hidden[:, chunk]
        torch.mul(product(grad, self.weight.t()).view_as(out), factor, out=out)
        if self.grad_weight is not None:
            if scale is not None:
                factor = (row_weight * scale).to(self.hidden.dtype).unsqueeze(-1)
            weighted = (self.hidden[:, chunk] * factor).flatten(0, 1)
            add_outer_(self.grad_weight, grad, weighted)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Return both gradients in their parameters' dtypes; the weight's is none, in its shape,
        if it was added elsewhere."""
        if self.elsewhere is not None:
            return self.grad_hidden, no_gradient(self.weight)
        if self.grad_weight is None:
            return self.grad_hidden, None
        return self.grad_hidden, self.grad_weight.to(self.weight.dtype)
