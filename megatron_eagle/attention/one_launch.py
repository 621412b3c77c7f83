"""Attend with one launch a layer on CUDA: documents and windows as arguments of the flash kernel.

A plan of blocks (``blocks``) launches a few kernels for each of its blocks, and a micro-batch of
packed documents has hundreds of them. PyTorch's flash kernel takes the bounds of sequences that lie
one behind the other, and a window, itself. Only forward, for frozen bases; drafts: ``varlen``.

Shape letters: B sequences, S their length, D documents of all of them, n query heads and g
key/value heads of this TP rank (g divides n), d channels of a key, dv of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.attention import flash


@dataclass(frozen=True)
class Bounds:
    """Documents that cover the B * S tokens of a micro-batch, one sequence behind the other.

    Attributes:
        offsets: [D + 1] int32, where each begins, and B * S.
        longest: the length of the longest.
    """

    offsets: Tensor
    longest: int

    @classmethod
    def of(
        cls, documents: Sequence[Sequence[tuple[int, int]]], length: int, device: torch.device
    ) -> Bounds:
        """Collect the (start, stop) of every sequence's documents, on the host, and copy them to
        ``device`` without waiting for it."""
        starts = [
            sequence * length + start
            for sequence, spans in enumerate(documents)
            for start, _ in spans
        ]
        offsets = torch.tensor([*starts, len(documents) * length], dtype=torch.int32)
        if device.type == "cuda":
            offsets = offsets.pin_memory()
        longest = max(stop - start for spans in documents for start, stop in spans)
        return cls(offsets.to(device, non_blocking=True), longest)


def applies(q: Tensor) -> bool:
    """Return whether the kernel takes queries such as q [B, n, S, d], which need no gradient."""
    return flash.has_cuda_flash(q) and not (torch.is_grad_enabled() and q.requires_grad)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bounds: Bounds | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out [B, n, S, dv] and lse [B, n, S] fp32 of causal attention inside documents.

    Args:
        q, k, v: [B, n, S, d], [B, g, S, d], [B, g, S, dv], whole sequences.
        scale: factor of the scores.
        bounds: the documents; by default each sequence is one.
        window: a position sees itself and the ``window`` - 1 keys before it.

    Not differentiable; no collective.
    """
    batch, heads, length, _ = q.shape
    width = v.shape[-1]
    q, k = flash.in_eighths(q), flash.in_eighths(k)
    tokens = [x.transpose(1, 2) for x in (q, k, flash.widened(v, q))]  # [B, S, heads, channels]
    offsets, longest = None, length
    if bounds is not None:
        tokens = [x.flatten(0, 1) for x in tokens]
        offsets, longest = bounds.offsets, bounds.longest
    left, right = (None, None) if window is None else (window - 1, 0)
    out, lse = torch.ops.aten._flash_attention_forward(
        *tokens, offsets, offsets, longest, longest, 0.0, True, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )[:2]  # fmt: skip
    if bounds is not None:  # out [B * S, n, d], lse [n, B * S]
        out = out.unflatten(0, (batch, length))
        lse = lse.view(heads, batch, length).transpose(0, 1)
    return out.transpose(1, 2)[..., :width], lse
