"""The reverse Kullback-Leibler divergence.

Shape letters as in :mod:`megatron_eagle.loss.row_loss`: K TTT steps, N target positions, Dp this
rank's shard of the draft vocabulary, T ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_eagle.kernels.choice import with_kernel
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
        return _divergence(draft, teacher)

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
        _gradient_(draft, teacher, mass.draft, offsets)


@with_kernel("megatron_eagle.kernels.reverse_kl:divergence")
def _divergence(draft: Tensor, teacher: Tensor) -> Tensor:
    """Return Σ q (log q - log p) [K, N] fp32 of this shard's softmaxes."""
    log_p = teacher.clamp_min(TINY).log()
    divergences = [(q * (q.clamp_min(TINY).log() - log_p)).sum(-1) for q in draft.float()]
    return torch.stack(divergences)


@with_kernel("megatron_eagle.kernels.reverse_kl:gradient_")
def _gradient_(draft: Tensor, teacher: Tensor, mass: Tensor, offset: Tensor) -> None:
    """Overwrite the softmax q = ``draft`` with q * mass (log q - log p + offset), [K, N] each."""
    log_p = teacher.clamp_min(TINY).log()
    for step, step_mass, step_offset in zip(draft, mass, offset, strict=True):
        softmax = step.float()
        log_ratio = softmax.clamp_min(TINY).log() - log_p + step_offset.unsqueeze(-1)
        step.copy_(softmax * step_mass.unsqueeze(-1) * log_ratio)
