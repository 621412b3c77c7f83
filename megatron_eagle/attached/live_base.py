"""The training step of a draft beside a model that a trainer runs, and may train, itself.

It is the step of :class:`~megatron_eagle.model.EagleGPTModel`; the base is not run but was, and its
embedding and output layer may have changed since the last micro-batch.

S' this rank's tokens, B micro-batch, H hidden size, A aux layers, Vp this rank's rows of the padded
vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attached.capture import (
    CapturedForward,
    ForwardCapture,
    embedding_weight,
    output_weight,
)
from megatron_eagle.config import EagleConfig
from megatron_eagle.draft.metadata import check_same_draft, decode_metadata
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.errors import UserError
from megatron_eagle.model import EagleGPTModel
from megatron_eagle.objective.batch import EagleBatch
from megatron_eagle.objective.inputs import DraftInputs
from megatron_eagle.parallel.context import ContextShard
from megatron_eagle.teacher.base import BaseOutputs, gather_final
from megatron_eagle.teacher.layer_sizes import random_tokens, typical_rms


class LiveBase:
    """The trainer's model, with what a step reads of a ``FrozenBase``.

    It is no module: the model stays its trainer's, and none of its parameters belongs to the draft.

    Args:
        gpt: the model, whole on this rank.
        config: TransformerConfig of the draft.
        aux_layers: ids of the layers whose outputs are captured, ascending.
        vocab_size: of the model, without padding.
        pg_collection: process groups of model and draft.
    """

    def __init__(
        self, gpt: Any, config: Any, aux_layers: Sequence[int], vocab_size: int, pg_collection: Any
    ) -> None:
        self.gpt, self.config, self.vocab_size = gpt, config, vocab_size
        self.pg_collection = pg_collection
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.forwards = ForwardCapture(gpt, aux_layers)
        self.capture = self.forwards.aux
        self._captured: CapturedForward | None = None

    @property
    def embedding_weight(self) -> Tensor:
        """Word embedding [Vp, H], detached."""
        captured = self._captured
        return embedding_weight(self.gpt) if captured is None else captured.embedding_weight

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output layer [Vp, H], detached."""
        captured = self._captured
        return output_weight(self.gpt) if captured is None else captured.output_weight

    @contextmanager
    def as_captured(self, captured: CapturedForward) -> Iterator[None]:
        """Show the weights that this forward used, inside the context."""
        self._captured = captured
        try:
            yield
        finally:
            self._captured = None

    def gather_final(self, final: Tensor, halo: int) -> Tensor:
        """Gather the final hidden, see :func:`megatron_eagle.teacher.base.gather_final`."""
        parallel = self.tp_group if self.config.sequence_parallel else None
        return gather_final(final, halo, parallel, self.cp_group)

    @torch.no_grad()
    def layer_sizes(self, length: int = 128) -> Tensor:
        """Measure the typical RMS of each aux layer's output by one forward on random tokens in
        eval mode, which leaves the model as it was: [A] fp32, the same on every rank.

        Collectives: the model's own, and those of
        :func:`~megatron_eagle.teacher.layer_sizes.typical_rms`.
        """
        multiple = 2 * self.cp_group.size() * self.tp_group.size()
        length = min(length, self.gpt.max_sequence_length // multiple * multiple)
        device = self.embedding_weight.device
        tokens = random_tokens(self.vocab_size, length, multiple).to(device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        shard = ContextShard.of(tokens.shape[1], self.cp_group)
        modes = [(module, module.training) for module in self.gpt.modules()]
        try:
            self.gpt.eval()
            with self.forwards.aux_hidden() as aux:
                self.gpt(shard.take(tokens, 1), shard.take(positions, 1), None)
        finally:
            for module, training in modes:
                module.training = training
        groups = [self.cp_group, *([self.tp_group] if self.config.sequence_parallel else [])]
        return torch.stack(list(typical_rms(aux.take(), aux.layers, groups).values()))


class DraftBeside(EagleGPTModel):
    """The draft as a Megatron model of its own: its parameters, its checkpoint, its step.

    Wrap it in Megatron's ``DistributedDataParallel`` and give it to an optimizer of its own.
    """

    scaled_by_schedule = False  # the trainer may weigh the loss as it likes

    def __init__(self, base: Any, draft: EagleDraft, options: EagleConfig) -> None:
        super().__init__(base, draft, options)
        self.pg_collection = base.pg_collection

    def step(self, captured: CapturedForward, batch: EagleBatch) -> tuple[Tensor, Tensor]:
        """Return the loss and the metric sums of a captured forward, see ``EagleGPTModel``."""
        self.teacher = self._mask = None  # rows of weights that may have changed
        outputs, dtype = captured.outputs, self.draft.config.params_dtype
        outputs = BaseOutputs(
            outputs.features.to(dtype), outputs.final_hidden.to(captured.output_weight.dtype)
        )
        with self.base.as_captured(captured):
            return self(batch, outputs)

    def draft_inputs(self, batch: EagleBatch, features: Tensor) -> DraftInputs:
        """Return the inputs of ``EagleGPTModel`` in the draft's dtype."""
        inputs, dtype = super().draft_inputs(batch, features), features.dtype
        mask = inputs.mask_embedding
        return dataclasses.replace(
            inputs,
            embeddings=inputs.embeddings.to(dtype),
            mask_embedding=None if mask is None else mask.to(dtype),
        )

    def load_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the draft's tensors, strictly. Raises ``UserError`` naming the option if they are of
        another draft than this one, or of one for another model."""
        saved = state_dict.get("draft.metadata")
        if saved is not None:
            source = "the state dict"
            now = decode_metadata(self.draft.metadata, "the draft")
            check_same_draft(decode_metadata(saved, source), now, source)
            if not torch.equal(state_dict["draft.vocab_ids"], self.draft.vocab_ids):
                raise UserError(f"<vocab_ids>: the draft in {source} has other token ids")
        return super().load_state_dict(state_dict, strict, assign)
