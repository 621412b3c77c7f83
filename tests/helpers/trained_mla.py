"""Multi-latent attention of the hand-made checkpoints of tests/helpers/trained_draft.py."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

MLA_SIZES = {
    "q_lora_rank": 11,
    "kv_lora_rank": 9,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 5,
}
"""An MLA draft's own sizes, no two of them equal; what `Shape.mla` may be."""


DEEPSEEK_YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.5,
}
"""As DeepSeek's config.json has it, with numbers that a short sequence feels."""

YARN_ARGUMENTS = {"rope_type": "yarn", "rotary_scaling_factor": 4.0, "mscale_all_dim": 0.5}

MLA_NAMES = {
    "q_proj": "linear_q_proj.weight",
    "q_a_proj": "linear_q_down_proj.weight",
    "q_a_layernorm": "linear_q_up_proj.layer_norm_weight",
    "q_b_proj": "linear_q_up_proj.weight",
    "kv_a_proj_with_mqa": "linear_kv_down_proj.weight",
    "kv_a_layernorm": "linear_kv_up_proj.layer_norm_weight",
    "kv_b_proj": "linear_kv_up_proj.weight",
}


def mla_sizes(
    mla: dict[str, int], heads: int, hidden: int, width: int
) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer's multi-latent attention over inputs of `width`."""
    rank, keys, turned = (
        mla["kv_lora_rank"],
        mla["qk_head_dim"],
        mla["qk_pos_emb_head_dim"],
    )
    queries = heads * (keys + turned)
    sizes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa": (rank + turned, width),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (keys + mla["v_head_dim"]), rank),
        "o_proj": (hidden, heads * mla["v_head_dim"]),
    }
    if not mla["q_lora_rank"]:
        return {**sizes, "q_proj": (queries, width)}
    return {
        **sizes,
        "q_a_proj": (mla["q_lora_rank"], width),
        "q_a_layernorm": (mla["q_lora_rank"],),
        "q_b_proj": (queries, mla["q_lora_rank"]),
    }


def mla_tensors(prefix: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's Hugging Face tensors `own` under the checkpoint's keys."""
    return {
        f"{prefix}{ours}": own[f"self_attn.{theirs}.weight"]
        for theirs, ours in MLA_NAMES.items()
        if f"self_attn.{theirs}.weight" in own
    }


def mla_arguments(mla: dict[str, int], heads: int) -> dict[str, Any]:
    """Megatron's arguments of a base that a draft of these sizes takes after."""
    given = {name: size for name, size in mla.items() if size}
    return {"multi_latent_attention": True, "num_query_groups": heads, **given}


def mla_rope(theta: float) -> dict[str, Any]:
    """What importing a base of DEEPSEEK_YARN finds out about it."""
    own = {name: value for name, value in DEEPSEEK_YARN.items() if not name.startswith("mscale")}
    del own["type"]
    strengths = [0.1 * mscale * math.log(4.0) + 1.0 for mscale in (0.7, 0.5)]
    factor = {"truncate": True, "attention_factor": strengths[0] / strengths[1]}
    return {"rope_type": "yarn", "rope_theta": theta, **own, **factor}
