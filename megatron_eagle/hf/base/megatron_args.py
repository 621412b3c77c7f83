"""config.json of a supported model -> the Megatron arguments that build the same network.

Whatever Megatron 0.19 would compute differently is refused, never approximated. A missing key means
the default of the family's Hugging Face configuration class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eagle.hf.base.families import Family
from megatron_eagle.hf.base.mla_args import mla_args, mla_dims
from megatron_eagle.hf.base.window_args import window_args
from megatron_eagle.hf.tables.config_fields import number, require, size, switch
from megatron_eagle.hf.tables.entries import Dims
from megatron_eagle.hf.tables.rope import rope_args

# Fields that would change the network in a way no table here maps, and the one value accepted.
REQUIRED_VALUES = {
    "hidden_act": "silu",
    "quantization_config": None,
}

# What Megatron's parser gives where `megatron_args` has no entry: a dense GQA network.
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
    "qk_l2_norm": False,
    "mtp_num_layers": None,
}


def megatron_args(config: dict[str, Any], family: Family, source: str) -> dict[str, Any]:
    """Megatron argparse names -> values. ValueError, naming `source`, for what is not supported."""
    config = {**family.defaults, **config}
    require(config, REQUIRED_VALUES, source)
    heads = size(config, "num_attention_heads", source)
    hidden = size(config, "hidden_size", source)
    groups = size(config, "num_key_value_heads", source, heads)
    if heads % groups:
        raise ValueError(
            f"{source}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {groups}"
        )
    bias = biases(config, family, source)
    return {
        "num_layers": size(config, "num_hidden_layers", source),
        "hidden_size": hidden,
        "ffn_hidden_size": size(config, "intermediate_size", source),
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": 0 if family.mla else _head_dim(config, hidden, heads, source),
        "max_position_embeddings": size(config, "max_position_embeddings", source),
        "normalization": "RMSNorm",
        "norm_epsilon": number(config, "rms_norm_eps", 1e-6, source),
        **family.activation,
        "position_embedding_type": "rope",
        **rope_args(config, family.partial_rotary, source),
        # Megatron has one switch for all biases: where only some exist, the others are zeros.
        "add_bias_linear": bias["output_bias"] or bias["mlp_bias"],
        "add_qkv_bias": bias["qkv_bias"],
        "qk_layernorm": family.fixed.get("qk_norm", switch(config, "use_qk_norm", False, source)),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "vocab_size": size(config, "vocab_size", source),
        "make_vocab_size_divisible_by": 128,
        **(family.moe_args(config, source) if family.moe_args is not None else {}),
        **(mla_args(config, source) if family.mla else {}),
        **window_args(config, family.window_flag, family.window_layers, source),
    }


def biases(config: Mapping[str, Any], family: Family, source: str) -> dict[str, bool]:
    """Which linear layers have a bias: qkv_bias, output_bias (of the attention), mlp_bias.

    A configuration class that has no such field says so in the family's `fixed`.
    """
    config = {**family.defaults, **config}
    given = {
        key: family.fixed.get(key, switch(config, key, False, source))
        for key in ("attention_bias", "mlp_bias")
    }
    for key, value in given.items():
        if config.get(key) not in (None, value):
            raise ValueError(f"{source}: {key} = {config[key]} is not supported, only {value}")
    attention = given["attention_bias"]
    return {
        "qkv_bias": family.fixed.get("qkv_bias", attention),
        "output_bias": family.fixed.get("output_bias", attention),
        "mlp_bias": given["mlp_bias"],
    }


def facts_of(config: dict[str, Any], family: Family, source: str) -> dict[str, Any]:
    """`megatron_args` and what the name tables also ask for."""
    args = megatron_args(config, family, source)
    return {
        **args,
        **biases(config, family, source),
        "any_qkv_bias": args["add_qkv_bias"] or args["add_bias_linear"],
        "untied": args["untie_embeddings_and_output_weights"],
        "mtp_layers": config.get("num_nextn_predict_layers") or 0,
    }


def dims_of(args: Mapping[str, Any]) -> Dims:
    """The symbols of the name tables (and `groups`), from `megatron_args`."""
    dims = {
        "V": args["vocab_size"],
        "H": args["hidden_size"],
        "Q": args["num_attention_heads"] * args["kv_channels"],
        "KV": args["num_query_groups"] * args["kv_channels"],
        "F": args["ffn_hidden_size"],
        "D": args["kv_channels"],
        "groups": args["num_query_groups"],
        "N": args["num_attention_heads"],
    }
    if args.get("num_experts") is not None:
        expert = args["moe_ffn_hidden_size"]
        dims |= {"E": args["num_experts"], "M": expert, "G": 2 * expert}
        dims |= {"S": args.get("moe_shared_expert_intermediate_size") or 0}
    if args.get("multi_latent_attention"):
        dims |= mla_dims(args)
    return dims


def flags(args: Mapping[str, Any]) -> list[str]:
    """The command line of `args`, for Megatron's parser; values that are off need no flag."""
    words: list[str] = []
    for name, value in args.items():
        if name == "add_bias_linear":
            words += [] if value else ["--disable-bias-linear"]
        elif isinstance(value, bool):
            words += [_flag(name)] if value else []
        elif name == "window_size":
            words += [_flag(name), ",".join(map(str, value))]
        elif isinstance(value, list):
            words += [_flag(name), "[" + ",".join(map(str, value)) + "]"]
        else:
            words += [_flag(name), str(value)]
    return words


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _head_dim(config: dict[str, Any], hidden: int, heads: int, source: str) -> int:
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"{source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    return size(config, "head_dim", source, hidden // heads)
