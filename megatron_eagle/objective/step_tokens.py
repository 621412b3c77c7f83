"""Work out on the host which tokens' embeddings the TTT steps read, each looked up once.

Row p of step t consumes x_{p+1+t}: step 0 all rows, later steps the live ones. Neighboring rows
and steps share tokens, so a rank looks up little more than one per row.

Shape letters: B sequences, S their length, S' this rank's tokens, K TTT steps, N live rows, T
tensor-parallel ranks under sequence parallelism (otherwise 1), U tokens that a rank looks up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.attention.live_rows import LiveRows


@dataclass(frozen=True)
class StepTokens:
    """Tokens to look up, and where each step finds its own among them.

    Attributes:
        lookup: [T, U] int64, flat entries of tokens padded to [B, S + K].
        first: [T, S' * B] int64, the entries of ``lookup[rank]`` that step 0 reads.
        later: [T, K - 1, N / T] int64, those that the later steps read.
    """

    lookup: Tensor
    first: Tensor
    later: Tensor

    @classmethod
    def of(
        cls, live: LiveRows, spans: Sequence[tuple[int, int]], batch: int, length: int, steps: int
    ) -> StepTokens:
        """Work them out for this rank's positions ``spans`` of ``batch`` sequences of ``length``
        tokens, all on the host."""
        width = length + steps
        positions = torch.cat([torch.arange(*span) for span in spans]) + 1
        rows = (positions.unsqueeze(1) + torch.arange(batch) * width).flatten()  # [S / CP * B]
        first = rows.view(live.parts, -1)
        back = torch.arange(1, steps).unsqueeze(1)
        later = rows[live.index].view(live.parts, 1, -1) + back
        found = [_distinct(*part, batch * width) for part in zip(first, later, strict=True)]
        most = max(lookup.numel() for lookup, _, _ in found)
        padded = [torch.nn.functional.pad(x, (0, most - x.numel())) for x, _, _ in found]
        return cls(
            torch.stack(padded),
            torch.stack([first for _, first, _ in found]),
            torch.stack([later for _, _, later in found]),
        )

    def to(self, move: Callable[[Tensor], Tensor]) -> StepTokens:
        """Return a copy on another device."""
        return StepTokens(move(self.lookup), move(self.first), move(self.later))


def _distinct(first: Tensor, later: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct numbers below ``size`` of both tensors, ascending, and both tensors as
    indices into them."""
    is_read = torch.zeros(size, dtype=torch.bool)
    is_read[first] = True
    is_read[later.flatten()] = True
    place = is_read.cumsum(0) - 1
    return is_read.nonzero()[:, 0], place[first], place[later]
