"""EagleGPTModel: the frozen base and the draft beside it, as one Megatron model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attention.packing import Packing
from megatron_eagle.compat import MegatronModule
from megatron_eagle.config import EagleConfig
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.draft.moe import take_balance_loss
from megatron_eagle.loss.row_losses import row_loss
from megatron_eagle.loss.soft_cross_entropy import Budgets, LossRows, soft_cross_entropy
from megatron_eagle.objective.batch import EagleBatch
from megatron_eagle.objective.metrics import metric_sums, prefix_hits
from megatron_eagle.objective.regression import hidden_regression
from megatron_eagle.objective.unroll import DraftInputs, target_hidden, unroll
from megatron_eagle.parallel.context import ContextShard
from megatron_eagle.pipeline.links import StageLinks
from megatron_eagle.pipeline.replicas import as_replica
from megatron_eagle.platform.profiling import nvtx_range
from megatron_eagle.teacher.base import FrozenBase
from megatron_eagle.teacher.embedding import step_embeddings, token_embedding
from megatron_eagle.teacher.outputs import BaseOutputs
from megatron_eagle.teacher.targets import TeacherHead, TeacherTargets


class EagleGPTModel(MegatronModule):
    """A draft trained beside the frozen base that teaches it.

    Args:
        base: the frozen base, or this pipeline stage's layers of it.
        draft: the trainable draft on the same tensor-parallel group, whole on every stage.
        options: the run's options.
        links: to the other pipeline stages, if there are any.
    """

    def __init__(
        self,
        base: FrozenBase,
        draft: EagleDraft,
        options: EagleConfig,
        links: StageLinks | None = None,
    ) -> None:
        super().__init__(config=base.config)
        self.base, self.draft, self.options, self.links = base, draft, options, links
        self.pg_collection = base.gpt.pg_collection
        self.share_embeddings_and_output_weights = False
        self.pre_process = self.post_process = True
        self.teacher: TeacherHead | None = None
        self._mask: Tensor | None = None
        self.budgets = Budgets(
            options.logits_budget_mib << 20,
            options.teacher_memory << 20,
            None if options.loss_chunk_mib is None else options.loss_chunk_mib << 20,
        )
        self.row_loss = row_loss(options.loss, options.acceptance_decay)
        # No buffer: a bf16 model would round it.
        weights = [options.step_decay**t for t in range(options.ttt_steps)]
        self.step_weights = torch.tensor(weights, device=base.output_weight.device)
        in_vocab = torch.zeros(base.vocab_size, dtype=torch.bool)
        in_vocab[draft.vocab_ids.cpu()] = True
        self.register_buffer("in_draft_vocab", in_vocab, persistent=False)
        self.layers_by_stage = self._layers_by_stage()

    def _layers_by_stage(self) -> list[tuple[int, ...]]:
        """The captured layers that each pipeline stage holds. A collective of the stages."""
        here = self.base.capture.layers_here
        if self.links is None:
            return [here]
        found: list[Any] = [None] * self.links.stages
        torch.distributed.all_gather_object(found, here, group=self.links.group)
        return found

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's schedules call this; what comes from other stages comes by the links."""

    def draft_inputs(
        self, tokens: Tensor, features: Tensor, packing: Packing | None = None
    ) -> DraftInputs:
        """What the unroll reads, for whole sequences of tokens [B, S], packed or not, and this
        rank's captured layers [S', B, A * H]."""
        steps = self.options.ttt_steps
        spans = ContextShard.of(tokens.shape[1], self.base.cp_group).spans
        return DraftInputs(
            features=features,
            embeddings=step_embeddings(
                tokens,
                self.base.embedding_weight,
                self.base.vocab_size,
                steps,
                self.base.tp_group,
                self.config.sequence_parallel,
                spans,
            ),
            rotary=self.draft.rotary(tokens.shape[1] + steps - 1),
            spans=spans,
            packing=packing,
            mask_embedding=self._mask_embedding(),
        )

    def _mask_embedding(self) -> Tensor | None:
        """[H] of P-EAGLE's mask token, looked up once."""
        if self.draft.mask_token is not None and self._mask is None:
            self._mask = token_embedding(
                self.draft.mask_token,
                self.base.embedding_weight,
                self.base.vocab_size,
                self.base.tp_group,
            )
        return self._mask

    @torch.no_grad()
    def targets(self, final_hidden: Tensor, target_rows: Tensor) -> tuple[TeacherTargets, Tensor]:
        """Teacher targets from the base's ``final_hidden`` [S', B, H], and the rows [M, H] of it
        that gave them; ``target_rows`` [M] as in
        :class:`~megatron_eagle.objective.batch.EagleBatch`."""
        if self.teacher is None:
            self.teacher = TeacherHead(
                self.base.output_weight,
                self.base.vocab_size,
                self.draft.vocab_ids,
                self.base.tp_group,
            )
        final_hidden = self.base.gather_final(final_hidden, self.options.ttt_steps)
        rows = final_hidden.flatten(0, 1)[target_rows]
        with nvtx_range("teacher"):
            return self.teacher.targets(rows), rows

    def forward(
        self, batch: EagleBatch, outputs_of_base: BaseOutputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """The micro-batch's loss (a sum over rows and weighted steps) and its metric sums, see
        :func:`~megatron_eagle.objective.metrics.reduce_metrics`. The base runs here unless its
        outputs are given."""
        base = outputs_of_base or batch.base_outputs or self.base(batch.tokens, batch.packing)
        targets, wanted = self.targets(base.final_hidden, batch.target_rows)
        inputs = self.draft_inputs(batch.tokens, base.features, batch.packing)
        hidden = target_hidden(
            self.draft,
            unroll(self.draft, inputs, self.options.ttt_steps, self.options.detach_steps),
            batch.step_rows,
        )
        with nvtx_range("loss"):
            loss, sums, hits = soft_cross_entropy(
                hidden,
                self.draft.lm_head(),
                targets,
                self._loss_rows(batch),
                self.draft.tp_group,
                self.budgets,
                self.row_loss,
            )
            rows = sums[self.options.ttt_steps]  # of step 0: what the batch's loss is divided by
            balance = take_balance_loss(self.draft, rows, self.draft.cp_group)
            if balance is not None:
                loss = loss + balance
            prefixes = prefix_hits(hits, batch.step_rows, batch.tokens.numel())
            if self.options.algorithm != "eagle1":
                return loss, metric_sums(sums, prefixes)
            per_step, values = hidden_regression(
                hidden, wanted, batch.step_mask, self.draft.tp_group
            )
        regression = self.options.hidden_loss_weight * (per_step * self.step_weights).sum()
        return loss + regression, metric_sums(sums, prefixes, values)

    def _loss_rows(self, batch: EagleBatch) -> LossRows:
        return LossRows(
            mask=batch.step_mask,
            step_weights=self.step_weights,
            shard_ids=self.draft.shard_ids,
            in_draft_vocab=self.in_draft_vocab if self.options.mask_out_of_vocab else None,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The draft alone: the base has a checkpoint of its own and never changes."""
        sharded = self.draft.sharded_state_dict(f"{prefix}draft.", sharded_offsets, metadata)
        return sharded if self.links is None else as_replica(sharded, self.links.stage)

    def load_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Strict for the draft; the base is not part of the state."""
        prefix = "draft."
        unexpected = [key for key in state_dict if not key.startswith(prefix)]
        assert not unexpected, f"not the draft's: {unexpected[:3]}"
        own = {key.removeprefix(prefix): value for key, value in state_dict.items()}
        if "metadata" in own:
            own["metadata"] = self.draft.metadata  # what this run is, not what saved it
        return self.draft.load_state_dict(own, strict=strict, assign=assign)
