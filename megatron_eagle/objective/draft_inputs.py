"""DraftInputs: everything the draft reads of one micro-batch, made before the first step.

S sequence, S' this rank's tokens (S cut over CP, and over TP under sequence parallelism), B
micro-batch, H hidden, A aux layers, K TTT steps, R runs of consecutive positions that this rank
holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.attention.packing import Packing
from megatron_eagle.draft.model import EagleDraft
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

    features [S', B, A * H] (EAGLE-1: [S', B, H], the base's final hidden state). embeddings
    [R, S' / R + K - 1, B, H]: of the tokens after each run of positions. angles: per step the RoPE
    angles of every query, [S / CP, 1 or B, 1, d]. packing: the documents of packed sequences.
    mask_embedding [H]: of P-EAGLE's mask token.
    """

    features: Tensor
    embeddings: Tensor
    angles: Sequence[Tensor]
    packing: Packing | None = None
    mask_embedding: Tensor | None = None

    @classmethod
    def of(
        cls,
        base: EmbeddingOfBase,
        draft: EagleDraft,
        tokens: Tensor,
        features: Tensor,
        *,
        steps: int,
        packing: Packing | None = None,
        mask_embedding: Tensor | None = None,
    ) -> DraftInputs:
        """Make the inputs of whole sequences of tokens [B, S], packed or not, and this rank's
        features. Collectives: one embedding look-up for all steps."""
        spans = ContextShard.of(tokens.shape[1], base.cp_group).spans
        embeddings = step_embeddings(
            tokens,
            base.embedding_weight,
            base.vocab_size,
            steps,
            base.tp_group,
            draft.config.sequence_parallel,
            spans,
        )
        rotary = draft.rotary(tokens.shape[1] + steps - 1)
        if packing is None:
            angles = [query_angles(rotary, spans, step) for step in range(steps)]
        else:
            angles = [packing.angles(rotary, base.cp_group, step) for step in range(steps)]
        return cls(features, embeddings, angles, packing, mask_embedding)

    def embedding(self, step: int) -> Tensor:
        """Return the embeddings [S', B, H] of the tokens that ``step`` consumes."""
        size = self.features.shape[0] // self.embeddings.shape[0]
        return self.embeddings[:, step : step + size].flatten(0, 1)


def query_angles(rotary: Tensor, spans: Sequence[tuple[int, int]], step: int) -> Tensor:
    """Return the RoPE angles of a step's queries: those of positions ``start + step`` to
    ``stop + step`` of each span, out of rotary [S + K - 1, 1, 1, d]."""
    parts = [rotary[start + step : stop + step] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
