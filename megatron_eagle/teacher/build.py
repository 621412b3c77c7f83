"""Building the base from what its checkpoint says, and loading its weights, in any TP layout."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch.nn.functional import silu

from megatron_eagle.attention.mla import patch_mla_layers
from megatron_eagle.attention.rope import attention_factor, set_attention_factor, set_frequencies
from megatron_eagle.checkpoint.directory import BaseInfo, resolve_checkpoint
from megatron_eagle.checkpoint.loading import load_sharded
from megatron_eagle.compat import (
    GPTModel,
    MLATransformerConfig,
    StrictHandling,
    TransformerConfig,
    quick_gelu,
)
from megatron_eagle.errors import UserError
from megatron_eagle.layers.backend import LayerBackend
from megatron_eagle.teacher.vocab_shards import VocabShards

_FIELDS = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
}
"""Megatron's flags that TransformerConfig has under another name."""


def base_config(info: BaseInfo, tensor_parallel: int, **parallelism: Any) -> Any:
    """Return the base's fp32 TransformerConfig outside the trainer, which makes its own from flags.

    ``parallelism`` are further fields of it, such as ``pipeline_model_parallel_size``.
    """
    mla = info.megatron_args.get("multi_latent_attention", False)
    kind = MLATransformerConfig if mla else TransformerConfig
    known = {item.name for item in fields(kind)}
    given = {_FIELDS.get(name, name): value for name, value in info.megatron_args.items()}
    given["gated_linear_unit"] = True
    given.setdefault("q_lora_rank", None)
    if parallelism.get("expert_model_parallel_size", 1) > 1:  # ranks' sequences differ in length
        parallelism.setdefault("moe_token_dispatcher_type", "alltoall")
    return kind(
        **{name: value for name, value in given.items() if name in known},
        activation_func=quick_gelu if info.megatron_args.get("quick_geglu") else silu,
        tensor_model_parallel_size=tensor_parallel,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **parallelism,
    )


def build_base(
    config: Any,
    info: BaseInfo,
    backend: LayerBackend,
    pg_collection: Any,
    pre_process: bool = True,
    post_process: bool = True,
) -> Any:
    """Build the base's GPTModel, without weights; the vocabulary is padded as Megatron pads it.

    A pipeline stage without the embedding or the output layer says so by ``pre_process`` and
    ``post_process``. What Megatron's flags cannot say of the base is set in ``config``.
    """
    args = info.megatron_args
    if config.multi_latent_attention:
        config.apply_rope_fusion = False  # it would ask Megatron's own rotary module
    else:
        set_attention_factor(config, attention_factor(info.rope))
    multiple = args["make_vocab_size_divisible_by"] * pg_collection.tp.size()
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=backend.base_spec(config, pg_collection.pp.rank()),
        vocab_size=-(-info.vocab_size // multiple) * multiple,
        max_sequence_length=args["max_position_embeddings"],
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type=args["position_embedding_type"],
        rotary_percent=args["rotary_percent"],
        rotary_base=args["rotary_base"],
        rope_scaling=args.get("use_rope_scaling", False),
        rope_scaling_factor=args.get("rope_scaling_factor", 8.0),
        pg_collection=pg_collection,
    )
    if config.multi_latent_attention:
        patch_mla_layers(gpt, info.rope, args["rotary_base"], backend.norm)
    elif info.rope:
        set_frequencies(gpt.rotary_pos_emb, info.rope)
    return gpt


def load_base(gpt: Any, directory: str | Path, shards: VocabShards | None = None) -> None:
    """Load the base's weights, strictly, at whatever layout ``gpt`` has, and the vocabulary
    matrices that this stage has besides. A collective of all ranks.

    Raises ``UserError`` naming the directory when a weight is missing or of another shape.
    """
    where = f"<base_checkpoint> {directory}"
    own = {} if shards is None else shards.sharded_state_dict("vocab_shards.")
    # Megatron calls "unexpected" what the model asks for and the checkpoint does not have.
    state, _, lacking = load_sharded(
        gpt.sharded_state_dict() | own,
        resolve_checkpoint(directory),
        where,
        strict=StrictHandling.RETURN_ALL,
    )
    weights = sorted(key for key in lacking if not key.endswith("_extra_state"))
    if weights:
        raise UserError(f"{where}: lacks {weights[0]}")
    if shards is not None:
        shards.load_state_dict({key.split(".")[-1]: state.pop(key) for key in own})
    gpt.load_state_dict(state, strict=False)
