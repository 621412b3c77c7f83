"""The experts and routers of a config.json as Megatron arguments, one function per kind of router.

Each returns Megatron argument names -> values and raises UserError, naming ``source``, for a router
that Megatron 0.19 would compute differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_eagle.checkpoint.hybrid_pattern import EXPERTS, layer_ends, pattern_of, symbols
from megatron_eagle.errors import UserError
from megatron_eagle.hf.tables.config_fields import number, require, size, switch


def softmax_after_topk(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Read the experts of Mixtral: softmax over the chosen experts' logits.

    All layers have experts, each as wide as ``intermediate_size``.
    """
    return {
        "num_experts": size(config, "num_local_experts", source),
        "moe_ffn_hidden_size": size(config, "intermediate_size", source),
        **_softmax(config, True, source),
    }


def qwen3_moe(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Read the experts of Qwen3-MoE: softmax over all, renormalised or not, in any layers."""
    experts = "num_experts" if config.get("num_local_experts") is None else "num_local_experts"
    dense = config.get("mlp_only_layers") or []
    step = size(config, "decoder_sparse_step", source, 1)
    layers = range(size(config, "num_hidden_layers", source))
    return {
        "num_experts": size(config, experts, source),
        "moe_ffn_hidden_size": size(config, "moe_intermediate_size", source),
        **_softmax(config, switch(config, "norm_topk_prob", source), source),
        **_layers([layer not in dense and (layer + 1) % step == 0 for layer in layers]),
    }


def qwen3_next(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Read the experts of Qwen3-Next: those of Qwen3-MoE, and a gated one for every token."""
    shared = size(config, "shared_expert_intermediate_size", source)
    return {
        **qwen3_moe(config, source),
        "moe_shared_expert_intermediate_size": shared,
        "moe_shared_expert_gate": True,
    }


def gpt_oss(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Read the experts of gpt-oss: softmax over the chosen ones, biases in router and experts."""
    require(config, {"swiglu_limit": 7.0}, source)
    return {
        **softmax_after_topk(config, source),
        "expert_tensor_parallel_size": 1,  # Megatron adds an expert's bias on every shard
    }


def deepseek_v2(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Read the experts of DeepSeek-V2: softmax over all, chosen from all or the best groups."""
    require(config, {"scoring_func": "softmax", "norm_topk_prob": False}, source)
    methods = ("greedy", "group_limited_greedy")
    method = config.get("topk_method", "greedy")
    if method not in methods:
        raise UserError(f"{source}: topk_method {method!r} is not supported; known: {methods}")
    return {
        **_deepseek(config, source),
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": True,
        **(_groups(config, source) if method != "greedy" else {}),
    }


def deepseek_v3(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Read the experts of DeepSeek-V3, Kimi-K2: sigmoids, chosen with a learnt bias by groups."""
    fixed = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
    require(config, fixed, source)
    return {
        **_deepseek(config, source),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        **(_groups(config, source) if size(config, "n_group", source) > 1 else {}),
    }


def _deepseek(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    require(config, {"moe_layer_freq": 1}, source)
    expert = size(config, "moe_intermediate_size", source)
    shared = config.get("n_shared_experts")
    layers = range(size(config, "num_hidden_layers", source))
    return {
        "num_experts": size(config, "n_routed_experts", source),
        "moe_ffn_hidden_size": expert,
        "moe_router_topk": size(config, "num_experts_per_tok", source),
        "moe_router_topk_scaling_factor": number(config, "routed_scaling_factor", source, 1.0),
        "moe_router_dtype": "fp32",
        **({"moe_shared_expert_intermediate_size": expert * shared} if shared else {}),
        **_layers([layer >= config.get("first_k_dense_replace", 0) for layer in layers]),
    }


def _groups(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    groups, best = size(config, "n_group", source), size(config, "topk_group", source)
    if size(config, "n_routed_experts", source) % groups or best > groups:
        raise UserError(f"{source}: n_group {groups} and topk_group {best} do not fit the experts")
    return {"moe_router_num_groups": groups, "moe_router_group_topk": best}


def moe_layers(args: Mapping[str, Any]) -> list[bool]:
    """Return for each layer whether its MLP is a MoE."""
    if args.get("num_experts") is None:
        return [False] * args["num_layers"]
    if (hybrid := pattern_of(args)) is not None:
        return [symbols(hybrid)[end] == EXPERTS for end in layer_ends(hybrid)]
    pattern = args.get("moe_layer_freq", 1)
    if isinstance(pattern, int):
        return [layer % pattern == 0 for layer in range(args["num_layers"])]
    return [bool(layer) for layer in pattern]


def _softmax(config: Mapping[str, Any], renormalised: bool, source: str) -> dict[str, Any]:
    topk = size(config, "num_experts_per_tok", source)
    if renormalised and topk == 1:
        raise UserError(f"{source}: a renormalised top-1 router is not supported by Megatron")
    return {
        "moe_router_topk": topk,
        "moe_router_score_function": "softmax",
        # A softmax over all experts, renormalised over the chosen ones, is the softmax over these.
        "moe_router_pre_softmax": not renormalised,
    }


def _layers(moe: Sequence[bool]) -> dict[str, Any]:
    """Return the pattern of MoE layers, if there are others.

    With a pattern Megatron numbers the layers in its checkpoint keys instead of stacking them.
    """
    return {} if all(moe) else {"moe_layer_freq": [int(layer) for layer in moe]}
