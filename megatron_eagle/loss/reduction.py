"""From the statistics of vocabulary shards to losses, accuracies and log Z: one all-gather.

A shard's own statistics, fp32: of the draft ``local`` [K, N, 4] max, sum of exp(z - max), Σ p z
(p the teacher's softmax over the shard) and the base id of the max, and what a loss adds (see
:mod:`megatron_eagle.loss.row_losses`); of the teacher [N, 5] max and
sum of exp over the draft shard, and max, its id and sum of exp over the full vocabulary's shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.parallel.vocab import combine_argmax, combine_log_sum_exp


@dataclass(frozen=True)
class Reduced:
    """Over all shards: [K, N] each, the teacher's [N]; and of each of T shards what losses other
    than the soft cross-entropy need: ``teacher_max`` [T, N], ``added`` [T, K, N], and the
    logarithms of its share of both softmaxes, [T, K, N] and [T, N]."""

    cross_entropy: Tensor
    log_z: Tensor
    hit: Tensor
    teacher_log_z: Tensor
    teacher_argmax: Tensor
    teacher_coverage: Tensor
    teacher_max: Tensor
    added: Tensor | None
    draft_log_shares: Tensor
    teacher_log_shares: Tensor

    def sums(self, value: Tensor, mask: Tensor, first_rows: Tensor) -> Tensor:
        """The metrics [3 * K + 2] of the rows of ``mask`` [K, N]: loss, rows and hits of each step;
        then the base's probability inside the draft vocabulary, and its rows, those of
        ``first_rows`` [N], the targets of step 0 (the others may be another rank's)."""
        per_step = torch.stack([(value * mask).sum(-1), mask.sum(-1), (self.hit & mask).sum(-1)])
        coverage = [(self.teacher_coverage * first_rows).sum(), first_rows.sum()]
        return torch.cat([per_step.flatten(), torch.stack(coverage)])


def reduce_shards(local: Tensor, teacher: Tensor, group: ProcessGroup) -> Reduced:
    """Join all shards: one all-gather over ``group``, none for a single rank."""
    locals_, teachers = _gather(local, teacher, group)
    maxima, sums, dots, ids, *added = locals_.unbind(-1)
    draft_max, draft_sum, full_max, full_id, full_sum = teachers.unbind(-1)
    log_z = combine_log_sum_exp(maxima, sums)
    teacher_log_z = combine_log_sum_exp(draft_max, draft_sum)
    teacher_log_shares = _log_shares(draft_max, draft_sum, teacher_log_z)
    share = teacher_log_shares.exp()
    teacher_argmax = combine_argmax(full_max, full_id)
    return Reduced(
        cross_entropy=log_z - (dots * share.unsqueeze(1)).sum(0),
        log_z=log_z,
        hit=combine_argmax(maxima, ids) == teacher_argmax,
        teacher_log_z=teacher_log_z,
        teacher_argmax=teacher_argmax,
        teacher_coverage=(teacher_log_z - combine_log_sum_exp(full_max, full_sum)).exp(),
        teacher_max=draft_max,
        added=added[0] if added else None,
        draft_log_shares=_log_shares(maxima, sums, log_z),
        teacher_log_shares=teacher_log_shares,
    )


def _log_shares(maxima: Tensor, sums: Tensor, log_z: Tensor) -> Tensor:
    """Finite for empty shards too, whose share is then 0 in fp32."""
    return sums.clamp_min(1.0).log() + maxima - log_z  # a shard's own max adds 1 to its sum


def shard_shares(local: Tensor, teacher: Tensor, reduced: Reduced) -> tuple[Tensor, Tensor]:
    """What this shard's softmaxes are multiplied with to be parts of the whole: [K, N] and [N]."""
    draft = local[..., 1] * (local[..., 0] - reduced.log_z).exp()
    return draft, teacher[:, 1] * (teacher[:, 0] - reduced.teacher_log_z).exp()


def _gather(local: Tensor, teacher: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """[K, N, n] and [N, 5] of every rank as [T, K, N, n] and [T, N, 5]."""
    if group.size() == 1:
        return local.unsqueeze(0), teacher.unsqueeze(0)
    payload = torch.cat([local.flatten(), teacher.flatten()])
    received = payload.new_empty(group.size() * payload.numel())
    torch.distributed.all_gather_into_tensor(received, payload, group=group)
    received = received.view(group.size(), -1)
    mine, theirs = received.split([local.numel(), teacher.numel()], dim=1)
    return mine.unflatten(1, local.shape), theirs.unflatten(1, teacher.shape)
