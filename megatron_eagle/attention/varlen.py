"""Attend to the trunk with one launch on CUDA, however many documents and live rows there are.

A plan of blocks (``blocks``) launches kernels for each document and each run of live rows. Flash
attention takes the bounds of segments instead: the queries of segment i attend to the keys of
segment i, and the last query of a segment sees the last key. So a document is a segment. Its
queries reach from its first live row to its end; rows between them that are not live are zeros
there, whose gradients are zero.

Shape letters: B sequences, S their length, D documents of all of them, N live rows, T rows of all
segments' queries (N <= T), n query heads and g key/value heads of this TP rank (g divides n), d
channels of a key, dv <= d channels of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.attention import flash

_aten = torch.ops.aten


@dataclass(frozen=True)
class Segments:
    """Queries and keys of D documents that cover B * S tokens, one behind the other.

    Attributes:
        query_offsets, key_offsets: [D + 1] int32, where each segment begins, and T or B * S.
        longest_query, longest_key: rows of the longest segment.
        queries: T.
        rows: [N] int64, which of the T rows each query is; None if they are all, in this order.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    longest_query: int
    longest_key: int
    queries: int
    rows: Tensor | None = None

    @classmethod
    def of(
        cls,
        runs: Sequence[Sequence[tuple[int, int]]],
        documents: Sequence[Sequence[tuple[int, int]]],
        device: torch.device,
    ) -> Segments:
        """Make the segments on the host and copy them to ``device`` without waiting for it.

        Args:
            runs: for every sequence the (start, stop) of its live rows, ascending.
            documents: for every sequence the (start, stop) of its documents, covering it.
        """
        lengths, key_lengths, rows, total = [], [], [], 0
        for live, spans in zip(runs, documents, strict=True):
            for start, stop in spans:
                inside = [(max(a, start), min(b, stop)) for a, b in live if a < stop and b > start]
                first = inside[0][0] if inside else stop - 1  # no kernel meets an empty segment
                rows += [torch.arange(a, b) + (total - first) for a, b in inside]
                lengths.append(stop - first)
                key_lengths.append(stop - start)
                total += stop - first
        index = torch.cat(rows)
        whole = index.numel() == total
        return cls(
            _to(_offsets(lengths), device),
            _to(_offsets(key_lengths), device),
            max(lengths),
            max(key_lengths),
            total,
            None if whole else _to(index, device),
        )

    def spread(self, x: Tensor) -> Tensor:
        """Put the queries' rows x [N, ...] among zeros, [T, ...]."""
        if self.rows is None:
            return x
        return x.new_zeros(self.queries, *x.shape[1:]).index_copy_(0, self.rows, x)

    def collect(self, x: Tensor) -> Tensor:
        """Return the queries' rows [N, ...] of x [T, ...]."""
        return x if self.rows is None else x.index_select(0, self.rows)


def applies(q: Tensor) -> bool:
    """Return whether the kernel takes queries such as q [B, n, S, d]."""
    return flash.has_cuda_flash(q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Return out [1, n, N, dv] and lse [1, n, N] fp32, or [B, n, S, ...] as the queries come.

    Args:
        q: [1, n, N, d] live rows, or [B, n, S, d].
        k, v: [B, g, S, d] and [B, g, S, dv].
        scale: factor of the scores.
        segments: of these queries and keys.

    Not differentiable by itself; no collective.
    """
    width = v.shape[-1]
    query, key, value = _kernel_inputs(q, k, v, segments)
    out, lse = _aten._flash_attention_forward(
        query, key, value, segments.query_offsets, segments.key_offsets,
        segments.longest_query, segments.longest_key, 0.0, True, False, scale=scale,
    )[:2]  # fmt: skip
    rows, statistics = segments.collect(out), segments.collect(lse.t())
    return _by_head(rows, q)[..., :width], _by_head(statistics, q).contiguous()


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    segments: Segments,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v; ``out`` and ``lse`` may be those of a larger softmax. Shapes
    as in :func:`forward`; no collective."""
    size, width = q.shape[-1], v.shape[-1]
    query, key, value = _kernel_inputs(q, k, v, segments)
    grad, result = (
        segments.spread(_by_token(flash.in_eighths(flash.widened(x, q)))) for x in (grad_out, out)
    )
    statistics = segments.spread(_by_token(lse)).t().contiguous()  # [n, T], read without strides
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # philox state: no dropout
    dq, dk, dv = _aten._flash_attention_backward(
        grad, query, key, value, result, statistics, segments.query_offsets, segments.key_offsets,
        segments.longest_query, segments.longest_key, 0.0, True, unused, unused, scale=scale,
    )  # fmt: skip
    return (
        _by_head(segments.collect(dq), q)[..., :size],
        _by_head(dk, k)[..., :size],
        _by_head(dv, k)[..., :width],
    )


def _kernel_inputs(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [T, n, w], keys and values [B * S, g, w], w a multiple of 8."""
    value = flash.in_eighths(flash.widened(v, q))
    query = segments.spread(_by_token(flash.in_eighths(q)))
    return query, _by_token(flash.in_eighths(k)), _by_token(value)


def _by_token(x: Tensor) -> Tensor:
    """Return x [B, heads, S, ...] as [B * S, heads, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """Return x [B * S, heads, ...] as [B, heads, S, ...], of the B and S of ``like``."""
    return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _to(x: Tensor, device: torch.device) -> Tensor:
    pinned = x.pin_memory() if device.type == "cuda" else x
    return pinned.to(device, non_blocking=True)
