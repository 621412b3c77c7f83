"""A training step of a block draft, from the base's features to the loss and its metrics.

Shape letters: S' this rank's tokens, Q sequences, A aux layers, H hidden, N blocks of B rows, K
judged slots, M judged rows, U targets, r rank of the Markov head, Dp this rank's shard of the draft
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_eagle.attention.anchors import AnchorState
from megatron_eagle.config.block_options import BlockOptions
from megatron_eagle.draft.block import BlockDraft
from megatron_eagle.loss.block_loss import block_loss
from megatron_eagle.loss.block_plan import BlockPlan, BlockValues
from megatron_eagle.loss.inputs import Budgets, TeacherRows
from megatron_eagle.loss.label_teacher import LabelTeacher
from megatron_eagle.objective.block_batch import BlockBatch
from megatron_eagle.objective.block_metrics import block_sums
from megatron_eagle.objective.inputs import EmbeddingOfBase, query_angles
from megatron_eagle.parallel.context import ContextShard, gather_key_value
from megatron_eagle.parallel.products import default_output_bytes
from megatron_eagle.platform.profiling import nvtx_range
from megatron_eagle.teacher.embedding import token_embeddings


class BlockObjective:
    """Loss of a block draft beside its base.

    Args:
        base: what embeds the anchors.
        draft: the draft.
        options: losses and weights.
        budgets: memory limits of the loss.
        in_draft_vocab: [V] bool.
        mask_embedding: returns the mask token's embedding [H].
    """

    def __init__(
        self,
        base: EmbeddingOfBase,
        draft: BlockDraft,
        options: BlockOptions,
        budgets: Budgets,
        mask_embedding: Callable[[], Tensor | None],
    ) -> None:
        self.base, self.draft, self.options, self.budgets = base, draft, options, budgets
        self.mask_embedding = mask_embedding

    def __call__(
        self,
        batch: BlockBatch,
        features: Tensor,
        teach: Callable[[], TeacherRows],
        in_draft_vocab: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the micro-batch's loss, a sum over weighted rows, and its packed ``BlockSums``.

        features [S', Q, A * H]. ``teach`` returns the base as teacher of the U targets, of which
        nothing is evaluated yet; it is not called where the data's tokens are all that is read.
        """
        rows = self.judged_rows(batch, self.outputs(batch, features))
        confidence = None
        if self.draft.confidence is not None:
            rows, confidence = rows[:, :-1].contiguous(), rows[:, -1]
        joint, markov = self.draft.joint_head()
        plan = BlockPlan(
            teacher=self.labels(batch) if self.options.data_alone else teach(),
            rows=batch.rows,
            options=self.options,
            steps=self.draft.spec.block_drafts,
            shard_ids=self.draft.shard_ids,
            in_draft_vocab=in_draft_vocab,
            group=self.draft.tp_group,
            gradient=torch.is_grad_enabled() and rows.requires_grad,
            chunk_bytes=self.budgets.chunk or default_output_bytes(rows.device),
        )
        with nvtx_range("loss"):
            loss, values = block_loss(rows, joint, markov, plan, self.budgets)
        confidence_sum = torch.zeros_like(loss)
        if confidence is not None:
            extra, confidence_sum = self.confidence_loss(confidence, values)
            loss = loss + extra
        return loss, block_sums(batch.rows, values, confidence_sum, plan.steps)

    def labels(self, batch: BlockBatch) -> LabelTeacher:
        """Return the data's tokens as teacher of the U targets."""
        columns = self.draft.shard.padded_rows
        return LabelTeacher(batch.rows.target_labels(len(batch.target_rows)), columns)

    def outputs(self, batch: BlockBatch, features: Tensor) -> Tensor:
        """Run the draft on all blocks: [N, B, H] after the final norm, whole blocks of this rank
        under sequence parallelism. Collectives: an embedding look-up, fc's and the layers', and
        under context parallelism one all-gather per layer (backward: one reduce-scatter)."""
        draft, slots = self.draft, self.draft.spec.slots
        with nvtx_range("unroll"):
            c = draft.context(features)
            rotary = draft.rotary(batch.tokens.shape[1] + slots)
            context_angles = self.context_angles(batch, rotary)
            ahead = torch.arange(slots, device=c.device)
            angles = rotary[:, 0][(batch.positions.unsqueeze(1) + ahead).flatten()].unsqueeze(1)

            def context(layer: int) -> tuple[Tensor, Tensor]:
                key, value = draft.context_key_value(layer, c, context_angles)
                return gather_key_value(key, value, draft.cp_group)

            state = AnchorState(batch.plan, slots, context)
            hidden = draft.run_blocks(self.inputs(batch.anchor_tokens), angles, state)
        return hidden.squeeze(1).unflatten(0, (-1, slots))

    def context_angles(self, batch: BlockBatch, rotary: Tensor) -> Tensor:
        """Return the RoPE angles of this context-parallel rank's tokens, [S, 1 or Q, 1, d]."""
        if batch.packing is not None:
            return batch.packing.angles(rotary, self.draft.cp_group)
        spans = ContextShard.of(batch.tokens.shape[1], self.draft.cp_group).spans
        return query_angles(rotary, spans, 0)

    def inputs(self, anchor_tokens: Tensor) -> Tensor:
        """Return the first layer's input [N * B, 1, H]: per block the anchor's embedding and the
        mask token's. This rank's blocks under sequence parallelism. One all-reduce or
        reduce-scatter over TP."""
        anchors = token_embeddings(
            anchor_tokens.unsqueeze(0),
            self.base.embedding_weight,
            self.base.vocab_size,
            self.base.tp_group,
            self.draft.config.sequence_parallel,
        )
        mask = self.mask_embedding()
        assert mask is not None, "a block draft has a mask token"
        masks = mask.expand(len(anchors), self.draft.spec.slots - 1, -1)
        return torch.cat([anchors, masks], dim=1).flatten(0, 1).unsqueeze(1)

    def judged_rows(self, batch: BlockBatch, outputs: Tensor) -> Tensor:
        """Return what the heads read of each judged row, the same on every TP rank: [M, H], with a
        Markov head [M, H + r], and the confidence's logit in one more column.

        Collectives: one look-up of W1; over TP one all-gather under sequence parallelism (backward:
        one reduce-scatter), else none (backward: one all-reduce).
        """
        draft, parts = self.draft, [outputs]
        if draft.markov is not None:
            parallel = draft.config.sequence_parallel
            embedded = draft.markov.embed(batch.previous.flatten(), parallel)
            embedded = embedded.unflatten(0, (-1, outputs.shape[1]))
            parts.append(draft.markov(outputs, embedded))
            if draft.confidence is not None:
                parts.append(draft.confidence(outputs, embedded))
        whole = draft.gather_rows(torch.cat(parts, dim=-1).flatten(0, 1))
        return whole[batch.block_rows]

    def confidence_loss(self, logits: Tensor, values: BlockValues) -> tuple[Tensor, Tensor]:
        """Return the confidence head's weighted loss, and its sum without the option's weight.

        Every TP rank holds all M rows, whose gradients are summed over the ranks later: each rank
        gives its part.
        """
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            logits.float(), values.alpha, reduction="none"
        )
        total = (each * values.weight).sum()
        part = self.options.confidence * total / self.draft.tp_group.size()
        return self.options.confidence * total.detach() + (part - part.detach()), total.detach()
