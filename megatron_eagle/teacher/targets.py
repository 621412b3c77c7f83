"""Teacher targets: what the base predicts at the supervised positions, made once per micro-batch.

Each rank computes its shard only: exponentials over its part of the draft vocabulary, and
streamed statistics over its part of the full vocabulary. What the ranks must tell each other
(five numbers a row) travels with the loss's own statistics, so nothing is sent here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.parallel.vocab import VocabShard, row_chunks, row_statistics


@dataclass(frozen=True)
class TeacherTargets:
    """M target rows on this rank, fp32.

    ``exp_logits`` [M, Dp]: exp(z - max) over this rank's draft ids, max being the shard's own.
    ``statistics`` [M, 5]: over the draft shard max and sum of exp; over the full-vocabulary shard
    max, its id (exact in fp32 below 2**24) and sum of exp.
    """

    exp_logits: Tensor
    statistics: Tensor


class TeacherHead:
    """This rank's frozen rows of the base's output layer, over both vocabularies.

    ``full_weight`` [Vp, H] are the base's own rows without padding; ``draft_weight`` [Dp, H] the
    rows of this rank's draft ids, fetched from their owners once, here (one reduce per rank over
    ``group``), or the same tensor when the draft keeps the whole vocabulary.
    """

    def __init__(
        self, output_weight: Tensor, vocab_size: int, vocab_ids: Tensor, group: ProcessGroup
    ) -> None:
        assert vocab_size < 2**24, "ids travel as fp32"
        weight = output_weight.detach()
        self.full_shard = VocabShard.of(vocab_size, group, weight.shape[0])
        self.full_weight = weight[: self.full_shard.rows]
        self.draft_shard = draft_vocab_shard(vocab_ids.numel(), vocab_size, weight.shape[0], group)
        if vocab_ids.numel() == vocab_size:
            self.draft_weight = self.full_weight
        else:
            self.draft_weight = self._fetch_rows(weight, vocab_ids, group)

    def _fetch_rows(self, weight: Tensor, vocab_ids: Tensor, group: ProcessGroup) -> Tensor:
        padded = self.draft_shard.padded_rows
        mine = weight.new_empty(0)
        for rank, ids in enumerate(vocab_ids.split(padded)):
            local = ids.to(weight.device) - self.full_shard.start
            inside = (local >= 0) & (local < self.full_shard.rows)
            rows = weight[local.clamp(0, weight.shape[0] - 1)] * inside.unsqueeze(-1)
            if group.size() > 1:
                torch.distributed.reduce(rows, group=group, group_dst=rank)
            if rank == group.rank():
                mine = rows
        return mine.view(-1, weight.shape[1])

    @torch.no_grad()
    def targets(self, final_hidden: Tensor) -> TeacherTargets:
        """Targets of ``final_hidden`` [M, H] (after the base's final norm, full rows on every TP
        rank). Logits exist one chunk of rows at a time; ``exp_logits`` is kept, the whole shard
        when the draft keeps the whole vocabulary. No collective."""
        rows = final_hidden.shape[0]
        exp_logits = final_hidden.new_empty(rows, self.draft_weight.shape[0], dtype=torch.float32)
        statistics = final_hidden.new_empty(rows, 5, dtype=torch.float32)
        for chunk in row_chunks(rows, self.full_weight.shape[0]):
            hidden = final_hidden[chunk]
            full_logits = hidden @ self.full_weight.t()
            full = row_statistics(full_logits)
            if self.draft_weight is self.full_weight:
                logits, draft = full_logits, full
            else:
                logits = hidden @ self.draft_weight.t()
                draft = row_statistics(logits)
            torch.exp(logits.float() - draft.max.unsqueeze(-1), out=exp_logits[chunk])
            ids = (full.argmax + self.full_shard.start).float()
            torch.stack(
                [draft.max, draft.sum_exp, full.max, ids, full.sum_exp], -1, out=statistics[chunk]
            )
        return TeacherTargets(exp_logits, statistics)


def draft_vocab_shard(
    draft_size: int, vocab_size: int, base_padded_rows: int, group: ProcessGroup
) -> VocabShard:
    """This rank's shard of the draft vocabulary: the base's own shard when nothing is compressed,
    else ``draft_size`` cut evenly."""
    padded = base_padded_rows if draft_size == vocab_size else None
    return VocabShard.of(draft_size, group, padded)
