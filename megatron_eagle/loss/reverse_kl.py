"""The reverse Kullback-Leibler divergence.

Shape letters as in :mod:`megatron_eagle.loss.row_loss`: K TTT steps, N target positions, Dp this
rank's shard of the draft vocabulary, T ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_eagle.loss.reduction import ReducedStats, ShardMass
from megatron_eagle.loss.row_loss import TINY, RowLoss, RowValues


class ReverseKL(RowLoss):
    """Σ q log(q / p) (``reverse-kl``). A p below the least normal fp32 number counts as it."""

    extra_from = "softmax"

    def extra_statistic(self, draft: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence between the two softmaxes of this shard alone.

        With the shard's mass r under q and t under p, the whole divergence is
        Σ r (divergence + log r - log t) over the shards.
        """
        log_p = teacher.clamp_min(TINY).log()
        divergences = [(q * (q.clamp_min(TINY).log() - log_p)).sum(-1) for q in draft.float()]
        return torch.stack(divergences)

    def value(self, reduced: ReducedStats) -> RowValues:
        assert reduced.extra is not None
        log_r, log_t = reduced.draft_log_mass, reduced.teacher_log_mass
        inside = reduced.extra + log_r - log_t.unsqueeze(1)
        loss = (log_r.exp() * inside).sum(0)
        return RowValues(loss, (log_r[reduced.rank] - log_t[reduced.rank] - loss,))

    def gradient_(
        self, draft: Tensor, teacher: Tensor, mass: ShardMass, terms: tuple[Tensor, ...]
    ) -> None:
        (offsets,) = terms
        log_p = teacher.clamp_min(TINY).log()
        for step, step_mass, offset in zip(draft, mass.draft, offsets, strict=True):
            softmax = step.float()
            log_q = softmax.clamp_min(TINY).log()
            log_ratio = log_q - log_p + offset.unsqueeze(-1)
            step.copy_(softmax * step_mass.unsqueeze(-1) * log_ratio)
