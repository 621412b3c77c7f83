"""Hold the statistics of one vocabulary shard, and gather those of all shards.

Softmax over a cut vocabulary needs each shard's maximum and sum of exponentials; the ranks exchange
them, and what a loss adds, in one all-gather for all TTT steps and the teacher.

Shape letters: T ranks (shards), K TTT steps, N target positions. All statistics are fp32, token ids
included: they are exact below 2**24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.parallel.collectives import all_gather


class ShardStats(NamedTuple):
    """Statistics of the draft's logits z on a vocabulary shard: [K, N], of all shards [T, K, N]."""

    max: Tensor
    """Maximum of z."""
    sum_exp: Tensor
    """Sum of exp(z - max)."""
    dot: Tensor
    """Σ p z, where p is the teacher's softmax over the shard."""
    argmax: Tensor
    """Base id of the maximum, the lowest of equals."""
    extra: Tensor | None = None
    """The loss's own statistic, see :class:`megatron_eagle.loss.row_loss.RowLoss`."""

    @classmethod
    def concatenate(cls, chunks: Sequence[Self]) -> Self:
        """Join the statistics of consecutive chunks of target positions."""
        fields = zip(*(chunk[:4] for chunk in chunks), strict=True)
        top, sum_exp, dot, argmax = (torch.cat(parts, -1) for parts in fields)
        extras = [chunk.extra for chunk in chunks if chunk.extra is not None]
        return cls(top, sum_exp, dot, argmax, torch.cat(extras, -1) if extras else None)

    def pack(self) -> Tensor:
        """Return [4, K, N], or [5, K, N] with ``extra``: what a rank sends."""
        return torch.stack([field for field in self if field is not None])

    @classmethod
    def unpack(cls, packed: Tensor) -> Self:
        """Return the fields [T, K, N] of every rank's :meth:`pack`, [T, 4 or 5, K, N]."""
        return cls(*packed.unbind(1))


class TeacherStats(NamedTuple):
    """Statistics of the teacher's logits on a vocabulary shard: [N], of all shards [T, N].

    The first two are taken over this rank's shard of the draft vocabulary, the others over its
    shard of the base's full vocabulary.
    """

    max: Tensor
    sum_exp: Tensor
    full_max: Tensor
    full_argmax: Tensor
    full_sum_exp: Tensor

    @classmethod
    def concatenate(cls, chunks: Sequence[Self]) -> Self:
        """Join the statistics of consecutive chunks of target positions."""
        return cls(*(torch.cat(fields, -1) for fields in zip(*chunks, strict=True)))

    def pack(self) -> Tensor:
        """Return [5, N]: what a rank sends."""
        return torch.stack(self)

    @classmethod
    def unpack(cls, packed: Tensor) -> Self:
        """Return the fields [T, N] of every rank's :meth:`pack`, [T, 5, N]."""
        return cls(*packed.unbind(1))


def gather_statistics(
    draft: ShardStats, teacher: TeacherStats, group: ProcessGroup
) -> tuple[ShardStats, TeacherStats]:
    """Gather the statistics of all T shards: fields [T, K, N] and [T, N] on every rank.

    One all-gather over ``group`` of 16 bytes (20 with ``extra``) per position and step, and 20 per
    position; none for a single rank. Not differentiable.
    """
    draft_part, teacher_part = draft.pack(), teacher.pack()
    gathered = all_gather(torch.cat([draft_part.flatten(), teacher_part.flatten()]), group)
    drafts, teachers = gathered.split([draft_part.numel(), teacher_part.numel()], dim=1)
    return (
        ShardStats.unpack(drafts.unflatten(1, draft_part.shape)),
        TeacherStats.unpack(teachers.unflatten(1, teacher_part.shape)),
    )


class LossSums(NamedTuple):
    """Sums over a micro-batch's target positions: fp32 [K] for K TTT steps, or a scalar.

    ``pack`` and ``unpack`` convert to and from one vector [3 K + 2], so that the sums of chunks add
    up in one operation.
    """

    loss: Tensor
    """[K]: the loss, not weighted by step."""
    rows: Tensor
    """[K]: supervised positions."""
    hits: Tensor
    """[K]: supervised positions whose draft argmax is the base's."""
    coverage: Tensor
    """Scalar: the base's probability inside the draft vocabulary, over ``coverage_rows``."""
    coverage_rows: Tensor
    """Scalar: target positions of TTT step 0."""

    def pack(self) -> Tensor:
        """Return the vector [3 K + 2]."""
        per_step, scalars = torch.stack(self[:3]), torch.stack(self[3:])
        return torch.cat([per_step.flatten(), scalars])

    @classmethod
    def unpack(cls, packed: Tensor) -> Self:
        """Return the fields of a vector [3 K + 2], as views."""
        return cls(*packed[:-2].view(3, -1), *packed[-2:])
