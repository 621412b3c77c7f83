"""Attention of blocks to context and block: values and gradients equal a dense masked softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_eagle.attention import anchors as anchors_module
from megatron_eagle.attention.anchor_plan import Anchor, AnchorPlan
from megatron_eagle.attention.anchors import anchor_attention

SLOTS, HEADS, GROUPS, SIZE, LENGTH = 3, 6, 2, 8, 23
DOCUMENTS = [[0, 9, 23], [0, 2, 23]]
Inputs = dict[str, Tensor]


def inputs(blocks: int) -> Inputs:
    shapes = {"q": (blocks, HEADS, SLOTS, SIZE), "k": (blocks, GROUPS, SLOTS, SIZE)}
    shapes |= {"v": shapes["k"], "ck": (2, GROUPS, LENGTH, SIZE), "cv": (2, GROUPS, LENGTH, SIZE)}
    return {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}


def dense(x: Inputs, anchors: list[Anchor]) -> Tensor:
    """One block at a time; those behind the last anchor are padding and see themselves alone."""
    outputs = []
    for number in range(len(x["q"])):
        keys, values = x["k"][number], x["v"][number]
        if number < len(anchors):
            sequence, document, row = anchors[number]
            seen = slice(document, row + 1)
            keys = torch.cat([x["ck"][sequence, :, seen], keys], dim=1)
            values = torch.cat([x["cv"][sequence, :, seen], values], dim=1)
        keys, values = (y.repeat_interleave(HEADS // GROUPS, 0) for y in (keys, values))
        scores = 0.3 * x["q"][number] @ keys.transpose(-1, -2)
        outputs.append(scores.softmax(-1) @ values)
    return torch.stack(outputs)


@pytest.mark.parametrize("folds", [False, True], ids=["masked", "folded"])
@pytest.mark.parametrize("window", [4, 128])
@pytest.mark.parametrize("rows", [list(range(LENGTH - 1)), [0, 3, 4, 11, 12, 21], []])
def test_equals_the_dense_softmax(
    window: int, rows: list[int], folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchors_module, "_folds", lambda q: folds)  # as a CPU, and as a GPU
    torch.manual_seed(0)
    anchors = [
        Anchor(sequence, max(start for start in starts[:-1] if start <= row), row)
        for sequence, starts in enumerate(DOCUMENTS)
        for row in rows
    ]
    given = inputs(len(anchors) + 2)
    plan = AnchorPlan.of(anchors, LENGTH, window, slab=3)
    found = anchor_attention(*given.values(), 0.3, plan)
    expected = dense(given, anchors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(found)
    gradients = torch.autograd.grad(found, list(given.values()), grad)
    wanted = torch.autograd.grad(expected, list(given.values()), grad, allow_unused=True)
    for name, one, other in zip(given, gradients, wanted, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6, msg=name)


def test_keys_that_nobody_sees_cost_nothing() -> None:
    """One late anchor in a long sequence: a rectangle, and one window."""
    plan = AnchorPlan.of([Anchor(0, 0, 1000)], 4096, window=128)
    (slab,) = plan.slabs
    (window,) = slab.windows
    assert slab.keys.shape == (1, 128)
    assert (window.before, window.own) == (slice(0, 896), slice(896, 1001))
