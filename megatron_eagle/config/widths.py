"""The draft's attention, experts and widths of layers: the base's, or what flags say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_eagle.config.checks import flag_name, shown_flag

if TYPE_CHECKING:
    from megatron_eagle.config import EagleConfig

MOE_TOPK = 2
MOE_BALANCE = 0.01
ATTENTIONS = ("gqa", "mla")
GROUPED_WIDTHS = ("num_query_groups", "kv_channels")
MLA_WIDTHS = (
    *("q_lora_rank", "kv_lora_rank"),
    *("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
)
LAYER_WIDTHS = ("ffn_hidden_size", "num_attention_heads", *GROUPED_WIDTHS, *MLA_WIDTHS)
"""Of a draft's layers, under Megatron's names; those of the other attention do not apply."""

SHARDED_WIDTHS = ("ffn_hidden_size", "num_attention_heads", "num_query_groups")
"""Those that tensor parallelism cuts."""


def layer_widths(options: EagleConfig, base_args: Mapping[str, Any]) -> dict[str, int]:
    """See :meth:`~megatron_eagle.config.EagleConfig.layer_widths`."""
    mla = options.attention == "mla"
    if mla and not base_args.get("multi_latent_attention"):
        raise ValueError(
            "--eagle-attention mla: the base has no multi-latent attention to take after"
        )
    names = [name for name in LAYER_WIDTHS if name not in _widths_of_others(options)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    widths = {name: base_args.get(name) or 0 for name in names}
    if not mla and widths["num_query_groups"] == widths["num_attention_heads"]:
        # Every head has a key of its own, as in the base.
        widths["num_query_groups"] = given.get("num_attention_heads", widths["num_query_groups"])
    widths |= given
    if mla and widths["v_head_dim"] > widths["qk_head_dim"] + widths["qk_pos_emb_head_dim"]:
        raise ValueError(
            f"--eagle-v-head-dim {widths['v_head_dim']}: values are wider than the draft's keys, "
            f"{widths['qk_head_dim']} + {widths['qk_pos_emb_head_dim']} channels"
        )
    if not mla and widths["num_attention_heads"] % widths["num_query_groups"]:
        raise ValueError(
            f"--eagle-num-query-groups: {widths['num_query_groups']} key/value heads do not "
            f"divide the draft's {widths['num_attention_heads']} attention heads"
        )
    return widths


def check_attention(options: EagleConfig) -> None:
    """Raise ``ValueError`` for widths that the draft's attention does not have."""
    if options.attention not in ATTENTIONS:
        raise ValueError(
            f"--eagle-attention must be one of {', '.join(ATTENTIONS)}, not {options.attention}"
        )
    for name in _widths_of_others(options):
        if getattr(options, name) is not None:
            raise ValueError(
                f"{shown_flag(name, getattr(options, name))}: a draft of --eagle-attention "
                f"{options.attention} has no such thing"
            )
    for name in LAYER_WIDTHS:
        value, least = getattr(options, name), 0 if name == "q_lora_rank" else 1
        if value is not None and value < least:
            raise ValueError(f"{flag_name(name)} must be at least {least}, not {value}")
    for name in ("kv_channels", "qk_pos_emb_head_dim"):
        value = getattr(options, name)
        if value is not None and value % 2:
            raise ValueError(f"{shown_flag(name, value)} is odd: rotary positions turn pairs")


def _widths_of_others(options: EagleConfig) -> tuple[str, ...]:
    return GROUPED_WIDTHS if options.attention == "mla" else MLA_WIDTHS


def expert_config(options: EagleConfig) -> dict[str, Any]:
    """See :meth:`~megatron_eagle.config.EagleConfig.expert_config`."""
    if options.num_experts is None:
        return {}
    topk, balance = options.moe_router_topk, options.moe_aux_loss_coeff
    found: dict[str, Any] = {
        "num_moe_experts": options.num_experts,
        "moe_router_topk": MOE_TOPK if topk is None else topk,
        "moe_aux_loss_coeff": MOE_BALANCE if balance is None else balance,
    }
    if options.moe_ffn_hidden_size is not None:
        found["moe_ffn_hidden_size"] = options.moe_ffn_hidden_size
    return found
