"""Teacher targets: what the base predicts at the supervised positions, made once per micro-batch.

Each rank computes its shard only: a softmax over its part of the draft vocabulary, and statistics
over its part of the full vocabulary. What the ranks must tell each other (five numbers a row)
travels with the loss's own statistics, so nothing is sent here. The loss asks for a chunk of rows
when it needs them, and all its steps use them at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.loss.shard_softmax import shard_softmax_
from megatron_eagle.parallel.vocab import VocabShard
from megatron_eagle.platform.cpu.products import product_fp32


@dataclass(frozen=True)
class TeacherTargets:
    """The base's predictions at M target rows, computed a chunk of rows at a time.

    ``final_hidden`` [M, H]: after the base's final norm, full rows on every TP rank.
    """

    head: TeacherHead
    final_hidden: Tensor

    @property
    def full_columns(self) -> int:
        return self.head.full_shard.padded_rows

    @property
    def draft_columns(self) -> int:
        return self.head.draft_shard.padded_rows

    @torch.no_grad()
    def rows(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Softmax over this rank's draft shard, fp32 [c, Dp], and statistics fp32 [c, 5]: max and
        sum of exp over the draft shard; max, its id (exact in fp32 below 2**24) and sum of exp
        over the full vocabulary's shard. No collective."""
        head, hidden = self.head, self.final_hidden[chunk]
        full = product_fp32(hidden, head.full_weight)
        whole = head.draft_weight is head.full_weight
        draft = full if whole else product_fp32(hidden, head.draft_weight)
        return draft, softmax_and_statistics_(draft, full, head.full_shard.start)


def softmax_and_statistics_(draft: Tensor, full: Tensor, start: int) -> Tensor:
    """``draft`` [c, Dp] fp32 becomes its softmax, in place, and ``full`` [c, Vp], whose first id is
    ``start``, is overwritten; they may be one tensor. Returns the statistics [c, 5] of
    :meth:`TeacherTargets.rows`. No collective."""
    draft_stats = shard_softmax_(draft)
    full_stats = draft_stats if full is draft else shard_softmax_(full)
    ids = full_stats[:, 2:] + start
    return torch.cat([draft_stats[:, :2], full_stats[:, :1], ids, full_stats[:, 1:2]], dim=1)


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

    def targets(self, final_hidden: Tensor) -> TeacherTargets:
        """Targets of ``final_hidden`` [M, H]; nothing is computed yet."""
        return TeacherTargets(self, final_hidden)


def draft_vocab_shard(
    draft_size: int, vocab_size: int, base_padded_rows: int, group: ProcessGroup
) -> VocabShard:
    """This rank's shard of the draft vocabulary: the base's own shard when nothing is compressed,
    else ``draft_size`` cut evenly."""
    padded = base_padded_rows if draft_size == vocab_size else None
    return VocabShard.of(draft_size, group, padded)
