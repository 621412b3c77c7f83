"""Run the package's step on given base logits, as the peers' steps do: the same work for all.

The package has no such path: a Megatron base stops before its output layer, and the teacher
computes the positions that the loss asks for. Here the product is left out, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:  # importing Megatron waits for platform.enable()
    from megatron_eagle.loss.statistics import TeacherStats
    from megatron_eagle.model import EagleGPTModel
    from megatron_eagle.objective.batch import EagleBatch


@dataclass(frozen=True)
class GivenLogits:
    """Teacher of one rank that reads ``logits`` [S * B, V] at ``target_rows`` [M]."""

    logits: Tensor
    target_rows: Tensor
    vocab_ids: Tensor

    @property
    def full_columns(self) -> int:
        return self.logits.shape[1]

    @property
    def draft_columns(self) -> int:
        return self.vocab_ids.numel()

    def rows(self, chunk: slice) -> tuple[Tensor, TeacherStats]:
        """Return what ``TeacherTargets.rows`` returns, without the product."""
        from megatron_eagle.teacher.targets import softmax_and_statistics_

        full = self.logits[self.target_rows[chunk]].float()
        same = self.draft_columns == self.full_columns
        draft = full if same else full[:, self.vocab_ids]
        return draft, softmax_and_statistics_(draft, full, 0)


def give_logits(model: EagleGPTModel, batch: EagleBatch) -> Tensor:
    """Let ``model`` read the base's logits for ``batch``, and return them, [S * B, V]."""
    hidden = model.base(batch.tokens, batch.packing).final_hidden.flatten(0, 1)
    logits = hidden @ model.base.output_weight.t()
    teacher = GivenLogits(logits, batch.target_rows, model.draft.vocab_ids)
    model.teach = lambda *_: teacher  # type: ignore[method-assign, assignment, return-value]
    return logits
