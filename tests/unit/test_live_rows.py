"""Attention of an unroll that goes on with live rows equals dense attention at these rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_eagle.attention.core import TrunkBranchState
from megatron_eagle.attention.live_rows import LiveRows
from megatron_eagle.attention.packing import Packing
from tests.helpers.one_rank import OneRank

BATCH, LENGTH, HEADS, GROUPS, SIZE, SCALE = 2, 16, 4, 2, 8, 0.3
LAYERS, STEPS = 2, 3
NEEDED = torch.zeros(LENGTH, BATCH, dtype=torch.bool)
NEEDED[0:2, 0] = NEEDED[5, 0] = NEEDED[9:14, 0] = NEEDED[7:16, 1] = True


def packing() -> Packing:
    """Two documents in the first sequence, one in the second; a run crosses the border."""
    first = torch.cat([torch.arange(11), torch.arange(5)])
    return Packing.of(torch.stack([first, torch.arange(LENGTH)]))


def dense(
    layer: int, step: int, q: Tensor, keys: list[Tensor], values: list[Tensor], packed: bool
) -> Tensor:
    """Attention of one position at a time, [rows, n, d] of the live rows (all rows at step 0 of the
    first layer)."""
    documents = packing().positions if packed else torch.arange(LENGTH).expand(BATCH, LENGTH)
    rows = [(s, b) for b in range(BATCH) for s in range(LENGTH) if NEEDED[s, b]]
    if step == 0 and layer == 1:
        rows = [(s, b) for b in range(BATCH) for s in range(LENGTH)]
    outputs = []
    for place, (s, b) in enumerate(rows):
        first = s - int(documents[b, s])
        seen = [(keys[0][b, :, first : s + 1], values[0][b, :, first : s + 1])]
        seen += [
            (key[0, :, place : place + 1], value[0, :, place : place + 1])
            for key, value in zip(keys[1:], values[1:], strict=True)
        ]
        key, value = (
            torch.cat(x, 1).repeat_interleave(HEADS // GROUPS, 0) for x in zip(*seen, strict=True)
        )
        query = q[b, :, s] if step == 0 else q[0, :, place]
        weight = (torch.einsum("nd,nld->nl", query, key) * SCALE).softmax(-1)
        outputs.append(torch.einsum("nl,nld->nd", weight, value))
    return torch.stack(outputs)


def test_a_few_rows_more_are_not_left_out() -> None:
    needed = torch.ones(64, 2, dtype=torch.bool)
    needed[63] = needed[10, 0] = needed[11, 1] = False
    live = LiveRows.of(needed, [(0, 64)])
    assert live.whole and live.index.tolist() == list(range(128))
    x = torch.randn(64, 2, 3)
    assert live.take(x) is x
    needed[12, 0] = False
    live = LiveRows.of(needed, [(0, 64)])
    assert not live.whole and live.index.numel() == 128 - 5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_live_rows_attend_as_in_dense_attention(packed: bool, narrow: bool) -> None:
    """With ``narrow`` the last layer is asked no other queries to begin with."""
    torch.manual_seed(0)
    live = LiveRows.of(NEEDED, [(0, LENGTH)])
    count = live.index.numel()
    state = TrunkBranchState(OneRank(), live, LAYERS, packing() if packed else None)  # type: ignore
    inputs, found, expected = [], [], []
    for layer in range(1, LAYERS + 1):
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for step in range(STEPS):
            batch, rows = (BATCH, LENGTH) if step == 0 else (1, count)
            q, k, v = (
                torch.randn(batch, heads, rows, SIZE, requires_grad=True)
                for heads in (HEADS, GROUPS, GROUPS)
            )
            inputs += [q, k, v]
            keys, values = [*keys, k], [*values, v]
            asked = q
            if narrow and step == 0 and layer == LAYERS:
                asked = live.take(q.permute(2, 0, 1, 3)).permute(1, 2, 0, 3)
            out = state.attend(layer, asked, k, v, SCALE)
            found.append(out.permute(0, 2, 1, 3).flatten(0, 1))
            expected.append(dense(layer, step, q, keys, values, packed))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    weights = [torch.randn_like(x) for x in found]
    gradients = [
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), inputs
        )
        for outputs in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
