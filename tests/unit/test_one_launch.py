"""Documents and windows in one flash kernel: its schema, and its layout against plans of blocks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_eagle.attention import flash, one_launch
from megatron_eagle.attention.blocks import beside_sink, blocks_forward, sink_attention, span_plan
from megatron_eagle.attention.one_launch import Bounds
from tests.helpers.fake_cuda_tensors import fake_cuda_tensors

BATCH, LENGTH, HEADS, GROUPS, SIZE, WIDTH, SCALE = 2, 24, 4, 2, 10, 6, 0.3
DOCUMENTS = [[(0, 5), (5, 24)], [(0, 11), (11, 12), (12, 24)]]


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, _: Tensor | None, longest: int,
    __: int, dropout: float, causal: bool, debug: bool, *, scale: float,
    window_size_left: int | None, window_size_right: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The layout of ``_flash_attention_forward``: [B, S, n, d] and lse [B, n, S], or with offsets
    [T, n, d] and lse [n, T]."""
    assert causal and dropout == 0.0 and not debug and window_size_right in (None, 0)
    assert q.shape[-1] % 8 == 0 and q.shape[-1] == k.shape[-1] == v.shape[-1]
    if offsets is None:
        sequences = [(q[i], k[i], v[i]) for i in range(q.shape[0])]
    else:
        assert offsets.dtype == torch.int32
        bounds = list(zip(offsets.tolist(), offsets.tolist()[1:], strict=False))
        assert longest == max(stop - start for start, stop in bounds)
        sequences = [(q[a:b], k[a:b], v[a:b]) for a, b in bounds]
    parts = [_dense(*tensors, scale, window_size_left) for tensors in sequences]
    outs, lses = zip(*parts, strict=True)
    if offsets is None:
        return torch.stack(outs), torch.stack(lses)
    return torch.cat(outs), torch.cat(lses, dim=1)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int | None) -> tuple:
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = torch.einsum("snd,tnd->nst", q, k) * scale
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (distance < 0) | (distance > (len(q) if left is None else left))
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("nst,tnd->snd", scores.softmax(-1), v), scores.logsumexp(-1)


def _inputs() -> list[Tensor]:
    torch.manual_seed(1)
    shapes = ((HEADS, SIZE), (GROUPS, SIZE), (GROUPS, WIDTH))
    # As a layer hands them on: [S, B, heads, channels], permuted.
    return [torch.randn(LENGTH, BATCH, n, d).permute(1, 2, 0, 3) for n, d in shapes]


@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_the_kernels_layout_equals_a_plan_of_blocks(
    documents: list | None, window: int | None
) -> None:
    q, k, v = _inputs()
    plan = [
        block
        for i in range(BATCH)
        for block in span_plan([(0, LENGTH)], documents and documents[i], slice(i, i + 1), window)
    ]
    bounds = documents and Bounds.of(documents, LENGTH, torch.device("cpu"))
    with mock.patch.object(torch.ops.aten, "_flash_attention_forward", _kernel):
        out, lse = one_launch.forward(q, k, v, SCALE, bounds, window)
    expected, expected_lse = blocks_forward(q, k, v, SCALE, plan)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)
    sink = torch.randn(HEADS)
    beside = sink_attention(q, k, v, SCALE, plan, sink)
    torch.testing.assert_close(beside_sink(out, lse, sink), beside, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_the_installed_kernel_takes_these_arguments(
    documents: list | None, window: int | None
) -> None:
    with fake_cuda_tensors():
        q, k, v = (
            torch.empty(LENGTH, BATCH, n, d, dtype=torch.bfloat16, device="cuda").permute(
                1, 2, 0, 3
            )
            for n, d in ((HEADS, SIZE), (GROUPS, SIZE), (GROUPS, WIDTH))
        )
        assert one_launch.applies(q)
        bounds = None
        if documents is not None:
            offsets = torch.empty(6, dtype=torch.int32, device="cuda")
            bounds = Bounds(offsets, 19)
        out, lse = one_launch.forward(q, k, v, SCALE, bounds, window)
        assert out.shape == (BATCH, HEADS, LENGTH, WIDTH) and out.dtype == torch.bfloat16
        assert lse.shape == (BATCH, HEADS, LENGTH) and lse.dtype == torch.float32


def test_heads_of_any_size_take_the_flash_kernel() -> None:
    with fake_cuda_tensors():
        q, k, v = (
            torch.empty(BATCH, n, LENGTH, d, dtype=torch.bfloat16, device="cuda")
            for n, d in ((HEADS, 100), (HEADS, 100), (HEADS, 60))
        )
        assert flash.has_cuda_flash(q)
        out, lse = flash.forward(q, k, v, SCALE, True)
        assert out.shape == v.shape
        grads = flash.backward(torch.empty_like(out), q, k, v, out, lse, SCALE, True)
        assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]
