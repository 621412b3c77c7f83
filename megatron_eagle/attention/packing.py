"""Sequences packed of several documents: who attends to whom, and at which positions.

A row sees its own document only, and positions restart with every document, so each document is
computed as if it stood alone. Attention is one plan of causal blocks, one a document; RoPE angles
are looked up by position. No mask exists, and what lies between documents costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.attention.blocks import Plan, block_attention, sink_attention, span_plan
from megatron_eagle.parallel.context import ContextShard, gather_key_value

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Packing:
    """The documents of a micro-batch of B sequences of S tokens.

    positions [B, S] int64: of every token within its document. ``documents``: for every sequence
    the (start, stop) of its documents, ascending, covering it; known on the host.
    """

    positions: Tensor
    documents: tuple[Spans, ...]

    @classmethod
    def of(cls, positions: Tensor) -> Packing:
        """From host ``positions`` [B, S]; a document begins wherever they are 0."""
        documents = []
        for row in positions:
            starts = [0, *((row[1:] == 0).nonzero()[:, 0] + 1).tolist(), len(row)]
            documents.append(tuple(pairwise(starts)))
        return cls(positions, tuple(documents))

    def to(self, positions: Tensor) -> Packing:
        """The same with ``positions`` on another device."""
        return replace(self, positions=positions)

    def plan(self, group: ProcessGroup, window: int | None = None) -> Plan:
        """The attention of this context-parallel rank's rows to the whole sequences' keys."""
        spans = ContextShard.of(self.positions.shape[1], group).spans
        return [
            block
            for sequence, documents in enumerate(self.documents)
            for block in span_plan(spans, documents, slice(sequence, sequence + 1), window)
        ]

    def angles(self, rotary: Tensor, group: ProcessGroup, step: int = 0) -> Tensor:
        """RoPE angles [S / CP, B, 1, d] of this context-parallel rank's rows at TTT step ``step``,
        from ``rotary`` [L, 1, 1, d], L being more than the last position plus the step."""
        shard = ContextShard.of(self.positions.shape[1], group)
        return rotary[:, 0][shard.take(self.positions, 1).t() + step]


class DocumentAttention:
    """The base's attention inside documents, an :class:`~megatron_eagle.attention.core
    .AttentionState` without a memory. Under context parallelism keys and values are gathered over
    ``group`` (one all-gather a layer)."""

    def __init__(self, packing: Packing, group: ProcessGroup) -> None:
        self._plan = cache(partial(packing.plan, group))  # of every window once
        self._group = group

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        key, value = gather_key_value(key, value, self._group)
        if sink is not None:
            return sink_attention(query, key, value, scale, self._plan(window), sink)
        return block_attention(query, key, value, scale, self._plan(window))
