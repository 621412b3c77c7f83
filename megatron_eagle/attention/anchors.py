"""Attend from blocks: to the context before each block's anchor, and to the block itself.

A block has B rows and no causal order: all of them see each other, and the context rows before the
anchor, in the anchor's document. One softmax over both. By the plan (``anchor_plan.py``), blocks
whose anchors follow rows of one window of W context rows see

* all keys of the windows before it: one rectangle for all these blocks;
* the keys of this window up to the row before the anchor. A CPU's flash kernel takes a mask, and
  gets one of [blocks * B, W], one window's at a time. A GPU's does not: with the B rows of a block
  folded into the heads, this is causal attention of a window's W rows, for all windows of a slab
  together. Rows that are no anchor's are computed in vain there.

Each part is a flash kernel, merged by log-sum-exp; backward feeds the merged pair to each. Memory
is linear in the context and in the number of blocks.

Shape letters: Q sequences of S context rows, N blocks of B rows, of which the first R have a
context, n query heads and g key/value heads of this TP rank (g divides n), d channels of a key, dv
of a value, w windows of a slab, W rows of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention import flash
from megatron_eagle.attention.anchor_plan import AnchorPlan, Slab, Window
from megatron_eagle.attention.blocks import merge_


def anchor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    scale: float,
    plan: AnchorPlan,
) -> Tensor:
    """Return softmax(scale * q [context ; block]ᵀ) [context ; block], [N, n, B, dv].

    query [N, n, B, d], key [N, g, B, d] and value [N, g, B, dv] of the blocks, context_key
    [Q, g, S, d] and context_value [Q, g, S, dv]. Differentiable in all of them, also where no block
    has a context; no collective.
    """
    return _AnchorAttention.apply(scale, plan, query, key, value, context_key, context_value)


class _AnchorAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        plan: AnchorPlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context_k: Tensor,
        context_v: Tensor,
    ) -> Tensor:
        out, lse = flash.forward(q, k, v, scale, causal=False)
        out, lse = out.contiguous(), lse.contiguous()
        for slab in plan.slabs:
            if _folds(q):
                blocks = slab.blocks
                part = _window_forward(q[blocks], context_k, context_v, scale, slab)
                out[blocks], lse[blocks] = merge_(out[blocks], lse[blocks], *part)
            for window in slab.windows:
                rows, one = window.blocks, slice(window.sequence, window.sequence + 1)
                if not (pieces := _pieces(window, q)):
                    continue
                wide_q = _side_by_side(q[rows])
                for keys, mask in pieces:
                    cut_k, cut_v = context_k[one, :, keys], context_v[one, :, keys]
                    wide = flash.forward(wide_q, cut_k, cut_v, scale, causal=False, mask=mask)
                    part = _apart(wide[0], q.shape[2]), _apart(wide[1], q.shape[2])
                    out[rows], lse[rows] = merge_(out[rows], lse[rows], *part)
        ctx.save_for_backward(q, k, v, context_k, context_v, out, lse)
        ctx.scale, ctx.plan = scale, plan
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, context_k, context_v, out, lse = ctx.saved_tensors
        grad, scale, slots = grad_outputs[0].contiguous(), ctx.scale, q.shape[2]
        dq, dk, dv = flash.backward(grad, q, k, v, out, lse, scale, causal=False)
        dq = dq.contiguous()
        # Rows before heads, so that a slab adds its rows to them and nothing has the size of all.
        context_dk, context_dv = (_rows_first_zeros(x) for x in (context_k, context_v))
        for slab in ctx.plan.slabs:
            if _folds(q):
                blocks = slab.blocks
                dq[blocks] += _window_backward(
                    (grad[blocks], q[blocks], out[blocks], lse[blocks]),
                    (context_k, context_v),
                    (context_dk, context_dv),
                    scale,
                    slab,
                )
            for window in slab.windows:
                rows, one = window.blocks, slice(window.sequence, window.sequence + 1)
                if not (pieces := _pieces(window, q)):
                    continue
                wide_grad, wide_q, wide_out, wide_lse = (
                    _side_by_side(x[rows]) for x in (grad, q, out, lse)
                )
                for keys, mask in pieces:
                    part_q, part_k, part_v = flash.backward(
                        wide_grad, wide_q, context_k[one, :, keys], context_v[one, :, keys],
                        wide_out, wide_lse, scale, causal=False, mask=mask,
                    )  # fmt: skip
                    dq[rows] += _apart(part_q, slots)
                    context_dk[one, :, keys] += part_k
                    context_dv[one, :, keys] += part_v
        return None, None, dq, dk, dv, context_dk, context_dv


def _folds(q: Tensor) -> bool:
    """Return whether windows are folded, since the device's flash kernels take no mask."""
    return q.device.type != "cpu"


