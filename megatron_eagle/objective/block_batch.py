"""BlockBatch: tokens, and the anchors whose blocks are trained on, worked out on the host.

A block's anchor is a token a of an answer. The block reads the base's rows before a, and its slots
say the tokens behind it: the t-th judged slot says token a + t + 1 and is judged by the base at
u = a + t. A block is judged up to the first token that is not supervised, or is another document's,
and every block is judged at least once. So row p = a - 1 is the last that the block reads, and the
t-th judged slot's target is p + 1 + t, as in an unroll (``objective/batch.py``).

Example: eight tokens x_0 .. x_7, of which x_3 .. x_6 are the assistant's, 3 judged slots.

    anchor a    reads rows    judged by rows    says tokens
        3         0 .. 2         3   4   5         4  5  6
        4         0 .. 3         4   5             5  6
        5         0 .. 4         5                 6

Anchors are drawn without replacement from (seed, sample), so that every rank, every layout and a
resumed run draws the same ones. Under context parallelism an anchor belongs to the rank that owns
row a - 1.

S sequence, Q micro-batch, N anchors of this rank, B slots of a block, K judged ones, M judged rows
(blocks and slots), U targets of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.attention.anchor_plan import WINDOW, Anchor, AnchorPlan
from megatron_eagle.attention.packing import Packing
from megatron_eagle.loss.block_rows import BlockRows
from megatron_eagle.objective.batch import EagleBatch
from megatron_eagle.parallel.context import ContextShard
from megatron_eagle.teacher.base import BaseOutputs


@dataclass(frozen=True)
class BlockShape:
    """B, and how many of a block's slots are judged; the anchor's slot is, if ``first`` is 0."""

    slots: int
    first: int

    @property
    def judged(self) -> int:
        """K."""
        return self.slots - self.first


@dataclass(frozen=True)
class BlockBatch:
    """A micro-batch of Q sequences of S tokens, and this rank's N blocks.

    tokens [Q, S], the whole sequences. ``anchor_tokens`` [N]; ``positions`` [N] of the anchors in
    their documents; ``previous`` [N, B]: the token before the one that slot k says, if the anchor's
    slot is judged. ``target_rows`` [U]: flat rows of the targets in the final hidden, as in
    ``EagleBatch``. ``block_rows`` [M]: each judged row's flat row among N * B. ``rows``: what it is
    judged by. The last blocks may be padding, which nothing judges. ``packing``, ``base_outputs``:
    as in ``EagleBatch``.
    """

    tokens: Tensor
    anchor_tokens: Tensor
    positions: Tensor
    previous: Tensor
    target_rows: Tensor
    block_rows: Tensor
    rows: BlockRows
    plan: AnchorPlan
    packing: Packing | None = None
    base_outputs: BaseOutputs | None = None

    @classmethod
    def build(
        cls,
        tokens: Tensor,
        loss_mask: Tensor,
        samples: Sequence[int],
        shape: BlockShape,
        *,
        anchors: int,
        seed: int,
        multiple: int = 1,
        anchor_multiple: int = 1,
        context: tuple[int, int] = (0, 1),
        positions: Tensor | None = None,
        window: int = WINDOW,
    ) -> BlockBatch:
        """Build from host tensors: tokens [Q, S]; loss_mask [Q, S], whose entry i says whether the
        next token x_{i+1} is supervised; the number of each sample.

        What follows the last target is cut off, to a ``multiple`` of tokens. The blocks are padded
        to an ``anchor_multiple`` (of TP for sequence parallelism). ``context`` is this rank and the
        size of its context-parallel group; ``positions`` [Q, S] are those of the tokens within
        their documents, if the sequences are packed.
        """
        count, length = tokens.shape
        runs = _supervised_runs(loss_mask, positions)
        numbered = zip(runs, samples, strict=True)
        drawn = [draw_anchors(row, anchors, seed, sample) for row, sample in numbered]
        sequence = torch.repeat_interleave(torch.arange(count), torch.tensor(list(map(len, drawn))))
        anchor = torch.cat(drawn)
        judged = (runs[sequence, anchor] - 1).clamp(max=shape.judged)
        rank, world = context
        needed = int((anchor + judged).max()) if len(anchor) else 2
        needed = max(needed, 2 * world * shape.judged if world > 1 else 0)  # a piece has its halo
        length = min(length, -(-needed // multiple) * multiple)
        within = torch.arange(tokens.shape[1]).expand(count, -1) if positions is None else positions
        blocks = _Blocks(sequence, anchor, judged, within[sequence, anchor])
        shard = ContextShard(length, rank, world)
        blocks, target_rows, first_target = _own(blocks, shard, count, shape)
        packing = None if positions is None else Packing.of(positions[:, :length])
        return cls(
            tokens=tokens[:, :length],
            target_rows=target_rows,
            plan=blocks.plan(length, window),
            packing=packing,
            **blocks.rows(tokens, shape, first_target, anchor_multiple),
        )

    def to(self, device: torch.device | str | int) -> BlockBatch:
        """Copy to ``device`` without blocking the host."""
        on_gpu = torch.cuda.is_available() and torch.device(device).type == "cuda"

        def move(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True) if on_gpu else x

        packing, outputs = self.packing, self.base_outputs
        names = (
            "tokens", "anchor_tokens", "positions", "previous", "target_rows", "block_rows",
        )  # fmt: skip
        return replace(
            self,
            **{name: move(getattr(self, name)) for name in names},
            rows=self.rows.map(move),
            plan=self.plan.map(move),
            packing=None if packing is None else packing.to(move(packing.positions)),
            base_outputs=None
            if outputs is None
            else BaseOutputs(move(outputs.features), move(outputs.final_hidden)),
        )


AnyBatch = EagleBatch | BlockBatch
"""A micro-batch of any algorithm; ``tokens``, ``packing``, ``base_outputs``, ``to`` are common."""


@dataclass(frozen=True)
class _Blocks:
    """Blocks by sequence, anchor, number of judged slots and position in the document: [N] each."""

    sequence: Tensor
    anchor: Tensor
    judged: Tensor
    position: Tensor

    def take(self, which: Tensor) -> _Blocks:
        return _Blocks(*(x[which] for x in vars(self).values()))

    def plan(self, length: int, window: int) -> AnchorPlan:
        starts = self.anchor - self.position
        columns = (x.tolist() for x in (self.sequence, starts, self.anchor - 1))
        anchors = [Anchor(*item) for item in zip(*columns, strict=True)]
        return AnchorPlan.of(anchors, length, window)

    def rows(
        self, tokens: Tensor, shape: BlockShape, first_target: Tensor, multiple: int
    ) -> dict[str, Any]:
        """Return what ``BlockBatch`` holds of the blocks, padded; ``tokens`` are not cut."""
        count = len(self.anchor)
        padding = max(-count % multiple, multiple if count == 0 else 0)
        pad = torch.nn.functional.pad
        slots = torch.arange(shape.slots)
        ahead = (self.anchor.unsqueeze(1) + slots).clamp(max=tokens.shape[1] - 1)
        previous = tokens[self.sequence.unsqueeze(1), ahead]
        block = torch.repeat_interleave(torch.arange(count), self.judged)
        ends = self.judged.cumsum(0)
        step = torch.arange(len(block)) - (ends - self.judged)[block]
        labels = tokens[self.sequence[block], self.anchor[block] + step + 1]
        rows = BlockRows(
            steps=step,
            blocks=block,
            targets=first_target[block] + step,
            labels=labels,
            first_targets=tuple(first_target.tolist()),
            counts=tuple(self.judged.tolist()),
        )
        return {
            "anchor_tokens": pad(tokens[self.sequence, self.anchor], (0, padding)),
            "positions": pad(self.position, (0, padding)),
            "previous": pad(previous, (0, 0, 0, padding)),
            "block_rows": block * shape.slots + shape.first + step,
            "rows": rows,
        }


def _supervised_runs(loss_mask: Tensor, positions: Tensor | None) -> Tensor:
    """Return for every token how many supervised tokens follow each other from it on, in its
    document: [Q, S], 0 where it is not supervised. The first token of a document never is."""
    supervised = torch.nn.functional.pad(loss_mask[:, :-1] > 0, (1, 0))
    if positions is not None:
        supervised = supervised & (positions > 0)
    length = supervised.shape[1]
    index = torch.arange(length).expand_as(supervised)
    ends = index.masked_fill(supervised, length).flip(1).cummin(1).values.flip(1)
    return (ends - index) * supervised


def draw_anchors(runs: Tensor, most: int, seed: int, sample: int) -> Tensor:
    """Draw at most ``most`` anchors, ascending, among the tokens that a supervised one follows."""
    choices = np.flatnonzero(runs.numpy() >= 2)
    if len(choices) > most:
        generator = np.random.default_rng((seed, sample))
        choices = np.sort(generator.choice(choices, most, replace=False))
    return torch.from_numpy(choices)


def _own(
    blocks: _Blocks, shard: ContextShard, batch: int, shape: BlockShape
) -> tuple[_Blocks, Tensor, Tensor]:
    """Return this rank's blocks in order, the flat rows of their targets, and the index of each
    block's first target among these."""
    halo = shape.judged if shard.world > 1 else 0
    parts, target_rows, first_targets, known = [], [], [], 0
    for piece, (start, stop) in enumerate(shard.spans):
        inside = (blocks.anchor > start) & (blocks.anchor <= stop)  # row a - 1 is this rank's
        own = blocks.take(inside)
        wanted = torch.zeros(batch, stop - start + shape.judged + 1, dtype=torch.bool)
        for step in range(shape.judged):
            judged = own.judged > step
            wanted[own.sequence[judged], own.anchor[judged] + step - start] = True
        number = wanted.flatten().cumsum(0).view_as(wanted) - 1 + known
        first_targets.append(number[own.sequence, own.anchor - start])
        sequence, offset = wanted.nonzero(as_tuple=True)
        known += len(offset)
        target_rows.append((offset + piece * (stop - start + halo)) * batch + sequence)
        parts.append(own)
    columns = (torch.cat(x) for x in zip(*(vars(part).values() for part in parts), strict=True))
    return _Blocks(*columns), torch.cat(target_rows), torch.cat(first_targets)
