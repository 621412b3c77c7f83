"""Run flash attention that returns the log-sum-exp, and its backward from *any* out and lse.

PyTorch's flash kernels expose both halves. Feeding the backward with the output and log-sum-exp
of a larger softmax (see ``blocks``) gives the exact gradients of this part inside that softmax,
since it recomputes P = exp(q k - lse).

q is [B, n, S, d], k [B, g, L, d], v [B, g, L, dv], lse [B, n, S] fp32. K and V are not repeated for
grouped queries. Values may be narrower than keys (MLA): the kernels want one width, so they are
padded with zeros. ``causal`` needs S = L; otherwise every query sees every key, except by a
``mask`` [1, 1, S, L] that is added to the scores, which a CPU's kernels alone take. No collective.

Shape letters: B sequences, n query heads and g key/value heads of this TP rank (g divides n), S
query positions, L key positions, d channels of a key, dv <= d channels of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return out [B, n, S, dv] and lse [B, n, S] of softmax(scale * q kᵀ + mask) v."""
    assert not causal or q.shape[2] == k.shape[2]
    width, on_cpu = v.shape[-1], q.device.type == "cpu"
    assert mask is None or on_cpu
    if not on_cpu and not has_cuda_flash(q):
        return _dense_forward(q, k, v, scale, causal)
    if not on_cpu:
        q, k = in_eighths(q), in_eighths(k)
    v = widened(v, q)
    if on_cpu:
        run = _aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = run(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    else:
        run = _aten._scaled_dot_product_flash_attention
        out, lse = run(q, k, v, 0.0, causal, scale=scale)[:2]
    return out[..., :width], lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v; ``out`` and ``lse`` may be those of a larger softmax."""
    size, width, on_cpu = q.shape[-1], v.shape[-1], q.device.type == "cpu"
    assert mask is None or on_cpu
    if not on_cpu and not has_cuda_flash(q):
        return _dense_backward(grad_out, q, k, v, out, lse, scale, causal)
    if not on_cpu:
        q, k = in_eighths(q), in_eighths(k)
    grad_out, v, out = (widened(x, q) for x in (grad_out, v, out))
    if on_cpu:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    else:
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # philox state: no dropout
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse.contiguous(), None, None,  # lse is read without strides
            q.shape[2], k.shape[2], 0.0, causal, unused, unused, scale=scale,
        )  # fmt: skip
    return dq[..., :size], dk[..., :size], dv[..., :width]


def widened(x: Tensor, q: Tensor) -> Tensor:
    """Pad x [..., dv] with zeros to the d channels of q."""
    missing = q.shape[-1] - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def in_eighths(x: Tensor) -> Tensor:
    """Pad the channels of x [..., d] with zeros to a multiple of 8, as CUDA's flash kernels ask."""
    missing = -x.shape[-1] % 8
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def has_cuda_flash(q: Tensor) -> bool:
    """Return whether CUDA's flash kernels take the dtype and width of q, padded if need be."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256


def _repeat_groups(q: Tensor, k: Tensor) -> Tensor:
    """Repeat k (or v) [B, g, L, d] for every query head: [B, n, L, d]."""
    return k if q.shape[1] == k.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _sum_groups(grad: Tensor, k: Tensor) -> Tensor:
    """Sum a gradient [B, n, L, d] over the query heads of each key head: [B, g, L, d]."""
    if grad.shape == k.shape:
        return grad
    return grad.unflatten(1, (k.shape[1], -1)).sum(2)


def _probabilities(
    q: Tensor, k: Tensor, lse: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the softmax [B, n, S, L] and its lse [B, n, S], both fp32; uses a given lse."""
    scores = torch.matmul(q, _repeat_groups(q, k).transpose(-1, -2)).float() * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    lse = scores.logsumexp(-1) if lse is None else lse
    return (scores - lse.unsqueeze(-1)).exp(), lse


def _dense_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend in fp32 on a GPU, where no flash kernel does: quadratic memory, for numeric tests."""
    probabilities, lse = _probabilities(q, k, None, scale, causal)
    return torch.matmul(probabilities.to(v.dtype), _repeat_groups(q, v)), lse


def _dense_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    probabilities, _ = _probabilities(q, k, lse, scale, causal)
    delta = (grad_out * out).float().sum(-1, keepdim=True)
    grad_p = torch.matmul(grad_out, _repeat_groups(q, v).transpose(-1, -2)).float()
    grad_scores = (probabilities * (grad_p - delta) * scale).to(q.dtype)
    dq = torch.matmul(grad_scores, _repeat_groups(q, k))
    dk = torch.matmul(grad_scores.transpose(-1, -2), q)
    dv = torch.matmul(probabilities.to(q.dtype).transpose(-1, -2), grad_out)
    return dq, _sum_groups(dk, k), _sum_groups(dv, v)
