"""Every field of a base's TransformerConfig is the base's, or one that a run may choose."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.errors import UserError
from megatron_eagle.teacher.description import base_arguments, transformer_config
from megatron_eagle.training.frozen_config import frozen_config, run_fields

DENSE = {
    "num_layers": 7, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 4,
    "group_query_attention": True, "num_query_groups": 2, "kv_channels": 12,
    "normalization": "RMSNorm", "norm_epsilon": 1e-5, "swiglu": True, "add_bias_linear": False,
    "position_embedding_type": "rope", "rotary_percent": 1.0, "rotary_base": 10000,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "max_position_embeddings": 64,
    "untie_embeddings_and_output_weights": True,
}  # fmt: skip
EXPERTS = {
    "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 24,
    "moe_router_load_balancing_type": "none",
}  # fmt: skip
OF_BASE = {
    "rotary_interleaved", "layernorm_zero_centered_gamma", "layernorm_epsilon", "num_layers",
    "moe_router_force_load_balancing", "moe_expert_capacity_factor", "moe_router_topk",
    "moe_router_topk_scaling_factor", "window_size", "softmax_scale",
}  # fmt: skip
OF_RUN = {"tensor_model_parallel_size", "transformer_impl", "bf16", "moe_aux_loss_coeff"}


@pytest.mark.parametrize("args", [DENSE, {**DENSE, **EXPERTS}], ids=["dense", "experts"])
def test_a_field_is_taken_from_the_run_or_refused(args: dict[str, Any]) -> None:
    base = BaseInfo("llama", "base", "", 61, {}, args)
    same = transformer_config(base_arguments(base))
    chosen = run_fields(same)
    names = {field.name for field in dataclasses.fields(same)}
    assert names - chosen >= OF_BASE and chosen >= OF_RUN
    assert frozen_config(same, base) is not same
    another = object()
    for name in sorted(names):
        changed = copy.copy(same)
        setattr(changed, name, another)
        if name in chosen:
            assert getattr(frozen_config(changed, base), name) is another, name
            continue
        with pytest.raises(UserError, match=f"^--.*: {name} .*contradicts the base checkpoint"):
            frozen_config(changed, base)
