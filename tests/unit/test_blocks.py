"""Plans of blocks: output and gradients equal one dense softmax under the mask they describe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_eagle.attention.blocks import Block, Plan, block_attention, span_plan
from megatron_eagle.attention.trunk_branch import trunk_branch_attention

BATCH, LENGTH, SIZE, SCALE = 2, 24, 16, 0.21
ZIGZAG = [(0, 6), (18, 24)]
DOCUMENTS = [(0, 4), (4, 20), (20, 24)]


def mask_of(plan: Plan, rows: int) -> Tensor:
    """What the plan lets each row see, [B, rows, L] bool."""
    mask = torch.zeros(BATCH, rows, LENGTH, dtype=torch.bool)
    for block in plan:
        part = mask[block.batch, block.query, block.key]
        seen = torch.ones(part.shape[1:], dtype=torch.bool)
        assert not part.any(), "a key counted twice"
        if block.causal:
            seen = seen.triu() if block.reverse else seen.tril()
        mask[block.batch, block.query, block.key] = seen
    return mask


def expected_mask(spans: list, documents: list | None, window: int = LENGTH) -> Tensor:
    positions = torch.cat([torch.arange(*span) for span in spans])
    distance = positions[:, None] - torch.arange(LENGTH)
    mask = (distance >= 0) & (distance < window)
    if documents is None:
        return mask
    document = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(documents)])
    return mask & (document[positions][:, None] == document)


PLANS = [
    pytest.param([(0, LENGTH)], None, id="causal"),
    pytest.param(ZIGZAG, None, id="first-and-last-piece"),
    pytest.param([(6, 12), (12, 18)], None, id="middle-pieces"),
    pytest.param([(0, LENGTH)], DOCUMENTS, id="documents"),
    pytest.param(ZIGZAG, DOCUMENTS, id="documents-in-pieces"),
]


@pytest.mark.parametrize(("spans", "documents"), PLANS)
def test_plans_describe_the_mask(spans: list, documents: list | None) -> None:
    rows = sum(stop - start for start, stop in spans)
    assert mask_of(span_plan(spans, documents), rows)[0].equal(expected_mask(spans, documents))


@pytest.mark.parametrize("window", [2, 3, 5, 8, 23])
@pytest.mark.parametrize(("spans", "documents"), PLANS)
def test_sliding_windows_equal_dense_softmax(
    spans: list, documents: list | None, window: int
) -> None:
    torch.manual_seed(window)
    plan = span_plan(spans, documents, window=window)
    mask = expected_mask(spans, documents, window)
    assert mask_of(plan, mask.shape[0])[0].equal(mask)
    q = torch.randn(BATCH, 4, mask.shape[0], SIZE, requires_grad=True)
    k, v = (torch.randn(BATCH, 2, LENGTH, SIZE, requires_grad=True) for _ in range(2))
    compare(block_attention(q, k, v, SCALE, plan), dense(q, k, v, mask), [q, k, v])


@pytest.mark.parametrize(("spans", "documents"), PLANS)
@pytest.mark.parametrize("branches", [0, 2])
def test_equals_dense_softmax(spans: list, documents: list | None, branches: int) -> None:
    """Grouped queries, trunk alone and with branch keys."""
    torch.manual_seed(branches)
    plan, mask = span_plan(spans, documents), expected_mask(spans, documents)
    rows = mask.shape[0]
    q = torch.randn(BATCH, 4, rows, SIZE, requires_grad=True)
    lengths = [LENGTH, *[rows] * branches]
    keys, values = (
        [torch.randn(BATCH, 2, length, SIZE, requires_grad=True) for length in lengths]
        for _ in range(2)
    )
    if branches:
        out = trunk_branch_attention(q, keys[0], values[0], keys[1:], values[1:], SCALE, plan)
    else:
        out = block_attention(q, keys[0], values[0], SCALE, plan)
    mask = torch.cat([mask, *[torch.eye(rows, dtype=torch.bool)] * branches], dim=1)
    expected = dense(q, torch.cat(keys, 2), torch.cat(values, 2), mask)
    compare(out, expected, [q, *keys, *values])


def test_each_sequence_may_have_documents_of_its_own() -> None:
    torch.manual_seed(0)
    other = [(0, 10), (10, LENGTH)]
    plan: list[Block] = []
    for index, documents in enumerate((DOCUMENTS, other)):
        plan += span_plan([(0, LENGTH)], documents, slice(index, index + 1))
    whole = [(0, LENGTH)]
    mask = torch.stack([expected_mask(whole, DOCUMENTS), expected_mask(whole, other)])
    assert mask_of(plan, LENGTH).equal(mask)
    q, k, v = (torch.randn(BATCH, 4, LENGTH, SIZE, requires_grad=True) for _ in range(3))
    expected = dense(q, k, v, mask.unsqueeze(1))
    compare(block_attention(q, k, v, SCALE, plan), expected, [q, k, v])


def dense(q: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (q @ key.transpose(-1, -2) * SCALE).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ value


def compare(out: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), inputs)
    for a, b in zip(found, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
