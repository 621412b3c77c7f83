"""The arguments of a trained GPT -> the Megatron arguments that build the same network.

Input are the arguments as Megatron's parser names them, of whatever release; output has one
spelling, that of the flags. What a frozen forward pass does not use (losses, dropout, layout,
kernels) is left out. What the layers of this package or a draft cannot honour is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eagle.checkpoint.native.heterogeneous import as_heterogeneous, is_heterogeneous
from megatron_eagle.checkpoint.native.hybrid import as_hybrid
from megatron_eagle.checkpoint.native.positions import position_args
from megatron_eagle.checkpoint.native.values import number, required, size
from megatron_eagle.errors import UserError, literal

Args = Mapping[str, Any]

DEFAULTS: dict[str, Any] = {
    "qk_l2_norm": False,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "squared_relu": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "softmax_type": "vanilla",
    "window_attn_skip_freq": None,
}
"""Optional arguments of every network: value of Megatron's parser, with which one is left out."""

MOE_DEFAULTS: dict[str, Any] = {
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_dtype": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
}
"""Optional arguments of a network with experts."""

MLA = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")

REFUSED: dict[str, tuple[Any, ...]] = {
    "experimental_attention_variant": (None,),
    "use_mup": (None, False),
    "moe_router_topk_limited_devices": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "mrope_section": (None,),
    "softmax_scale": (None,),
}
"""Arguments that change the network in a way nothing here computes -> the values that are off."""

RENAMED = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "hybrid_override_pattern": "hybrid_layer_pattern",
}
"""Names that arguments had or have in some release -> the flag's name, used here."""


def architecture_args(args: Args, source: str) -> dict[str, Any]:
    """Return Megatron argument names -> values for the whole network, without its vocabulary.

    Raises ``UserError``, starting with ``source``, for a missing or impossible argument and for a
    network that is not supported.
    """
    args = current_names(args)
    _check_supported(args, source)
    heads, hidden = size(args, "num_attention_heads", source), size(args, "hidden_size", source)
    hybrid = bool(args.get("hybrid_layer_pattern"))
    grouped = bool(args.get("group_query_attention"))
    mla = bool(args.get("multi_latent_attention"))
    groups = size(args, "num_query_groups", source) if grouped and not mla else heads
    if heads % groups:
        raise UserError(f"{source}: num_query_groups {groups} do not divide {heads} heads")
    architecture = {
        "num_layers": 0 if hybrid else size(args, "num_layers", source),
        "hidden_size": hidden,
        "ffn_hidden_size": size(args, "ffn_hidden_size", source),
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": size(args, "qk_head_dim" if mla else "kv_channels", source),
        "max_position_embeddings": size(args, "max_position_embeddings", source),
        "normalization": required(args, "normalization", source, ("LayerNorm", "RMSNorm")),
        "norm_epsilon": number(args, "norm_epsilon", source),
        **_activation(args, source),
        **position_args(args, source),
        "add_qkv_bias": bool(args.get("add_qkv_bias")),
        "qk_layernorm": bool(args.get("qk_layernorm")),
        "add_bias_linear": bool(required(args, "add_bias_linear", source, (True, False))),
        "untie_embeddings_and_output_weights": bool(
            required(args, "untie_embeddings_and_output_weights", source, (True, False))
        ),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **_given(args, DEFAULTS),
        **_window(args),
        **(_mla(args, source) if mla else {}),
        **_experts(args, source),
    }
    if hybrid:
        return as_hybrid(architecture, args, source)
    if is_heterogeneous(args):
        return as_heterogeneous(architecture, args, source)
    return architecture


def current_names(args: Args) -> dict[str, Any]:
    """Return ``args`` with names and meanings of older releases in the spelling of the flags."""
    renamed = dict(args)
    for old, new in RENAMED.items():
        if renamed.get(new) is None and renamed.get(old) is not None:
            renamed[new] = renamed[old]
    if "disable_bias_linear" in renamed:
        renamed["add_bias_linear"] = not renamed["disable_bias_linear"]
    return renamed


def _check_supported(args: Args, source: str) -> None:
    if args.get("is_hybrid_model") and not args.get("hybrid_layer_pattern"):
        raise UserError(
            f"{source}: is_hybrid_model without hybrid_layer_pattern (by ratios of layers) is not "
            "supported; <base_description> can have the pattern"
        )
    if args.get("spec"):
        raise UserError(f"{source}: spec {literal(args['spec'])}: layers of one's own are not read")
    if args.get("bert_binary_head") is False or args.get("encoder_num_layers"):
        name = "encoder_num_layers"
        if args.get(name) not in (None, args.get("num_layers")):
            raise UserError(f"{source}: {name}: an encoder is no GPT")
    for name, off in REFUSED.items():
        if args.get(name) not in off:
            raise UserError(f"{source}: {name} {literal(args[name])} is not supported")
    if args.get("softmax_type") == "off-by-one":
        raise UserError(f"{source}: softmax_type off-by-one is not supported")
    kinds = args.get("moe_router_load_balancing_type")
    if args.get("num_experts") and "sinkhorn" in (kinds if isinstance(kinds, list) else [kinds]):
        raise UserError(f"{source}: moe_router_load_balancing_type sinkhorn is not supported")


def _activation(args: Args, source: str) -> dict[str, Any]:
    """Return the arguments of the MLP's activation.

    Megatron's fused GELU is the approximation by tanh, its other one the exact function.
    """
    swiglu = bool(required(args, "swiglu", source, (True, False)))
    if args.get("openai_gelu") or args.get("onnx_safe"):
        raise UserError(f"{source}: openai_gelu and onnx_safe are not supported")
    if swiglu or args.get("squared_relu") or args.get("quick_geglu"):
        return {"swiglu": swiglu, **({} if swiglu else {"bias_gelu_fusion": False})}
    fused = bool(required(args, "bias_gelu_fusion", source, (True, False)))
    return {"swiglu": False, "bias_gelu_fusion": fused and bool(args.get("add_bias_linear"))}


def _given(args: Args, defaults: Args) -> dict[str, Any]:
    """Return those of ``defaults`` that ``args`` sets to another value, as JSON holds them."""
    given = {name: args[name] for name in defaults if args.get(name) not in (None, defaults[name])}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in given.items()
    }


def _window(args: Args) -> dict[str, Any]:
    """Return the sliding window; causal attention sees nothing to the right of it."""
    window = args.get("window_size")
    if window is None or window[0] < 0:
        return {}
    return {"window_size": [window[0], 0]}


def _mla(args: Args, source: str) -> dict[str, Any]:
    low_rank = {} if args.get("q_lora_rank") is None else {"q_lora_rank": args["q_lora_rank"]}
    return {
        "multi_latent_attention": True,
        **low_rank,
        **{name: size(args, name, source) for name in MLA},
    }


def _experts(args: Args, source: str) -> dict[str, Any]:
    if args.get("num_experts") is None:
        return {}
    width = args.get("moe_ffn_hidden_size")
    experts = {
        "num_experts": size(args, "num_experts", source),
        "moe_ffn_hidden_size": size(args, "ffn_hidden_size", source) if width is None else width,
        "moe_router_topk": size(args, "moe_router_topk", source),
        **_given(args, MOE_DEFAULTS),
    }
    if args.get("add_bias_linear"):
        experts["expert_tensor_parallel_size"] = 1  # Megatron adds an expert's bias on every shard
    return experts
