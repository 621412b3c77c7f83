"""The two cross-entropies: against the base's softmax, and against its best token.

Shape letters as in :mod:`megatron_eagle.loss.row_loss`: K TTT steps, N target positions, Dp this
rank's shard of the draft vocabulary, T ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_eagle.loss.reduction import ReducedStats, ShardMass
from megatron_eagle.loss.row_loss import RowLoss, RowValues
from megatron_eagle.loss.shard_softmax import rescale_


class SoftCrossEntropy(RowLoss):
    """-Σ p log q (``kl``): the Kullback-Leibler divergence from p, up to p's own entropy."""

    fuses_subtraction = True

    def value(self, reduced: ReducedStats) -> RowValues:
        return RowValues(reduced.cross_entropy)

    def gradient_(
        self, draft: Tensor, teacher: Tensor, mass: ShardMass, terms: tuple[Tensor, ...]
    ) -> None:
        rescale_(draft, mass.draft, teacher, mass.teacher)


class HardCrossEntropy(RowLoss):
    """-log q of the token that the base likes best among the draft's (``ce``)."""

    extra_from = "logits"

    def extra_statistic(self, draft: Tensor, teacher: Tensor) -> Tensor:
        """Return the draft's logit of the token that the base likes best in this shard."""
        if not teacher.shape[-1]:
            return draft.new_zeros(draft.shape[:-1], dtype=torch.float32)
        best = teacher.argmax(-1).expand(draft.shape[:-1]).unsqueeze(-1)
        return draft.gather(-1, best).squeeze(-1).float()

    def value(self, reduced: ReducedStats) -> RowValues:
        assert reduced.extra is not None
        winner = reduced.teacher_max.argmax(0)  # the first of equals: the lowest id
        steps = reduced.log_z.shape[0]
        logit = reduced.extra.gather(0, winner.expand(1, steps, -1)).squeeze(0)
        return RowValues(reduced.log_z - logit, (winner == reduced.rank,))

    def gradient_(
        self, draft: Tensor, teacher: Tensor, mass: ShardMass, terms: tuple[Tensor, ...]
    ) -> None:
        (is_winner,) = terms
        draft.mul_(mass.draft.unsqueeze(-1))
        if teacher.shape[-1]:
            best = teacher.argmax(-1).expand(draft.shape[:-1]).unsqueeze(-1)
            minus_one = -is_winner.to(draft.dtype).expand(draft.shape[:-1]).unsqueeze(-1)
            draft.scatter_add_(-1, best, minus_one)
