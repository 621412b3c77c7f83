"""Block-causal attention: one softmax per row over any union of rectangles and triangles.

A plan is a list of blocks: rows of the queries that attend to a span of the keys, all of them or
causally. Plain causal attention is one block. A rank that holds two pieces of a sequence cut for
context parallelism, a sequence packed of several documents, and a sliding window are more. Each
block is a flash kernel, and blocks of the same rows are merged by their log-sum-exp, so no mask
exists and masked blocks cost nothing. Backward feeds the merged output and log-sum-exp to every
block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention import flash

ALL = slice(None)


@dataclass(frozen=True)
class Block:
    """The query rows ``query`` of the sequences ``batch`` attend to the keys ``key``.

    In a ``causal`` block, which is square, row i sees the keys 0..i of the block, and the keys i..
    when it is ``reverse`` too."""

    query: slice = ALL
    key: slice = ALL
    causal: bool = True
    batch: slice = ALL
    reverse: bool = False


Plan = Sequence[Block]
"""Blocks of the same rows stand next to each other; every row is in at least one block."""

CAUSAL: Plan = (Block(),)
"""Every row sees itself and all rows before it."""


def span_plan(
    spans: Iterable[tuple[int, int]],
    documents: Sequence[tuple[int, int]] | None = None,
    batch: slice = ALL,
    window: int | None = None,
) -> list[Block]:
    """The plan of local rows that hold the ``spans`` (start, stop) of a sequence, one after the
    other, against the keys of the whole sequence in order.

    With ``documents``, ascending (start, stop) that cover the spans, a row sees only what lies in
    its own document; with a ``window`` (2 or more), only itself and the window - 1 keys before it.
    """
    blocks: list[Block] = []
    offset = 0
    for start, stop in spans:
        for first, last in documents or [(0, stop)]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                shift = offset - start
                blocks += _document_blocks(first, low, high, shift, batch, window or high)
        offset += stop - start
    return blocks


def _document_blocks(
    first: int, low: int, high: int, shift: int, batch: slice, window: int
) -> Iterator[Block]:
    """The rows low .. high - 1 (local rows, once ``shift`` is added) of a document that begins at
    ``first``."""

    def block(start: int, stop: int, key: slice, causal: bool, reverse: bool = False) -> Block:
        return Block(slice(start + shift, stop + shift), key, causal, batch, reverse)

    whole = min(high, first + window)  # rows before it see their document from its start
    if low < whole:
        if first < low:
            yield block(low, whole, slice(first, low), causal=False)
        yield block(low, whole, slice(low, whole), causal=True)
    # window - 1 rows share no more than one triangle of own keys and one of earlier ones.
    for start in range(max(low, whole), high, window - 1):
        stop = min(high, start + window - 1)
        oldest = start - window + 1
        middle = oldest + stop - start
        yield block(start, stop, slice(start, stop), causal=True)
        yield block(start, stop, slice(oldest, middle), causal=True, reverse=True)
        if middle < start:
            yield block(start, stop, slice(middle, start), causal=False)


def blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Plan
) -> tuple[Tensor, Tensor]:
    """(out [B, n, S, dv], lse [B, n, S] fp32) of the plan's softmax.

    q [B, n, S, d], k [B, g, L, d], v [B, g, L, dv], g dividing n, this TP rank's heads. Not
    differentiable by itself; no collective.
    """
    if len(plan) == 1:
        return _forward(q, k, v, scale, plan[0])
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    for (batch, rows), blocks in groupby(plan, lambda block: (block.batch, block.query)):
        part: tuple[Tensor, Tensor] | None = None
        for block in blocks:
            new = _forward(*_cut(q, k, v, block), scale, block)
            part = new if part is None else merge(*part, *new)
        assert part is not None
        out[batch, :, rows], lse[batch, :, rows] = part
    return out, lse


def blocks_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from the ``out`` and ``lse`` of the whole softmax, of which the plan
    may be a part only. Keys that no block touches get zeros."""
    if len(plan) == 1:
        return _backward(grad_out, q, k, v, out, lse, scale, plan[0])
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for block in plan:
        batch, rows, keys = block.batch, block.query, block.key
        part_q, part_k, part_v = _backward(
            grad_out[batch, :, rows],
            *_cut(q, k, v, block),
            out[batch, :, rows],
            lse[batch, :, rows].contiguous(),
            scale,
            block,
        )
        dq[batch, :, rows] += part_q
        dk[batch, :, keys] += part_k
        dv[batch, :, keys] += part_v
    return dq, dk, dv


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes of the same rows over disjoint keys as one."""
    merged = torch.logaddexp(lse, other_lse)
    weight = (lse - merged).exp().unsqueeze(-1).to(out.dtype)
    other_weight = (other_lse - merged).exp().unsqueeze(-1).to(out.dtype)
    return torch.addcmul(out * weight, other, other_weight), merged


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: float, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = blocks_forward(q, k, v, scale, plan)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.plan = scale, plan
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_out, scale, plan = grad_outputs[0].contiguous(), ctx.scale, ctx.plan
        return None, None, *blocks_backward(grad_out, q, k, v, out, lse, scale, plan)


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, plan: Plan = CAUSAL
) -> Tensor:
    """softmax(scale * q kᵀ) v over the plan's blocks, [B, n, S, dv] in the query's dtype.

    Shapes as in :func:`blocks_forward`; differentiable in all three; no collective.
    """
    return _BlockAttention.apply(scale, plan, query, key, value)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, block: Block) -> tuple[Tensor, Tensor]:
    """One block's own (out, lse), of its rows and keys."""
    if not block.reverse:
        return flash.forward(q, k, v, scale, block.causal)
    # Backwards in time, the keys i.. are the keys ..i.
    out, lse = flash.forward(q.flip(2), k.flip(2), v.flip(2), scale, block.causal)
    return out.flip(2), lse.flip(2)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    block: Block,
) -> tuple[Tensor, Tensor, Tensor]:
    if not block.reverse:
        return flash.backward(grad_out, q, k, v, out, lse, scale, block.causal)
    grad_out, q, k, v, out, lse = (x.flip(2) for x in (grad_out, q, k, v, out, lse))
    dq, dk, dv = flash.backward(grad_out, q, k, v, out, lse, scale, block.causal)
    return dq.flip(2), dk.flip(2), dv.flip(2)


def sink_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, plan: Plan, sink: Tensor
) -> Tensor:
    """:func:`block_attention` under a softmax that ``sink`` [n], a score per head, joins without a
    value. Not differentiable: only frozen bases have sinks."""
    out, lse = blocks_forward(query, key, value, scale, plan)
    share = torch.sigmoid(lse - sink.float().unsqueeze(-1))  # what the sink leaves
    return out * share.unsqueeze(-1).to(out.dtype)


def _cut(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    batch, keys = block.batch, block.key
    return q[batch, :, block.query], k[batch, :, keys], v[batch, :, keys]
