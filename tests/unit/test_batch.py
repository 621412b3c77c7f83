"""Which rows are supervised at which step."""

from __future__ import annotations

import torch

from megatron_eagle.objective.batch import EagleBatch


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
        flat = built.step_rows[step][built.step_mask[step]].tolist()
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


def test_nothing_supervised_gives_an_empty_batch() -> None:
    built = EagleBatch.build(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9), 3, trim=True)
    assert built.target_rows.numel() == 0 and built.tokens.shape[1] >= 5
