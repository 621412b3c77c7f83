"""Our step with the base's logits given, as the peers' are: the same work as theirs.

The package has no such path: a Megatron base stops before its output layer, and the teacher makes
the rows that the loss asks for. Here the product is left out, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:  # only the ranks import Megatron
    from benchmarks.draft_step import DraftStep


@dataclass(frozen=True)
class GivenLogits:
    """A teacher of one rank that reads ``logits`` [R, V] at ``target_rows`` [M]."""

    logits: Tensor
    target_rows: Tensor
    vocab_ids: Tensor

    @property
    def full_columns(self) -> int:
        return self.logits.shape[1]

    @property
    def draft_columns(self) -> int:
        return self.vocab_ids.numel()

    def rows(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """As :meth:`megatron_eagle.teacher.targets.TeacherTargets.rows`."""
        from megatron_eagle.teacher.targets import softmax_and_statistics_

        full = self.logits[self.target_rows[chunk]].float()
        whole = self.draft_columns == self.full_columns
        draft = full if whole else full[:, self.vocab_ids]
        return draft, softmax_and_statistics_(draft, full, 0)


def give_logits(step: DraftStep) -> Tensor:
    """Let ``step`` read the base's logits; they are returned, [S * B, V]."""
    model, batch = step.model, step.batch
    rows = model.base(batch.tokens, batch.packing).final_hidden.flatten(0, 1)
    logits = rows @ model.base.output_weight.t()
    teacher = GivenLogits(logits, batch.target_rows, model.draft.vocab_ids)
    model.targets = lambda *_: (teacher, rows)  # type: ignore[method-assign, assignment]
    return logits
