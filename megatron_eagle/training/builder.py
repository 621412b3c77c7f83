"""Building the model: the base from its checkpoint, the draft beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from torch import Tensor

from megatron_eagle.attention.rope import attention_factor, set_attention_factor
from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import EagleConfig
from megatron_eagle.data.features.store import FeaturePlan, read_plan
from megatron_eagle.draft.build import build_draft
from megatron_eagle.draft.layer_config import draft_rotary
from megatron_eagle.draft.metadata import encode_metadata, resolved_spec, run_metadata
from megatron_eagle.draft.model import EagleDraft
from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.checkpoint import StoredDraft
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.servers import serving_notes
from megatron_eagle.layers.backend import LayerBackend, backend_of
from megatron_eagle.loss.inputs import teacher_bytes
from megatron_eagle.model import EagleGPTModel
from megatron_eagle.pipeline.exchange import StageExchange
from megatron_eagle.pipeline.replicas import FinalizeReplicas, equal_start
from megatron_eagle.teacher.base import FrozenBase
from megatron_eagle.teacher.build import build_base, load_base
from megatron_eagle.teacher.offline import (
    OfflineBase,
    config_without_layers,
    info_without_layers,
    without_layers,
)
from megatron_eagle.teacher.vocab_shards import VocabShards
from megatron_eagle.training.base_start import BaseStart, left_out
from megatron_eagle.training.frozen_config import frozen_config
from megatron_eagle.training.save_place import warn_if_disk_is_small
from megatron_eagle.training.throughput import Throughput
from megatron_eagle.training.warm_start import load_base_start, load_warm_start


class ModelBuilder:
    """A Megatron ``model_provider``: builds :class:`EagleGPTModel` on this rank when called."""

    def __init__(
        self,
        options: EagleConfig,
        base: BaseInfo,
        vocab_ids: Tensor,
        warm_start: StoredDraft | None = None,
        throughput: Throughput | None = None,
    ) -> None:
        self.options, self.base, self.vocab_ids = options, base, vocab_ids
        self.warm_start, self.throughput = warm_start, throughput

    def __call__(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> EagleGPTModel:
        assert vp_stage is None
        args = get_args()
        config = config or core_transformer_config_from_args(args)
        if not config.multi_latent_attention:
            set_attention_factor(config, attention_factor(self.base.rope))
        base_config = frozen_config(config, self.base)
        base_config.recompute_granularity = None  # it keeps nothing for a backward
        # Its weights are loaded; and so the draft's start does not depend on the base's size.
        base_config.perform_initialization = False
        base_config.gradient_accumulation_fusion = False  # Megatron's own head asks for Apex
        aux_layers = self.options.spec.aux_layers_of(self.base.megatron_args["num_layers"])
        states = self.options.train.pack or self.options.train.eval_prompts is not None
        backend = backend_of(args.transformer_impl, keeps_states=states)
        if pg_collection.pp.size() > 1:
            base_config.finalize_model_grads_func = FinalizeReplicas(pg_collection.pp)
        plan = self._features(aux_layers)
        info = self._with_stages(args.hybrid_layer_pattern)
        if plan is not None:
            base_config, info = config_without_layers(base_config), info_without_layers(info)
        gpt = build_base(base_config, info, backend, pg_collection, pre_process, post_process)
        if plan is not None:
            gpt = without_layers(gpt)
        shards = VocabShards(gpt)
        assert self.options.train.base_checkpoint is not None
        print_rank_0(f"> loading the base from {self.options.train.base_checkpoint}")
        load_base(gpt, self.options.train.base_checkpoint, shards)
        for part in (gpt, shards):  # they run here, before Megatron moves the model
            part.cuda(torch.cuda.current_device())
        if plan is None:
            base = FrozenBase(gpt, aux_layers, self.base.vocab_size, shards)
        else:
            base = OfflineBase(gpt, aux_layers, self.base.vocab_size, plan.layer_sizes)
        timeout = timedelta(minutes=args.distributed_timeout_minutes)
        exchange = StageExchange.of(base, pg_collection.pp, timeout)
        draft = self._build_draft(config, backend, base, pg_collection)
        if self.warm_start is not None:
            print_rank_0(f"> starting from the draft in {self.warm_start.source}")
            load_warm_start(draft, self.warm_start)
        elif self.options.train.init_from_base:
            self._start_as_base(draft, lambda: base.layer_sizes(exchange))
        else:
            draft.start_evenly(lambda: base.layer_sizes(exchange))
        if exchange.stages > 1:
            equal_start(draft, pg_collection.pp)
        numbers = " ".join(map(str, aux_layers)) or "none"
        print_rank_0(
            f"> draft: {sum(p.numel() for p in draft.parameters()):,} parameters per rank, "
            f"{self.options.spec.algorithm}, aux layers {numbers}, "
            f"{self.vocab_ids.numel():,} of {self.base.vocab_size:,} token ids"
        )
        for note in serving_notes(self._info(aux_layers)):
            print_rank_0(f"> to be served: {note}")
        whole = sum(p.numel() for p in draft.parameters()) * draft.tp_group.size()
        warn_if_disk_is_small(args.save, whole)
        if draft.tp_group.size() > 1 and not self.options.spec.method.drafts_blocks:
            print_rank_0(self._teacher_size(args, draft.shard.padded_rows))
        model = EagleGPTModel(base, draft, self.options, exchange)
        if self.throughput is not None and not self.options.spec.method.drafts_blocks:
            self.throughput.saw(model)
        return model

    def _with_stages(self, pattern: str | None) -> BaseInfo:
        """Return the base with its ``pattern`` as this run cuts it, if it is a HybridModel."""
        if pattern is None:
            return self.base
        args = {**self.base.megatron_args, "hybrid_layer_pattern": pattern}
        return replace(self.base, megatron_args=args)

    def _info(self, aux_layers: tuple[int, ...]) -> DraftInfo:
        """Return the description of the draft that this run trains."""
        options = self.options
        spec = resolved_spec(options.spec, self.base, aux_layers, self.vocab_ids.numel())
        return DraftInfo(spec, self.base, options.steps)

    def _start_as_base(self, draft: EagleDraft, layer_sizes: Callable[[], Tensor]) -> None:
        assert self.options.train.base_checkpoint is not None
        layers = self.options.spec.num_layers
        print_rank_0(f"> starting from the base's last layer{'s' * (layers > 1)}")
        if lost := left_out(self.base, self.options.spec):
            print_rank_0(f"> ... without their {lost}, which this draft has not")
        start = BaseStart(
            self.options.spec, self.base, self.options.train.base_checkpoint, self.vocab_ids.cpu()
        )
        load_base_start(draft, start, layer_sizes)

    def _features(self, aux_layers: tuple[int, ...]) -> FeaturePlan | None:
        """Read the plan of ``--eagle-offline-features`` and check that its aux layers are this
        run's; None without the flag."""
        if self.options.train.offline_features is None:
            return None
        plan = read_plan(Path(self.options.train.offline_features))
        if plan.aux_layers != aux_layers:
            raise UserError(
                f"--eagle-offline-features {self.options.train.offline_features}: of layers "
                f"{' '.join(map(str, plan.aux_layers))}, this run reads "
                f"{' '.join(map(str, aux_layers))} (--eagle-aux-layers)"
            )
        return plan

    def _teacher_size(self, args: Any, columns: int) -> str:
        """Say how large a micro-batch's targets would be if every token were supervised."""
        tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
        size, limit = teacher_bytes(tokens, columns) >> 20, self.options.train.teacher_memory
        kept = "kept" if size <= limit else "made and used one chunk of rows at a time"
        return (
            f"> teacher targets: at most {size:,} MiB per rank and micro-batch, {kept} "
            f"(--eagle-teacher-memory {limit})"
        )

    def _build_draft(
        self, config: Any, backend: LayerBackend, base: FrozenBase, pg_collection: Any
    ) -> EagleDraft:
        options, aux_layers = self.options, base.capture.layers
        spec = resolved_spec(options.spec, self.base, aux_layers, self.vocab_ids.numel())
        metadata = run_metadata(options, self.base, spec, pg_collection.ep.size())
        device = base.output_weight.device
        return build_draft(
            spec=spec,
            num_aux=len(aux_layers),
            base_config=config,
            backend=backend,
            vocab_ids=self.vocab_ids,
            vocab_size=self.base.vocab_size,
            base_head=lambda: base.output_weight,
            base_head_rows=base.output_weight.shape[0],
            rotary=draft_rotary(base.rotary, self.base, spec, device),
            metadata=encode_metadata(metadata),
            pg_collection=pg_collection,
            device=device,
            moe_aux_loss_coeff=options.moe_aux_loss_coeff,
            initialize=config.perform_initialization,
        )
