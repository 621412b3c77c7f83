"""config.json of a supported model -> the Megatron arguments that build the same network.

Whatever Megatron 0.19 would compute differently is refused, never approximated: every function here
raises UserError, naming ``source``, for it. A missing key means the default of the family's Hugging
Face configuration class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.hf.base.families import Family
from megatron_eagle.hf.base.hybrid_args import as_hybrid, delta_net_dims
from megatron_eagle.hf.base.mla_args import mla_args, mla_dims
from megatron_eagle.hf.base.module_names import DEEPSEEK
from megatron_eagle.hf.base.rope_args import rope_args
from megatron_eagle.hf.base.window_args import window_args
from megatron_eagle.hf.tables.config_fields import number, require, size, switch
from megatron_eagle.hf.tables.entries import Dims, with_symbols

REQUIRED_VALUES = {
    "hidden_act": "silu",
    "quantization_config": None,
}
"""Fields that would change the network in a way no table here maps -> the one value accepted."""

ABSENT = {
    "num_experts": None,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
    "multi_latent_attention": False,
    "softmax_type": "vanilla",
    "quick_geglu": False,
    "swiglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "window_size": None,
    "window_attn_skip_freq": None,
    "use_rope_scaling": False,
    "rotary_seq_len_interpolation_factor": None,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "add_position_embedding": True,
    "spec": None,
    "squared_relu": False,
    "apply_layernorm_1p": False,
    "attention_output_gate": False,
    "moe_shared_expert_gate": False,
    "qk_l2_norm": False,
    "mtp_num_layers": None,
}
"""Values of Megatron's parser for what ``megatron_args`` leaves out: a dense GQA network."""


def megatron_args(config: dict[str, Any], family: Family, source: str) -> dict[str, Any]:
    """Return Megatron argument names -> values, for the whole network."""
    config = {**family.defaults, **config}
    require(config, REQUIRED_VALUES, source)
    heads = size(config, "num_attention_heads", source)
    hidden = size(config, "hidden_size", source)
    groups = size(config, "num_key_value_heads", source, heads)
    if heads % groups:
        raise UserError(
            f"{source}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {groups}"
        )
    bias = biases(config, family, source)
    args = {
        "num_layers": size(config, "num_hidden_layers", source),
        "hidden_size": hidden,
        "ffn_hidden_size": size(config, "intermediate_size", source),
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": 0 if family.mla else _head_dim(config, hidden, heads, source),
        "max_position_embeddings": size(config, "max_position_embeddings", source),
        "normalization": "RMSNorm",
        "norm_epsilon": number(config, "rms_norm_eps", source, 1e-6),
        **family.layer_args,
        "position_embedding_type": "rope",
        **rope_args(config, family.partial_rotary, source),
        # Megatron has one switch for all biases: where only some exist, the others are zeros.
        "add_bias_linear": bias["output_bias"] or bias["mlp_bias"],
        "add_qkv_bias": bias["qkv_bias"],
        "qk_layernorm": family.fixed.get("qk_norm", switch(config, "use_qk_norm", source)),
        "untie_embeddings_and_output_weights": not switch(config, "tie_word_embeddings", source),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "vocab_size": size(config, "vocab_size", source),
        "make_vocab_size_divisible_by": 128,
        **(family.moe_args(config, source) if family.moe_args is not None else {}),
        **(mla_args(config, source) if family.mla else {}),
    }
    if family.mixers is not None:
        return as_hybrid(args, family.mixers(config, source), config, source)
    return args | window_args(config, family.window_switch, family.window_layers, source)


def biases(config: Mapping[str, Any], family: Family, source: str) -> dict[str, bool]:
    """Return which linear layers have a bias: qkv_bias, output_bias (of the attention), mlp_bias.

    ``fixed`` of the family holds the answer where its configuration class has no such field.
    """
    config = {**family.defaults, **config}
    fields = {
        key: family.fixed.get(key, switch(config, key, source))
        for key in ("attention_bias", "mlp_bias")
    }
    for key, value in fields.items():
        if config.get(key) not in (None, value):
            raise UserError(f"{source}: {key} = {config[key]} is not supported, only {value}")
    attention = fields["attention_bias"]
    return {
        "qkv_bias": family.fixed.get("qkv_bias", attention),
        "output_bias": family.fixed.get("output_bias", attention),
        "mlp_bias": fields["mlp_bias"],
    }


def facts_of(config: dict[str, Any], family: Family, source: str) -> dict[str, Any]:
    """Return ``megatron_args`` together with the other facts that the name tables ask for."""
    args = megatron_args(config, family, source)
    return {
        **args,
        **biases(config, family, source),
        "any_qkv_bias": args["add_qkv_bias"] or args["add_bias_linear"],
        "untied": args["untie_embeddings_and_output_weights"],
        "mtp_layers": (family.module or DEEPSEEK).count_in(config) or 0,
    }


def dims_of(args: Mapping[str, Any]) -> Dims:
    """Return the name tables' symbols in numbers (see ``entries``), and ``groups``.

    ``args``: Megatron arguments as ``megatron_args`` returns them.
    """
    heads, groups, head_dim = (
        args[name] for name in ("num_attention_heads", "num_query_groups", "kv_channels")
    )
    dims = {
        "1": 1,
        "V": args["vocab_size"],
        "H": args["hidden_size"],
        "F": args["ffn_hidden_size"],
        "N": heads,
        "HD": head_dim,
        "Q": heads * head_dim,
        "KV": groups * head_dim,
        "groups": groups,
    }
    if args.get("num_experts") is not None:
        expert = args["moe_ffn_hidden_size"]
        dims |= {"E": args["num_experts"], "M": expert, "G": 2 * expert}
        dims |= {"S": args.get("moe_shared_expert_intermediate_size") or 0}
    if args.get("multi_latent_attention"):
        dims = with_symbols(dims, mla_dims(args))
    if args.get("linear_num_key_heads") is not None:
        dims = with_symbols(dims, delta_net_dims(args))
    return dims


def _head_dim(config: dict[str, Any], hidden: int, heads: int, source: str) -> int:
    if config.get("head_dim") is None and hidden % heads:
        raise UserError(
            f"{source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    return size(config, "head_dim", source, hidden // heads)
