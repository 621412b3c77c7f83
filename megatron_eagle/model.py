"""EagleGPTModel: the frozen base and the draft beside it, as one Megatron model.

START READING HERE: :meth:`EagleGPTModel.forward` is one training step of a micro-batch, top to
bottom. It calls the folders of the package in this order: the base (teacher/base.py), the draft's
inputs and its K steps (objective/unroll.py), the teacher (teacher/targets.py), the fused loss
(loss/soft_cross_entropy.py) and the metrics (objective/metrics.py).

S sequence, S' this rank's tokens, B micro-batch, H hidden, A aux layers, K TTT steps, M supervised
target positions.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.compat import MegatronModule
from megatron_eagle.config import EagleConfig
from megatron_eagle.draft.block import BlockDraft
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.draft.moe import take_balance_loss
from megatron_eagle.loss.head_gradient import HeadGradient
from megatron_eagle.loss.inputs import Budgets, LossRows
from megatron_eagle.loss.registry import row_loss
from megatron_eagle.loss.soft_cross_entropy import soft_cross_entropy
from megatron_eagle.loss.statistics import LossSums
from megatron_eagle.objective.batch import EagleBatch
from megatron_eagle.objective.block_batch import AnyBatch, BlockBatch
from megatron_eagle.objective.block_step import BlockObjective
from megatron_eagle.objective.inputs import DraftInputs
from megatron_eagle.objective.metrics import metric_sums, prefix_hits
from megatron_eagle.objective.regression import hidden_regression
from megatron_eagle.objective.unroll import unroll
from megatron_eagle.parallel.products import agreed_output_bytes
from megatron_eagle.pipeline.exchange import StageExchange
from megatron_eagle.pipeline.replicas import as_replica
from megatron_eagle.platform.profiling import nvtx_range
from megatron_eagle.teacher.base import BaseOutputs, FrozenBase
from megatron_eagle.teacher.embedding import token_embedding
from megatron_eagle.teacher.targets import TeacherHead, TeacherTargets


class EagleGPTModel(MegatronModule):
    """A draft trained beside the frozen base that teaches it.

    Args:
        base: the frozen base, or this pipeline stage's layers of it.
        draft: the trainable draft on the same tensor-parallel group, whole on every stage.
        options: the run's options.
        exchange: with the base's other pipeline stages; by default the base is whole here.

    Attributes:
        scaled_by_schedule: whether the loss is multiplied before its backward by nothing but the
            config's ``grad_scale_func``, as Megatron's schedules do.
    """

    scaled_by_schedule = True

    def __init__(
        self,
        base: FrozenBase,
        draft: EagleDraft,
        options: EagleConfig,
        exchange: StageExchange | None = None,
    ) -> None:
        # Megatron sums gradients by the names of such norms over TP: the draft's, not the base's.
        config = copy.copy(base.config)
        config.qk_layernorm = draft.spec.norms_heads
        super().__init__(config=config)
        self.base, self.draft, self.options = base, draft, options
        self.exchange = exchange or StageExchange(base)
        self.pg_collection = base.gpt.pg_collection
        self.share_embeddings_and_output_weights = False
        self.pre_process = self.post_process = True
        self.teacher: TeacherHead | None = None
        self._mask: Tensor | None = None
        train = options.train
        self.budgets = Budgets(
            train.logits_budget_mib << 20,
            train.teacher_memory << 20,
            agreed_output_bytes(base.output_weight.device, draft.tp_group)
            if train.loss_chunk_mib is None
            else train.loss_chunk_mib << 20,
        )
        self.row_loss = row_loss(train.loss, train.acceptance_decay)
        # No buffer: a bf16 model would round it.
        weights = [train.step_decay**t for t in range(train.ttt_steps)]
        self.step_weights = torch.tensor(weights, device=base.output_weight.device)
        in_vocab = torch.zeros(base.vocab_size, dtype=torch.bool)
        in_vocab[draft.vocab_ids.cpu()] = True
        self.register_buffer("in_draft_vocab", in_vocab, persistent=False)
        self.block_objective: BlockObjective | None = None
        if isinstance(draft, BlockDraft):
            draft.copy_head(self.teacher_head().draft_weight)
            self.block_objective = BlockObjective(
                base, draft, options.blocks(), self.budgets, self._mask_embedding
            )

    def forward(
        self, batch: AnyBatch, base_outputs: BaseOutputs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the micro-batch's loss (a sum over tokens and weighted steps) and its metric sums,
        see :func:`~megatron_eagle.objective.metrics.reduce_metrics`.

        The base runs here unless its outputs are passed in (pipeline stages) or were read from disk
        (offline features). The teacher evaluates nothing yet: the loss asks it for one chunk of
        target positions at a time.
        """
        base = base_outputs or batch.base_outputs or self.base(batch.tokens, batch.packing)
        if isinstance(batch, BlockBatch):
            return self.train_blocks(batch, base)
        inputs = self.draft_inputs(batch, base.features)
        hidden = unroll(
            self.draft, inputs, batch.step_rows, detach_steps=self.options.train.detach_steps
        )
        target_hidden = self.target_hidden(base.final_hidden, batch.target_rows)
        teacher = self.teach(target_hidden)
        head_gradient = self.head_gradient()
        with nvtx_range("loss"):
            loss, sums, hits = soft_cross_entropy(
                hidden,
                self.draft.lm_head(head_gradient is not None),
                teacher,
                self.loss_rows(batch),
                self.draft.tp_group,
                self.budgets,
                self.row_loss,
                head_gradient,
            )
            extra, regression = self.extra_losses(batch, hidden, target_hidden, sums)
        prefixes = prefix_hits(hits, batch.step_rows, batch.live.index.numel())
        return loss + extra, metric_sums(sums, prefixes, regression)

    def train_blocks(self, batch: BlockBatch, base: BaseOutputs) -> tuple[Tensor, Tensor]:
        """Return loss and metric sums of a block draft, see
        :func:`~megatron_eagle.objective.block_metrics.reduce_block_metrics`."""
        assert self.block_objective is not None
        teach = partial(self.teach_rows, base.final_hidden, batch.target_rows)
        return self.block_objective(batch, base.features, teach, self.in_draft_vocab)

    def draft_inputs(self, batch: EagleBatch, features: Tensor) -> DraftInputs:
        """Return what the draft reads of the batch, beside this rank's features [S', B, A * H]."""
        return DraftInputs.of(
            self.base,
            self.draft,
            batch,
            features,
            steps=self.options.train.ttt_steps,
            mask_embedding=self._mask_embedding(),
        )

    @torch.no_grad()
    def target_hidden(self, final_hidden: Tensor, target_rows: Tensor) -> Tensor:
        """Return the base's final hidden state at the target positions, [M, H], the same on every
        TP rank; ``target_rows`` [M] as in :class:`~megatron_eagle.objective.batch.EagleBatch`."""
        rows = self.base.gather_final(final_hidden, self.options.steps)
        return rows.flatten(0, 1)[target_rows]

    def teach_rows(self, final_hidden: Tensor, target_rows: Tensor) -> TeacherTargets:
        """Return the teacher of some of the base's rows, see :meth:`target_hidden`."""
        return self.teach(self.target_hidden(final_hidden, target_rows))

    @torch.no_grad()
    def teach(self, target_hidden: Tensor) -> TeacherTargets:
        """Return the teacher of these target positions [M, H]; nothing is evaluated yet."""
        with nvtx_range("teacher"):
            return self.teacher_head().targets(target_hidden)

    @torch.no_grad()
    def teacher_head(self) -> TeacherHead:
        """Return the teacher's rows of both vocabularies, fetched when they are first needed."""
        if self.teacher is None:
            self.teacher = TeacherHead(
                self.base.output_weight,
                self.base.vocab_size,
                self.draft.vocab_ids,
                self.base.tp_group,
            )
        return self.teacher

    def head_gradient(self) -> HeadGradient | None:
        """Return where the loss adds the head's gradient: to the ``main_grad`` of Megatron's
        DistributedDataParallel, if there is one and Megatron's schedule scales the loss."""
        total = self.draft.lm_head.gradient_rows()
        if total is None or not self.scaled_by_schedule or not torch.is_grad_enabled():
            return None
        scale = torch.ones((), device=total.device)
        scale_loss = self.config.grad_scale_func
        return HeadGradient(total, scale if scale_loss is None else scale_loss(scale).reshape(()))

    def loss_rows(self, batch: EagleBatch) -> LossRows:
        """Return masks and weights of the target positions."""
        mask_out_of_vocab = self.options.train.mask_out_of_vocab
        return LossRows(
            mask=batch.step_mask,
            step_weights=self.step_weights,
            shard_ids=self.draft.shard_ids,
            in_draft_vocab=self.in_draft_vocab if mask_out_of_vocab else None,
        )

    def extra_losses(
        self, batch: EagleBatch, hidden: Tensor, target_hidden: Tensor, sums: LossSums
    ) -> tuple[Tensor | float, Tensor | None]:
        """Return the losses beside the head's: a MoE draft's balance loss and EAGLE-1's regression,
        summed; and the regression's sums per step [K] for the metrics."""
        supervised = sums.rows[0]  # tokens of step 0, which divide the loss
        extra: Tensor | float = 0.0
        balance = take_balance_loss(self.draft, supervised, self.draft.cp_group)
        if balance is not None:
            extra = balance
        if not self.draft.algorithm.regresses_hidden:
            return extra, None
        per_step, values = hidden_regression(
            hidden, target_hidden, batch.step_mask, self.draft.tp_group
        )
        weighted = self.options.regression_weight * (per_step * self.step_weights).sum()
        return extra + weighted, values

    def _mask_embedding(self) -> Tensor | None:
        """Look up the embedding [H] of P-EAGLE's mask token, once."""
        mask_token = self.draft.spec.mask_token
        if mask_token is not None and self._mask is None:
            self._mask = token_embedding(
                mask_token,
                self.base.embedding_weight,
                self.base.vocab_size,
                self.base.tp_group,
            )
        return self._mask

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Ignore Megatron's schedules: other stages' outputs come through the exchange."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the draft's alone: the base has a checkpoint of its own and never changes."""
        sharded = self.draft.sharded_state_dict(f"{prefix}draft.", sharded_offsets, metadata)
        return as_replica(sharded, self.exchange.stage)

    def load_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the draft's tensors, strictly; a state dict never holds the base."""
        prefix = "draft."
        unexpected = [key for key in state_dict if not key.startswith(prefix)]
        assert not unexpected, f"not the draft's: {unexpected[:3]}"
        own = {key.removeprefix(prefix): value for key, value in state_dict.items()}
        if "metadata" in own:
            own["metadata"] = self.draft.metadata  # what this run is, not what saved it
        return self.draft.load_state_dict(own, strict=strict, assign=assign)
