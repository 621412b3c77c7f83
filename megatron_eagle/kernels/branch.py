"""Attention to branch keys, forward and backward, in one pass over the queries each.

A program takes a block of positions of one query head (backward: of one key head, whose query
heads share its keys). fp32 inside.

Shape letters: B sequences, n query heads and g key/value heads of this TP rank (g divides n), S
query positions, t branch steps, d channels of a key, dv of a value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32


def merge_branch_(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
) -> None:
    """Merge the branch into the trunk's ``out`` [B, n, S, dv] and ``lse`` [B, n, S], in place; see
    :func:`megatron_eagle.attention.branch.merge_branch_`."""
    batch, heads, rows, size = q.shape
    keys, values = _alike(keys), _alike(values)
    if not q.numel():
        return
    q = _with_unit_channels(q)
    _merge[(triton.cdiv(rows, _ROWS), batch * heads)](
        q,
        out,
        lse,
        tuple(keys),
        tuple(values),
        scale,
        rows,
        heads,
        heads // keys[0].shape[1],
        *_strides(q, out, lse, keys[0], values[0]),
        STEPS=len(keys),
        D=size,
        DV=out.shape[-1],
        BLOCK_D=triton.next_power_of_2(size),
        BLOCK_DV=triton.next_power_of_2(out.shape[-1]),
        ROWS=_ROWS,
    )


def branch_backward(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    dq: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Add the branch's part to ``dq`` [B, n, S, d] in place; return the gradients of keys and
    values; see :func:`megatron_eagle.attention.branch.branch_backward`."""
    batch, heads, rows, size = q.shape
    keys, values = _alike(keys), _alike(values)
    branch_dk, branch_dv = (
        [torch.empty_like(x) for x in keys],
        [torch.empty_like(x) for x in values],
    )
    if not q.numel():
        return branch_dk, branch_dv
    groups = keys[0].shape[1]
    q, grad_out, out = (_with_unit_channels(x) for x in (q, grad_out, out))
    assert dq.stride(-1) == 1
    _backward[(triton.cdiv(rows, _ROWS), batch * groups)](
        grad_out,
        q,
        out,
        lse,
        tuple(keys),
        tuple(values),
        dq,
        tuple(branch_dk),
        tuple(branch_dv),
        scale,
        rows,
        groups,
        *_strides(grad_out, q, out, lse, keys[0], values[0], dq, branch_dk[0], branch_dv[0]),
        STEPS=len(keys),
        HEADS=heads // groups,
        D=size,
        DV=out.shape[-1],
        BLOCK_D=triton.next_power_of_2(size),
        BLOCK_DV=triton.next_power_of_2(out.shape[-1]),
        ROWS=_ROWS,
    )
    return branch_dk, branch_dv


def _strides(*tensors: Tensor) -> list[int]:
    """Return the strides of each tensor's sequences, heads and positions, one after the other."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _with_unit_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with one set of strides, channels next to each other."""
    strides = {x.stride() for x in tensors}
    if len(strides) == 1 and tensors[0].stride(-1) == 1:
        return list(tensors)
    return [x.contiguous() for x in tensors]


