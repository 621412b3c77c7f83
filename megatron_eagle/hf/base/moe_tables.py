"""The name tables of layers with experts: Mixtral's and Qwen's, gpt-oss's, DeepSeek's."""

from __future__ import annotations

from megatron_eagle.hf.base.mla_tables import ROUTER_BIAS, SHARED_EXPERTS
from megatron_eagle.hf.tables.entries import (
    Entry,
    Source,
    join_interleaved,
    join_rows,
    join_transposed,
    one,
    rows,
)


def moe(block: str, router: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    """The table of a MoE layer whose block holds one matrix per expert and projection."""
    expert = f"{block}.experts.{{}}"
    return (
        one("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
        one("mlp.router.weight", f"{block}.{router}.weight", "E", "H"),
        rows(
            "mlp.experts.experts.linear_fc1.weight",
            [(f"{expert}.{gate}.weight", "M"), (f"{expert}.{up}.weight", "M")],
            "H",
        ),
        one("mlp.experts.experts.linear_fc2.weight", f"{expert}.{down}.weight", "H", "M"),
    )


GPT_OSS_MOE = (
    one("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
    one("mlp.router.weight", "mlp.router.weight", "E", "H"),
    one("mlp.router.bias", "mlp.router.bias", "E"),
    Entry(
        "mlp.experts.experts.linear_fc1.weight",
        ("G", "H"),
        (Source("mlp.experts.gate_up_proj", ("E", "H", "G")),),
        join_interleaved,
    ),
    Entry(
        "mlp.experts.experts.linear_fc1.bias",
        ("G",),
        (Source("mlp.experts.gate_up_proj_bias", ("E", "G")),),
        join_interleaved,
    ),
    Entry(
        "mlp.experts.experts.linear_fc2.weight",
        ("H", "M"),
        (Source("mlp.experts.down_proj", ("E", "M", "H")),),
        join_transposed,
    ),
    Entry(
        "mlp.experts.experts.linear_fc2.bias",
        ("H",),
        (Source("mlp.experts.down_proj_bias", ("E", "H")),),
        join_rows,
    ),
)

DEEPSEEK_MOE = (*moe("mlp", "gate", "gate_proj", "up_proj", "down_proj"), *SHARED_EXPERTS)
BIASED_MOE = (*DEEPSEEK_MOE, ROUTER_BIAS)
