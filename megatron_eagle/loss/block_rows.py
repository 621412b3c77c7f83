"""Hold what a block draft's judged rows are judged by, and cut them into chunks of whole blocks.

Shape letters: N blocks, K judged slots of a block, M judged rows in the order of blocks and slots,
U target positions that they share, V and Dp the base's vocabulary and this rank's shard of the
draft's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class RowChunk(NamedTuple):
    """Whole blocks, the rows of these, and the targets of these."""

    blocks: slice
    rows: slice
    targets: slice


@dataclass(frozen=True)
class BlockRows:
    """The M judged rows, identical on all tensor-parallel ranks.

    steps, blocks, targets [M] int64: of each row its place t among the judged slots, its block, and
    its target. labels [M]: the base id that the data has there. ``first_targets`` and ``counts``,
    on the host: of each block the target of its first judged row, and how many rows it has; their
    targets follow each other.
    """

    steps: Tensor
    blocks: Tensor
    targets: Tensor
    labels: Tensor
    first_targets: tuple[int, ...]
    counts: tuple[int, ...]

    def map(self, move: Callable[[Tensor], Tensor]) -> BlockRows:
        """Return the rows with ``move`` applied to their tensors."""
        return replace(
            self,
            steps=move(self.steps),
            blocks=move(self.blocks),
            targets=move(self.targets),
            labels=move(self.labels),
        )

    def chunks(self, most: int) -> list[RowChunk]:
        """Cut into chunks of at most ``most`` rows, or of one block, all of nearly the same size;
        one empty chunk for no rows."""
        total = sum(self.counts)
        size = total / max(1, -(-total // max(1, most)))
        chunks, first, row, stop = [], 0, 0, 0
        for block, count in enumerate(self.counts):
            if block > first and stop + count - row > min(size + count / 2, most):
                chunks.append(self._chunk(first, block, row, stop))
                first, row = block, stop
            stop += count
        chunks.append(self._chunk(first, len(self.counts), row, total))
        return chunks

    def _chunk(self, first: int, last: int, row: int, stop: int) -> RowChunk:
        starts, counts = self.first_targets[first:last], self.counts[first:last]
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        targets = slice(min(starts, default=0), max(ends, default=0))
        return RowChunk(slice(first, last), slice(row, stop), targets)

    def by_block(self, values: Tensor, empty: float, steps: int) -> Tensor:
        """Spread the values [M] of all rows over [N, K], ``empty`` where no row is."""
        spread = values.new_full((len(self.counts), steps), empty)
        spread[self.blocks, self.steps] = values
        return spread

    def target_labels(self, count: int) -> Tensor:
        """Return the labels of all ``count`` targets, [U]; a target without a row has 0."""
        labels = self.labels.new_zeros(count)
        labels[self.targets] = self.labels
        return labels

    def local_labels(self, shard_ids: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the column of each label in this rank's shard, whose ids are ``shard_ids`` [Dp],
        and whether it has one; [rows] each."""
        labels = self.labels[rows]
        if not shard_ids.numel():
            return torch.zeros_like(labels), torch.zeros_like(labels, dtype=torch.bool)
        column = torch.searchsorted(shard_ids, labels).clamp(max=shard_ids.numel() - 1)
        return column, shard_ids[column] == labels


def d_pace(right: Tensor, judged: Tensor, floor: float) -> Tensor:
    """Return D-PACE's weights (arXiv 2605.18810) of the slots of N blocks, [N, K].

    ``right`` [N, K] are the draft's probabilities of the data's tokens; ``judged`` [N, K] bool.
    w_j = Σ_{m >= j} Π_{i <= m} ((1 - floor) q_i + floor), over judged slots alone. Not normalized;
    give it no gradient.
    """
    share = ((1 - floor) * right + floor).masked_fill(~judged, 1.0)
    chances = share.cumprod(-1) * judged
    return chances.flip(-1).cumsum(-1).flip(-1) * judged
