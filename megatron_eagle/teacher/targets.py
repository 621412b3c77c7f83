"""Compute the teacher: the base's predictions at the supervised positions, once per micro-batch.

Each rank computes its shard only: a softmax over its part of the draft vocabulary, and statistics
of both vocabularies, which travel with the loss's own, so that nothing is sent here. The loss pulls
the teacher: :meth:`TeacherHead.targets` computes nothing, and the loss asks for one chunk of target
positions at a time, which all its TTT steps use at once.

Shape letters: M target positions of a micro-batch, c positions of a chunk, H hidden size; Vp and Dp
this rank's shards of the base's and the draft's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.loss.shard_softmax import shard_softmax_
from megatron_eagle.loss.statistics import TeacherStats
from megatron_eagle.parallel.products import product_fp32
from megatron_eagle.parallel.vocab import VocabShard, draft_vocab_shard


@dataclass(frozen=True)
class TeacherTargets:
    """The base's predictions at M target positions, computed when the loss asks for a chunk of them
    (:class:`megatron_eagle.loss.inputs.TeacherRows`).

    ``final_hidden`` [M, H]: after the base's final norm, in full on every TP rank.
    """

    head: TeacherHead
    final_hidden: Tensor

    @property
    def full_columns(self) -> int:
        """Width of the widest shard of the base's vocabulary."""
        return self.head.full_shard.padded_rows

    @property
    def draft_columns(self) -> int:
        """Width of the widest shard of the draft vocabulary."""
        return self.head.draft_shard.padded_rows

    @torch.no_grad()
    def rows(self, chunk: slice) -> tuple[Tensor, TeacherStats]:
        """Compute the softmax over this rank's draft shard, fp32 [c, Dp], and the statistics [c] of
        both shards. Not differentiable; no collective."""
        head, hidden = self.head, self.final_hidden[chunk]
        full = product_fp32(hidden, head.full_weight)
        draft = head.draft_logits(hidden, full)
        return draft, softmax_and_statistics_(draft, full, head.full_shard.start)


def softmax_and_statistics_(draft: Tensor, full: Tensor, start: int) -> TeacherStats:
    """Turn the logits ``draft`` [c, Dp] fp32 into their softmax, in place, and return the
    statistics [c].

    ``full`` [c, Vp], the logits of this rank's base vocabulary, whose first id is ``start``, is
    overwritten; the two may be one tensor. No collective.
    """
    draft_stats = shard_softmax_(draft)
    full_stats = draft_stats if full is draft else shard_softmax_(full)
    full_max, full_sum_exp, position = full_stats
    return TeacherStats(
        max=draft_stats[0],
        sum_exp=draft_stats[1],
        full_max=full_max,
        full_argmax=position + start,
        full_sum_exp=full_sum_exp,
    )


class TeacherHead:
    """This rank's frozen rows of the base's output layer, over both vocabularies.

    ``full_weight`` [Vp, H] are the base's own rows without padding.

    Collective: to fetch the draft's rows from the ranks that hold them, the constructor runs one
    reduce per rank over ``group``, unless the draft keeps the whole vocabulary or
    ``group`` has one rank.
    """

    def __init__(
        self, output_weight: Tensor, vocab_size: int, vocab_ids: Tensor, group: ProcessGroup
    ) -> None:
        assert vocab_size < 2**24, "ids travel as fp32"
        weight = output_weight.detach()
        self.full_shard = VocabShard.of(vocab_size, group, weight.shape[0])
        self.full_weight = weight[: self.full_shard.rows]
        self.draft_shard = draft_vocab_shard(vocab_ids.numel(), vocab_size, weight.shape[0], group)
        self._ids: Tensor | None = None  # columns of this rank's logits
        self._draft_rows: Tensor | None = None
        if vocab_ids.numel() == vocab_size:
            return
        if group.size() == 1:
            self._ids = vocab_ids.to(weight.device)
        else:
            self._draft_rows = self._fetch_rows(weight, vocab_ids, group)

    @property
    def draft_weight(self) -> Tensor:
        """[Dp, H]: the rows of this rank's draft ids, a new copy of them, or ``full_weight`` when
        the draft keeps the whole vocabulary."""
        if self._ids is not None:
            return self.full_weight[self._ids]
        return self.full_weight if self._draft_rows is None else self._draft_rows

    def draft_logits(self, hidden: Tensor, full: Tensor) -> Tensor:
        """Return the logits [c, Dp] fp32 of hidden [c, H] over this rank's draft ids; ``full``
        [c, Vp] are those over its base ids, and the result where the two are the same."""
        if self._ids is not None:
            return full[:, self._ids]  # a hundredth of the time of another product
        return full if self._draft_rows is None else product_fp32(hidden, self._draft_rows)

    def _fetch_rows(self, weight: Tensor, vocab_ids: Tensor, group: ProcessGroup) -> Tensor:
        """Return [Dp, H], the rows of this rank's part of the draft ``vocab_ids``."""
        fetched = weight.new_empty(0)
        for rank, ids in enumerate(vocab_ids.split(self.draft_shard.padded_rows)):
            local = ids.to(weight.device) - self.full_shard.start
            inside = (local >= 0) & (local < self.full_shard.rows)
            rows = weight[local.clamp(0, weight.shape[0] - 1)] * inside.unsqueeze(-1)
            torch.distributed.reduce(rows, group=group, group_dst=rank)
            if rank == group.rank():
                fetched = rows
        return fetched.view(-1, weight.shape[1])

    def targets(self, final_hidden: Tensor) -> TeacherTargets:
        """Return the targets of ``final_hidden`` [M, H]; nothing is computed yet, the loss pulls
        them chunk by chunk."""
        return TeacherTargets(self, final_hidden)
