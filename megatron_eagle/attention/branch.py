"""Attend to branch keys: each query to one key per later TTT step, all at the query's own position.

Dot products of rows with rows, merged into the trunk's softmax in its own memory. On a CPU a few
positions at a time pass through all operations, so that what lies between them stays in a core's
cache. On a GPU a Triton kernel stands in for each function (megatron_eagle/kernels), or without
Triton all positions pass at once.

Shape letters: B sequences, n query heads and g key/value heads of this TP rank (g divides n),
r = n / g, S query positions, t branch steps, d channels of a key, dv of a value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_eagle.kernels.choice import with_kernel
from megatron_eagle.parallel.vocab import row_chunks

_CACHED_BYTES = 512 << 10


@with_kernel("megatron_eagle.kernels.branch:merge_branch_")
def merge_branch_(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
) -> None:
    """Merge the branch into the trunk's ``out`` [B, n, S, dv] and ``lse`` [B, n, S], in place.

    q [B, n, S, d]; keys [B, g, S, d] and values [B, g, S, dv] of t steps. No collective.
    """
    groups = keys[0].shape[1]
    q5, out5, lse4 = (x.unflatten(1, (groups, -1)) for x in (q, out, lse))
    for rows in _row_blocks(q):
        query, part, old = q5[..., rows, :], out5[..., rows, :], lse4[..., rows]
        scores = torch.stack([_dot(query, key[:, :, rows]).mul_(scale) for key in keys])
        merged = torch.logaddexp(old, scores.logsumexp(0))
        part.mul_((old - merged).exp_().unsqueeze(-1).to(out.dtype))
        weights = scores.sub_(merged).exp_().to(out.dtype)
        for weight, value in zip(weights, values, strict=True):
            part.addcmul_(weight.unsqueeze(-1), value[:, :, rows].unsqueeze(2))
        old.copy_(merged)


@with_kernel("megatron_eagle.kernels.branch:branch_backward")
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
    """Add the branch's part to the trunk's ``dq`` [B, n, S, d] in place; return the gradients of
    keys and values. ``out`` and ``lse`` are the merged ones; shapes as in :func:`merge_branch_`."""
    groups = keys[0].shape[1]
    grad5, q5, out5, lse4, dq5 = (x.unflatten(1, (groups, -1)) for x in (grad_out, q, out, lse, dq))
    branch_dk, branch_dv = (
        [torch.empty_like(x) for x in keys],
        [torch.empty_like(x) for x in values],
    )
    for rows in _row_blocks(q):
        query, grad = q5[..., rows, :], grad5[..., rows, :]
        delta = (grad.float() * out5[..., rows, :]).sum(-1)
        steps = zip(keys, values, branch_dk, branch_dv, strict=True)
        for all_keys, all_values, dk, dv in steps:
            key, value = all_keys[:, :, rows], all_values[:, :, rows]
            p = _dot(query, key).mul_(scale).sub_(lse4[..., rows]).exp_()
            grad_score = _dot(grad, value).sub_(delta).mul_(p).mul_(scale).to(q.dtype)
            dq5[..., rows, :].addcmul_(grad_score.unsqueeze(-1), key.unsqueeze(2))
            torch.sum(grad_score.unsqueeze(-1) * query, 2, out=dk[:, :, rows])
            torch.sum(p.to(q.dtype).unsqueeze(-1) * grad, 2, out=dv[:, :, rows])
    return branch_dk, branch_dv


def _dot(rows: Tensor, key: Tensor) -> Tensor:
    """Return the dot products [B, g, r, c] fp32 of rows [B, g, r, c, d] with key [B, g, c, d]."""
    # Not einsum: it makes a matrix product of every position.
    return (rows * key.float().unsqueeze(2)).sum(-1)


def _row_blocks(q: Tensor) -> list[slice]:
    """Cut the S positions of q [B, n, S, d] into blocks that are worked on one after the other."""
    if q.device.type != "cpu":
        return [slice(0, q.shape[2])]
    return row_chunks(q.shape[2], q.numel() // max(1, q.shape[2]), _CACHED_BYTES)
