"""The widths of a draft's layers beside a given base, under Megatron's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eagle.config.spec import GQA_WIDTHS, MLA_WIDTHS, MOE_TOPK, DraftSpec
from megatron_eagle.errors import UserError

LAYER_WIDTHS = ("ffn_hidden_size", "num_attention_heads", *GQA_WIDTHS, *MLA_WIDTHS)
"""Fields of :class:`DraftSpec`; those of the other kind of attention do not apply."""

TP_WIDTHS = ("ffn_hidden_size", "num_attention_heads", "num_query_groups")
"""Widths that tensor parallelism cuts."""


def layer_widths(spec: DraftSpec, base_args: Mapping[str, Any]) -> dict[str, int]:
    """Return the widths of the draft's layers beside a base with these Megatron arguments.

    Only those of the draft's kind of attention; ``q_lora_rank`` is 0 without a low-rank projection.
    Raises :class:`UserError` if the widths do not go together.
    """
    if spec.uses_mla and not base_args.get("multi_latent_attention"):
        raise UserError("<attention> mla: the base has no multi-latent attention to follow")
    attention = MLA_WIDTHS if spec.uses_mla else GQA_WIDTHS
    names = ("ffn_hidden_size", "num_attention_heads", *attention)
    chosen = {name: getattr(spec, name) for name in names if getattr(spec, name) is not None}
    widths = {name: base_args.get(name) or 0 for name in names}
    if not spec.uses_mla and widths["num_query_groups"] == widths["num_attention_heads"]:
        # Every head has a key of its own, as in the base.
        widths["num_query_groups"] = chosen.get("num_attention_heads", widths["num_query_groups"])
    widths |= chosen
    _check(widths, spec)
    return widths


def _check(widths: Mapping[str, int], spec: DraftSpec) -> None:
    if not spec.uses_mla:
        if widths["num_attention_heads"] % widths["num_query_groups"]:
            raise UserError(
                f"<num_query_groups>: {widths['num_query_groups']} key/value heads do not "
                f"divide the draft's {widths['num_attention_heads']} attention heads"
            )
    elif widths["v_head_dim"] > widths["qk_head_dim"] + widths["qk_pos_emb_head_dim"]:
        raise UserError(
            f"<v_head_dim> {widths['v_head_dim']}: values are wider than the draft's keys, "
            f"{widths['qk_head_dim']} + {widths['qk_pos_emb_head_dim']} channels"
        )


def expert_config(spec: DraftSpec) -> dict[str, Any]:
    """Return the draft's experts under the names of Megatron's TransformerConfig; empty for dense
    layers."""
    if spec.num_experts is None:
        return {}
    config: dict[str, Any] = {
        "num_moe_experts": spec.num_experts,
        "moe_router_topk": spec.moe_router_topk or MOE_TOPK,
    }
    if spec.moe_ffn_hidden_size is not None:
        config["moe_ffn_hidden_size"] = spec.moe_ffn_hidden_size
    return config
