"""What the loss of a block draft needs, and its value once all vocabulary shards are known.

The loss of a judged row mixes the cross-entropy with the data's token, the one with the base's
distribution p over the draft vocabulary, and the L1 distance 2 (1 - alpha) from the base's whole
distribution, where alpha = Σ min(q, P) is the probability that a verifier accepts a token drafted
from q. Its weight belongs to its slot, or is D-PACE's, which needs all slots of a block.

Shape letters: N blocks, K judged slots, M judged rows, U targets, Dp this rank's shard of the draft
vocabulary, H hidden size, r rank of the Markov head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.config.block_options import D_PACE_FLOOR, BlockOptions
from megatron_eagle.loss.block_rows import BlockRows, RowChunk, d_pace
from megatron_eagle.loss.inputs import TeacherRows
from megatron_eagle.loss.reduction import ReducedStats


class BlockValues(NamedTuple):
    """Losses and weights of M judged rows, the same on every rank; all [M] fp32 but ``hits``."""

    loss: Tensor
    """The mixed loss, without its weight."""
    weight: Tensor
    """Of the row: its slot's, or D-PACE's."""
    alpha: Tensor
    """Σ min(q, P); zeros if nothing needs it."""
    hits: Tensor
    """bool: the draft's argmax is the base's over its whole vocabulary, or the data's token."""
    coverage: Tensor
    """The probability inside the draft vocabulary, of the base or of the data's token alone."""
    has_label: Tensor
    """1 where the draft can say the data's token; elsewhere there is no cross-entropy with it."""
    below: Tensor
    """Σ q over the tokens where q < P; zeros if nothing needs it."""


@dataclass(frozen=True)
class BlockPlan:
    """All that the loss needs beside hidden states and head. ``gradient``: whether one is wanted.

    ``shard_ids`` [Dp]: base ids of this rank's draft vocabulary; ``in_draft_vocab`` [V] bool.
    """

    teacher: TeacherRows
    rows: BlockRows
    options: BlockOptions
    steps: int
    shard_ids: Tensor
    in_draft_vocab: Tensor
    group: ProcessGroup
    gradient: bool
    chunk_bytes: int

    @property
    def one_rank(self) -> bool:
        """Whether this rank has the whole vocabulary."""
        return self.group.size() == 1

    @property
    def reads_labels(self) -> bool:
        """Whether the loss or its weights read the data's tokens."""
        return self.options.ce > 0 or self.options.weights is None

    @property
    def reads_teacher(self) -> bool:
        """Whether the gradient reads the base's softmax."""
        return self.options.kl > 0 or self.options.l1 > 0

    @property
    def subtracts(self) -> bool:
        """Whether the gradient is softmax minus teacher's, and no rank or pass needs the softmax
        before: then the softmax's own pass subtracts."""
        options = self.options
        return self.one_rank and self.gradient and not (options.ce or options.needs_overlap)

    def chunks(self) -> list[RowChunk]:
        """Cut the rows into chunks of whole blocks, the same on every rank."""
        bytes_each = 4 * (self.teacher.draft_columns + self.teacher.full_columns)
        return self.rows.chunks(self.chunk_bytes // bytes_each)

    def values(self, reduced: ReducedStats, chunk: RowChunk) -> BlockValues:
        """Return losses and weights of the chunk's rows from the statistics [1, rows] of all
        shards. No collective."""
        options = self.options
        log_z = reduced.log_z[0]
        has_label = self.in_draft_vocab[self.rows.labels[chunk.rows]].float()
        loss = torch.zeros_like(log_z)
        cross_entropy = torch.zeros_like(log_z)
        if reduced.extra is not None:
            # Shards without the label report 0.
            cross_entropy = (log_z - reduced.extra[:, 0].sum(0)) * has_label
            loss += options.ce * cross_entropy
        if options.kl:
            loss += options.kl * reduced.cross_entropy[0]
        alpha = below = torch.zeros_like(log_z)
        if reduced.overlap is not None:
            alpha, below = (part[0] for part in reduced.overlap)
            loss += options.l1 * 2 * (1 - alpha)
        right = (-cross_entropy).exp() * has_label
        return BlockValues(
            loss=loss,
            weight=self._weights(right, chunk),
            alpha=alpha,
            hits=reduced.hit[0],
            coverage=has_label if options.data_alone else reduced.coverage,
            has_label=has_label,
            below=below,
        )

    def _weights(self, right: Tensor, chunk: RowChunk) -> Tensor:
        """Return the rows' weights, given the probabilities [rows] of the data's tokens."""
        steps, weights = self.rows.steps[chunk.rows], self.options.weights
        if weights is not None:
            return torch.tensor(weights).to(right.device, non_blocking=True)[steps]
        blocks = self.rows.blocks[chunk.rows] - chunk.blocks.start
        shape = chunk.blocks.stop - chunk.blocks.start, self.steps
        spread, judged = right.new_zeros(shape), torch.zeros(shape, dtype=torch.bool)
        judged = judged.to(right.device)
        spread[blocks, steps], judged[blocks, steps] = right, True
        return d_pace(spread, judged, D_PACE_FLOOR)[blocks, steps]
