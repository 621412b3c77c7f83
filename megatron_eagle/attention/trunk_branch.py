"""Attend in a TTT step: to a causal trunk, and to a few branch keys at the query's position.

At step t, position p attends to the step-0 keys 0..p (the trunk, the same at every step) and to one
key per later step j = 1..t, all of position p (the branch); one softmax over both. The trunk is
flash kernels, one per block of its plan (``blocks``), the branch an elementwise dot product, both
merged by their log-sum-exp, so memory is linear in S and in the number of steps and there is no
mask tensor. Backward: the flash backward fed with the merged output and log-sum-exp for the trunk,
elementwise products for the branch (the identity that ring attention rests on).

Shape letters: B sequences, n query heads and g key/value heads of this TP rank (g divides n),
r = n / g, S query positions of this CP rank, L trunk positions, t branch steps, d channels of a
key, dv of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.blocks import CAUSAL, Plan, blocks_backward, blocks_forward


def trunk_branch_attention(
    query: Tensor,
    trunk_key: Tensor,
    trunk_value: Tensor,
    branch_keys: list[Tensor],
    branch_values: list[Tensor],
    scale: float,
    plan: Plan = CAUSAL,
) -> Tensor:
    """Return softmax(scale * q [trunk ; branch]ᵀ) [trunk ; branch], [B, n, S, dv].

    Differentiable in all tensors; no collective.

    Args:
        query: [B, n, S, d]; the result has its dtype.
        trunk_key, trunk_value: [B, g, L, d] and [B, g, L, dv], the whole sequence also under
            context parallelism.
        branch_keys, branch_values: [B, g, S, d] and [B, g, S, dv] per later step; empty at step 0.
        scale: factor of the scores.
        plan: which queries see which positions of the trunk.
    """
    assert len(branch_keys) == len(branch_values)
    return _TrunkBranch.apply(
        scale, plan, len(branch_keys), query, trunk_key, trunk_value, *branch_keys, *branch_values
    )


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Split the heads of x: [B, n, S, d] -> [B, g, r, S, d], a view."""
    return x.unflatten(1, (groups, -1))


class _TrunkBranch(torch.autograd.Function):
    """Differentiable trunk and branch; ``branch`` is the keys of all steps, then the values."""

    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        plan: Plan,
        steps: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *branch: Tensor,
    ) -> Tensor:
        out, lse = blocks_forward(q, k, v, scale, plan)
        if steps:
            out, lse = _merge(q, out, lse, branch[:steps], branch[steps:], scale)
        ctx.save_for_backward(q, k, v, out, lse, *branch)
        ctx.scale, ctx.plan, ctx.steps = scale, plan, steps
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *branch = ctx.saved_tensors
        grad_out, scale, steps = grad_outputs[0].contiguous(), ctx.scale, ctx.steps
        dq, dk, dv = blocks_backward(grad_out, q, k, v, out, lse, scale, ctx.plan)
        if not steps:
            return None, None, None, dq, dk, dv
        dq, branch_dk, branch_dv = _branch_backward(
            grad_out, q, out, lse, branch[:steps], branch[steps:], scale, dq
        )
        return None, None, None, dq, dk, dv, *branch_dk, *branch_dv


def _scores(q: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return dot products [B, g, r, S] fp32 of grouped queries with one key per position."""
    # Not einsum: it makes a matrix product of every position.
    return (q * key.float().unsqueeze(2)).sum(-1) * scale


def _merge(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Merge branch keys and values into (out, lse) of the trunk."""
    groups = keys[0].shape[1]
    grouped_q, lse5 = _grouped(q, groups), lse.unflatten(1, (groups, -1))
    scores = torch.stack([_scores(grouped_q, key, scale) for key in keys])  # [t, B, g, r, S]
    merged = torch.logaddexp(lse5, scores.logsumexp(0))
    total = _grouped(out, groups) * (lse5 - merged).exp().unsqueeze(-1).to(out.dtype)
    for score, value in zip(scores, values, strict=True):
        weight = (score - merged).exp().to(out.dtype)
        total = torch.addcmul(total, weight.unsqueeze(-1), value.unsqueeze(2))
    return total.flatten(1, 2), merged.flatten(1, 2)


def _branch_backward(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    scale: float,
    dq: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Add the branch's part to the trunk's ``dq``; return it and the branch's own gradients."""
    groups = keys[0].shape[1]
    q5, do5, lse5 = _grouped(q, groups), _grouped(grad_out, groups), lse.unflatten(1, (groups, -1))
    delta = torch.linalg.vecdot(grad_out.float(), out.float()).unflatten(1, (groups, -1))
    dq5, branch_dk, branch_dv = _grouped(dq, groups), [], []
    for key, value in zip(keys, values, strict=True):
        p = (_scores(q5, key, scale) - lse5).exp()
        grad_score = (p * (_scores(do5, value, 1.0) - delta) * scale).to(q.dtype)
        dq5 = torch.addcmul(dq5, grad_score.unsqueeze(-1), key.unsqueeze(2))
        branch_dk.append((grad_score.unsqueeze(-1) * q5).sum(2))
        branch_dv.append((p.to(q.dtype).unsqueeze(-1) * do5).sum(2))
    return dq5.flatten(1, 2), branch_dk, branch_dv
