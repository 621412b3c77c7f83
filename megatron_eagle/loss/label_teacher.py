"""A teacher that says the data's tokens, for drafts trained and measured on these alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.loss.statistics import TeacherStats


@dataclass(frozen=True)
class LabelTeacher:
    """``TeacherRows`` of U targets whose best token is the data's, ``labels`` [U].

    It has no softmax and multiplies nothing: its statistics are those of logits 0 at the label and
    of nothing elsewhere, on every rank. ``draft_columns``: as wide as the draft's logits are.
    """

    labels: Tensor
    draft_columns: int
    full_columns: int = 0

    def rows(self, chunk: slice) -> tuple[Tensor, TeacherStats]:
        """Return an empty softmax [c, 0], which no loss reads, and the statistics [c]."""
        best = self.labels[chunk].float()
        zero, one = torch.zeros_like(best), torch.ones_like(best)
        return best.new_empty(len(best), 0), TeacherStats(zero, one, zero, best, one)
