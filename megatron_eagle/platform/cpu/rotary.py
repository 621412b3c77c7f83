"""Rotate queries and keys in two passes that keep only the angles for backward.

Megatron's unfused rotary embedding makes a rotated copy, two products, their sum and a
concatenation, each as large as the queries, and as many in backward. A GPU has fused kernels.

Shape letters: S positions, B sequences, n heads, d channels of a head, e <= d rotated ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import patch_all, require

_EMBEDDINGS = "megatron.core.models.common.embeddings"
_ROTATE = f"{_EMBEDDINGS}.rope_utils:_apply_rotary_pos_emb_bshd"
_EXPORTED = f"{_EMBEDDINGS}.rotary_pos_embedding:_apply_rotary_pos_emb_bshd"


def speed_up_rotary() -> None:
    """Replace Megatron's unfused rotary embedding of [S, B, n, d] tensors."""
    lean = _lean_rotary(require(_ROTATE))
    patch_all({_ROTATE: lean, _EXPORTED: lean}, "rotary embedding without copies")


def _lean_rotary(original: Any) -> Any:
    """Wrap Megatron's function; neighboring channels as pairs that stay neighbors go to it."""

    def rotate(
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        mla_rotary_interleaved: bool = False,
        mscale: float = 1.0,
        **kwargs: Any,
    ) -> Tensor:
        if rotary_interleaved or kwargs:
            return original(t, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, **kwargs)
        cos, sin = ((part * mscale).to(t.dtype) for part in (freqs.cos(), freqs.sin()))
        return _Rotate.apply(t, cos, sin, mla_rotary_interleaved)

    return rotate


class _Rotate(torch.autograd.Function):
    """Rotate t [S, B, n, d] by cos and sin [S, 1 or B, 1, e]; the channels past e stay.

    Channels i and i + e / 2 are a pair. With ``interleaved`` channels 2 i and 2 i + 1 are one in
    the input, and i and i + e / 2 in the output.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        out = torch.empty_like(t, memory_format=torch.contiguous_format)
        first, second = _pairs(t, cos.shape[-1], interleaved)
        out_first, out_second = _pairs(out, cos.shape[-1], False)
        (cos_first, cos_second), (sin_first, sin_second) = cos.chunk(2, -1), sin.chunk(2, -1)
        torch.mul(first, cos_first, out=out_first).addcmul_(second, sin_first, value=-1)
        torch.mul(second, cos_second, out=out_second).addcmul_(first, sin_second)
        out[..., cos.shape[-1] :] = t[..., cos.shape[-1] :]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        first, second = _pairs(grads[0], cos.shape[-1], False)
        grad_first, grad_second = _pairs(grad, cos.shape[-1], ctx.interleaved)
        (cos_first, cos_second), (sin_first, sin_second) = cos.chunk(2, -1), sin.chunk(2, -1)
        torch.mul(first, cos_first, out=grad_first).addcmul_(second, sin_second)
        torch.mul(second, cos_second, out=grad_second).addcmul_(first, sin_first, value=-1)
        grad[..., cos.shape[-1] :] = grads[0][..., cos.shape[-1] :]
        return grad, None, None, None


def _pairs(x: Tensor, size: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return the first and the second channel of every pair of x's first ``size`` channels."""
    if interleaved:
        return x[..., 0:size:2], x[..., 1:size:2]
    return x[..., : size // 2], x[..., size // 2 : size]