@triton.jit
def _merge(
    q, out, lse, keys, values, scale, rows, heads, per_group,
    q_b, q_h, q_s, o_b, o_h, o_s, l_b, l_h, l_s, k_b, k_h, k_s, v_b, v_h, v_s,
    STEPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sequence = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    group = head // per_group
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside = row < rows
    in_key = inside[:, None] & (channel < D)[None, :]
    in_value = inside[:, None] & (value_channel < DV)[None, :]
    q_at = sequence * q_b + head * q_h + row[:, None] * q_s + channel[None, :]
    out_at = out + sequence * o_b + head * o_h + row[:, None] * o_s + value_channel[None, :]
    lse_at = lse + sequence * l_b + head * l_h + row * l_s
    key_at = sequence * k_b + group * k_h + row[:, None] * k_s + channel[None, :]
    value_at = sequence * v_b + group * v_h + row[:, None] * v_s + value_channel[None, :]
    query = tl.load(q + q_at, mask=in_key, other=0.0).to(tl.float32)
    total = tl.load(out_at, mask=in_value, other=0.0).to(tl.float32)
    top = tl.load(lse_at, mask=inside, other=0.0)
    mass = tl.full((ROWS,), 1.0, tl.float32)
    for step in tl.static_range(STEPS):
        key = tl.load(keys[step] + key_at, mask=in_key, other=0.0).to(tl.float32)
        score = tl.sum(query * key, axis=1) * scale
        new_top = tl.maximum(top, score)
        kept, weight = tl.exp(top - new_top), tl.exp(score - new_top)
        value = tl.load(values[step] + value_at, mask=in_value, other=0.0).to(tl.float32)
        total = total * kept[:, None] + weight[:, None] * value
        mass = mass * kept + weight
        top = new_top
    tl.store(out_at, (total / mass[:, None]).to(out.dtype.element_ty), mask=in_value)
    tl.store(lse_at, top + tl.log(mass), mask=inside)


@triton.jit
def _backward(
    grad_out, q, out, lse, keys, values, dq, dks, dvs, scale, rows, groups,
    g_b, g_h, g_s, q_b, q_h, q_s, o_b, o_h, o_s, l_b, l_h, l_s, k_b, k_h, k_s, v_b, v_h, v_s,
    dq_b, dq_h, dq_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    STEPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sequence = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    channel, value_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside = row < rows
    in_key = inside[:, None] & (channel < D)[None, :]
    in_value = inside[:, None] & (value_channel < DV)[None, :]
    key_at = sequence * k_b + group * k_h + row[:, None] * k_s + channel[None, :]
    value_at = sequence * v_b + group * v_h + row[:, None] * v_s + value_channel[None, :]
    dk_at = sequence * dk_b + group * dk_h + row[:, None] * dk_s + channel[None, :]
    dv_at = sequence * dv_b + group * dv_h + row[:, None] * dv_s + value_channel[None, :]
    for step in tl.static_range(STEPS):
        key = tl.load(keys[step] + key_at, mask=in_key, other=0.0).to(tl.float32)
        value = tl.load(values[step] + value_at, mask=in_value, other=0.0).to(tl.float32)
        dk = tl.zeros((ROWS, BLOCK_D), tl.float32)
        dv = tl.zeros((ROWS, BLOCK_DV), tl.float32)
        for index in range(HEADS):
            head = group * HEADS + index
            q_at = sequence * q_b + head * q_h + row[:, None] * q_s + channel[None, :]
            o_at = sequence * o_b + head * o_h + row[:, None] * o_s + value_channel[None, :]
            g_at = sequence * g_b + head * g_h + row[:, None] * g_s + value_channel[None, :]
            dq_at = dq + sequence * dq_b + head * dq_h + row[:, None] * dq_s + channel[None, :]
            lse_at = lse + sequence * l_b + head * l_h + row * l_s
            query = tl.load(q + q_at, mask=in_key, other=0.0).to(tl.float32)
            grad = tl.load(grad_out + g_at, mask=in_value, other=0.0).to(tl.float32)
            merged = tl.load(out + o_at, mask=in_value, other=0.0).to(tl.float32)
            delta = tl.sum(grad * merged, axis=1)
            score = tl.sum(query * key, axis=1) * scale
            p = tl.exp(score - tl.load(lse_at, mask=inside, other=0.0))
            grad_score = p * (tl.sum(grad * value, axis=1) - delta) * scale
            dk += grad_score[:, None] * query
            dv += p[:, None] * grad
            part = tl.load(dq_at, mask=in_key, other=0.0).to(tl.float32)
            part += grad_score[:, None] * key
            tl.store(dq_at, part.to(dq.dtype.element_ty), mask=in_key)
        tl.store(dks[step] + dk_at, dk.to(dq.dtype.element_ty), mask=in_key)
        tl.store(dvs[step] + dv_at, dv.to(dq.dtype.element_ty), mask=in_value)
