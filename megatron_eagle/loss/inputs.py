"""Hold what the fused loss reads: the teacher, masks and weights, memory limits.

Shape letters: K TTT steps, M target positions of a micro-batch, c positions of a chunk, H hidden
size, V the base's vocabulary, Dp this rank's shard of the draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.loss.head_gradient import HeadGradient
from megatron_eagle.loss.reduction import ReducedStats
from megatron_eagle.loss.row_loss import RowLoss
from megatron_eagle.loss.statistics import TeacherStats
from megatron_eagle.parallel.vocab import even_chunks


class TeacherRows(Protocol):
    """The teacher at the M target positions, computed chunk by chunk when the loss asks for it.

    The loss *pulls* the teacher: whoever builds this object has computed nothing yet. Only the loss
    knows how many positions fit the memory, and all TTT steps use a chunk at once, so logits as
    wide as the vocabulary exist for one chunk at a time.
    :class:`megatron_eagle.teacher.targets.TeacherTargets` computes them from the base's hidden.
    """

    @property
    def full_columns(self) -> int:
        """Width of the widest shard of the full vocabulary: chunks must be equal on all ranks."""
        ...

    @property
    def draft_columns(self) -> int:
        """Width of the widest shard of the draft vocabulary on any rank."""
        ...

    def rows(self, chunk: slice) -> tuple[Tensor, TeacherStats]:
        """Compute the softmax over this rank's draft shard, fp32 [c, Dp], and the statistics [c] of
        this rank's shards of both vocabularies, at the target positions ``chunk``. No
        collective; called once for each chunk."""
        ...


@dataclass(frozen=True)
class LossRows:
    """Masks and weights of the M target positions, identical on all tensor-parallel ranks but for
    ``shard_ids``."""

    mask: Tensor
    """[K, M] bool: the target is supervised at that TTT step."""
    step_weights: Tensor
    """[K]."""
    shard_ids: Tensor
    """[Dp]: base ids of this rank's draft vocabulary."""
    in_draft_vocab: Tensor | None
    """[V] bool, to leave out positions whose base argmax the draft cannot say; ``None`` keeps
    them."""


@dataclass(frozen=True)
class Budgets:
    """Memory limits in bytes per rank.

    ``logits`` and ``teacher``: what draft logits and teacher targets may take between forward and
    backward in the *kept* schedule. ``chunk``: what those of one chunk may take; by default as much
    as the device's products need to be fast. It must be the same on every rank.
    """

    logits: int
    teacher: int
    chunk: int | None = None

    def allow(self, hidden: Tensor, columns: int) -> bool:
        """Tell whether a whole micro-batch may be kept; hidden [K, M, H]."""
        steps, count, _ = hidden.shape
        logits = steps * count * columns * hidden.element_size()
        return logits <= self.logits and teacher_bytes(count, columns) <= self.teacher


def teacher_bytes(targets: int, columns: int) -> int:
    """Return how many bytes the teacher's fp32 softmax of ``targets`` positions takes on a rank."""
    return 4 * targets * columns


@dataclass(frozen=True)
class LossPlan:
    """All that a schedule needs beside the draft's hidden and head. ``gradient``: whether one is
    wanted; ``head_gradient``: where the head's goes, if not to autograd."""

    teacher: TeacherRows
    rows: LossRows
    group: ProcessGroup
    loss: RowLoss
    gradient: bool
    chunk_bytes: int
    head_gradient: HeadGradient | None = None

    @property
    def one_rank(self) -> bool:
        """Whether this rank has the whole vocabulary."""
        return self.group.size() == 1

    def chunks(self, hidden: Tensor) -> list[slice]:
        """Cut the M target positions of hidden [K, M, H] into equal chunks, the same on every
        rank."""
        steps, count, _ = hidden.shape
        bytes_each = 4 * (steps * self.teacher.draft_columns + self.teacher.full_columns)
        return even_chunks(count, self.chunk_bytes // bytes_each)

    def mask_and_weight(self, reduced: ReducedStats, chunk: slice) -> tuple[Tensor, Tensor]:
        """Return the mask (bool) and the weight of each position and step, [K, c]."""
        mask = self.rows.mask[:, chunk]
        if self.rows.in_draft_vocab is not None:
            mask = mask & self.rows.in_draft_vocab[reduced.teacher_argmax]
        return mask, mask * self.rows.step_weights.unsqueeze(-1)
