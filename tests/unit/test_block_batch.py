"""Which tokens become anchors, which rows are judged, and by what."""

from __future__ import annotations

import dataclasses
from itertools import chain, pairwise

import pytest
import torch

from megatron_eagle.loss.block_rows import BlockRows
from megatron_eagle.objective.block_batch import BlockBatch, BlockShape, draw_anchors
from tests.helpers.block_case import STARTS, make_case, shape_of

FILL_IN, NEXT = BlockShape(4, 1), BlockShape(4, 0)


def one_anchor(shape: BlockShape, answer: slice, length: int = 12) -> BlockBatch:
    """A batch of one sequence x_i = 10 + i, of whose ``answer`` the first token is the anchor."""
    mask = torch.zeros(1, length)
    mask[0, answer.start - 1 : answer.stop - 1] = 1
    tokens = 10 + torch.arange(length).unsqueeze(0)
    built = BlockBatch.build(tokens, mask, [0], shape, anchors=100, seed=0)
    first = built.anchor_tokens.tolist().index(10 + answer.start)
    count = built.rows.counts[first]
    start = sum(built.rows.counts[:first])
    rows = slice(start, start + count)
    columns = {
        name: getattr(built.rows, name)[rows] for name in ("steps", "blocks", "targets", "labels")
    }
    return dataclasses.replace(
        built, block_rows=built.block_rows[rows] - 4 * first,
        previous=built.previous[first], rows=dataclasses.replace(built.rows, **columns),
    )  # fmt: skip


def test_the_rows_of_a_fill_in_block() -> None:
    built = one_anchor(FILL_IN, slice(5, 12))
    assert built.block_rows.tolist() == [1, 2, 3]
    assert built.rows.labels.tolist() == [16, 17, 18]
    assert built.target_rows[built.rows.targets].tolist() == [5, 6, 7]


def test_the_rows_of_a_next_token_block() -> None:
    built = one_anchor(NEXT, slice(5, 12))
    assert built.block_rows.tolist() == [0, 1, 2, 3]
    assert built.rows.labels.tolist() == [16, 17, 18, 19]
    assert built.target_rows[built.rows.targets].tolist() == [5, 6, 7, 8]
    assert built.previous.tolist() == [15, 16, 17, 18]


def test_a_block_ends_with_its_answer() -> None:
    built = one_anchor(NEXT, slice(5, 8))
    assert built.rows.labels.tolist() == [16, 17], "x_7 is the answer's last token"


def test_nothing_crosses_a_document() -> None:
    case = make_case(packed=True)
    everything = torch.ones_like(case.loss_mask)
    built = BlockBatch.build(
        case.tokens, everything, [0, 1], NEXT, anchors=100, seed=0, positions=case.positions
    )
    # A document of n tokens has n - 2 anchors: neither its first token nor its last.
    lengths = [b - a for cuts in STARTS for a, b in pairwise(cuts)]
    assert len(built.rows.counts) == sum(max(0, n - 2) for n in lengths)
    judged = (min(4, n - 1 - a) for n in lengths for a in range(1, n - 1))
    assert sum(built.rows.counts) == sum(judged)
    assert int(built.positions.min()) == 1


def test_draws_depend_on_seed_and_sample_alone() -> None:
    runs = torch.full((200,), 9)
    drawn = draw_anchors(runs, 20, 1, 5)
    assert drawn.equal(draw_anchors(runs, 20, 1, 5)) and drawn.equal(drawn.unique())
    assert not drawn.equal(draw_anchors(runs, 20, 1, 6))
    assert not drawn.equal(draw_anchors(runs, 20, 2, 5))
    fewer = draw_anchors(torch.tensor([0, 2, 1, 3, 2, 1]), 20, 1, 5)
    assert fewer.tolist() == [1, 3, 4], "all of them, if there are no more"


@pytest.mark.parametrize("packed", [False, True])
def test_context_parallel_ranks_share_the_blocks(packed: bool) -> None:
    case = make_case(packed=packed, anchors=7)
    parts = [
        BlockBatch.build(
            case.tokens, case.loss_mask, [3, 4], shape_of(case.config), anchors=7, seed=2,
            multiple=4, context=(rank, 2), positions=case.positions,
        )
        for rank in range(2)
    ]  # fmt: skip
    whole = BlockBatch.build(
        case.tokens, case.loss_mask, [3, 4], shape_of(case.config), anchors=7, seed=2,
        multiple=4, positions=case.positions,
    )  # fmt: skip
    assert sorted(chain.from_iterable(part.rows.labels.tolist() for part in parts)) == sorted(
        whole.rows.labels.tolist()
    )
    assert sum(part.plan.count for part in parts) == whole.plan.count


def test_padding_blocks_are_judged_by_nothing() -> None:
    tokens, mask = torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9)
    built = BlockBatch.build(tokens, mask, [0], NEXT, anchors=5, seed=0, anchor_multiple=4)
    assert built.anchor_tokens.numel() == 4 and built.plan.count == 0
    assert built.rows.counts == () and built.block_rows.numel() == 0
    assert [tuple(chunk) for chunk in built.rows.chunks(10)] == [(slice(0, 0),) * 3]


def test_chunks_hold_whole_blocks_and_the_targets_they_share() -> None:
    case = make_case()
    built = BlockBatch.build(
        case.tokens, case.loss_mask, [0, 1], NEXT, anchors=100, seed=0, anchor_multiple=1
    )
    rows: BlockRows = built.rows
    chunks = rows.chunks(11)
    assert len(chunks) > 3
    assert [c.rows.start for c in chunks[1:]] == [c.rows.stop for c in chunks[:-1]]
    assert chunks[0].rows.start == 0 and chunks[-1].rows.stop == len(rows.labels)
    for chunk in chunks:
        assert chunk.rows.stop - chunk.rows.start <= 11
        assert set(rows.blocks[chunk.rows].tolist()) == set(
            range(chunk.blocks.start, chunk.blocks.stop)
        )
        targets = rows.targets[chunk.rows]
        assert (int(targets.min()), int(targets.max()) + 1) == (
            chunk.targets.start, chunk.targets.stop,
        )  # fmt: skip
