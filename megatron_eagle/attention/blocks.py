"""Block-causal attention: one softmax per row over any union of rectangles and triangles.

A plan is a list of blocks: rows of the queries that attend to a span of the keys, all of them or
causally. Plain causal attention is one block. A rank that holds two pieces of a sequence cut for
context parallelism, and a sequence packed of several documents, are a few more. Each block is a
flash kernel, and blocks of the same rows are merged by their log-sum-exp, so no mask exists and
masked blocks cost nothing. Backward feeds the merged output and log-sum-exp to every block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention import flash

ALL = slice(None)


@dataclass(frozen=True)
class Block:
    """The query rows ``query`` of the sequences ``batch`` attend to the keys ``key``; ``causal``
    blocks are square, and row i sees the keys 0..i of the block."""

    query: slice = ALL
    key: slice = ALL
    causal: bool = True
    batch: slice = ALL


Plan = Sequence[Block]
"""Blocks of the same rows stand next to each other; every row is in at least one block."""

CAUSAL: Plan = (Block(),)
"""Every row sees itself and all rows before it."""


def span_plan(
    spans: Iterable[tuple[int, int]],
    documents: Sequence[tuple[int, int]] | None = None,
    batch: slice = ALL,
) -> list[Block]:
    """The plan of local rows that hold the ``spans`` (start, stop) of a sequence, one after the
    other, against the keys of the whole sequence in order.

    With ``documents``, ascending (start, stop) that cover the spans, a row sees only what lies in
    its own document.
    """
    blocks, offset = [], 0
    for start, stop in spans:
        for first, last in documents or [(0, stop)]:
            low, high = max(start, first), min(stop, last)
            if low >= high:
                continue
            rows = slice(offset + low - start, offset + high - start)
            if first < low:
                blocks.append(Block(rows, slice(first, low), causal=False, batch=batch))
            blocks.append(Block(rows, slice(low, high), causal=True, batch=batch))
        offset += stop - start
    return blocks


def blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Plan
) -> tuple[Tensor, Tensor]:
    """(out [B, n, S, dv], lse [B, n, S] fp32) of the plan's softmax.

    q [B, n, S, d], k [B, g, L, d], v [B, g, L, dv], g dividing n, this TP rank's heads. Not
    differentiable by itself; no collective.
    """
    if len(plan) == 1:
        return flash.forward(q, k, v, scale, plan[0].causal)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    for (batch, rows), blocks in groupby(plan, lambda block: (block.batch, block.query)):
        part: tuple[Tensor, Tensor] | None = None
        for block in blocks:
            new = flash.forward(*_cut(q, k, v, block), scale, block.causal)
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
        return flash.backward(grad_out, q, k, v, out, lse, scale, plan[0].causal)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for block in plan:
        batch, rows, keys = block.batch, block.query, block.key
        part_q, part_k, part_v = flash.backward(
            grad_out[batch, :, rows],
            *_cut(q, k, v, block),
            out[batch, :, rows],
            lse[batch, :, rows].contiguous(),
            scale,
            block.causal,
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


def _cut(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    batch, keys = block.batch, block.key
    return q[batch, :, block.query], k[batch, :, keys], v[batch, :, keys]
