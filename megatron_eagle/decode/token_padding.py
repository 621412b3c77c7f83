"""Padding of a decoding forward's tokens, so that sequence parallelism can cut them evenly.

B sequences of n tokens each, padded to n'; P parts: TP ranks under sequence parallelism, else 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.parallel.collectives import all_gather


@dataclass(frozen=True)
class TokenPadding:
    """Cut of n tokens into ``parts`` equal runs, one per rank of ``group``; 1: all on every rank.

    Padding comes behind all real positions: whatever it leaves in a cache is overwritten before any
    token can attend to it.
    """

    group: ProcessGroup
    parts: int

    @classmethod
    def of(cls, config: Any, group: ProcessGroup) -> TokenPadding:
        """Return the padding that the layers of TransformerConfig ``config`` need."""
        return cls(group, group.size() if config.sequence_parallel else 1)

    @property
    def spare(self) -> int:
        """Return how many positions behind the last token padding may take."""
        return self.parts - 1

    def pad(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Pad tokens and positions [B, n] to [B, n'], n' the next multiple of ``parts``."""
        missing = -tokens.shape[1] % self.parts
        if missing == 0:
            return tokens, positions
        offsets = torch.arange(1, missing + 1, device=positions.device)
        positions = torch.cat([positions, positions[:, -1:] + offsets], dim=1)
        return torch.nn.functional.pad(tokens, (0, missing)), positions

    def scatter(self, hidden: Tensor) -> Tensor:
        """Return this rank's part [n' / P, B, H] of ``hidden`` [n, B, H]. No collective."""
        if self.parts == 1:
            return hidden
        missing = -hidden.shape[0] % self.parts
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, 0, 0, missing))
        return padded.chunk(self.parts)[self.group.rank()]

    def gather(self, part: Tensor, tokens: int) -> Tensor:
        """Gather every rank's ``part`` [n' / P, B, H] and drop the padding: [``tokens``, B, H].
        One all-gather under sequence parallelism; not differentiable."""
        if self.parts == 1:
            return part
        return all_gather(part, self.group).flatten(0, 1)[:tokens]
