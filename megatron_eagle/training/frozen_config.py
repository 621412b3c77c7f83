"""The frozen base's TransformerConfig: its description, and what a run may choose beside it.

Megatron's trainer makes one configuration of all flags. That of the base is made of its
description; the two are compared field by field, and a difference is refused by flag name unless
the field is among ``RUN_FIELDS``. So no flag changes the teacher without a word.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

from torch.nn.functional import gelu

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.compat import ModelParallelConfig
from megatron_eagle.errors import UserError, literal
from megatron_eagle.teacher.description import base_arguments, transformer_config
from megatron_eagle.teacher.megatron_parser import megatron_parser

KERNELS = (
    "apply_query_key_layer_scaling",
    "apply_rope_fusion",
    "attention_backend",
    "attention_softmax_in_fp32",
    "batch_invariant_mode",
    "bias_dropout_fusion",
    "clone_scatter_output_in_embedding",
    "cache_mla_latents",
    "cp_comm_type",
    "disable_bf16_reduced_precision_matmul",
    "disable_parameter_transpose_cache",
    "first_last_layers_bf16",
    "flash_attention_version",
    "flash_decode",
    "fused_residual_rmsnorm",
    "fused_single_qkv_rope",
    "masked_softmax_fusion",
    "memory_efficient_layer_norm",
    "mla_down_proj_fusion",
    "mlp_chunks_for_prefill",
    "mlp_chunks_for_training",
    "persist_layer_norm",
    "symmetric_ar_type",
    "tp_only_amax_red",
    "transformer_impl",
    "use_fused_weighted_squared_relu",
    "use_grouped_gemm_for_dense_mlp",
    "use_grouped_gemm_for_shared_expert",
    "use_te_activation_func",
    "use_te_rng_tracker",
    "use_transformer_engine_op_fuser",
)
"""How the same function is computed, and by what."""

LAYOUT = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
)
"""Which stage computes what."""

TRAINING = (
    "attention_dropout",
    "calculate_per_token_loss",
    "config_logger_dir",
    "distribute_saved_activations",
    "embedding_init_method",
    "embedding_init_method_std",
    "hidden_dropout",
    "init_method",
    "init_method_std",
    "init_model_with_meta_device",
    "log_max_attention_logit",
    "output_layer_init_method",
    "qk_clip",
    "qk_clip_alpha",
    "qk_clip_threshold",
    "recompute_granularity",
    "recompute_method",
    "recompute_modules",
    "recompute_num_layers",
    "test_mode",
)
"""What a module in eval mode, which is loaded and keeps nothing for a backward, does not use."""

EXPERTS = (
    "moe_aux_loss_coeff",
    "moe_deepep_num_sms",
    "moe_enable_deepep",
    "moe_enable_routing_replay",
    "moe_flex_dispatcher_backend",
    "moe_flex_dispatcher_num_sms",
    "moe_grouped_gemm",
    "moe_layer_recompute",
    "moe_per_layer_logging",
    "moe_permute_fusion",
    "moe_router_bias_update_rate",
    "moe_router_fusion",
    "moe_router_load_balancing_type",
    "moe_router_quantile_balancing_ema",
    "moe_shared_expert_overlap",
    "moe_single_grouped_bias",
    "moe_single_grouped_weight",
    "moe_token_dispatcher_type",
    "moe_z_loss_coeff",
)
"""Losses, dispatch and kernels of experts, whatever tokens they get."""

PREFIXES = (
    "_",
    "activation_func_fp8",
    "activation_offload",
    "cuda_graph",
    "delay_offload",
    "delta_offload",
    "dsa_",
    "enable_cuda_graph",
    "external_cuda_graph",
    "fine_grained",
    "fp4",
    "fp8",
    "inference_",
    "min_offloaded",
    "moe_hybridep",
    "moe_ncclep",
    "moe_paged_stash",
    "moe_permute_fusion",
    "mtp_",
    "nccl_all_reduce",
    "num_layers_at_",
    "offload",
    "use_mamba",
)
"""Groups of fields of the kinds above, or of layers that a base of this kind has not."""

RECURRENT_LAYERS = ("linear_", "mamba_")
"""Groups of fields of a HybridModel's layers, which no GPTModel has."""

_FLAGS = {
    "activation_func": "--swiglu, --squared-relu or --quick-geglu",
    "gated_linear_unit": "--swiglu or --quick-geglu",
    "num_moe_experts": "--num-experts",
}
"""Fields whose flag is stored under another name."""


def run_fields(config: Any) -> set[str]:
    """Return the fields of ``config`` that a run may choose, whatever base it has."""
    named = {*KERNELS, *LAYOUT, *TRAINING, *EXPERTS}
    named |= {field.name for field in fields(ModelParallelConfig)}
    if config.activation_func is not gelu:
        named.add("bias_activation_fusion")  # of GELU, Megatron fuses another function
    prefixes = PREFIXES if config.is_hybrid_model else (*PREFIXES, *RECURRENT_LAYERS)
    return named | {field.name for field in fields(config) if field.name.startswith(prefixes)}


def frozen_config(parsed: Any, base: BaseInfo) -> Any:
    """Return the base's TransformerConfig for a run whose flags make the one ``parsed``.

    Raises ``UserError`` naming the flag of the first field in which they contradict each other.
    """
    described = transformer_config(base_arguments(base))
    chosen = run_fields(described)
    for field in fields(described):
        ours, theirs = getattr(described, field.name), getattr(parsed, field.name, None)
        if field.name in chosen:
            setattr(described, field.name, theirs)
        elif _plain(ours) != _plain(theirs):
            raise UserError(
                f"{_flag_of(field.name)}: {field.name} {literal(_shown(theirs))} contradicts the "
                f"base checkpoint, which has {literal(_shown(ours))}"
            )
    return described


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return str(getattr(value, "__name__", value))


@cache
def flags_by_name() -> dict[str, str]:
    """Return the flag of every argument by the name that Megatron's parser stores it under."""
    return {a.dest: a.option_strings[0] for a in megatron_parser()._actions if a.option_strings}


def _flag_of(name: str) -> str:
    return _FLAGS.get(name) or flags_by_name().get(name) or "--" + name.replace("_", "-")
