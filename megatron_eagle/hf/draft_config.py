"""config.json and the model card of an exported draft."""

from __future__ import annotations

from typing import Any

import torch

from megatron_eagle.hf.draft_info import DraftInfo

ARCHITECTURE = "LlamaForCausalLMEagle3"


def hf_config(info: DraftInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Every field that vLLM, SGLang and TensorRT-LLM read of an EAGLE-3 draft.

    Captured layers appear in both conventions, because each server reads another field: inside
    eagle_config id i is the output of layer i, at the top level it is the state after i layers.
    """
    args, base = info.base.megatron_args, info.base.hf_config
    outputs = list(info.aux_layers)
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": args["hidden_size"],
        "target_hidden_size": args["hidden_size"],
        "intermediate_size": args["ffn_hidden_size"],
        "num_hidden_layers": info.num_layers,
        "num_attention_heads": args["num_attention_heads"],
        "num_key_value_heads": args["num_query_groups"],
        "head_dim": args["kv_channels"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": args["norm_epsilon"],
        "vocab_size": info.base.vocab_size,
        "draft_vocab_size": info.draft_vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "max_position_embeddings": base["max_position_embeddings"],
        **_rope(info),
        "num_aux_hidden_states": len(outputs),
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in outputs],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": outputs,
            "use_aux_hidden_state": True,
        },
    }
    tokens = ("bos_token_id", "eos_token_id")
    return config | {name: base[name] for name in tokens if base.get(name) is not None}


def _rope(info: DraftInfo) -> dict[str, Any]:
    """Both spellings: rope_theta with rope_scaling, and the newer rope_parameters."""
    base = info.base.hf_config
    given = base.get("rope_scaling") or base.get("rope_parameters") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    scaling = {key: value for key, value in given.items() if key not in ("rope_theta", "type")}
    theta = float(info.base.megatron_args["rotary_base"])
    fields: dict[str, Any] = {"rope_theta": theta}
    if kind != "default":
        fields["rope_scaling"] = {**scaling, "rope_type": kind}
    fields["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": theta}
    return fields


def model_card(info: DraftInfo, checkpoint: str, dtype: torch.dtype) -> str:
    """README.md; `checkpoint` is the name of the iteration's directory."""
    steps = info.ttt_steps
    vocabulary = (
        f"{info.draft_vocab_size:,} of the base's {info.base.vocab_size:,} token ids (`d2t`)"
        if info.compressed
        else f"the base's {info.base.vocab_size:,} token ids"
    )
    return f"""---
tags:
- eagle3
- speculative-decoding
---
# EAGLE-3 draft for {info.base.name}

| | |
|---|---|
| base | {info.base.name} ({info.base.family}) |
| captured layers (outputs, 0-based) | {", ".join(map(str, info.aux_layers))} |
| draft layers | {info.num_layers} |
| trained for | {steps} draft steps |
| draft vocabulary | {vocabulary} |
| dtype | {str(dtype).removeprefix("torch.")} |
| converted from | `{checkpoint}` |

The draft has no embedding of its own: servers share the base's. The tokenizer is the base's.

## Serving

`BASE` is the base model, `DRAFT` this directory.

vLLM:

    vllm serve BASE --speculative-config \\
      '{{"method": "eagle3", "model": "DRAFT", "num_speculative_tokens": {steps}}}'

SGLang:

    python -m sglang.launch_server --model-path BASE \\
      --speculative-algorithm EAGLE3 --speculative-draft-model-path DRAFT \\
      --speculative-num-steps {steps} --speculative-eagle-topk 1 \\
      --speculative-num-draft-tokens {steps + 1}

The conversion wrote and checked these files; it did not run a server, so neither command was
executed on them.
"""
