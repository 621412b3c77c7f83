"""Live rows: the rows of a micro-batch that some TTT step judges, and what they attend to.

A row that no step judges is still read by later rows, but only as a trunk key of every layer. So
the unroll runs all rows up to the last layer's keys and values of step 0; from there on, and in
all later steps, it runs the live rows alone, as one sequence of N. Where nearly all rows are live,
as without a prompt, all count as live and stay where they are: nothing is gathered.

Shape letters: B sequences, S their length, CP context-parallel ranks, N live rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_eagle.attention.blocks import Block, Plan, span_plan
from megatron_eagle.attention.packing import Packing, Spans

_SPARED = 32
"""Leaving out fewer than one row in so many saves less than gathering the others costs: by passes
over memory, a few percent of a step's norms and sums, which are a tenth of a step."""


@dataclass(frozen=True)
class LiveRows:
    """N rows of this rank's S / CP * B, one sequence after the other, positions ascending; or all
    of them in their own order, [S / CP, B].

    Attributes:
        index: [N] int64, their flat rows in [S / CP, B].
        runs: for every sequence the (start, stop) of their positions, ascending, on the host.
        total: S / CP * B.
        parts: sequence parallelism cuts the rows into so many equal parts, one per
            tensor-parallel rank; otherwise 1.
    """

    index: Tensor
    runs: tuple[Spans, ...]
    total: int
    parts: int = 1

    @classmethod
    def of(cls, needed: Tensor, spans: Sequence[tuple[int, int]], parts: int = 1) -> LiveRows:
        """Choose the rows ``needed`` [S / CP, B] bool on the host, whose positions are ``spans``.

        Others join them where equal parts ask for it, so that there is at least one in each, and
        where hardly any row would be left out.
        """
        chosen = needed.flatten().clone()
        total = chosen.numel()
        count = max(1, -(-int(chosen.sum()) // parts)) * parts
        missing = count - int(chosen.sum())
        if missing:
            chosen[(~chosen).nonzero()[-missing:, 0]] = True
        length, batch = needed.shape
        if total - count <= total // _SPARED:
            return cls(torch.arange(total), (tuple(spans),) * batch, total, parts)
        positions = torch.cat([torch.arange(*span) for span in spans])
        chosen = chosen.view(length, batch)
        runs = tuple(_runs(positions[column]) for column in chosen.t())
        sequence, row = chosen.t().nonzero(as_tuple=True)
        return cls(row * batch + sequence, runs, total, parts)

    @classmethod
    def everything(cls, length: int, batch: int) -> LiveRows:
        """Choose all rows of whole sequences."""
        return cls.of(torch.ones(length, batch, dtype=torch.bool), [(0, length)])

    @property
    def whole(self) -> bool:
        """Whether these are all rows, in their own order."""
        return self.index.numel() == self.total

    def to(self, move: Callable[[Tensor], Tensor]) -> LiveRows:
        """Return the same rows, their index moved to another device."""
        return replace(self, index=move(self.index))

    def part(self, rank: int) -> Tensor:
        """Return the flat rows [N / parts] of one part."""
        return self.index.view(self.parts, -1)[rank]

    def take(self, x: Tensor) -> Tensor:
        """Cut x [S / CP, B, ...] down to these rows, [N, 1, ...], or leave it whole;
        differentiable."""
        if self.whole:
            return x
        return take_rows(x, self.index)

    def plan(self, packing: Packing | None = None) -> Plan:
        """Return the plan of queries [1, n, N, d] against the keys of the whole sequences."""
        assert not self.whole, "queries are as many as ever"
        blocks: list[Block] = []
        offset = 0
        for sequence, runs in enumerate(self.runs):
            documents = None if packing is None else packing.documents[sequence]
            keys = slice(sequence, sequence + 1)
            blocks += span_plan(runs, documents, keys_of=keys, offset=offset)
            offset += sum(stop - start for start, stop in runs)
        return blocks


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return the flat ``rows`` [N] of x [S, B, ...] as one sequence, [N, 1, ...];
    differentiable."""
    return x.flatten(0, 1).index_select(0, rows).unsqueeze(1)


def _runs(positions: Tensor) -> Spans:
    """Return the (start, stop) of the runs of consecutive numbers in ascending ``positions``."""
    if not positions.numel():
        return ()
    breaks = (positions.diff() != 1).nonzero()[:, 0] + 1
    pieces = positions.tensor_split(breaks)
    return tuple((int(piece[0]), int(piece[-1]) + 1) for piece in pieces)
