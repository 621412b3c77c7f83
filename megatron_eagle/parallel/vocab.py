"""How a vocabulary is cut over the tensor-parallel group, and row statistics of a shard.

Padding never enters a softmax: rows beyond the true vocabulary are sliced off, not masked, so a
shard is a matrix of its real rows only (possibly none on the last ranks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

EMPTY_SHARD_MAX = -1e30
"""Maximum reported by a shard without rows: loses against any logit, and subtracts without NaN."""


@dataclass(frozen=True)
class VocabShard:
    """The contiguous ids ``[start, start + rows)`` of one rank, out of ``size`` true ids.

    ``padded_rows`` is the height of the stored matrix on every rank; ``rows`` of them are real.
    """

    size: int
    padded_rows: int
    rank: int
    world: int

    @classmethod
    def of(cls, size: int, group: ProcessGroup, padded_rows: int | None = None) -> VocabShard:
        """This rank's shard; ``padded_rows`` defaults to the least that covers ``size``."""
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


@dataclass(frozen=True)
class RowStatistics:
    """Per-row statistics of one shard of logits, fp32 [N]: ``max``, ``sum_exp`` of exp(z - max),
    and the shard-local ``argmax`` (int64)."""

    max: Tensor
    sum_exp: Tensor
    argmax: Tensor


def row_statistics(logits: Tensor) -> RowStatistics:
    """Statistics of ``logits`` [N, Dp] over this rank's shard; no collective.

    An empty shard gives ``EMPTY_SHARD_MAX``, 0 and 0, which vanish in any combination.
    """
    if logits.shape[-1] == 0:
        zero = logits.new_zeros(logits.shape[0], dtype=torch.float32)
        return RowStatistics(zero + EMPTY_SHARD_MAX, zero, zero.long())
    top, index = logits.max(dim=-1)
    top = top.float()
    return RowStatistics(top, (logits.float() - top.unsqueeze(-1)).exp_().sum(-1), index)


def combine_log_sum_exp(maxima: Tensor, sums: Tensor) -> Tensor:
    """logsumexp over all shards from their [T, N] maxima and sums; [N], no collective."""
    top = maxima.max(dim=0).values
    return top + (sums * (maxima - top).exp()).sum(0).log()


def combine_argmax(maxima: Tensor, ids: Tensor) -> Tensor:
    """Global ids [N] (int64) of the row maxima from all shards' [T, N]; ties take the lowest id."""
    ids = ids.long()
    is_top = maxima == maxima.max(dim=0).values
    return ids.masked_fill(~is_top, torch.iinfo(torch.int64).max).min(dim=0).values


def row_chunks(rows: int, columns: int, budget_bytes: int = 32 << 20) -> list[slice]:
    """Slices of ``rows`` such that a chunk of fp32 [chunk, columns] stays within the budget."""
    step = max(1, budget_bytes // (4 * max(1, columns)))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
