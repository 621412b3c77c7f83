"""The loss of all K TTT steps: head, vocab-parallel loss of the rows and their gradient, fused.

Logits live one chunk of target rows at a time, for all steps together, and turn in place into
softmax and then gradient. A step's loss feeds nothing in the next, so what the ranks must tell
each other meets in one all-gather: per row and step a shard's max, sum of exp, Σ p z and argmax
(16 bytes), per target row the teacher's five statistics. Log Z and CE = log Z - Σ p z follow
everywhere, and so does this rank's gradient, w (q - p): backward sends nothing.
Other losses than the soft cross-entropy are in :mod:`megatron_eagle.loss.row_losses`; those of
the acceptance alpha = Σ min(p, q) need log Z first and reduce a second time.

Two schedules give the same result:

* *at once*: every chunk is reduced by itself and its gradient made in forward; nothing of the
  vocabulary's width outlives the chunk. Always with one rank, where nothing is sent; with more, one
  all-gather per chunk.
* *kept*: one all-gather per micro-batch; softmax and teacher of all chunks are kept for backward,
  as long as they fit the budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.loss.reduction import Reduced, reduce_shards, shard_shares
from megatron_eagle.loss.row_losses import Shares, SoftCrossEntropy, overlap_statistics
from megatron_eagle.loss.shard_softmax import draft_softmax_
from megatron_eagle.parallel.vocab import even_chunks
from megatron_eagle.platform.cpu.products import add_outer_, onednn_is_faster, product

CHUNK_BYTES = {"cpu": (32 if onednn_is_faster() else 56) << 20, "cuda": 2 << 30}
"""Logits of teacher and draft that exist at a time, unless they are kept. MKL wants more rows in a
product than oneDNN does before it comes near the processor's speed (docs/log.md). On a GPU every
chunk reads and writes the weight's whole gradient, which takes as long as some 300 to 400 rows do
(docs/architecture.md)."""


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
    for the *kept* schedule; and what those of one ``chunk`` may take, by default ``CHUNK_BYTES``.
    The chunks must be the same on every rank."""

    logits: int
    teacher: int
    chunk: int | None = None

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
    loss: SoftCrossEntropy | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss`` of ``hidden @ weightᵀ`` against the teacher, by default the soft cross-entropy,
    summed over rows and steps.

    hidden [K, M, H], the normed draft hidden of every step at its target rows, full on every rank
    (its gradient is this rank's partial sum: let it pass through
    ``copy_to_tensor_model_parallel_region`` or a sequence-parallel gather). weight [Dp, H], this
    rank's head rows, without padding.

    Returns the scalar Σ_t w_t Σ_rows loss (differentiable in hidden and weight, once); the sums
    [3, K] + 2 flattened, fp32: per step loss, rows and hits, then the base's probability inside the
    draft vocabulary and its rows; and the hits [K, M] bool themselves: supervised rows whose draft
    argmax is the base's over the full vocabulary. All-gathers over ``group`` in forward: none for
    one rank, one within ``budgets``, else one per chunk; for a loss that ``overlaps`` as many
    all-reduces more. None in backward.
    """
    gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    chunk = budgets.chunk or CHUNK_BYTES[hidden.device.type]
    work = _Work(teacher, rows, group, loss or SoftCrossEntropy(), gradient, chunk)
    keep = gradient and not work.alone and budgets.allow(hidden, teacher.draft_columns)
    return (_Kept if keep else _AtOnce).apply(hidden, weight, work)


@dataclass(frozen=True)
class _Work:
    teacher: TeacherRows
    rows: LossRows
    group: ProcessGroup
    loss: SoftCrossEntropy
    gradient: bool
    chunk_bytes: int

    @property
    def alone(self) -> bool:
        return self.group.size() == 1

    def chunks(self, hidden: Tensor) -> list[slice]:
        """Equal chunks of target rows, the same on every rank."""
        steps, count, _ = hidden.shape
        row_bytes = 4 * (steps * self.teacher.draft_columns + self.teacher.full_columns)
        return even_chunks(count, self.chunk_bytes // row_bytes)

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
        ids, loss = work.rows.shard_ids, work.loss
        logits = product(hidden[:, rows].flatten(0, 1), weight)
        draft = logits.unflatten(0, (hidden.shape[0], -1))
        extra = [loss.from_logits(draft, teacher)]
        # A whole vocabulary's softmax needs no other rank: its gradient is in reach at once.
        subtract = work.alone and work.gradient and type(loss) is SoftCrossEntropy
        local = draft_softmax_(draft, teacher, subtract)
        if ids.numel():
            local[..., 3] = ids[local[..., 3].long()].float()
        extra.append(loss.from_softmax(draft, teacher))
        added = [statistic.unsqueeze(-1) for statistic in extra if statistic is not None]
        assert len(added) == loss.adds
        return cls(draft, teacher, torch.cat([local, *added], -1), teacher_local, subtract)


@dataclass(frozen=True)
class _Rows:
    """What all shards make of some target rows: the loss ``value`` [K, N] and its gradient's
    per-row terms."""

    reduced: Reduced
    value: Tensor
    shares: Shares
    terms: list[Tensor]

    @classmethod
    def reduce(cls, parts: list[_Chunk], work: _Work) -> _Rows:
        """Of the rows of ``parts`` together: one all-gather, and one all-reduce if the loss
        overlaps."""
        local = torch.cat([part.local for part in parts], dim=1)
        teacher_local = torch.cat([part.teacher_local for part in parts])
        reduced = reduce_shards(local, teacher_local, work.group)
        ratio, scale = shard_shares(local, teacher_local, reduced)
        shares, overlap = Shares(ratio, scale, reduced.teacher_coverage), None
        if work.loss.overlaps:
            sizes = [part.teacher.shape[0] for part in parts]
            ends = torch.tensor(sizes).cumsum(0).tolist()
            found = [
                overlap_statistics(part.draft, part.teacher, shares.of(slice(end - size, end)))
                for part, size, end in zip(parts, sizes, ends, strict=True)
            ]
            overlap = torch.cat(found, dim=1)
            if not work.alone:
                torch.distributed.all_reduce(overlap, group=work.group)
        rank = 0 if work.alone else work.group.rank()
        value = work.loss.value(reduced, overlap)
        return cls(reduced, value, shares, work.loss.terms(reduced, overlap, rank))


class _Gradients:
    """Sums of hidden [K, M, H] and weight, from chunks; the weight's in fp32, if it needs one."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.source, self.weight = hidden, weight
        self.hidden = torch.empty_like(hidden)
        self.total = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None

    def add(self, rows: slice, grad_logits: Tensor, row_weight: Tensor) -> None:
        grad, scale = grad_logits.flatten(0, 1), row_weight.to(self.source.dtype).unsqueeze(-1)
        target = self.hidden[:, rows]
        torch.mul(product(grad, self.weight.t()).view_as(target), scale, out=target)
        if self.total is not None:
            weighted = (self.source[:, rows] * scale).flatten(0, 1)
            add_outer_(self.total, grad, weighted)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        return self.hidden, None if self.total is None else self.total.to(self.weight.dtype)


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, work: _Work) -> tuple[Tensor, ...]:
        gradients = _Gradients(hidden, weight) if work.gradient else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        sums = hidden.new_zeros(3 * hidden.shape[0] + 2, dtype=torch.float32)
        hits = torch.zeros_like(work.rows.mask)
        for rows in work.chunks(hidden):
            part = _Chunk.evaluate(hidden, weight, work, rows)
            whole = _Rows.reduce([part], work)
            mask, row_weight = work.row_weight(whole.reduced, rows)
            loss += (whole.value * row_weight).sum()
            sums += whole.reduced.sums(whole.value, mask, work.rows.mask[0, rows])
            hits[:, rows] = whole.reduced.hit & mask
            if gradients is not None:
                if not part.subtracted:
                    work.loss.gradient_(part.draft, part.teacher, whole.shares, whole.terms)
                gradients.add(rows, part.draft, row_weight)
            del part  # its memory is the next chunk's
        if gradients is not None:
            ctx.save_for_backward(*gradients.finish())
        ctx.mark_non_differentiable(sums, hits)
        return loss, sums, hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second backward through the same graph is refused by autograd.
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight.mul_(grads[0])
        return grad_hidden.mul_(grads[0]), grad_weight, None


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, work: _Work) -> tuple[Tensor, ...]:
        ctx.chunks, ctx.loss = work.chunks(hidden), work.loss
        parts = [_Chunk.evaluate(hidden, weight, work, rows) for rows in ctx.chunks]
        whole = _Rows.reduce(parts, work)
        mask, row_weight = work.row_weight(whole.reduced, slice(None))
        ctx.terms, shares = len(whole.terms), whole.shares
        kept = [tensor for part in parts for tensor in (part.draft, part.teacher)]
        ctx.save_for_backward(
            hidden, weight, row_weight, shares.ratio, shares.scale, shares.coverage,
            *whole.terms, *kept,
        )  # fmt: skip
        sums = whole.reduced.sums(whole.value, mask, work.rows.mask[0])
        hits = whole.reduced.hit & mask
        ctx.mark_non_differentiable(sums, hits)
        return (whole.value * row_weight).sum(), sums, hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, row_weight, ratio, scale, coverage, *others = ctx.saved_tensors
        terms, kept = others[: ctx.terms], others[ctx.terms :]
        shares = Shares(ratio, scale, coverage)
        row_weight = row_weight * grads[0]
        gradients = _Gradients(hidden, weight)
        for rows, draft, teacher in zip(ctx.chunks, kept[::2], kept[1::2], strict=True):
            here = [term[..., rows] for term in terms]
            ctx.loss.gradient_(draft, teacher, shares.of(rows), here)
            gradients.add(rows, draft, row_weight[:, rows])
        return *gradients.finish(), None
