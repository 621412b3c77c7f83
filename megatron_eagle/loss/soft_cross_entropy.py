"""The loss of all K TTT steps: head, vocab-parallel loss and their gradient in one function.

Logits live one chunk of target positions at a time, for all steps together, and turn in place into
softmax and then gradient. A step's loss feeds nothing in the next, so the statistics of all steps
meet in one all-gather: per position and step a shard's maximum, sum of exp, Σ p z and argmax (16
bytes), per position the teacher's five statistics. Log Z and the soft cross-entropy
log Z - Σ p z follow on every rank, and so does this rank's gradient, w (q - p): backward sends
nothing. Other losses (:mod:`megatron_eagle.loss.registry`) gather one statistic more, or reduce a
second time, because the acceptance alpha = Σ min(p, q) needs log Z first.

Two schedules give the same result:

* :class:`LossAtOnce` reduces each chunk by itself and makes its
  gradient in forward. Always with one rank, where nothing is sent; with more, one all-gather per
  chunk.
* :class:`LossKept` needs one all-gather per micro-batch, and keeps the
  softmaxes of all chunks for backward, as long as they fit the budgets.

Shape letters: K TTT steps, M target positions of a micro-batch, H hidden size, Dp this rank's shard
of the draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.loss.chunk import GradientSums, ReducedChunks, ShardChunk
from megatron_eagle.loss.cross_entropy import SoftCrossEntropy
from megatron_eagle.loss.head_gradient import HeadGradient
from megatron_eagle.loss.inputs import Budgets, LossPlan, LossRows, TeacherRows
from megatron_eagle.loss.reduction import ShardMass
from megatron_eagle.loss.row_loss import RowLoss
from megatron_eagle.loss.statistics import LossSums
from megatron_eagle.parallel.products import default_output_bytes


def soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherRows,
    rows: LossRows,
    group: ProcessGroup,
    budgets: Budgets,
    loss: RowLoss | None = None,
    head_gradient: HeadGradient | None = None,
) -> tuple[Tensor, LossSums, Tensor]:
    """Return the sum of ``loss`` (by default the soft cross-entropy) of ``hidden @ weightᵀ``
    against the teacher.

    Args:
        hidden: [K, M, H], the normed draft hidden of every step at its target positions, full on
            every rank. Its gradient is this rank's partial sum: let it pass through
            ``copy_to_tensor_model_parallel_region`` or a sequence-parallel gather.
        weight: [Dp, H], this rank's rows of the draft's head, without padding.
        teacher: the base's predictions; ``teacher.rows`` is called here, chunk by chunk, and
            nothing of them is computed before.
        rows: masks and weights of the target positions.
        group: the tensor-parallel group that the vocabulary is cut over.
        budgets: memory limits; they decide the schedule and the chunks.
        loss: the loss of one position and step.
        head_gradient: where the gradient of ``weight`` is added, once for each backward; by
            default autograd gets it. It may be added in forward: then a backward must follow.

    Returns:
        The scalar Σ_t w_t Σ_positions loss, differentiable in hidden and weight, once; the sums
        for the metrics; and the hits [K, M] bool: supervised positions whose draft argmax is the
        base's over the full vocabulary.

    Collectives over ``group``, all in forward: none for one rank; within ``budgets`` one
    all-gather, else one per chunk; as many all-reduces more for a loss that ``needs_overlap``.
    """
    gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    plan = LossPlan(
        teacher=teacher,
        rows=rows,
        group=group,
        loss=loss or SoftCrossEntropy(),
        gradient=gradient,
        chunk_bytes=budgets.chunk or default_output_bytes(hidden.device),
        head_gradient=head_gradient,
    )
    keep = gradient and not plan.one_rank and budgets.allow(hidden, teacher.draft_columns)
    schedule = LossKept if keep else LossAtOnce
    total, sums, hits = schedule.apply(hidden, weight, plan)
    return total, LossSums.unpack(sums), hits


class LossAtOnce(torch.autograd.Function):
    """Loss of hidden [K, M, H] and weight [Dp, H], its gradient made in forward, chunk by chunk.

    Example: 2 ranks, K = 3, M = 10, chunks of 4, 3 and 3 positions. For each chunk forward

    1. asks the teacher for its softmax at 4 positions and makes the draft's 3 x 4 rows of logits,
       which become their softmax in place;
    2. all-gathers the chunk's statistics (three all-gathers in all), so that every rank knows the
       losses and its own mass of each softmax;
    3. turns the softmax into the gradient on the logits in place, adds its products to the
       gradients of hidden and weight, and frees it before the next chunk.

    Backward multiplies the two finished gradients by the incoming scalar, and sends nothing. (The
    weight's is multiplied beforehand where it is added to a buffer of many micro-batches.) With
    one rank step 2 sends nothing, and step 1 already gives the soft cross-entropy's gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, plan: LossPlan) -> tuple[Tensor, ...]:
        """Return the loss, the packed ``LossSums`` and the hits [K, M] bool."""
        elsewhere = plan.head_gradient
        scale = None if elsewhere is None else elsewhere.scale
        gradients = GradientSums(hidden, weight, elsewhere) if plan.gradient else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        sums = hidden.new_zeros(3 * hidden.shape[0] + 2, dtype=torch.float32)
        hits = torch.zeros_like(plan.rows.mask)
        for positions in plan.chunks(hidden):
            chunk = ShardChunk.evaluate(hidden, weight, plan, positions)
            reduced = ReducedChunks.reduce([chunk], plan)
            mask, row_weight = plan.mask_and_weight(reduced.stats, positions)
            values = reduced.values
            loss += (values.loss * row_weight).sum()
            sums += reduced.stats.sums(values.loss, mask, plan.rows.mask[0, positions]).pack()
            hits[:, positions] = reduced.stats.hit & mask
            if gradients is not None:
                if not chunk.subtracted:
                    plan.loss.gradient_(chunk.draft, chunk.teacher, reduced.mass, values.terms)
                gradients.add(positions, chunk.draft, row_weight, scale)
            del chunk  # its memory is the next chunk's
        if gradients is not None:
            ctx.save_for_backward(*gradients.finish())
        ctx.elsewhere = elsewhere
        ctx.mark_non_differentiable(sums, hits)
        return loss, sums, hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second backward through the same graph is refused by autograd.
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.elsewhere is not None:
            ctx.elsewhere.check_scale(grads[0])
        elif grad_weight is not None:
            grad_weight.mul_(grads[0])
        return grad_hidden.mul_(grads[0]), grad_weight, None


class LossKept(torch.autograd.Function):
    """Loss of hidden [K, M, H] and weight [Dp, H], its gradient made in backward.

    Example: 2 ranks, K = 3, M = 10, chunks of 4, 3 and 3 positions. Forward

    1. asks the teacher for its softmax at each chunk's positions and makes the draft's logits
       there, which become their softmax in place: 4, 3 and 3 positions, times 3 steps;
    2. all-gathers the statistics of all 10 positions once;
    3. keeps the three chunks' softmaxes, draft and teacher, and this shard's mass of each.

    Backward turns each kept softmax into the gradient on the logits in place, chunk by chunk, and
    adds its products to the gradients of hidden and weight. It sends nothing.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, plan: LossPlan) -> tuple[Tensor, ...]:
        """Return the loss, the packed ``LossSums`` and the hits [K, M] bool."""
        ctx.loss, ctx.chunks, ctx.elsewhere = plan.loss, plan.chunks(hidden), plan.head_gradient
        chunks = [ShardChunk.evaluate(hidden, weight, plan, positions) for positions in ctx.chunks]
        reduced = ReducedChunks.reduce(chunks, plan)
        mask, row_weight = plan.mask_and_weight(reduced.stats, slice(None))
        values, mass = reduced.values, reduced.mass
        ctx.terms = len(values.terms)
        softmaxes = [tensor for chunk in chunks for tensor in (chunk.draft, chunk.teacher)]
        ctx.save_for_backward(hidden, weight, row_weight, *mass, *values.terms, *softmaxes)
        sums = reduced.stats.sums(values.loss, mask, plan.rows.mask[0]).pack()
        hits = reduced.stats.hit & mask
        ctx.mark_non_differentiable(sums, hits)
        return (values.loss * row_weight).sum(), sums, hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, row_weight, draft_mass, teacher_mass, coverage, *rest = ctx.saved_tensors
        mass = ShardMass(draft_mass, teacher_mass, coverage)
        terms, softmaxes = rest[: ctx.terms], rest[ctx.terms :]
        row_weight = row_weight * grads[0]
        gradients = GradientSums(hidden, weight, ctx.elsewhere)
        chunks = zip(ctx.chunks, softmaxes[::2], softmaxes[1::2], strict=True)
        for positions, draft, teacher in chunks:
            chunk_terms = tuple(term[..., positions] for term in terms)
            ctx.loss.gradient_(draft, teacher, mass.take(positions), chunk_terms)
            gradients.add(positions, draft, row_weight[:, positions])
        return *gradients.finish(), None
