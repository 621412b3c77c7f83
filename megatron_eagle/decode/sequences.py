"""Batch of token sequences of different lengths that grow until each of them stops.

B sequences still in the batch, S tokens of the longest one so far, n new tokens of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

COMPACT_BELOW = 0.75
"""Fraction of the batch still growing at which finished sequences are dropped; dropping them copies
the caches."""


class Sequences:
    """Hold ``tokens`` [B, capacity] and ``lengths`` [B] of the sequences still in the batch.

    Args:
        prompts: token ids, none of them empty.
        max_new_tokens: length of an answer, unless one of ``stop_ids`` ends it before.
        stop_ids: ids that end an answer; kept as its last token.
        device: device of all tensors.
        spare: positions behind the last token that drafting may use.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Iterable[int],
        device: torch.device,
        spare: int = 0,
    ) -> None:
        lengths = [len(prompt) for prompt in prompts]
        assert min(lengths) > 0, "an empty prompt"
        self.capacity = max(lengths) + max_new_tokens + spare
        padded = [[*prompt, *[0] * (self.capacity - len(prompt))] for prompt in prompts]
        self.tokens = torch.tensor(padded, device=device)
        self.lengths = torch.tensor(lengths, device=device)
        self._prompt_lengths = lengths
        self._limits = self.lengths + max_new_tokens
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self._done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self._source = torch.arange(len(prompts))
        self._answers: dict[int, list[int]] = {}

    @property
    def growing(self) -> Tensor:
        """Return which sequences still grow: [B] bool."""
        return ~self._done

    @property
    def finished(self) -> bool:
        """Return whether no sequence grows any more."""
        return bool(self._done.all())

    def is_stop(self, tokens: Tensor) -> Tensor:
        """Return which of ``tokens`` [...] end a sequence: [...] bool."""
        return torch.isin(tokens, self._stop_ids)

    def padded_prompts(self) -> tuple[Tensor, Tensor]:
        """Return all tokens so far, right-padded with id 0, and their positions, both [B, S]."""
        longest = int(self.lengths.max())
        positions = torch.arange(longest, device=self.tokens.device)
        return self.tokens[:, :longest], positions.expand(len(self.lengths), longest)

    def append(self, new: Tensor, counts: Tensor) -> None:
        """Append the first ``counts`` [B] of ``new`` [B, n] to the sequences that still grow, up to
        their limit and through the first stop id."""
        column = torch.arange(new.shape[1], device=new.device)
        positions = self.lengths.unsqueeze(1) + column
        keep = (column < counts.unsqueeze(1)) & (positions < self._limits.unsqueeze(1))
        stop = self.is_stop(new)
        keep &= (stop.cumsum(1) - stop.long() == 0) & self.growing.unsqueeze(1)
        rows, columns = keep.nonzero(as_tuple=True)
        self.tokens[rows, positions[rows, columns]] = new[rows, columns]
        self.lengths += keep.sum(1)
        self._done |= (stop & keep).any(1) | (self.lengths >= self._limits)

    def compact(self) -> Tensor | None:
        """Drop finished sequences if it pays; return the indices of those kept, None if all are."""
        kept = self.growing.nonzero().flatten()
        if self.finished or kept.numel() > COMPACT_BELOW * self._done.numel():
            return None
        self._collect()
        self.tokens, self.lengths = self.tokens[kept], self.lengths[kept]
        self._limits, self._done = self._limits[kept], self._done[kept]
        self._source = self._source[kept.cpu()]
        return kept

    def answers(self) -> list[list[int]]:
        """Return each prompt's answer, stop id included, in the prompts' order."""
        assert self.finished
        self._collect()
        return [self._answers[source] for source in range(len(self._prompt_lengths))]

    def _collect(self) -> None:
        for row in self._done.nonzero().flatten().tolist():
            source = int(self._source[row])
            start, end = self._prompt_lengths[source], int(self.lengths[row])
            self._answers[source] = self.tokens[row, start:end].tolist()
