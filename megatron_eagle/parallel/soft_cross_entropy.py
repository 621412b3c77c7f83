"""The loss of all K TTT steps: vocab-parallel soft cross-entropy with one collective.

The loss of step t feeds nothing in step t + 1, so the cross-rank reductions of all steps, and of
the teacher, wait for each other and travel as one all-gather: per row and step a shard's max,
sum of exp, Σ p z and argmax (16 bytes), per target row the teacher's five statistics. Then
log Z and CE = log Z - Σ p z follow everywhere, and so does the gradient on this rank's logits,
w (exp(z - log Z) - p): backward sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.parallel.vocab import (
    combine_argmax,
    combine_log_sum_exp,
    row_chunks,
    row_statistics,
)
from megatron_eagle.platform.compiler import compilable


@dataclass(frozen=True)
class LossRows:
    """What is the same for every rank of a micro-batch's M target rows and K steps.

    ``mask`` [K, M] bool: row supervised at that step. ``step_weights`` [K]. ``shard_ids`` [Dp]:
    base ids of this rank's draft rows. ``in_draft_vocab`` [V] bool, or ``None`` to keep rows whose
    base argmax the draft cannot say.
    """

    mask: Tensor
    step_weights: Tensor
    shard_ids: Tensor
    in_draft_vocab: Tensor | None


def soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    exp_teacher: Tensor,
    teacher_statistics: Tensor,
    rows: LossRows,
    group: ProcessGroup,
    logits_budget: int,
) -> tuple[Tensor, Tensor]:
    """Soft cross-entropy of ``hidden @ weightᵀ`` against the teacher, summed over rows and steps.

    hidden [K, M, H], the normed draft hidden of every step at its target rows, full on every rank
    (its gradient is this rank's partial sum: let it pass through
    ``copy_to_tensor_model_parallel_region`` or a sequence-parallel gather). weight [Dp, H], this
    rank's real head rows. exp_teacher [M, Dp] and teacher_statistics [M, 5] of TeacherTargets.

    Returns the scalar Σ_t w_t Σ_rows CE (differentiable in hidden and weight) and the sums
    [3, K] + 2 flattened, fp32: per step CE, rows and hits (draft argmax = base argmax over the
    full vocabulary); then the base's probability inside the draft vocabulary and its rows.
    One all-gather over ``group`` in forward, none in backward. Logits up to ``logits_budget``
    bytes are kept for backward, otherwise recomputed by chunks.
    """
    return _SoftCrossEntropy.apply(
        hidden, weight, exp_teacher, teacher_statistics, rows, group, logits_budget
    )


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        exp_teacher: Tensor,
        teacher_statistics: Tensor,
        rows: LossRows,
        group: ProcessGroup,
        logits_budget: int,
    ) -> tuple[Tensor, Tensor]:
        steps, count, width = hidden.shape
        flat = hidden.reshape(-1, width)
        keep = 4 * flat.shape[0] * weight.shape[0] <= logits_budget
        local, kept = _local_statistics(flat, weight, exp_teacher, rows.shard_ids, keep)
        local, teacher = _gather(local, teacher_statistics, group)
        merged = _combine(local.unflatten(1, (steps, count)), teacher)
        mask = rows.mask
        if rows.in_draft_vocab is not None:
            mask = mask & rows.in_draft_vocab[merged.teacher_argmax]
        row_weight = mask * rows.step_weights.unsqueeze(-1)
        sums = _sums(merged, mask, rows.mask[0])
        # p = exp_teacher * scale: this shard's exponentials over the whole draft vocabulary's sum.
        scale = (teacher_statistics[:, 0] - merged.teacher_log_z).exp()
        ctx.save_for_backward(flat, weight, exp_teacher, scale, merged.log_z, row_weight, *kept)
        ctx.steps = steps
        ctx.mark_non_differentiable(sums)
        return (merged.cross_entropy * row_weight).sum(), sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, exp_teacher, scale, log_z, row_weight, *kept = ctx.saved_tensors
        steps, count = row_weight.shape
        scaled = (row_weight * grads[0]).flatten()
        log_z = log_z.flatten()
        grad_hidden = torch.empty_like(flat)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for chunk in _step_chunks(steps, count, weight.shape[0]):
            rows = slice(chunk.start % count, chunk.start % count + chunk.stop - chunk.start)
            logits = kept[0][chunk] if kept else flat[chunk] @ weight.t()
            grad = _logit_gradient(
                logits, log_z[chunk], exp_teacher[rows], scale[rows], scaled[chunk]
            ).to(weight.dtype)
            torch.mm(grad, weight, out=grad_hidden[chunk])
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), flat[chunk])
            else:  # chunks add up in fp32
                grad_weight += grad.t() @ flat[chunk]
        grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden.view(steps, count, -1), grad_weight, None, None, None, None, None


@dataclass(frozen=True)
class _Merged:
    """Statistics over all shards: [K, M] each, the teacher's [M]."""

    cross_entropy: Tensor
    log_z: Tensor
    hit: Tensor
    teacher_log_z: Tensor
    teacher_argmax: Tensor
    teacher_coverage: Tensor


