"""Tiny random Hugging Face bases, written as a hub download looks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "mimo": "Qwen2",  # which transformers has not, and which is one
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "qwen3_next": "Qwen3Next",
    "qwen3_5": "Qwen3_5",
    "gpt_oss": "GptOss",
    "glm4_moe": "Glm4Moe",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
}
TEXT_CONFIGS = {"qwen3_5"}
"""Families whose configuration class is named as the language model of a multimodal one."""
CENTERED_NORMS = {"qwen3_next", "qwen3_5"}
"""Families that store what a norm's weight differs from 1 by."""
DELTA_NET: dict[str, Any] = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 8,
    "num_hidden_layers": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "head_dim": 8},  # 8 heads x 8 is not the hidden size
    "mistral": {"sliding_window": 5, "head_dim": 6, "rope_theta": 1e6},
    "qwen2": {"tie_word_embeddings": False},
    "mimo": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 12},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": 24,
        "head_dim": 12,
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],
    },
    "qwen3_next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
        **DELTA_NET,
    },
    "qwen3_5": DELTA_NET,
    "glm4_moe": {
        "num_hidden_layers": 4,
        "head_dim": 12,
        "attention_bias": True,
        "use_qk_norm": True,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.5,
        },
    },
    "deepseek_v2": {**MLA, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0},
    "deepseek_v3": MLA,
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 12,
        "sliding_window": 4,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
}


def make_base(
    directory: Path, family: str, shard: str = "5GB", seed: int = 7, **fields: Any
) -> torch.nn.Module:
    """Save a random fp32 model of `family` in `directory` and return it (eval mode)."""
    import transformers

    name, text = CLASSES[family], "Text" if family in TEXT_CONFIGS else ""
    config = getattr(transformers, f"{name}{text}Config")(**{**SIZES, **FIELDS[family], **fields})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for block in model.modules():
        if type(block).__name__ == "DeepseekV2Moe":
            block.num_experts = block.experts.num_experts  # transformers 5.8.1 reads and lacks it
        if type(block).__name__ == "DeepseekV2Attention":
            block.scaling *= softmax_strength(config.rope_parameters)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            # The default init leaves norms at 1 and biases at 0, which would hide a swap.
            weight.normal_(0.0, 0.2).add_(1.0 if _is_plain_norm(family, key) else 0.0)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    model.save_pretrained(directory, max_shard_size=shard)
    if family == "mimo":
        name_mimo(directory / "config.json")
    return model


def _is_plain_norm(family: str, key: str) -> bool:
    """Whether `key` is a norm's weight that is stored as it is, not its difference from 1."""
    return key.endswith("norm.weight") and (family not in CENTERED_NORMS or "linear_attn" in key)


def name_mimo(file: Path) -> None:
    """Give config.json of a Qwen2 the names that MiMo's has."""
    named = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))


def wrap_text(directory: Path) -> None:
    """Make a language model's files in `directory` those of the multimodal model around it."""
    from safetensors.torch import load_file, save_file

    text = json.loads((directory / "config.json").read_text())
    (architecture,) = text.pop("architectures")
    outer = {
        "architectures": [architecture.replace("ForCausalLM", "ForConditionalGeneration")],
        "model_type": text["model_type"].removesuffix("_text"),
        "text_config": text,
        "vision_config": {"depth": 1},
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    (directory / "config.json").write_text(json.dumps(outer))
    inner = load_file(directory / "model.safetensors")
    tensors = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: x
        for name, x in inner.items()
    }
    tensors["model.visual.patch_embed.proj.weight"] = torch.zeros(3, 5)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def softmax_strength(rope: dict[str, Any]) -> float:
    """DeepSeek's own code scales scores by it; transformers 5.8.1 does for V3, and not for V2."""
    if not rope.get("mscale_all_dim"):
        return 1.0
    return (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] of `tokens` [B, S]."""
    with torch.no_grad():
        return model(tokens).logits.float()
