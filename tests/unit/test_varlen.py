"""The draft's trunk in one flash call: its schema, and its layout against plans of blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_eagle.attention import varlen
from megatron_eagle.attention.core import TrunkBranchState
from megatron_eagle.attention.live_rows import LiveRows
from megatron_eagle.attention.packing import Packing
from megatron_eagle.attention.varlen import Segments
from tests.helpers.fake_cuda_tensors import fake_cuda_tensors
from tests.helpers.one_rank import OneRank

BATCH, LENGTH, HEADS, GROUPS, SIZE, WIDTH, SCALE = 2, 24, 4, 2, 10, 6, 0.3
STARTS = [[0, 5, 11, 24], [0, 11, 12, 24]]
NEEDED = torch.zeros(LENGTH, BATCH, dtype=torch.bool)
NEEDED[2:4, 0] = NEEDED[13:17, 0] = NEEDED[19, 0] = NEEDED[7:16, 1] = NEEDED[23, 1] = True
TAILS = torch.ones_like(NEEDED)
TAILS[:3, 0] = False
LAYERS, STEPS = 2, 3


def packing() -> Packing:
    rows = [torch.cat([torch.arange(b - a) for a, b in pairwise(starts)]) for starts in STARTS]
    return Packing.of(torch.stack(rows))


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[n, queries, keys] of one segment: the last query sees the last key."""
    scores = torch.einsum("snd,tnd->nst", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    later = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    return (scores * scale).masked_fill(later, float("-inf"))


def _segments(*offsets: Tensor, longest: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    bounds = [[slice(*pair) for pair in pairwise(ends.tolist())] for ends in offsets]
    assert all(ends.dtype == torch.int32 for ends in offsets)
    assert longest == tuple(max(s.stop - s.start for s in side) for side in bounds)
    assert all(0 < q.stop - q.start <= k.stop - k.start for q, k in zip(*bounds, strict=True))
    return zip(*bounds, strict=True)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_most: int, k_most: int,
    dropout: float, causal: bool, debug: bool, *, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The layout of ``_flash_attention_forward`` with offsets: out [T, n, d], lse [n, T]."""
    assert causal and dropout == 0.0 and not debug and q.shape[-1] % 8 == 0
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    outs, lses = [], []
    for queries, keys in _segments(q_ends, k_ends, longest=(q_most, k_most)):
        scores = _scores(q[queries], k[keys], scale)
        value = v[keys].repeat_interleave(HEADS // GROUPS, 1)
        outs.append(torch.einsum("nst,tnd->snd", scores.softmax(-1), value))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_ends: Tensor,
    k_ends: Tensor, q_most: int, k_most: int, dropout: float, causal: bool, seed: Tensor,
    offset: Tensor, *, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """That of ``_flash_attention_backward``, from any out [T, n, d] and lse [n, T]."""
    assert lse.is_contiguous() and grad.shape == out.shape == q.shape
    dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
    for queries, keys in _segments(q_ends, k_ends, longest=(q_most, k_most)):
        own, go = q[queries], grad[queries]
        key, value = (x[keys].repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
        p = (_scores(own, k[keys], scale) - lse[:, queries].unsqueeze(-1)).exp()
        delta = (go * out[queries]).sum(-1).t().unsqueeze(-1)
        ds = p * (torch.einsum("snd,tnd->nst", go, value) - delta) * scale
        dq[queries] = torch.einsum("nst,tnd->snd", ds, key)
        for target, whole in (
            (dk, torch.einsum("nst,snd->tnd", ds, own)),
            (dv, torch.einsum("nst,snd->tnd", p, go)),
        ):
            target[keys] = whole.unflatten(1, (GROUPS, -1)).sum(2)
    return dq, dk, dv


@contextlib.contextmanager
def kernel() -> Iterator[list[int]]:
    """Let the kernels' layout stand in for them on the CPU; counts the calls."""
    calls: list[int] = []

    def counted(run: Any) -> Any:
        return lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs)

    with (
        mock.patch.object(torch.ops.aten, "_flash_attention_forward", counted(_forward)),
        mock.patch.object(torch.ops.aten, "_flash_attention_backward", counted(_backward)),
        mock.patch.object(varlen, "applies", lambda q: True),
    ):
        yield calls


def unrolled(
    live: LiveRows, packed: bool, device: str = "cpu"
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Outputs of two layers and three steps, and the gradients of all their inputs; in bf16 on a
    GPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    live = live.to(lambda index: index.to(device))
    torch.manual_seed(0)
    state = TrunkBranchState(OneRank(), live, LAYERS, packing() if packed else None)  # type: ignore
    inputs, outputs = [], []
    for layer in range(1, LAYERS + 1):
        for step in range(STEPS):
            batch, rows = (BATCH, LENGTH) if step == 0 else (1, live.index.numel())
            shapes = ((HEADS, SIZE), (GROUPS, SIZE), (GROUPS, WIDTH))
            own = [  # as a layer hands them on: [S, B, heads, channels], permuted
                torch.randn(rows, batch, n, d, requires_grad=True) for n, d in shapes
            ]
            inputs += own
            moved = [x.to(device, dtype).permute(1, 2, 0, 3) for x in own]
            outputs.append(state.attend(layer, *moved, SCALE).cpu().float())
    total = sum((x * torch.randn_like(x)).sum() for x in outputs)
    assert isinstance(total, Tensor)
    return outputs, torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("needed", [NEEDED, TAILS], ids=["holes", "tails"])
def test_one_launch_equals_a_plan_of_blocks(needed: Tensor, packed: bool) -> None:
    live = LiveRows.of(needed, [(0, LENGTH)])
    outputs, gradients = unrolled(live, packed)
    with kernel() as calls:
        found, found_gradients = unrolled(live, packed)
    assert len(calls) >= 2 * LAYERS * (STEPS - 1), "some kernel per layer and step"
    torch.testing.assert_close(found, outputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_gradients, gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("narrow", [False, True])
def test_the_installed_kernels_take_these_arguments(narrow: bool) -> None:
    live = LiveRows.of(NEEDED, [(0, LENGTH)])
    runs = live.runs if narrow else tuple(((0, LENGTH),) for _ in range(BATCH))
    segments = Segments.of(runs, packing().documents, torch.device("cpu"))
    batch, rows = (1, live.index.numel()) if narrow else (BATCH, LENGTH)
    with fake_cuda_tensors():
        segments = _on_cuda(segments)
        q, k, v = (
            torch.empty(length, size, n, d, dtype=torch.bfloat16, device="cuda").permute(1, 2, 0, 3)
            for size, length, n, d in (
                (batch, rows, HEADS, SIZE), (BATCH, LENGTH, GROUPS, SIZE),
                (BATCH, LENGTH, GROUPS, WIDTH),
            )
        )  # fmt: skip
        assert varlen.applies(q)
        out, lse = varlen.forward(q, k, v, SCALE, segments)
        assert out.shape == (batch, HEADS, rows, WIDTH) and out.dtype == torch.bfloat16
        assert lse.shape == (batch, HEADS, rows) and lse.dtype == torch.float32
        grads = varlen.backward(torch.empty_like(out), q, k, v, out, lse, SCALE, segments)
        assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]


def _on_cuda(segments: Segments) -> Segments:
    def moved(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    return replace(
        segments,
        query_offsets=moved(segments.query_offsets),
        key_offsets=moved(segments.key_offsets),
        rows=None if segments.rows is None else moved(segments.rows),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_the_kernels_themselves_equal_a_plan_of_blocks(packed: bool) -> None:
    live = LiveRows.of(NEEDED, [(0, LENGTH)])
    outputs, gradients = unrolled(live, packed)
    found, found_gradients = unrolled(live, packed, "cuda")
    torch.testing.assert_close(found, outputs, rtol=0.02, atol=0.02)
    for a, b in zip(found_gradients, gradients, strict=True):
        assert (a - b).norm() < 0.03 * b.norm() + 0.01
