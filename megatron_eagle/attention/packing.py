"""Describe sequences packed of several documents: who attends to whom, and at which positions.

A token sees its own document only, and positions restart with every document, so each document is
computed as if it were alone. Attention is a plan of causal blocks, one or more per document; RoPE
angles are looked up by position. There is no mask tensor, and pairs of tokens from two documents
cost nothing.

Shape letters: B sequences, S their length, CP context-parallel ranks, d channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.attention import one_launch
from megatron_eagle.attention.blocks import (
    Plan,
    beside_sink,
    block_attention,
    sink_attention,
    span_plan,
)
from megatron_eagle.attention.one_launch import Bounds
from megatron_eagle.parallel.context import ContextShard, gather_key_value

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Packing:
    """Documents of a micro-batch of B sequences of S tokens.

    Attributes:
        positions: [B, S] int64, the position of every token within its document.
        documents: for every sequence the (start, stop) of its documents, ascending, covering it;
            on the host.
    """

    positions: Tensor
    documents: tuple[Spans, ...]

    @classmethod
    def of(cls, positions: Tensor) -> Packing:
        """Find the documents from host ``positions`` [B, S]: one begins wherever they are 0."""
        documents = []
        for row in positions:
            starts = [0, *((row[1:] == 0).nonzero()[:, 0] + 1).tolist(), len(row)]
            documents.append(tuple(pairwise(starts)))
        return cls(positions, tuple(documents))

    def to(self, positions: Tensor) -> Packing:
        """Return the same documents with ``positions``, a copy of them on another device."""
        return replace(self, positions=positions)

    def plan(self, group: ProcessGroup, window: int | None = None) -> Plan:
        """Return the plan of this CP rank's queries against the keys of the whole sequences."""
        spans = ContextShard.of(self.positions.shape[1], group).spans
        return [
            block
            for sequence, documents in enumerate(self.documents)
            for block in span_plan(spans, documents, slice(sequence, sequence + 1), window)
        ]

    def angles(self, rotary: Tensor, group: ProcessGroup, step: int = 0) -> Tensor:
        """Return RoPE angles [S / CP, B, 1, d] of this CP rank's tokens at TTT step ``step``.

        They are looked up in ``rotary`` [P, 1, 1, d], the angles of positions 0 .. P - 1, where P
        must exceed the last position plus the step.
        """
        shard = ContextShard.of(self.positions.shape[1], group)
        return rotary[:, 0][shard.take(self.positions, 1).t() + step]


class DocumentAttention:
    """Attention of the base inside documents: an ``AttentionState`` that remembers nothing.

    Under context parallelism keys and values are gathered over ``group``: one all-gather per layer.
    """

    def __init__(self, packing: Packing, group: ProcessGroup) -> None:
        self._plan = cache(partial(packing.plan, group))  # by window
        self._bounds = cache(partial(Bounds.of, packing.documents, packing.positions.shape[1]))
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
        """See ``AttentionState``."""
        if self._group.size() == 1 and one_launch.applies(query):
            bounds = self._bounds(query.device)
            out, lse = one_launch.forward(query, key, value, scale, bounds, window)
            return out if sink is None else beside_sink(out, lse, sink)
        key, value = gather_key_value(key, value, self._group)
        if sink is not None:
            return sink_attention(query, key, value, scale, self._plan(window), sink)
        return block_attention(query, key, value, scale, self._plan(window))
