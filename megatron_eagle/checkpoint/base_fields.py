"""The fields of a base's description, and what each may hold.

``megatron_args`` become flags of Megatron's. A description comes with somebody's base, so only the
names that describe an architecture are known here, each with its type and range: a file must not
say where training saves or which checkpoint it loads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_eagle.checkpoint.hybrid_pattern import layer_ends, pattern_fault, pattern_of
from megatron_eagle.checkpoint.layer_blocks import BLOCKS, agrees, blocks_fault, mlp_widths
from megatron_eagle.errors import UserError, literal

LARGEST_SIZE = 2**24
MOST_LAYERS = 10_000
LARGEST_NUMBER = 1e12
LONGEST_SHOWN = 60
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TP_SIZES = (
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "mamba_num_groups",
)
"""Sizes of a base, where it has them, that tensor parallelism divides, see ``cut_sizes``."""
Check = Callable[[Any], str | None]
"""Returns None for a value that is allowed, else the words for what is allowed."""


def _size(most: int = LARGEST_SIZE) -> Check:
    def check(value: Any) -> str | None:
        fits = type(value) is int and 1 <= value <= most
        return None if fits else f"a positive integer up to {most}"

    return check


def _number(value: Any) -> str | None:
    fits = type(value) in (int, float) and 0 <= value <= LARGEST_NUMBER
    return None if fits else f"a number from 0 to {LARGEST_NUMBER:g}"


def _positive(value: Any) -> str | None:
    return (
        None
        if _number(value) is None and value > 0
        else f"a positive number up to {LARGEST_NUMBER:g}"
    )


def _whole(value: Any) -> str | None:
    return None if _size(2**53)(value) is None else "a positive number without a fraction"


def _switch(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _among(*values: Any) -> Check:
    def check(value: Any) -> str | None:
        known = any(type(value) is type(one) and value == one for one in values)
        return None if known else " or ".join(map(repr, values))

    return check


def _pattern(value: Any) -> str | None:
    """One number per layer: 1 where the layer is of the kind, else 0."""
    fits = (
        isinstance(value, list)
        and 0 < len(value) <= MOST_LAYERS
        and all(type(on) is int and on in (0, 1) for on in value)
    )
    return None if fits else "a list of 0 and 1"


def _frequency(value: Any) -> str | None:
    """Take a pattern, or the number of layers in which one is of the other kind."""
    fits = _size(MOST_LAYERS)(value) is None or _pattern(value) is None
    return None if fits else "a positive integer or a list of 0 and 1"


def _window(value: Any) -> str | None:
    fits = (
        isinstance(value, list) and len(value) == 2 and _size()(value[0]) is None and value[1] == 0
    )
    return None if fits else "a window [size, 0]"


REQUIRED: dict[str, Check] = {
    "num_layers": _size(MOST_LAYERS),
    "hidden_size": _size(),
    "ffn_hidden_size": _size(),
    "num_attention_heads": _size(),
    "group_query_attention": _switch,
    "num_query_groups": _size(),
    "kv_channels": _size(),
    "max_position_embeddings": _size(2**31),
    "normalization": _among("RMSNorm", "LayerNorm"),
    "norm_epsilon": _positive,
    "position_embedding_type": _among("rope", "learned_absolute", "none"),
    "rotary_base": _whole,
    "rotary_percent": _positive,
    "add_bias_linear": _switch,
    "add_qkv_bias": _switch,
    "qk_layernorm": _switch,
    "untie_embeddings_and_output_weights": _switch,
    "attention_dropout": _among(0.0),
    "hidden_dropout": _among(0.0),
    "vocab_size": _size(),
    "make_vocab_size_divisible_by": _size(),
}
OPTIONAL: dict[str, Check] = {
    "swiglu": _switch,
    "squared_relu": _switch,
    "bias_gelu_fusion": _switch,
    "apply_layernorm_1p": _switch,
    "apply_residual_connection_post_layernorm": _switch,
    "attention_output_gate": _switch,
    "qk_l2_norm": _switch,
    "rotary_interleaved": _switch,
    "no_rope_freq": _frequency,
    "quick_geglu": _switch,
    "glu_linear_offset": _number,
    "activation_func_clamp_value": _positive,
    "softmax_type": _among("vanilla", "off-by-one", "learnable"),
    "use_rope_scaling": _switch,
    "rope_scaling_factor": _positive,
    "window_size": _window,
    "window_attn_skip_freq": _frequency,
    "num_experts": _size(),
    "moe_layer_freq": _frequency,
    "moe_ffn_hidden_size": _size(),
    "moe_shared_expert_intermediate_size": _size(),
    "moe_router_topk": _size(),
    "moe_shared_expert_gate": _switch,
    "moe_apply_probs_on_input": _switch,
    "moe_latent_size": _size(),
    "moe_router_score_function": _among("softmax", "sigmoid", "sqrtsoftplus"),
    "moe_router_pre_softmax": _switch,
    "moe_router_enable_expert_bias": _switch,
    "moe_router_topk_scaling_factor": _positive,
    "moe_router_dtype": _among("fp32", "fp64"),
    "moe_router_num_groups": _size(),
    "moe_router_group_topk": _size(),
    "expert_tensor_parallel_size": _size(),
    "multi_latent_attention": _switch,
    "q_lora_rank": _size(),
    "kv_lora_rank": _size(),
    "qk_head_dim": _size(),
    "qk_pos_emb_head_dim": _size(),
    "v_head_dim": _size(),
    "rope_type": _among("rope", "yarn"),
    "rotary_scaling_factor": _positive,
    "mscale_all_dim": _number,
    "hybrid_layer_pattern": pattern_fault,
    BLOCKS: blocks_fault,
    "linear_conv_kernel_dim": _size(),
    "linear_key_head_dim": _size(),
    "linear_value_head_dim": _size(),
    "linear_num_key_heads": _size(),
    "linear_num_value_heads": _size(),
    "mamba_state_dim": _size(),
    "mamba_head_dim": _size(),
    "mamba_num_groups": _size(),
    "mamba_num_heads": _size(),
}
ROPE: dict[str, Check] = {
    "rope_type": _among("default", "linear", "llama3", "yarn"),
    "rope_theta": _positive,
    "factor": _positive,
    "low_freq_factor": _positive,
    "high_freq_factor": _positive,
    "original_max_position_embeddings": _size(2**31),
    "beta_fast": _positive,
    "beta_slow": _positive,
    "attention_factor": _positive,
    "truncate": _switch,
}


def check_megatron_args(args: Mapping[str, Any], source: str) -> None:
    """Raise ``UserError``, starting with ``source``, for an unknown or impossible argument."""
    checks = REQUIRED | OPTIONAL
    _refuse_unknown(args, checks, f"{source}: megatron_args")
    _check_values(args, checks, source)
    pattern, layers = pattern_of(args), args.get("num_layers")
    if pattern is not None and layers not in (None, len(layer_ends(pattern))):
        raise UserError(
            f"{source}: num_layers {layers}, but hybrid_layer_pattern has "
            f"{len(layer_ends(pattern))} layers, counted as the Hugging Face model counts them"
        )
    if BLOCKS in args and set(REQUIRED) <= set(args) and not agrees(args):
        raise UserError(f"{source}: {BLOCKS} contradicts the other arguments")


def cut_sizes(args: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes that tensor parallelism has to divide, by name."""
    return {name: args[name] for name in TP_SIZES if name in args} | mlp_widths(args)


