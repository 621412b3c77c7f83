"""The softmax of a shard of logits, made in place, with what joins it to the other shards'.

A shard's softmax q is relative to the shard alone; with its max and its sum of exp(z - max), the
softmax over all shards is q * sum * exp(max - log Z). On a CPU the passes go over a few rows at a
time, which stay in a core's cache from the first pass to the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_eagle.parallel.vocab import EMPTY_SHARD_MAX, row_chunks
from megatron_eagle.platform.compiler import compilable, is_compiling

CACHED_BYTES = 2 << 20
_SPAN = 128


def shard_softmax_(logits: Tensor) -> Tensor:
    """``logits`` [N, Dp] become their softmax over this shard, in place.

    Returns fp32 [N, 3]: max, sum of exp(z - max), and the position of the max (the first of
    equals). An empty shard gives ``EMPTY_SHARD_MAX``, 0 and 0, which vanish in any combination.
    """
    return _by_blocks(logits.unsqueeze(0), None, False)[0][:, [0, 1, 3]]


def draft_softmax_(logits: Tensor, teacher: Tensor, subtract: bool) -> Tensor:
    """``logits`` [K, N, Dp] become their softmax over this shard, minus ``teacher`` [N, Dp] fp32
    with ``subtract``, in place.

    Returns fp32 [K, N, 4]: max, sum of exp(z - max), Σ teacher z, position of the max.
    """
    return _by_blocks(logits, teacher, subtract)


def rescale_(softmax: Tensor, ratio: Tensor, teacher: Tensor, scale: Tensor) -> None:
    """``softmax`` [K, N, Dp] becomes softmax * ratio [K, N] - teacher [N, Dp] * scale [N]."""
    _, count, columns = softmax.shape
    for step, own in zip(softmax, ratio, strict=True):
        for rows in _blocks(count, columns, softmax.is_cuda):
            _rescale_block_(step[rows], own[rows], teacher[rows], scale[rows])


def _by_blocks(logits: Tensor, teacher: Tensor | None, subtract: bool) -> Tensor:
    steps, count, columns = logits.shape
    found = logits.new_zeros(steps, count, 4, dtype=torch.float32)
    if columns == 0:
        found[..., 0] = EMPTY_SHARD_MAX
        return found
    for rows in _blocks(count, columns, logits.is_cuda):
        own = None if teacher is None else teacher[rows]
        for step in range(steps):
            found[step, rows] = _softmax_block_(logits[step, rows], own, subtract)
    return found


def _blocks(count: int, columns: int, on_gpu: bool) -> list[slice]:
    if on_gpu or is_compiling():
        return [slice(0, count)]
    return row_chunks(count, columns, CACHED_BYTES)


@compilable
def _softmax_block_(logits: Tensor, teacher: Tensor | None, subtract: bool) -> Tensor:
    top, index = row_max(logits)
    wide = logits.float()  # fp32 logits themselves
    dot = top if teacher is None else torch.linalg.vecdot(wide, teacher)
    softmax = torch.softmax(wide, -1, out=wide)
    total = softmax.gather(-1, index.unsqueeze(-1)).squeeze(-1).reciprocal()
    if subtract:
        assert teacher is not None
        torch.sub(softmax, teacher, out=logits)
    elif softmax is not logits:
        logits.copy_(softmax)
    return torch.stack([top.float(), total, dot, index.float()], -1)


@compilable
def _rescale_block_(softmax: Tensor, ratio: Tensor, teacher: Tensor, scale: Tensor) -> None:
    ratio, scale = ratio.unsqueeze(-1), scale.unsqueeze(-1)
    scaled = softmax.mul_(ratio) if softmax.dtype == torch.float32 else softmax * ratio
    torch.addcmul(scaled, teacher, scale, value=-1.0, out=softmax)


def row_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Max and its position, the first of equals, of each row of [N, Dp].

    PyTorch's own max with positions is not vectorised on a CPU, its amax is: first the maxima of
    short spans, then the position inside the first best span. The last two spans may overlap.
    """
    columns = logits.shape[-1]
    if logits.is_cuda or is_compiling() or columns < 2 * _SPAN:
        return logits.max(dim=-1)
    whole = columns // _SPAN
    maxima = logits[:, : whole * _SPAN].unflatten(1, (whole, _SPAN)).amax(-1)
    if columns % _SPAN:
        maxima = torch.cat([maxima, logits[:, -_SPAN:].amax(-1, keepdim=True)], dim=1)
    start = (maxima.argmax(-1, keepdim=True) * _SPAN).clamp_(max=columns - _SPAN)
    span = logits.gather(1, start + torch.arange(_SPAN))
    top, inside = span.max(dim=-1)
    return top, start.squeeze(1) + inside