def _pieces(window: Window, q: Tensor) -> list[tuple[slice, Tensor | None]]:
    """Return the context rows that the window's blocks of q [N, n, B, d] meet in a kernel of their
    own, and a mask of those: [1, 1, blocks * B, rows] to add to the scores, None if all see all."""
    pieces: list[tuple[slice, Tensor | None]] = []
    if window.before.stop > window.before.start:
        pieces.append((window.before, None))
    if not _folds(q):
        rows = torch.arange(window.own.stop - window.own.start, device=q.device)
        hidden = rows >= window.seen.repeat_interleave(q.shape[2]).unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
        pieces.append((window.own, mask.masked_fill_(hidden, float("-inf"))[None, None]))
    return pieces


def _window_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slab: Slab
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of a slab's blocks over the keys of their own windows."""
    keys, values = (_windows(x, slab.keys) for x in (k, v))
    out, lse = flash.forward(_folded(q, slab), keys, values, scale, causal=True)
    return _unfolded(out, slab, q.shape[2]), _unfolded(lse.contiguous(), slab, q.shape[2])


def _window_backward(
    blocks: tuple[Tensor, Tensor, Tensor, Tensor],
    context: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    scale: float,
    slab: Slab,
) -> Tensor:
    """Return the queries' gradient, and add the context's to ``gradients``."""
    grad, q, out, lse = (_folded(x, slab) for x in blocks)
    keys, values = (_windows(x, slab.keys) for x in context)
    dq, *parts = flash.backward(grad, q, keys, values, out, lse, scale, causal=True)
    for total, part in zip(gradients, parts, strict=True):
        rows = part.transpose(1, 2).flatten(0, 1)  # [w * W, g, d]
        total.transpose(1, 2).view(-1, *rows.shape[1:]).index_add_(0, slab.keys.flatten(), rows)
    return _unfolded(dq, slab, q.shape[1] // blocks[1].shape[1])


def _rows_first_zeros(context: Tensor) -> Tensor:
    """Return zeros [Q, g, S, d] like ``context``, in memory as [Q, S, g, d]."""
    sequences, groups, length, size = context.shape
    return context.new_zeros(sequences, length, groups, size).transpose(1, 2)


def _windows(context: Tensor, rows: Tensor) -> Tensor:
    """Take the windows' flat ``rows`` [w, W] of context [Q, g, S, d]: [w, g, W, d]."""
    length = context.shape[2]
    return context[rows // length, :, rows % length].transpose(1, 2)


def _folded(x: Tensor, slab: Slab) -> Tensor:
    """Put blocks [R, n, B, ...] at their rows of the windows, their slots beside the heads:
    [w, n * B, W, ...]. Rows without a block are zeros, and give no gradient to any key."""
    windows, rows = slab.keys.shape
    wide = x.new_zeros(windows * rows, *x.shape[1:])
    wide[slab.place] = x
    return wide.flatten(1, 2).unflatten(0, (windows, rows)).transpose(1, 2).contiguous()


def _unfolded(x: Tensor, slab: Slab, slots: int) -> Tensor:
    """Undo :func:`_folded`: [w, n * B, W, ...] -> [R, n, B, ...]."""
    rows = x.transpose(1, 2).flatten(0, 1)[slab.place]
    return rows.unflatten(1, (-1, slots))


def _side_by_side(x: Tensor) -> Tensor:
    """Put the rows of blocks [R, n, B, ...] one after another: [1, n, R * B, ...]."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0).contiguous()


def _apart(x: Tensor, slots: int) -> Tensor:
    """Undo :func:`_side_by_side`: [1, n, R * B, ...] -> [R, n, B, ...]."""
    return x[0].unflatten(1, (-1, slots)).transpose(0, 1)


class AnchorState:
    """Attention of one pass over a micro-batch's blocks; an ``AttentionState``.

    ``context`` returns a layer's keys [Q, g, S, d] and values [Q, g, S, dv] of the context. It is
    asked once per layer and pass, inside the layer: what it sends is the layer's.
    """

    def __init__(
        self, plan: AnchorPlan, slots: int, context: Callable[[int], tuple[Tensor, Tensor]]
    ) -> None:
        self._plan, self._slots, self._context = plan, slots, context

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Attend with the rows of all blocks: query [1, n, N * B, d], key and value likewise."""
        assert window is None and sink is None, "drafts have neither"
        context_key, context_value = self._context(layer)
        q, k, v = (
            x[0].unflatten(1, (-1, self._slots)).transpose(0, 1).contiguous()
            for x in (query, key, value)
        )
        out = anchor_attention(q, k, v, context_key, context_value, scale, self._plan)
        return out.transpose(0, 1).flatten(1, 2).unsqueeze(0)