def _step_chunks(steps: int, count: int, columns: int) -> list[slice]:
    """Chunks of the flattened [K * M] rows that never span two steps."""
    return [
        slice(t * count + c.start, t * count + c.stop)
        for t in range(steps)
        for c in row_chunks(count, columns)
    ]


def _local_statistics(
    flat: Tensor, weight: Tensor, exp_teacher: Tensor, shard_ids: Tensor, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """[K * M, 4] of this shard (max, sum of exp, Σ exp_teacher z, id of max), and the logits
    if they are to be kept."""
    count = exp_teacher.shape[0]
    steps = flat.shape[0] // max(1, count)
    local = flat.new_empty(flat.shape[0], 4, dtype=torch.float32)
    kept = [flat.new_empty(flat.shape[0], weight.shape[0])] if keep else []
    for chunk in _step_chunks(steps, count, weight.shape[0]):
        rows = slice(chunk.start % count, chunk.start % count + chunk.stop - chunk.start)
        if keep:
            logits = torch.mm(flat[chunk], weight.t(), out=kept[0][chunk])
        else:
            logits = flat[chunk] @ weight.t()
        own = row_statistics(logits)
        dot = _teacher_dot(logits, exp_teacher[rows])
        ids = shard_ids[own.argmax] if shard_ids.numel() else own.argmax
        torch.stack([own.max, own.sum_exp, dot, ids.float()], -1, out=local[chunk])
    return local, kept


@compilable
def _teacher_dot(logits: Tensor, exp_teacher: Tensor) -> Tensor:
    return (logits.float() * exp_teacher).sum(-1)


@compilable
def _logit_gradient(
    logits: Tensor, log_z: Tensor, exp_teacher: Tensor, scale: Tensor, row_weight: Tensor
) -> Tensor:
    q = (logits.float() - log_z.unsqueeze(-1)).exp()
    return (q - exp_teacher * scale.unsqueeze(-1)) * row_weight.unsqueeze(-1)


def _gather(local: Tensor, teacher: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """[K * M, 4] and [M, 5] of every rank as [T, K * M, 4] and [T, M, 5]: one all-gather."""
    if group.size() == 1:
        return local.unsqueeze(0), teacher.unsqueeze(0)
    payload = torch.cat([local.flatten(), teacher.flatten()])
    received = payload.new_empty(group.size() * payload.numel())
    torch.distributed.all_gather_into_tensor(received, payload, group=group)
    received = received.view(group.size(), -1)
    mine, theirs = received.split([local.numel(), teacher.numel()], dim=1)
    return mine.unflatten(1, local.shape), theirs.unflatten(1, teacher.shape)


def _combine(local: Tensor, teacher: Tensor) -> _Merged:
    """From [T, K, M, 4] and [T, M, 5]."""
    maxima, sums, dots, ids = local.unbind(-1)
    draft_max, draft_sum, full_max, full_id, full_sum = teacher.unbind(-1)
    log_z = combine_log_sum_exp(maxima, sums)
    teacher_log_z = combine_log_sum_exp(draft_max, draft_sum)
    dot = (dots * (draft_max - teacher_log_z).exp().unsqueeze(1)).sum(0)
    teacher_argmax = combine_argmax(full_max, full_id)
    full_log_z = combine_log_sum_exp(full_max, full_sum)
    return _Merged(
        cross_entropy=log_z - dot,
        log_z=log_z,
        hit=combine_argmax(maxima, ids) == teacher_argmax,
        teacher_log_z=teacher_log_z,
        teacher_argmax=teacher_argmax,
        teacher_coverage=(teacher_log_z - full_log_z).exp(),
    )


def _sums(merged: _Merged, mask: Tensor, first_rows: Tensor) -> Tensor:
    """``first_rows`` [M]: targets of rows that step 0 has here; the others are another rank's."""
    per_step = torch.stack(
        [(merged.cross_entropy * mask).sum(-1), mask.sum(-1), (merged.hit & mask).sum(-1)]
    )
    coverage = torch.stack([(merged.teacher_coverage * first_rows).sum(), first_rows.sum()])
    return torch.cat([per_step.flatten(), coverage])