def check_complete(args: Mapping[str, Any], source: str) -> None:
    """Raise ``UserError`` unless ``args`` say enough to build the base.

    A draft's record of its base may say less.
    """
    for name in REQUIRED:
        if name not in args:
            raise UserError(f"{source}: megatron_args: {name} is missing")


def check_rope(rope: Mapping[str, Any], source: str) -> None:
    """Raise the same for the description of a rotary embedding, which may be empty."""
    _refuse_unknown(rope, ROPE, f"{source}: rope")
    if rope and not {"rope_type", "rope_theta"} <= set(rope):
        raise UserError(f"{source}: rope: rope_type and rope_theta are needed")
    _check_values(rope, ROPE, f"{source}: rope")


def check_token_ids(config: Mapping[str, Any], vocab_size: int, source: str) -> None:
    """Raise the same for token ids of a config.json that are none.

    A padding token beyond the vocabulary is let through: public models have one, and nothing is
    ever padded with it.
    """
    generation = config.get("generation_config")
    if isinstance(generation, dict):
        check_token_ids(
            {**generation, "generation_config": None}, vocab_size, f"{source}: generation_config"
        )
    elif generation is not None:
        raise UserError(f"{source}: generation_config must be a JSON object")
    for key in TOKEN_FIELDS:
        value = config.get(key)
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int:
                raise UserError(f"{source}: {key}: {_shown(token)} is no token id")
            if key != "pad_token_id" and not 0 <= token < vocab_size:
                raise UserError(
                    f"{source}: {key}: token id {_shown(token)} is outside the vocabulary's 0 to "
                    f"{vocab_size - 1}"
                )


def _refuse_unknown(values: Mapping[str, Any], checks: Mapping[str, Check], source: str) -> None:
    for name in values:
        if name not in checks:
            raise UserError(f"{source}: unknown field {_shown(name)}")


def _check_values(values: Mapping[str, Any], checks: Mapping[str, Check], source: str) -> None:
    for name, value in values.items():
        if allowed := checks[name](value):
            raise UserError(f"{source}: {name} must be {allowed}, found {_shown(value)}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return literal(text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "...")
