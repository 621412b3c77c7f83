"""Attend in a TTT step: to a causal trunk, and to a few branch keys at the query's position.

At step t, position p attends to the step-0 keys 0..p (the trunk, the same at every step) and to one
key per later step j = 1..t, all of position p (the branch); one softmax over both. The trunk is
flash kernels, one per block of its plan (``blocks``) or one for all (``varlen``), the branch dot
products (``branch``), both merged by their log-sum-exp, so memory is linear in S and in the number
of steps and there is no mask tensor. Backward: the flash backward fed with the merged output and
log-sum-exp for the trunk, products of rows for the branch (the identity that ring attention rests
on).

Shape letters: B sequences, n query heads and g key/value heads of this TP rank (g divides n), S
query positions of this CP rank, L trunk positions, t branch steps, d channels of a key, dv of a
value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention import varlen
from megatron_eagle.attention.blocks import CAUSAL, Plan, blocks_backward, blocks_forward
from megatron_eagle.attention.branch import branch_backward, merge_branch_
from megatron_eagle.attention.varlen import Segments


def trunk_branch_attention(
    query: Tensor,
    trunk_key: Tensor,
    trunk_value: Tensor,
    branch_keys: list[Tensor],
    branch_values: list[Tensor],
    scale: float,
    plan: Plan | Segments = CAUSAL,
) -> Tensor:
    """Return softmax(scale * q [trunk ; branch]ᵀ) [trunk ; branch], [B, n, S, dv].

    Differentiable in all tensors; no collective.

    Args:
        query: [B, n, S, d]; the result has its dtype.
        trunk_key, trunk_value: [B, g, L, d] and [B, g, L, dv], the whole sequence also under
            context parallelism.
        branch_keys, branch_values: [B, g, S, d] and [B, g, S, dv] per later step; empty at step 0.
        scale: factor of the scores.
        plan: which queries see which positions of the trunk, block by block or as segments.
    """
    assert len(branch_keys) == len(branch_values)
    return _TrunkBranch.apply(
        scale, plan, len(branch_keys), query, trunk_key, trunk_value, *branch_keys, *branch_values
    )


class _TrunkBranch(torch.autograd.Function):
    """Differentiable trunk and branch; ``branch`` is the keys of all steps, then the values."""

    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        plan: Plan | Segments,
        steps: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *branch: Tensor,
    ) -> Tensor:
        if isinstance(plan, Segments):
            out, lse = varlen.forward(q, k, v, scale, plan)
        else:
            out, lse = blocks_forward(q, k, v, scale, plan)
        if steps:
            merge_branch_(q, out, lse, branch[:steps], branch[steps:], scale)
        ctx.save_for_backward(q, k, v, out, lse, *branch)
        ctx.scale, ctx.plan, ctx.steps = scale, plan, steps
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *branch = ctx.saved_tensors
        grad_out, scale, steps = grad_outputs[0].contiguous(), ctx.scale, ctx.steps
        in_one_launch = isinstance(ctx.plan, Segments)
        trunk_backward: Any = varlen.backward if in_one_launch else blocks_backward
        dq, dk, dv = trunk_backward(grad_out, q, k, v, out, lse, scale, ctx.plan)
        if not steps:
            return None, None, None, dq, dk, dv
        branch_dk, branch_dv = branch_backward(
            grad_out, q, out, lse, branch[:steps], branch[steps:], scale, dq
        )
        return None, None, None, dq, dk, dv, *branch_dk, *branch_dv
