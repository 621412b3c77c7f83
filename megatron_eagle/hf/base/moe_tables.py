"""The name tables of layers with experts: Mixtral and Qwen, gpt-oss, DeepSeek.

The symbols of the shapes are explained in ``megatron_eagle.hf.tables.entries``.
"""

from __future__ import annotations

from functools import partial

from megatron_eagle.hf.base.mla_tables import ROUTER_BIAS
from megatron_eagle.hf.tables.entries import (
    Entry,
    Join,
    Source,
    Table,
    join_interleaved,
    join_rows,
    join_transposed,
    one,
    rows,
)


def moe(block: str, router: str, gate: str, up: str, down: str) -> Table:
    """Return the table of a MoE layer whose block holds one matrix per expert and projection."""
    expert = f"{block}.experts.{{}}"
    return {
        "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", "H"),
        "mlp.router.weight": (f"{block}.{router}.weight", "E", "H"),
        "mlp.experts.experts.linear_fc1.weight": rows(
            {f"{expert}.{gate}.weight": "M", f"{expert}.{up}.weight": "M"}, "H"
        ),
        "mlp.experts.experts.linear_fc2.weight": (f"{expert}.{down}.weight", "H", "M"),
    }


def shared_experts(block: str) -> Table:
    """Return the table of the experts that every token goes to, ``block`` in the files."""
    when = {"when": "moe_shared_expert_intermediate_size"}
    return {
        "mlp.shared_experts.linear_fc1.weight": rows(
            {f"{block}.gate_proj.weight": "S", f"{block}.up_proj.weight": "S"}, "H", **when
        ),
        "mlp.shared_experts.linear_fc2.weight": one(f"{block}.down_proj.weight", "H", "S", **when),
    }


def _all_experts(name: str, stored: tuple[str, ...], join: Join, *shape: str) -> partial[Entry]:
    """Return the row of experts of shape ``shape`` that one tensor holds as ``[E, *stored]``."""
    return partial(Entry, shape=shape, sources=(Source(name, ("E", *stored)),), join=join)


GPT_OSS_MOE: Table = {
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", "H"),
    "mlp.router.weight": ("mlp.router.weight", "E", "H"),
    "mlp.router.bias": ("mlp.router.bias", "E"),
    "mlp.experts.experts.linear_fc1.weight": _all_experts(
        "mlp.experts.gate_up_proj", ("H", "G"), join_interleaved, "G", "H"
    ),
    "mlp.experts.experts.linear_fc1.bias": _all_experts(
        "mlp.experts.gate_up_proj_bias", ("G",), join_interleaved, "G"
    ),
    "mlp.experts.experts.linear_fc2.weight": _all_experts(
        "mlp.experts.down_proj", ("M", "H"), join_transposed, "H", "M"
    ),
    "mlp.experts.experts.linear_fc2.bias": _all_experts(
        "mlp.experts.down_proj_bias", ("H",), join_rows, "H"
    ),
}

DEEPSEEK_MOE: Table = {
    **moe("mlp", "gate", "gate_proj", "up_proj", "down_proj"),
    **shared_experts("mlp.shared_experts"),
}
BIASED_MOE: Table = {**DEEPSEEK_MOE, **ROUTER_BIAS}
