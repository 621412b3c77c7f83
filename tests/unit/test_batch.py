"""Which rows are supervised at which step."""

from __future__ import annotations

import pytest
import torch

from megatron_eagle.objective.batch import EagleBatch
from megatron_eagle.parallel.context import ContextShard


def rows_by_definition(mask: torch.Tensor, step: int) -> set[tuple[int, int]]:
    """(p, b) such that the consumed token p + 1 + t exists and is supervised."""
    batch, length = mask.shape
    return {
        (p, b)
        for b in range(batch)
        for p in range(length)
        if p + 1 + step <= length - 1 and mask[b, p + step]
    }


def test_rows_follow_the_definition() -> None:
    torch.manual_seed(0)
    mask = torch.rand(3, 11) < 0.5
    built = EagleBatch.build(torch.zeros(3, 11, dtype=torch.long), mask.float(), steps=4)
    for step in range(4):
        flat = built.live.index[built.step_rows[step][built.step_mask[step]]].tolist()
        assert {divmod(row, 3) for row in flat} == rows_by_definition(mask, step)
        assert len(flat) == len(set(flat))
        targets = built.target_rows[built.step_mask[step]]
        assert ((targets // 3) == torch.tensor(flat) // 3 + 1 + step).all()


def test_trimming_keeps_every_supervised_row() -> None:
    mask = torch.zeros(2, 20)
    mask[0, 3:6] = 1
    mask[1, 2] = 1
    tokens = torch.arange(40).view(2, 20)
    whole = EagleBatch.build(tokens, mask, steps=3)
    trimmed = EagleBatch.build(tokens, mask, steps=3, multiple=4, trim=True)
    assert trimmed.tokens.shape == (2, 8), "targets reach 6, rounded up to a multiple of 4"
    for name in ("target_rows", "step_rows", "step_mask"):
        assert torch.equal(getattr(trimmed, name), getattr(whole, name))
    assert torch.equal(trimmed.live.index, whole.live.index)
    assert trimmed.live.runs == whole.live.runs == (((1, 6),), ((0, 3),))


def test_nothing_supervised_gives_an_empty_batch() -> None:
    built = EagleBatch.build(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9), 3, trim=True)
    assert built.target_rows.numel() == 0 and built.tokens.shape[1] >= 5
    assert built.live.index.numel() == 1, "layers want a row"


@pytest.mark.parametrize("context", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_live_rows_are_those_of_any_step_in_equal_parts(
    context: tuple[int, int], parts: int
) -> None:
    torch.manual_seed(parts)
    mask, steps = torch.rand(2, 24) < 0.2, 3
    tokens = torch.arange(48).view(2, 24)
    built = EagleBatch.build(tokens, mask.float(), steps, parts=parts, context=context)
    spans = ContextShard(24, *context).spans
    positions = torch.cat([torch.arange(*span) for span in spans])
    live = [(int(positions[row // 2]), row % 2) for row in built.live.index.tolist()]
    judged = set().union(*(rows_by_definition(mask, step) for step in range(steps)))
    needed = {(p, b) for p, b in judged if p in positions}
    assert needed <= set(live) and len(live) % parts == 0
    assert len(needed) <= len(live) == len(set(live)) < len(needed) + parts
    runs = [(p, b) for b, spans in enumerate(built.live.runs) for s in spans for p in range(*s)]
    assert runs == live, "sequence after sequence, ascending"
    read = built.step_tokens
    padded = torch.nn.functional.pad(tokens, (0, steps)).flatten()
    looked_up = [padded[lookup] for lookup in read.lookup]
    first = torch.cat([found[first] for found, first in zip(looked_up, read.first, strict=True)])
    rows = [(p, b) for p in positions.tolist() for b in range(2)]
    assert first.tolist() == [padded[b * 27 + p + 1] for p, b in rows]
    for step in range(1, steps):
        found = [x[later[step - 1]] for x, later in zip(looked_up, read.later, strict=True)]
        assert torch.cat(found).tolist() == [padded[b * 27 + p + 1 + step] for p, b in live]


def test_a_rank_looks_up_each_token_once() -> None:
    built = EagleBatch.build(torch.zeros(2, 24, dtype=torch.long), torch.ones(2, 24), steps=4)
    assert built.step_tokens.lookup.numel() == 2 * (24 + 3 - 1), "no step judges the last row"
