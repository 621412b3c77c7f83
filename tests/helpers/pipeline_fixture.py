"""A base from a checkpoint on pipeline stages, and a draft with the reference's weights beside it.

Runs inside a rank of ``run_distributed``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.testing.harness import megatron_parallel
from tests.helpers import block_case
from tests.helpers.block_case import BlockCase
from tests.helpers.draft_fixture import Case, draft_options, load_reference_weights
from tests.reference.mtp import MTPConfig


@dataclass(frozen=True)
class ModuleDraft:
    """A base's own next-token module: the oracle's configuration, and the Hugging Face directory of
    base and module."""

    kind: str
    config: MTPConfig
    module: str
    vocab_ids: Tensor

    def options(self, base: Any) -> Any:
        """The package's options of its training beside `base`, its description."""
        from megatron_eagle.config import EagleConfig
        from megatron_eagle.hf.draft.base_module import beside_base

        options = EagleConfig.of(
            algorithm="mtp", ttt_steps=self.config.steps, step_decay=self.config.step_decay,
            detach_steps=self.config.detach_steps,
        )  # fmt: skip
        return dataclasses.replace(options, spec=beside_base(options.spec, base.megatron_args))

    def load(self, draft: Any, base: Any) -> None:
        """Load the module's weights into `draft`."""
        from megatron_eagle.hf.draft.import_hf import open_hf_draft
        from megatron_eagle.training.warm_start import load_warm_start

        load_warm_start(draft, open_hf_draft(self.module, base))


@dataclass(frozen=True)
class PipelineCase:
    """One layout's inputs. ``draft`` holds the draft's weights and sizes; ``micro_batches`` per
    data-parallel rank the (tokens, loss mask) of each, and the positions in their documents if they
    are packed."""

    draft: Case | BlockCase | ModuleDraft
    base: str
    aux_layers: tuple[int, ...]
    micro_batches: list[list[tuple[Tensor, ...]]]
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    first: int | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = False


class GivenStep:
    """Stand-in for ForwardStep that hands out the case's micro-batches."""

    def __init__(self, case: PipelineCase, options: Any, groups: Any) -> None:
        from megatron_eagle.training.step import ForwardStep

        self.case, self.cp_rank = case, groups.cp.rank()
        self.loss = ForwardStep(options, len(case.draft.vocab_ids)).loss

    def __call__(self, iterator: Any, model: Any) -> Any:
        return model(self.read(iterator)), self.loss

    def read(self, iterator: Any) -> Any:
        from megatron_eagle.objective.batch import EagleBatch

        tokens, mask, *positions = next(iterator)
        multiple = self.case.tp * (2 * self.case.cp if self.case.cp > 1 else 1)
        if isinstance(self.case.draft, BlockCase):
            return block_case.micro_batch(
                self.case.draft, tokens, mask, positions[0] if positions else None,
                multiple=multiple, anchor_multiple=self.case.tp,
                context=(self.cp_rank, self.case.cp),
            )  # fmt: skip
        draft = self.case.draft
        steps = draft.config.steps if isinstance(draft, ModuleDraft) else draft.config.ttt_steps
        return EagleBatch.build(
            tokens, mask, steps, multiple=multiple, trim=True,
            context=(self.cp_rank, self.case.cp), positions=positions[0] if positions else None,
            parts=self.case.tp if self.case.sequence_parallel else 1,
            every_row=draft.config.num_experts > 0,
        )  # fmt: skip


def options_of(draft: Case | BlockCase | ModuleDraft, base: Any) -> Any:
    """The package's options of the draft and its training beside `base`, its description."""
    from megatron_eagle.config import EagleConfig

    if isinstance(draft, ModuleDraft):
        return draft.options(base)
    if isinstance(draft, BlockCase):
        return block_case.block_options(draft)
    reference = draft.config
    return EagleConfig.of(
        ttt_steps=reference.ttt_steps,
        step_decay=reference.step_decay,
        mask_out_of_vocab=reference.mask_out_of_vocab,
        detach_steps=reference.detach_steps,
        **draft_options(reference),
    )


def build_pipeline(case: PipelineCase, groups: Any = None, **experts: Any) -> tuple[Any, Any, Any]:
    """Build (model wrapped for data parallelism, step, process groups) on this rank; ``groups`` are
    made if they are not given. With ``experts``, Megatron's arguments of experts, the base is a
    random MoE of the checkpoint's dimensions."""
    groups = groups or megatron_parallel(tp=case.tp, pp=case.pp, cp=case.cp, ep=case.ep)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.enums import ModelType

    from megatron_eagle.checkpoint.directory import load_base_json
    from megatron_eagle.draft.build import build_draft
    from megatron_eagle.draft.layer_config import draft_rotary
    from megatron_eagle.draft.metadata import encode_metadata
    from megatron_eagle.layers.backend import local_backend
    from megatron_eagle.model import EagleGPTModel
    from megatron_eagle.pipeline.exchange import StageExchange
    from megatron_eagle.pipeline.replicas import FinalizeReplicas, equal_start
    from megatron_eagle.teacher.base import FrozenBase
    from megatron_eagle.teacher.build import base_config, build_base, load_base
    from megatron_eagle.teacher.vocab_shards import VocabShards

    info = load_base_json(case.base)
    config = base_config(
        info, case.tp, pipeline_model_parallel_size=case.pp, pipeline_dtype=torch.float32,
        context_parallel_size=case.cp, sequence_parallel=case.sequence_parallel,
        num_layers_in_first_pipeline_stage=case.first, calculate_per_token_loss=True,
        expert_model_parallel_size=case.ep, **experts,
    )  # fmt: skip
    if case.pp > 1:
        config.finalize_model_grads_func = FinalizeReplicas(groups.pp)
    ends = (groups.pp.rank() == 0, groups.pp.rank() == case.pp - 1)
    gpt = build_base(config, info, local_backend(), groups, *ends)
    shards = VocabShards(gpt)
    if not experts:
        load_base(gpt, case.base, shards)
    base = FrozenBase(gpt, case.aux_layers, info.vocab_size, shards)
    exchange = StageExchange.of(base, groups.pp)
    options = options_of(case.draft, info)
    device = base.output_weight.device
    draft = build_draft(
        spec=options.spec,
        num_aux=len(case.aux_layers),
        base_config=config,
        backend=local_backend(),
        vocab_ids=case.draft.vocab_ids,
        vocab_size=info.vocab_size,
        base_head=lambda: base.output_weight,
        base_head_rows=base.output_weight.shape[0],
        rotary=draft_rotary(base.rotary, info, options.spec, device),
        metadata=encode_metadata({}),
        pg_collection=groups,
        device=device,
        moe_aux_loss_coeff=options.moe_aux_loss_coeff,
    )
    if exchange.is_first and isinstance(case.draft, BlockCase):
        block_case.load_weights(draft, case.draft)
    elif isinstance(case.draft, ModuleDraft):
        case.draft.load(draft, info)  # on every stage: routers' biases are no parameters
    elif exchange.is_first:
        load_reference_weights(draft, case.draft)
    if exchange.stages > 1:
        equal_start(draft, groups.pp)
    model = EagleGPTModel(base, draft, options, exchange)
    model.model_type = ModelType.encoder_or_decoder
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=case.distributed_optimizer,
        use_distributed_optimizer=case.distributed_optimizer,
        bucket_size=2**62,
    )
    # As Megatron's get_model does: by the model's own configuration, which is no longer the base's.
    wrapped = DistributedDataParallel(model.config, ddp, model)
    model.config.no_sync_func = wrapped.no_sync
    return wrapped, GivenStep(case, options, groups), groups
