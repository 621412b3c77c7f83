"""AttachedDraft: a draft that learns from a model's own forwards.

B micro-batch, S sequence (a trainer has S / CP tokens of it on a rank), K TTT steps, D draft
vocabulary, V base vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attached.export import export_tensors
from megatron_eagle.attached.live_base import DraftBeside, LiveBase
from megatron_eagle.attached.micro_batch import read_micro_batch
from megatron_eagle.compat import finalize_model_grads
from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.draft.config_json import draft_config_json
from megatron_eagle.hf.draft.formats import FORMATS, Format, check_servers
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.objective.metrics import MetricSums, reduce_metrics


class AttachedDraft:
    """A draft beside a trainer's model. :func:`megatron_eagle.attach` makes one.

    After each forward of the model, :meth:`loss` gives the draft's loss on the same tokens; after
    the last micro-batch of a step, :meth:`finish_step` completes the draft's gradients. Nothing of
    the model is in the draft's graph: its loss may be added to the model's or differentiated at
    once, which frees the draft's activations before the model's backward.

    Attributes:
        module: the draft as a Megatron model: for ``DistributedDataParallel``, an optimizer of its
            own and ``dist_checkpointing`` (keys ``draft.*``, which ``megatron-eagle convert``
            reads). It holds no parameter of the model.
        config: its TransformerConfig, for ``DistributedDataParallel``.
        info: its description.
    """

    def __init__(self, base: LiveBase, module: DraftBeside, info: DraftInfo) -> None:
        self.module, self.info = module, info
        self.config = module.config
        self._base = base

    def loss(self, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the draft's loss on the tokens of the model's last forward, and its metric sums.

        Call it once after each forward of the model and before the model's optimizer steps: the
        teacher reads the output layer's weight that the forward used.

        Args:
            loss_mask: [B, S / CP], as the model's own loss has it: entry i says by 0 or 1 whether
                the token after position i is supervised. Documents packed into a sequence are told
                by the forward's ``packed_seq_params``, or by ``position_ids`` that restart; the
                draft's attention, positions and TTT steps stay inside them.

        Returns:
            The loss, a scalar: the sum over this rank's supervised tokens and weighted steps, not a
            mean (:meth:`finish_step` divides). And packed sums [5 K + 2], detached, for
            :meth:`finish_step`. Both are the same on every tensor-parallel rank, and parts that add
            up over data and context parallelism.

        Collectives: those of a step of ``EagleGPTModel`` without its base; one all-gather of tokens
        over CP; for a compressed vocabulary one reduce per rank over TP of the teacher's rows,
        since the model may have changed. The host waits for the device once.

        Raises ``UserError`` unless the model ran exactly once since the last call, and for what
        :func:`~megatron_eagle.attached.micro_batch.read_micro_batch` refuses.
        """
        captured = self._base.forwards.take()
        steps = self.info.ttt_steps
        config = self.module.draft.config
        batch = read_micro_batch(
            captured,
            loss_mask,
            steps,
            self._base.cp_group,
            parts=self._base.tp_group.size() if config.sequence_parallel else 1,
            every_row=config.num_moe_experts is not None,
        )
        loss, sums = self.module.step(captured, batch)
        return loss, sums.detach()

    def finish_step(self, draft: Any, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """Complete the gradients of an optimizer step and return its metrics.

        Args:
            draft: ``module`` in Megatron's ``DistributedDataParallel``.
            sums: of all micro-batches of the step, as :meth:`loss` returned them.

        Returns:
            Scalars on the device, see :func:`~megatron_eagle.objective.metrics.reduce_metrics`.

        Gradients are summed over data and context parallelism, and over TP where sequence
        parallelism wants it, and divided by the supervised tokens of the global batch: Megatron's
        ``finalize_model_grads``. One more all-reduce for the metrics. Call it before the draft's
        optimizer steps.
        """
        if not sums:
            raise UserError("<sums> are empty: finish_step needs those of the step's losses")
        base, options = self._base, self.module.options
        rows = torch.stack([MetricSums.unpack(packed).rows[0] for packed in sums]).sum().int()
        groups = base.pg_collection
        known = all(hasattr(groups, name) for name in ("embd", "pos_embd", "dp_cp"))
        finalize_model_grads([draft], rows, pg_collection=groups if known else None)
        train = options.train
        return reduce_metrics(
            list(sums),
            train.ttt_steps,
            train.step_decay,
            options.regression_weight,
            [groups.dp_cp],
        )

    def paused(self) -> AbstractContextManager[None]:
        """Return a context in which the model's forwards (evaluation, log-probabilities) are not
        captured. Those with an inference context never are."""
        return self._base.forwards.paused()

    def remove(self) -> None:
        """Take the hooks off the model; the draft can be saved and exported, and trains no more."""
        self._base.forwards.remove()

    def export_weights(
        self, fmt: str = "hf", dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor) of everything in the draft's model.safetensors,
        as ``megatron-eagle convert`` writes it: to refit a serving engine while training.

        Args:
            fmt: format of the names, as ``--format`` of ``convert``.
            dtype: of the weights; by default the draft's.

        One tensor is gathered at a time, on the draft's device, by one all-gather over TP (two for
        gate and up): every rank of the tensor-parallel group must read to the end. Data-parallel
        replicas all hold the same.

        Raises ``UserError`` for a format that does not exist or whose readers cannot run the draft,
        and for a weight that is not finite.
        """
        dtype = dtype or self.config.params_dtype
        return export_tensors(self.module, self.info, _format(fmt), dtype, self._base.tp_group)

    def export_config(self, fmt: str = "hf", dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Return the config.json that belongs to :meth:`export_weights`, with which a serving
        engine builds the draft. Raises ``UserError`` as that does. No collective."""
        check_servers(_format(fmt), self.info)
        return draft_config_json(self.info, _format(fmt), dtype or self.config.params_dtype)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"<format> {literal(name)}: not one of {', '.join(FORMATS)}")
    return FORMATS[name]
