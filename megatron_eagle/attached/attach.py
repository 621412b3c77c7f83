"""Attach a draft to a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.attached.capture import output_weight
from megatron_eagle.attached.describe import describe_model, draft_base_config
from megatron_eagle.attached.draft import AttachedDraft
from megatron_eagle.attached.live_base import DraftBeside, LiveBase
from megatron_eagle.attached.model_kinds import layers_of_model
from megatron_eagle.attached.random_state import seeded
from megatron_eagle.attached.refusals import (
    check_options,
    check_widths,
    chosen_vocab_ids,
    whole_model,
)
from megatron_eagle.attention.rope import attention_factor, set_attention_factor
from megatron_eagle.config import DraftSpec, EagleConfig, TrainOptions
from megatron_eagle.draft.build import build_draft
from megatron_eagle.draft.layer_config import own_rotary
from megatron_eagle.draft.metadata import encode_metadata, resolved_spec, run_metadata
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.layers.backend import LayerBackend, local_backend, transformer_engine_backend


def attach(
    model: Any,
    spec: DraftSpec,
    options: TrainOptions | None = None,
    *,
    vocab_size: int,
    vocab_ids: Tensor | None = None,
    name: str = "a model in memory",
    hf_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    pg_collection: Any = None,
    seed: int = 1234,
) -> AttachedDraft:
    """Build a draft beside ``model``, on this rank, and hook it to the model's own forward.

    The model is left as it is: its parameters, modes, outputs and random generators do not change,
    and its losses and gradients are bit-equal to those without the draft, whether it is trained or
    frozen. Tensor, sequence, context, data and expert parallelism are the model's.

    Args:
        model: Megatron's GPTModel or HybridModel on this rank, in ``DistributedDataParallel`` and
            ``Float16Module`` or not, as ``get_model`` returns it or alone.
        spec: the draft's architecture.
        options: of its training; those that belong to a whole run (data, evaluation, start) are
            refused.
        vocab_size: V, the tokenizer's, without Megatron's padding.
        vocab_ids: [D] int64, the token ids of a draft with ``draft_vocab_size``, ascending.
        name: of the base, for config.json and model card of the converted draft.
        hf_config: the model's config.json as a mapping, if it has one. It must agree with the
            model; without it, RoPE must be plain.
        dtype: of the draft's parameters, torch.float32 or torch.bfloat16; by default that of the
            model's output layer.
        pg_collection: process groups; by default the model's.
        seed: of the draft's first weights, whatever the generators' state is.

    Collective over the model's ranks: one forward on random tokens, in eval mode and without
    gradients, by which the aux layers' sizes are measured (none beside fp8 or fp4, whose scales it
    would move, and none where a norm makes it needless).

    Raises ``UserError`` in one line for a model without a place for a draft (pipeline stages, CUDA
    graphs, fully sharded parameters, of another class), and for a spec, options or ids that do
    not fit it.
    """
    gpt = whole_model(model)
    config = EagleConfig(spec, options or TrainOptions())
    dtype = dtype or output_weight(gpt).dtype
    check_options(gpt, config, vocab_size, dtype)
    ids = chosen_vocab_ids(spec, vocab_ids, vocab_size)
    base_info = describe_model(gpt, vocab_size, name, hf_config)
    draft_config = draft_base_config(gpt.config, dtype)
    check_widths(spec, draft_config, config.train)
    set_attention_factor(draft_config, attention_factor(base_info.rope))
    aux_layers = spec.aux_layers_of(layers_of_model(gpt))
    resolved = resolved_spec(spec, base_info, aux_layers, ids.numel())
    groups = pg_collection or gpt.pg_collection
    base = LiveBase(gpt, draft_config, aux_layers, vocab_size, groups)
    device = base.output_weight.device
    expert_parallel = draft_config.expert_model_parallel_size
    metadata = run_metadata(config, base_info, resolved, expert_parallel)
    with seeded(seed, groups):
        draft = build_draft(
            spec=resolved,
            num_aux=len(aux_layers),
            base_config=draft_config,
            backend=_backend(gpt),
            vocab_ids=ids,
            vocab_size=vocab_size,
            base_head=lambda: base.output_weight,
            base_head_rows=base.output_weight.shape[0],
            rotary=own_rotary(base_info, resolved, device),
            metadata=encode_metadata(metadata),
            pg_collection=groups,
            device=device,
            moe_aux_loss_coeff=config.moe_aux_loss_coeff,
        )
        draft.to(dtype)  # torch's norms begin in fp32
        if gpt.config.fp8 is None and gpt.config.fp4 is None:
            draft.start_evenly(base.layer_sizes)
    info = DraftInfo(resolved, base_info, config.train.ttt_steps, config.train.to_mapping())
    return AttachedDraft(base, DraftBeside(base, draft, config), info)


def _backend(gpt: Any) -> LayerBackend:
    """Return builders of the kind of modules that the model's layers are made of."""
    kinds = {type(module).__module__ for module in gpt.decoder.modules()}
    is_te = any("transformer_engine" in kind for kind in kinds)
    return transformer_engine_backend() if is_te else local_backend()
