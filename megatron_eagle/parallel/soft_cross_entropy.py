"""The loss of all K TTT steps: head, vocab-parallel soft cross-entropy and their gradient, fused.

Logits live one chunk of target rows at a time, for all steps together, and turn in place into
softmax and then gradient. A step's loss feeds nothing in the next, so what the ranks must tell
each other meets in one all-gather: per row and step a shard's max, sum of exp, Σ p z and argmax
(16 bytes), per target row the teacher's five statistics. Log Z and CE = log Z - Σ p z follow
everywhere, and so does this rank's gradient, w (q - p): backward sends nothing.

Two schedules give the same result:

* *at once*: every chunk is reduced by itself and its gradient made in forward; nothing of the
  vocabulary's width outlives the chunk. Always with one rank, where nothing is sent; with more, one
  all-gather per chunk.
* *kept*: one all-gather per micro-batch; softmax and teacher of all chunks are kept for backward,
  as long as they fit the budgets.

Another loss of q and p needs: statistics of a chunk that add up over shards, beside
:func:`draft_softmax_`; its value, beside :class:`Reduced`; its gradient, in
:meth:`_Chunk.gradient_`. One whose statistics need log Z first (Σ min(p, q)) scales softmax
and teacher by :func:`shard_shares` and reduces a second time: per chunk *at once*, once for all
chunks when *kept*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.parallel.reduction import Reduced, reduce_shards, shard_shares
from megatron_eagle.parallel.shard_softmax import draft_softmax_, rescale_
from megatron_eagle.parallel.vocab import even_chunks
from megatron_eagle.platform.products import add_outer_, linear

CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 512 << 20}
"""Logits of teacher and draft that exist at a time, unless they are kept."""


class TeacherRows(Protocol):
    """The teacher's M target rows, computed when asked for."""

    @property
    def full_columns(self) -> int:
        """The widest shard of the full vocabulary on any rank: chunks are equal everywhere."""
        ...

    @property
    def draft_columns(self) -> int:
        """The widest shard of the draft vocabulary on any rank."""
        ...

    def rows(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Softmax over this rank's draft shard, fp32 [c, Dp], and statistics fp32 [c, 5]: of the
        draft shard max and sum of exp, of the full shard max, its id and sum of exp."""
        ...


@dataclass(frozen=True)
class LossRows:
    """What is the same for every rank of a micro-batch's M target rows and K steps.

    ``mask`` [K, M] bool: row supervised at that step. ``step_weights`` [K]. ``shard_ids`` [Dp]:
    base ids of this rank's draft rows. ``in_draft_vocab`` [V] bool, or ``None`` to keep rows whose
    base argmax the draft cannot say.
    """

    mask: Tensor
    step_weights: Tensor
    shard_ids: Tensor
    in_draft_vocab: Tensor | None


@dataclass(frozen=True)
class Budgets:
    """Bytes per rank that draft logits and teacher targets may take between forward and backward
    for the *kept* schedule."""

    logits: int
    teacher: int

    def allow(self, hidden: Tensor, columns: int) -> bool:
        steps, count, _ = hidden.shape
        logits = steps * count * columns * hidden.element_size()
        return logits <= self.logits and teacher_bytes(count, columns) <= self.teacher


def teacher_bytes(targets: int, columns: int) -> int:
    """What the targets of ``targets`` rows take on a rank when they are kept, fp32."""
    return 4 * targets * columns


def soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherRows,
    rows: LossRows,
    group: ProcessGroup,
    budgets: Budgets,
) -> tuple[Tensor, Tensor]:
    """Soft cross-entropy of ``hidden @ weightᵀ`` against the teacher, summed over rows and steps.

    hidden [K, M, H], the normed draft hidden of every step at its target rows, full on every rank
    (its gradient is this rank's partial sum: let it pass through
    ``copy_to_tensor_model_parallel_region`` or a sequence-parallel gather). weight [Dp, H], this
    rank's head rows, without padding.

    Returns the scalar Σ_t w_t Σ_rows CE (differentiable in hidden and weight, once) and the sums
    [3, K] + 2 flattened, fp32: per step CE, rows and hits (draft argmax = base argmax over the
    full vocabulary); then the base's probability inside the draft vocabulary and its rows.
    All-gathers over ``group`` in forward: none for one rank, one within ``budgets``, else one per
    chunk. None in backward.
    """
    gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    work = _Work(teacher, rows, group, gradient)
    keep = gradient and not work.alone and budgets.allow(hidden, teacher.draft_columns)
    return (_Kept if keep else _AtOnce).apply(hidden, weight, work)


@dataclass(frozen=True)
class _Work:
    teacher: TeacherRows
    rows: LossRows
    group: ProcessGroup
    gradient: bool

    @property
    def alone(self) -> bool:
        return self.group.size() == 1

    def chunks(self, hidden: Tensor) -> list[slice]:
        """Equal chunks of target rows, the same on every rank."""
        steps, count, _ = hidden.shape
        row_bytes = 4 * (steps * self.teacher.draft_columns + self.teacher.full_columns)
        return even_chunks(count, CHUNK_BYTES[hidden.device.type] // row_bytes)

    def row_weight(self, reduced: Reduced, chunk: slice) -> tuple[Tensor, Tensor]:
        """Mask and loss weight [K, c] of a chunk's rows."""
        mask = self.rows.mask[:, chunk]
        if self.rows.in_draft_vocab is not None:
            mask = mask & self.rows.in_draft_vocab[reduced.teacher_argmax]
        return mask, mask * self.rows.step_weights.unsqueeze(-1)


@dataclass(frozen=True)
class _Chunk:
    """Softmaxes of this shard: ``draft`` [K, c, Dp], ``teacher`` [c, Dp]; and their statistics.
    ``subtracted``: ``draft`` is the gradient already."""

    draft: Tensor
    teacher: Tensor
    local: Tensor
    teacher_local: Tensor
    subtracted: bool

    @classmethod
    def evaluate(cls, hidden: Tensor, weight: Tensor, work: _Work, rows: slice) -> _Chunk:
        teacher, teacher_local = work.teacher.rows(rows)
        ids = work.rows.shard_ids
        logits = linear(hidden[:, rows].flatten(0, 1), weight)
        draft = logits.unflatten(0, (hidden.shape[0], -1))
        # A whole vocabulary's softmax needs no other rank: its gradient is in reach at once.
        subtract = work.alone and work.gradient
        local = draft_softmax_(draft, teacher, subtract)
        if ids.numel():
            local[..., 3] = ids[local[..., 3].long()].float()
        return cls(draft, teacher, local, teacher_local, subtract)

    def gradient_(self, reduced: Reduced) -> Tensor:
        """``draft`` becomes q - p, the gradient on this shard's logits of a row of weight 1."""
        if not self.subtracted:
            ratio, scale = shard_shares(self.local, self.teacher_local, reduced)
            rescale_(self.draft, ratio, self.teacher, scale)
        return self.draft


class _Gradients:
    """Sums of hidden [K, M, H] and weight, from chunks; the weight's in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.source, self.weight = hidden, weight
        self.hidden = torch.empty_like(hidden)
        self.total = torch.zeros_like(weight, dtype=torch.float32)

    def add(self, rows: slice, grad_logits: Tensor, row_weight: Tensor) -> None:
        grad, scale = grad_logits.flatten(0, 1), row_weight.to(self.source.dtype).unsqueeze(-1)
        part = linear(grad, self.weight.t()).view_as(self.hidden[:, rows])
        torch.mul(part, scale, out=self.hidden[:, rows])
        weighted = (self.source[:, rows] * scale).flatten(0, 1)
        add_outer_(self.total, grad, weighted)

    def finish(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.total.to(self.weight.dtype)


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, work: _Work) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(hidden, weight) if work.gradient else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        sums = hidden.new_zeros(3 * hidden.shape[0] + 2, dtype=torch.float32)
        for rows in work.chunks(hidden):
            part = _Chunk.evaluate(hidden, weight, work, rows)
            reduced = reduce_shards(part.local, part.teacher_local, work.group)
            mask, row_weight = work.row_weight(reduced, rows)
            loss += (reduced.cross_entropy * row_weight).sum()
            sums += reduced.sums(mask, work.rows.mask[0, rows])
            if gradients is not None:
                gradients.add(rows, part.gradient_(reduced), row_weight)
            del part  # its memory is the next chunk's
        if gradients is not None:
            ctx.save_for_backward(*gradients.finish())
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second backward through the same graph is refused by autograd.
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grads[0]), grad_weight.mul_(grads[0]), None


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, work: _Work) -> tuple[Tensor, Tensor]:
        ctx.chunks = work.chunks(hidden)
        parts = [_Chunk.evaluate(hidden, weight, work, rows) for rows in ctx.chunks]
        local = torch.cat([part.local for part in parts], dim=1)
        teacher_local = torch.cat([part.teacher_local for part in parts])
        reduced = reduce_shards(local, teacher_local, work.group)
        mask, row_weight = work.row_weight(reduced, slice(None))
        ratio, scale = shard_shares(local, teacher_local, reduced)
        kept = [tensor for part in parts for tensor in (part.draft, part.teacher)]
        ctx.save_for_backward(hidden, weight, row_weight, ratio, scale, *kept)
        sums = reduced.sums(mask, work.rows.mask[0])
        ctx.mark_non_differentiable(sums)
        return (reduced.cross_entropy * row_weight).sum(), sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, row_weight, ratio, scale, *kept = ctx.saved_tensors
        row_weight = row_weight * grads[0]
        gradients = _Gradients(hidden, weight)
        for rows, draft, teacher in zip(ctx.chunks, kept[::2], kept[1::2], strict=True):
            rescale_(draft, ratio[:, rows], teacher, scale[rows])
            gradients.add(rows, draft, row_weight[:, rows])
        return *gradients.finish(), None
