"""Distribution of an evaluation's prompts over the ranks, and the gathering of their results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.distributed import ProcessGroup

Item = TypeVar("Item")


@dataclass(frozen=True)
class PromptShard:
    """Shard ``index`` of ``count`` of the prompts, decoded by this rank and by all ranks whose
    forwards wait for its own; ``reports`` is true on one of them."""

    index: int = 0
    count: int = 1
    reports: bool = True

    @classmethod
    def of(cls, groups: Iterable[ProcessGroup]) -> PromptShard:
        """Return this rank's shard, one for every set of ranks that ``groups`` connect.

        With :func:`lockstep_groups`, data- and context-parallel ranks decode prompts of their own,
        unless they run the base's experts together. Collective over all ranks of the world.
        """
        local = [torch.distributed.get_process_group_ranks(group) for group in groups]
        by_rank: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(by_rank, local)
        sets = connected_ranks(tuple(ranks) for rank_groups in by_rank for ranks in rank_groups)
        rank = torch.distributed.get_rank()
        index = next(i for i, ranks in enumerate(sets) if rank in ranks)
        return cls(index, len(sets), rank == min(sets[index]))

    def take(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this shard's items: every ``count``-th, from ``index`` on."""
        return items[self.index :: self.count]

    def gather(self, result: Item) -> list[Item]:
        """Return the ``result`` of each shard, in their order, on every rank. Collective over all
        ranks of the world."""
        if self.count == 1:
            return [result]
        by_rank: list[Any] = [None] * torch.distributed.get_world_size()
        pair = (self.index, result) if self.reports else None
        torch.distributed.all_gather_object(by_rank, pair)
        pairs = [pair for pair in by_rank if pair is not None]
        return [item for _, item in sorted(pairs, key=lambda pair: pair[0])]


def lockstep_groups(pg_collection: Any) -> list[ProcessGroup]:
    """Return the groups whose ranks must run base and draft in step."""
    return [pg_collection.tp, pg_collection.pp, pg_collection.tp_ep]


def connected_ranks(groups: Iterable[tuple[int, ...]]) -> list[set[int]]:
    """Return the sets of ranks that ``groups`` connect, ordered by their smallest rank."""
    sets: list[set[int]] = []
    for group in groups:
        touched = [ranks for ranks in sets if not ranks.isdisjoint(group)]
        sets = [ranks for ranks in sets if ranks.isdisjoint(group)]
        sets.append(set(group).union(*touched))
    return sorted(sets, key=min)
