"""Attend by a plan of blocks: one softmax per query over any union of rectangles and triangles.

A plan is a list of blocks: a span of queries that attends to a span of keys, to all of them or
causally. Plain causal attention is one block. Two pieces of a sequence cut for context parallelism,
documents packed into a sequence, and a sliding window take several. Each block is a flash kernel,
and blocks of the same queries are merged by their log-sum-exp, so there is no mask tensor and keys
that nobody sees cost nothing. Backward feeds the merged output and log-sum-exp to every block.

Shape letters: B sequences, n query heads and g key/value heads of this TP rank (g divides n), S
query positions, L key positions, d channels of a key, dv of a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention import flash

ALL = slice(None)


@dataclass(frozen=True)
class Block:
    """The queries ``query`` of the sequences ``batch`` attend to the keys ``key``.

    In a ``causal`` block, which is square, query i sees the keys 0..i of the block. If it is
    ``reverse`` too, query i sees the block's key i and all later ones. ``keys_of``: the sequences
    of the keys, if they are not numbered as those of the queries.
    """

    query: slice = ALL
    key: slice = ALL
    causal: bool = True
    batch: slice = ALL
    reverse: bool = False
    keys_of: slice | None = None


Plan = Sequence[Block]
"""Blocks of the same queries are neighbours in the list; every query is in at least one block."""

CAUSAL: Plan = (Block(),)
"""Every position sees itself and all positions before it."""


def span_plan(
    spans: Iterable[tuple[int, int]],
    documents: Sequence[tuple[int, int]] | None = None,
    batch: slice = ALL,
    window: int | None = None,
    keys_of: slice | None = None,
    offset: int = 0,
) -> list[Block]:
    """Return the plan of this rank's queries against the keys of the whole sequence in order.

    Args:
        spans: the (start, stop) of a sequence that this rank's queries hold, one after the other.
        documents: ascending (start, stop) that cover the spans; a query then sees the keys of its
            own document only.
        batch: the sequences that the plan is for.
        window: a query sees itself and the ``window`` - 1 keys before it; at least 2.
        keys_of: the sequences of the keys, if they are numbered otherwise than in ``batch``.
        offset: the index of the first query.
    """
    blocks: list[Block] = []
    for start, stop in spans:
        for first, last in documents or [(0, stop)]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                shift = offset - start
                blocks += _document_blocks(first, low, high, shift, batch, window or high + 1)
        offset += stop - start
    return [replace(block, keys_of=keys_of) for block in blocks]


def _document_blocks(
    first: int, low: int, high: int, shift: int, batch: slice, window: int
) -> Iterator[Block]:
    """Yield the blocks of positions low .. high - 1 of a document that begins at ``first``.

    Adding ``shift`` to a position gives its index among this rank's queries. For first = low = 0,
    high = 6 and window = 3, with a letter per block:

        key         0  1  2  3  4  5
        position 0  a                   a: causal, back to the document's start
        position 1  a  a
        position 2  a  a  a
        position 3     c  c  b          b: causal, the newest keys
        position 4        c  b  b       c: reverse, the oldest keys in the window
        position 5           f  g  e    e, f, g: the next turn; g lies between its two triangles
    """

    def block(start: int, stop: int, key: slice, causal: bool, reverse: bool = False) -> Block:
        return Block(slice(start + shift, stop + shift), key, causal, batch, reverse)

    cut = min(high, first + window)  # positions before it see back to their document's start
    if low < cut:
        if first < low:
            yield block(low, cut, slice(first, low), causal=False)
        yield block(low, cut, slice(low, cut), causal=True)
    # With at most window - 1 queries at a time, the newest keys and the oldest do not overlap.
    for start in range(max(low, cut), high, window - 1):
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
    """Return out [B, n, S, dv] and lse [B, n, S] fp32 of the plan's softmax.

    q [B, n, S, d], k [B, g, L, d], v [B, g, L, dv]. Not differentiable by itself; no collective.
    """
    if _is_whole(plan, q, k):
        return _forward(q, k, v, scale, plan[0])
    out = lse = None
    for (batch, queries), blocks in groupby(plan, lambda block: (block.batch, block.query)):
        part = _merged([(*_cut(q, k, v, block), block) for block in blocks], scale)
        if part[1].shape == q.shape[:-1]:
            return part
        if out is None or lse is None:
            rows = q.transpose(1, 2)  # positions before heads: what the layer reads next
            out = q.new_empty(*rows.shape[:-1], v.shape[-1]).transpose(1, 2)
            lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        out[batch, :, queries], lse[batch, :, queries] = part
    assert out is not None and lse is not None
    return out, lse


def _merged(
    blocks: list[tuple[Tensor, Tensor, Tensor, Block]], scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the union of blocks with the same queries."""
    out, lse = _forward(*blocks[0][:3], scale, blocks[0][3])
    for q, k, v, block in blocks[1:]:
        out, lse = merge_(out, lse, *_forward(q, k, v, scale, block))
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
    """Return the gradients of q, k, v from ``out`` and ``lse``.

    These may be of a larger softmax, of which the plan is a part. Keys that no block touches get
    zeros. No collective.
    """
    if _is_whole(plan, q, k):
        return _backward(grad_out, q, k, v, out, lse, scale, plan[0])
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    written = None
    for block in plan:
        batch, queries, keys = block.batch, block.query, block.key
        sequences = batch if block.keys_of is None else block.keys_of
        part_q, part_k, part_v = _backward(
            grad_out[batch, :, queries],
            *_cut(q, k, v, block),
            out[batch, :, queries],
            lse[batch, :, queries].contiguous(),
            scale,
            block,
        )
        if written == (batch, queries):
            dq[batch, :, queries] += part_q
        else:
            dq[batch, :, queries] = part_q
            written = (batch, queries)
        dk[sequences, :, keys] += part_k
        dv[sequences, :, keys] += part_v
    return dq, dk, dv


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two softmaxes of the same queries over disjoint keys: (out, lse) of the union, in the
    memory of the first."""
    merged = torch.logaddexp(lse, other_lse)
    weight = lse.sub_(merged).exp_().unsqueeze(-1).to(out.dtype)
    other_weight = other_lse.sub_(merged).exp_().unsqueeze(-1).to(out.dtype)
    return out.mul_(weight).addcmul_(other, other_weight), merged


class _BlockAttention(torch.autograd.Function):
    """Differentiable ``blocks_forward`` without the log-sum-exp."""

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
    """Return softmax(scale * q kᵀ) v over the plan's blocks, [B, n, S, dv] in the query's dtype.

    Shapes as in ``blocks_forward``; differentiable in query, key and value; no collective.
    """
    return _BlockAttention.apply(scale, plan, query, key, value)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, block: Block) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of one block's queries and keys alone."""
    if not block.reverse:
        return flash.forward(q, k, v, scale, block.causal)
    # Flipped, "key i and all later ones" is "key i and all earlier ones": causal.
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
    """Return the gradients of one block's queries, keys and values."""
    if not block.reverse:
        return flash.backward(grad_out, q, k, v, out, lse, scale, block.causal)
    grad_out, q, k, v, out, lse = (x.flip(2) for x in (grad_out, q, k, v, out, lse))
    dq, dk, dv = flash.backward(grad_out, q, k, v, out, lse, scale, block.causal)
    return dq.flip(2), dk.flip(2), dv.flip(2)


def sink_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, plan: Plan, sink: Tensor
) -> Tensor:
    """Run ``block_attention`` with ``sink`` [n], a score per head that joins the softmax.

    A sink has no value: it only takes its part of the probability. Not differentiable, since only
    frozen bases have sinks; no collective.
    """
    return beside_sink(*blocks_forward(query, key, value, scale, plan), sink)


def beside_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Scale out [B, n, S, dv] of a softmax with lse [B, n, S] to what a sink [n] leaves of it."""
    left = torch.sigmoid(lse - sink.float().unsqueeze(-1))  # the keys' part of the probability
    return out * left.unsqueeze(-1).to(out.dtype)


def _cut(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values of a block, as views."""
    sequences = block.batch if block.keys_of is None else block.keys_of
    keys = block.key
    return q[block.batch, :, block.query], k[sequences, :, keys], v[sequences, :, keys]


def _is_whole(plan: Plan, q: Tensor, k: Tensor) -> bool:
    """Return whether the plan is one block of all queries and all keys."""
    if len(plan) > 1:
        return False
    block_q, block_k, _ = _cut(q, k, k, plan[0])
    return block_q.shape == q.shape and block_k.shape == k.shape
