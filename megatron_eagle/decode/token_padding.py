"""How the rows of one decoding forward lie over the tensor-parallel group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.parallel.collectives import all_gather


@dataclass(frozen=True)
class RowLayout:
    """Whole on every rank; under sequence parallelism cut into ``parts`` equal runs, one a rank,
    for which rows are added at the end. The added ones come behind all real positions: what they
    leave in a cache is overwritten before any row can see it.
    """

    group: ProcessGroup
    parts: int

    @classmethod
    def of(cls, config: Any, group: ProcessGroup) -> RowLayout:
        """Of the layers of TransformerConfig ``config``."""
        return cls(group, group.size() if config.sequence_parallel else 1)

    @property
    def spare(self) -> int:
        """Positions that added rows may touch."""
        return self.parts - 1

    def padded(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """tokens and positions [B, n] with as many rows more as the cut needs."""
        more = -tokens.shape[1] % self.parts
        if more == 0:
            return tokens, positions
        behind = torch.arange(1, more + 1, device=positions.device)
        positions = torch.cat([positions, positions[:, -1:] + behind], dim=1)
        return torch.nn.functional.pad(tokens, (0, more)), positions

    def cut(self, hidden: Tensor) -> Tensor:
        """This rank's part [n' / parts, B, H] of whole rows [n, B, H]."""
        if self.parts == 1:
            return hidden
        more = -hidden.shape[0] % self.parts
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, 0, 0, more))
        return padded.chunk(self.parts)[self.group.rank()]

    def whole(self, part: Tensor, rows: int) -> Tensor:
        """All ranks' [n' / parts, B, H], whole and without the added rows: [``rows``, B, H]. One
        all-gather under sequence parallelism."""
        if self.parts == 1:
            return part
        return all_gather(part, self.group).flatten(0, 1)[:rows]
