"""Make loss and gradient of each chunk at once, in forward; keep nothing as wide as the vocabulary.

Shape letters: K TTT steps, M target positions of a micro-batch, H hidden size, Dp this rank's shard
of the draft vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.loss.chunk import ReducedChunks, ShardChunk
from megatron_eagle.loss.gradients import GradientSums
from megatron_eagle.loss.inputs import LossPlan


class LossAtOnce(torch.autograd.Function):
    """Loss of hidden [K, M, H] and weight [Dp, H], its gradient made in forward, chunk by chunk.

    Example: 2 ranks, K = 3, M = 10, chunks of 4, 3 and 3 positions. For each chunk forward

    1. asks the teacher for its softmax at 4 positions and makes the draft's 3 x 4 rows of logits,
       which become their softmax in place;
    2. all-gathers the chunk's statistics (three all-gathers in all), so that every rank knows the
       losses and its own mass of each softmax;
    3. turns the softmax into the gradient on the logits in place, adds its products to the
       gradients of hidden and weight, and frees it before the next chunk.

    Backward multiplies the two finished gradients by the incoming scalar, and sends nothing. Of one
    rank, step 2 sends nothing either, and the soft cross-entropy's gradient comes out of step 1.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, plan: LossPlan) -> tuple[Tensor, ...]:
        """Return the loss, the packed ``LossSums`` and the hits [K, M] bool."""
        gradients = GradientSums(hidden, weight) if plan.gradient else None
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
                gradients.add(positions, chunk.draft, row_weight)
            del chunk  # its memory is the next chunk's
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
