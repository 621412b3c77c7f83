"""Everything that the K TTT steps read of one micro-batch.

Shape letters: S sequence, S' this rank's tokens (S cut over CP, and over TP under sequence
parallelism), B micro-batch, H hidden, A aux layers, K TTT steps, U tokens that this rank looks up,
N live rows, N' this rank's part of them under sequence parallelism (otherwise N), d RoPE channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.attention.live_rows import LiveRows
from megatron_eagle.attention.packing import Packing
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.objective.batch import EagleBatch
from megatron_eagle.parallel.context import ContextShard
from megatron_eagle.teacher.embedding import step_embeddings


class EmbeddingOfBase(Protocol):
    """The part of the frozen base that the draft's inputs come from."""

    embedding_weight: Tensor
    vocab_size: int
    tp_group: ProcessGroup
    cp_group: ProcessGroup


@dataclass(frozen=True)
class DraftInputs:
    """Everything the K steps read of one micro-batch.

    features [S', B, A * H] (EAGLE-1: [S', B, H], the base's final hidden state). live: the rows
    that go on after step 0's trunk. embeddings [U, H]: of the tokens that the steps consume;
    entries: which of them each step consumes, [S' * B] at step 0, then [N']. angles: per step the
    RoPE angles of every query, [S / CP, 1 or B, 1, d] at step 0, then [N, 1, 1, d] (as at step 0
    where all rows are live). packing: the documents of packed sequences. mask_embedding [H]: of
    P-EAGLE's mask token.
    """

    features: Tensor
    live: LiveRows
    embeddings: Tensor
    entries: Sequence[Tensor]
    angles: Sequence[Tensor]
    packing: Packing | None = None
    mask_embedding: Tensor | None = None

    @classmethod
    def of(
        cls,
        base: EmbeddingOfBase,
        draft: EagleDraft,
        batch: EagleBatch,
        features: Tensor,
        *,
        steps: int,
        mask_embedding: Tensor | None = None,
    ) -> DraftInputs:
        """Make the inputs of a micro-batch and this rank's features of it. Collectives: one
        embedding look-up for all steps."""
        sequence_parallel = draft.config.sequence_parallel
        live, read = batch.live, batch.step_tokens
        assert live.parts == (base.tp_group.size() if sequence_parallel else 1)
        embeddings = step_embeddings(
            batch.tokens,
            read.lookup,
            base.embedding_weight,
            base.vocab_size,
            steps,
            base.tp_group,
            sequence_parallel,
        )
        part = base.tp_group.rank() if live.parts > 1 else 0
        return cls(
            features=features,
            live=live,
            embeddings=embeddings,
            entries=[read.first[part], *read.later[part]],
            angles=step_angles(draft, batch, steps),
            packing=batch.packing,
            mask_embedding=mask_embedding,
        )

    def embedding(self, step: int) -> Tensor:
        """Return the embeddings of the tokens that ``step`` consumes: [S', B, H] at step 0, then
        [N', 1, H], or as at step 0 where all rows are live."""
        batch = 1 if step and not self.live.whole else self.features.shape[1]
        return self.embeddings[self.entries[step]].unflatten(0, (-1, batch))


def step_angles(draft: EagleDraft, batch: EagleBatch, steps: int) -> list[Tensor]:
    """Return the RoPE angles of every step's queries: [S / CP, 1 or B, 1, d] at step 0, then of the
    live rows, [N, 1, 1, d], or as at step 0 where all rows are live."""
    size, length = batch.tokens.shape
    rotary = draft.rotary(length + steps - 1)
    spans = ContextShard.of(length, draft.cp_group).spans
    angles = []
    for step in range(steps):
        if batch.packing is None:
            whole = query_angles(rotary, spans, step)
        else:
            whole = batch.packing.angles(rotary, draft.cp_group, step)
        narrow = step and not batch.live.whole
        angles.append(batch.live.take(whole.expand(-1, size, -1, -1)) if narrow else whole)
    return angles


def query_angles(rotary: Tensor, spans: Sequence[tuple[int, int]], step: int) -> Tensor:
    """Return the RoPE angles of a step's queries: those of positions ``start + step`` to
    ``stop + step`` of each span, out of rotary [S + K - 1, 1, 1, d]."""
    parts = [rotary[start + step : stop + step] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
