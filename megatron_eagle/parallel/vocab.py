"""Cut a vocabulary over the tensor-parallel group, and combine its shards' softmax statistics.

Padding never enters a softmax: rows beyond the true vocabulary are sliced off, not masked, so a
shard is a matrix of its real rows only (possibly none on the last ranks).

Shape letters: T ranks (shards), N token positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

EMPTY_SHARD_MAX = -1e30
"""Maximum reported by a shard without rows: loses against any logit, and subtracts without NaN."""


@dataclass(frozen=True)
class VocabShard:
    """Contiguous ids ``[start, start + rows)`` of one rank, out of ``size`` true ids.

    ``padded_rows`` is the height of the stored matrix on every rank; ``rows`` of them are real.
    """

    size: int
    padded_rows: int
    rank: int
    world: int

    @classmethod
    def of(cls, size: int, group: ProcessGroup, padded_rows: int | None = None) -> VocabShard:
        """Return this rank's shard; by default the least ``padded_rows`` that cover ``size``."""
        world = group.size()
        least = -(-size // world)
        rows = least if padded_rows is None else padded_rows
        assert rows >= least, f"{world} shards of {rows} rows cannot hold {size} ids"
        return cls(size, rows, group.rank(), world)

    @property
    def start(self) -> int:
        return self.rank * self.padded_rows

    @property
    def rows(self) -> int:
        return max(0, min(self.padded_rows, self.size - self.start))


def draft_vocab_shard(
    draft_size: int, vocab_size: int, base_padded_rows: int, group: ProcessGroup
) -> VocabShard:
    """Return this rank's shard of the draft vocabulary: the base's own shard when nothing is
    compressed, else ``draft_size`` ids cut evenly over ``group``."""
    padded = base_padded_rows if draft_size == vocab_size else None
    return VocabShard.of(draft_size, group, padded)


def combine_log_sum_exp(maxima: Tensor, sums: Tensor) -> Tensor:
    """Return the logsumexp [N] over all shards from their maxima and sums of exp(z - max) [T, N].

    No collective.
    """
    top = maxima.max(dim=0).values
    return top + (sums * (maxima - top).exp()).sum(0).log()


def combine_argmax(maxima: Tensor, ids: Tensor) -> Tensor:
    """Return the ids [N] int64 of the largest of all shards' ``maxima`` [T, N], whose ids are
    ``ids`` [T, N] of any dtype; ties take the lowest id. No collective."""
    ids = ids.long()
    is_top = maxima == maxima.max(dim=0).values
    return ids.masked_fill(~is_top, torch.iinfo(torch.int64).max).min(dim=0).values


def row_chunks(rows: int, columns: int, budget_bytes: int) -> list[slice]:
    """Return slices of ``rows`` such that fp32 [slice, columns] stays within ``budget_bytes``."""
    size = max(1, budget_bytes // (4 * max(1, columns)))
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def even_chunks(rows: int, largest: int) -> list[slice]:
    """Return the fewest slices of ``rows`` of at most ``largest`` (at least 1) rows each, all of
    nearly the same size; one empty slice of no rows."""
    number = max(1, -(-rows // max(1, largest)))
    bounds = [rows * i // number for i in range(number + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]
