"""Reduce all chunks in one all-gather, and keep their softmaxes to make the gradient in backward.

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
from megatron_eagle.loss.reduction import ShardMass


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
        ctx.loss, ctx.chunks = plan.loss, plan.chunks(hidden)
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
        gradients = GradientSums(hidden, weight)
        chunks = zip(ctx.chunks, softmaxes[::2], softmaxes[1::2], strict=True)
        for positions, draft, teacher in chunks:
            chunk_terms = tuple(term[..., positions] for term in terms)
            ctx.loss.gradient_(draft, teacher, mass.take(positions), chunk_terms)
            gradients.add(positions, draft, row_weight[:, positions])
        return *gradients.finish(), None
