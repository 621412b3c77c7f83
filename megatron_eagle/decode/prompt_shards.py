"""Which of an evaluation's prompts each rank decodes, and bringing together what all found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.distributed import ProcessGroup

Item = TypeVar("Item")


@dataclass(frozen=True)
class PromptShare:
    """Share ``index`` of ``count``. Ranks whose forwards wait for each other have the same share;
    ``speaks`` is true of one of them."""

    index: int = 0
    count: int = 1
    speaks: bool = True

    @classmethod
    def of(cls, groups: Iterable[ProcessGroup]) -> PromptShare:
        """As many shares as there are sets of ranks that no group of ``groups`` links: data- and
        context-parallel ranks decode prompts of their own, but not those that run one base's
        experts together. A collective of all ranks of the world."""
        mine = [torch.distributed.get_process_group_ranks(group) for group in groups]
        every: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, mine)
        sets = joined_ranks(tuple(ranks) for rank_groups in every for ranks in rank_groups)
        rank = torch.distributed.get_rank()
        index = next(i for i, ranks in enumerate(sets) if rank in ranks)
        return cls(index, len(sets), rank == min(sets[index]))

    def take(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every ``count``-th."""
        return items[self.index :: self.count]

    def gather(self, found: Item) -> list[Item]:
        """What each share found, in their order, on every rank. A collective of all ranks."""
        if self.count == 1:
            return [found]
        every: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, (self.index, found) if self.speaks else None)
        return [item for _, item in sorted((x for x in every if x is not None), key=lambda x: x[0])]


def lockstep_groups(pg_collection: Any) -> list[ProcessGroup]:
    """The groups whose ranks run base and draft in step."""
    return [pg_collection.tp, pg_collection.pp, pg_collection.tp_ep]


def joined_ranks(groups: Iterable[tuple[int, ...]]) -> list[set[int]]:
    """The connected sets of ranks, by their smallest rank."""
    sets: list[set[int]] = []
    for group in groups:
        touched = [ranks for ranks in sets if not ranks.isdisjoint(group)]
        sets = [ranks for ranks in sets if ranks.isdisjoint(group)]
        sets.append(set(group).union(*touched))
    return sorted(sets, key=min)
