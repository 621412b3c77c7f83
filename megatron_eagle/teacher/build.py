"""Building the base from its description, and loading its weights, in any layout.

Megatron's own builder builds the model; layers that belong to this package come in as a layer
specification.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_eagle.attention.mla import patch_mla_layers
from megatron_eagle.attention.rope import attention_factor, set_attention_factor, set_frequencies
from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.checkpoint.hybrid_pattern import for_stages, pattern_of
from megatron_eagle.checkpoint.loading import load_sharded
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.compat import GPTModelBuilder, HybridModelBuilder, StrictHandling
from megatron_eagle.errors import UserError
from megatron_eagle.layers.backend import LayerBackend
from megatron_eagle.teacher.description import base_arguments, model_config, transformer_config
from megatron_eagle.teacher.stored_names import adopt_names, sharded_weights, unread_weights
from megatron_eagle.teacher.vocab_shards import VocabShards


def base_config(info: BaseInfo, tensor_parallel: int, **parallelism: Any) -> Any:
    """Return the base's fp32 TransformerConfig outside the trainer.

    ``parallelism`` are further fields of it, such as ``pipeline_model_parallel_size``.
    """
    if parallelism.get("expert_model_parallel_size", 1) > 1:  # ranks' sequences differ in length
        parallelism.setdefault("moe_token_dispatcher_type", "alltoall")
    parallelism["tensor_model_parallel_size"] = tensor_parallel
    return transformer_config(base_arguments(info, **parallelism))


def build_base(
    config: Any,
    info: BaseInfo,
    backend: LayerBackend,
    pg_collection: Any,
    pre_process: bool = True,
    post_process: bool = True,
) -> Any:
    """Build the base's GPTModel or HybridModel, without weights; the vocabulary is padded as
    Megatron pads it.

    A pipeline stage without the embedding or the output layer says so by ``pre_process`` and
    ``post_process``. What Megatron's flags cannot say of the base is set in ``config``. A
    HybridModel is cut where its pattern says so, if that makes the pipeline's stages, and otherwise
    evenly or as ``config`` says. Raises ``UserError`` for layers whose kernels are not installed.
    """
    config.mtp_num_layers = None  # layers that predict further tokens belong to no frozen base
    if config.multi_latent_attention:
        config.apply_rope_fusion = False  # it would ask Megatron's own rotary module
    else:
        set_attention_factor(config, attention_factor(info.rope))
    model = model_config(info, config)
    multiple = info.megatron_args["make_vocab_size_divisible_by"] * pg_collection.tp.size()
    model.vocab_size = -(-info.vocab_size // multiple) * multiple
    pattern = pattern_of(info.megatron_args)
    if pattern is None:
        model.transformer_layer_spec = lambda _: backend.base_spec(
            config, pg_collection.pp.rank(), info.is_native
        )
        builder: Any = GPTModelBuilder(model)
    else:
        model.hybrid_layer_pattern = for_stages(pattern, pg_collection.pp.size())
        model.hybrid_stack_spec = backend.hybrid_spec(config, pattern, info.is_native)
        builder = HybridModelBuilder(model)
    gpt = builder.build_model(pg_collection, pre_process, post_process)
    theta = info.megatron_args["rotary_base"]
    if config.multi_latent_attention:
        patch_mla_layers(gpt, info.rope, theta, None if info.is_native else backend.norm)
    elif info.rope:
        set_frequencies(gpt.rotary_pos_emb, info.rope)
    return gpt


def load_base(gpt: Any, directory: str | Path, shards: VocabShards | None = None) -> None:
    """Load the base's weights, strictly, at whatever layout ``gpt`` has, and the vocabulary
    matrices that this stage has besides. A collective of all ranks.

    Raises ``UserError`` naming the directory when a weight is missing or of another shape.
    """
    where = f"<base_checkpoint> {directory}"
    stored = CheckpointReader.open(directory)
    sharded = adopt_names(sharded_weights(gpt, stored.keys()), stored.keys())
    if unread := unread_weights(gpt, sharded, stored.keys()):
        raise UserError(f"{where}: holds {unread[0]}, which the description of the base has not")
    own = {} if shards is None else shards.sharded_state_dict("vocab_shards.")
    # Megatron calls "unexpected" what the model asks for and the checkpoint does not have.
    state, _, lacking = load_sharded(
        sharded | own, stored.directory, where, strict=StrictHandling.RETURN_ALL
    )
    weights = sorted(key for key in lacking if not key.endswith("_extra_state"))
    if weights:
        raise UserError(f"{where}: lacks {weights[0]}")
    if shards is not None:
        shards.load_state_dict({key.split(".")[-1]: state.pop(key) for key in own})
    gpt.load_state_dict(state, strict=False)
