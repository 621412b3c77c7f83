"""EagleBatch: tokens, and which positions are supervised at which step, worked out on the host.

Row p of step t consumes x_{p+1+t} and is judged by the base's distribution at u = p + 1 + t. So
the supervised rows of every step share one set of target positions u, and step t's row for u is
u - 1 - t: the teacher is evaluated once per u, never per step. Positions that are not supervised
reach neither the teacher nor the draft's head. In packed sequences u and its rows lie in the same
document: the first token of a document is no target, and no step looks across its start.

Example: eight tokens x_0 .. x_7, of which x_4 .. x_6 are the assistant's, K = 3.

    target u      4   5   6
    step 0, row   3   4   5        row 3 consumes x_4 and predicts x_5, as the base does at 4
    step 1, row   2   3   4
    step 2, row   1   2   3

Were x_3 the first token of a document, rows 2 and 1 would lie in another one and be masked.

Under context parallelism a rank owns the rows p of its two pieces of the sequence. Their targets
may lie up to K positions further on, so the pieces of the final hidden state have K rows more: a
halo.

The draft's layers run whole rows only where later rows read them; from there on they run the rows
that some step judges (attention/live_rows.py), and these are what ``step_rows`` counts.

S sequence, B micro-batch, K TTT steps, M target positions and N live rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.attention.live_rows import LiveRows
from megatron_eagle.attention.packing import Packing
from megatron_eagle.objective.step_tokens import StepTokens
from megatron_eagle.parallel.context import ContextShard
from megatron_eagle.teacher.base import BaseOutputs


@dataclass(frozen=True)
class EagleBatch:
    """A micro-batch of B sequences of S tokens, with M supervised targets on this rank.

    tokens [B, S], the whole sequences. ``target_rows`` [M]: flat rows of the targets in the final
    hidden [S, B]; under context parallelism in this rank's [S / CP + 2 * K, B], its pieces with
    their halos. ``step_rows`` [K, M]: which of the N live rows is judged at each step.
    ``step_mask`` [K, M] bool: False where that row would lie before the document or on another rank
    (its entry in ``step_rows`` is then any row, and unused). ``live``: the live rows, and
    ``step_tokens`` the tokens that they and all others consume. ``packing``: the documents of
    packed sequences. ``base_outputs``: the base's outputs for this rank, if they were read from
    disk.
    """

    tokens: Tensor
    target_rows: Tensor
    step_rows: Tensor
    step_mask: Tensor
    live: LiveRows
    step_tokens: StepTokens
    packing: Packing | None = None
    base_outputs: BaseOutputs | None = None

    @classmethod
    def build(
        cls,
        tokens: Tensor,
        loss_mask: Tensor,
        steps: int,
        *,
        multiple: int = 1,
        parts: int = 1,
        every_row: bool = False,
        trim: bool = False,
        context: tuple[int, int] = (0, 1),
        positions: Tensor | None = None,
    ) -> EagleBatch:
        """Build from host tensors: tokens [B, S]; loss_mask [B, S], whose entry i says whether the
        next token x_{i+1} is supervised (Megatron's label-aligned mask).

        ``trim`` cuts off what follows the last target of all sequences, to a ``multiple`` (of TP
        for sequence parallelism, of 2 * CP for context parallelism): causal layers never look
        there. Under sequence parallelism ``parts`` is the number of tensor-parallel ranks, which
        get equally many live rows. With ``every_row`` all rows are live. ``context`` is this rank
        and the size of its context-parallel group; ``positions`` [B, S] are those of the tokens
        within their documents, if the sequences are packed.
        """
        batch, length = tokens.shape
        rank, world = context
        supervised = loss_mask[:, : length - 1] > 0
        if positions is not None:
            supervised = supervised & (positions[:, 1:] > 0)
        target, sequence = supervised.t().nonzero(as_tuple=True)
        target = target + 1  # u = p + 1 for the mask entry of p
        if trim:
            needed = int(target[-1]) + 1 if target.numel() else steps + 2
            needed = max(needed, 2 * world * steps if world > 1 else 0)  # a piece has its halo
            length = min(length, -(-needed // multiple) * multiple)
        before = target if positions is None else positions[sequence, target]
        shard = ContextShard(length, rank, world)
        targets, halo = (target, sequence, before), steps if world > 1 else 0
        pieces = [
            _piece_rows(*targets, span, index, steps, batch, halo)
            for index, span in enumerate(shard.spans)
        ]
        target_rows, judged, step_mask = (torch.cat(x, -1) for x in zip(*pieces, strict=True))
        is_judged = torch.full((length // world, batch), every_row)
        is_judged.view(-1)[judged[step_mask]] = True
        live = LiveRows.of(is_judged, shard.spans, parts)
        return cls(
            tokens=tokens[:, :length],
            target_rows=target_rows,
            step_rows=_places(live)[judged].masked_fill(~step_mask, 0),
            step_mask=step_mask,
            live=live,
            step_tokens=StepTokens.of(live, shard.spans, batch, length, steps),
            packing=None if positions is None else Packing.of(positions[:, :length]),
        )

    def to(self, device: torch.device | str | int) -> EagleBatch:
        """Copy to ``device`` without blocking the host."""

        def move(x: Tensor) -> Tensor:
            from_host = x.device.type == "cpu" and _on_gpu(device)
            return x.pin_memory().to(device, non_blocking=True) if from_host else x

        packing, outputs = self.packing, self.base_outputs
        return EagleBatch(
            tokens=move(self.tokens),
            target_rows=move(self.target_rows),
            step_rows=move(self.step_rows),
            step_mask=move(self.step_mask),
            live=self.live.to(move),
            step_tokens=self.step_tokens.to(move),
            packing=None if packing is None else packing.to(move(packing.positions)),
            base_outputs=None
            if outputs is None
            else BaseOutputs(move(outputs.features), move(outputs.final_hidden)),
        )


def _piece_rows(
    target: Tensor,
    sequence: Tensor,
    before: Tensor,
    span: tuple[int, int],
    index: int,
    steps: int,
    batch: int,
    halo: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``target_rows``, the flat rows of [S / CP, B] that each step judges, and ``step_mask``
    of the targets of the piece ``span``.

    ``index`` counts the rank's pieces; ``before`` is how many tokens precede each target in its
    document.
    """
    start, stop = span
    near = (target > start) & (target < stop + steps)
    target, sequence, before = target[near], sequence[near], before[near]
    back = torch.arange(1, steps + 1).unsqueeze(-1)
    row = target.unsqueeze(0) - back
    inside = (row >= start) & (row < stop) & (back <= before)
    local = row.clamp(start, stop - 1) - start + index * (stop - start)
    final = target - start + index * (stop - start + halo)
    return final * batch + sequence, local * batch + sequence, inside


def _places(live: LiveRows) -> Tensor:
    """Return for every flat row of [S / CP, B] its place among the live rows."""
    places = torch.zeros(live.total, dtype=torch.int64)
    places[live.index] = torch.arange(live.index.numel())
    return places


def _on_gpu(device: torch.device | str | int) -> bool:
    return torch.cuda.is_available() and torch.device(device).type == "cuda"
