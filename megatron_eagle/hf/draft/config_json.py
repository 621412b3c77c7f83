"""config.json of an exported draft, in each format.

The servers disagree about the ids of aux layers: some count the output of layer i, others the state
after i layers. Each field below says which it is.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from megatron_eagle.algorithms import ALGORITHMS
from megatron_eagle.hf.base.stitch import MARK
from megatron_eagle.hf.draft.block_config import block_config
from megatron_eagle.hf.draft.draft_rope import draft_rope
from megatron_eagle.hf.draft.formats import Format
from megatron_eagle.hf.draft.info import SPECULATORS_VERSION, DraftInfo
from megatron_eagle.hf.draft.servers import sglang_ids
from megatron_eagle.hf.tables.rope import ORIGINAL_LENGTH, rope_kind

ARCHITECTURE = "LlamaForCausalLMEagle3"
MLA = "Eagle3DeepseekV2ForCausalLM"
QWEN3 = "Eagle3Qwen3ForCausalLM"
SPECULATOR = "Eagle3DraftModel"


def draft_config_json(info: DraftInfo, fmt: Format, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json of a draft in ``fmt`` with weights of ``dtype``."""
    if info.spec.method.drafts_blocks:
        return block_config(info, fmt, dtype)
    if architecture := info.spec.method.architectures.get(fmt.name):
        return {"architectures": [architecture], **_layer_config(info, dtype)}
    if fmt.name == "speculators":
        return _speculators_config(info, dtype)
    return _eagle3_config(info, fmt, dtype)


def is_exported_draft(config: dict[str, Any]) -> bool:
    """Return whether config.json names an architecture that this module writes, or marks a
    next-token module."""
    if MARK in config:
        return True
    special = chain.from_iterable(a.architectures.values() for a in ALGORITHMS.values())
    return config.get("architectures") in [
        [name] for name in (ARCHITECTURE, MLA, QWEN3, SPECULATOR, *special)
    ]


def _eagle3_config(info: DraftInfo, fmt: Format, dtype: torch.dtype) -> dict[str, Any]:
    """Return every field that vLLM, SGLang and TensorRT-LLM read of an EAGLE-3 draft.

    Aux layers appear in both conventions, because each server reads another field: inside
    ``eagle_config`` id i is the output of layer i (but see ``servers.sglang_ids``), at the top
    level it is the state after i layers.
    ``target_hidden_size`` is left out (readers then take ``hidden_size``): where it is present,
    SafeAILab's code does not read the base's embedding and runs with a random one.
    """
    outputs = list(info.aux_layers)
    inner = sglang_ids(info.base, outputs) if fmt.servers == ("sglang",) else outputs
    norms = _norm_flags(info)
    return {
        "architectures": [_architecture(info)],
        **_layer_config(info, dtype),
        "draft_vocab_size": info.draft_vocab_size,
        "num_aux_hidden_states": len(outputs),
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in outputs],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": inner,
            "use_aux_hidden_state": True,
            # The servers look here; the speculators library looks at the top level.
            **{name: True for name in norms if name == "norm_before_fc"},
        },
        **norms,
        **_parallel_drafting(info),
    }


def _architecture(info: DraftInfo) -> str:
    if info.spec.uses_mla:
        return MLA
    return QWEN3 if info.spec.qk_layernorm else ARCHITECTURE


def _parallel_drafting(info: DraftInfo) -> dict[str, int]:
    """Return the fields in which vLLM's parallel drafting finds the mask token, if there is one."""
    token = info.spec.mask_token
    return {} if token is None else {"ptd_token_id": token, "pard_token": token}


def _norm_flags(info: DraftInfo) -> dict[str, bool]:
    """Return the norm flags that are true.

    A false ``norm_output`` must not be written: SpecForge would drop the norm in front of the head.
    """
    flags = {
        "fc_norm": info.spec.method.norms_each_aux_layer,
        "norm_output": info.spec.method.feeds_back_normed,
        "norm_before_fc": info.spec.norm_before_fc,
        "norm_before_residual": info.spec.norm_before_residual,
    }
    return {name: True for name, value in flags.items() if value}


def _speculators_config(info: DraftInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Return the nested form of the speculators library, which vLLM reads too.

    Aux layer ids are the states after i layers.
    """
    return {
        "architectures": [SPECULATOR],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "torch_dtype": _name(dtype),
        "draft_vocab_size": info.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in info.aux_layers],
        "norm_before_residual": False,  # vLLM's default in this form is True
        **_norm_flags(info),
        "transformer_layer_config": {
            **_layer_config(info, dtype),
            "num_aux_hidden_states": len(info.aux_layers),  # vLLM expects 3 otherwise
        },
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": info.ttt_steps}],
            "verifier": {
                "name_or_path": info.base.name,
                "architectures": info.base.hf_config.get("architectures", []),
            },
        },
    }


def _layer_config(info: DraftInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Return the draft's layers as a Llama or DeepSeek configuration."""
    args, base = info.layer_args, info.base.hf_config
    mla = info.spec.uses_mla
    rope = draft_rope(info.base, mla)
    config = {
        **(_mla_fields(info) if mla else _grouped_fields(info)),
        "hidden_size": args["hidden_size"],
        "intermediate_size": args["ffn_hidden_size"],
        "num_hidden_layers": info.num_layers,
        "num_attention_heads": args["num_attention_heads"],
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": args["norm_epsilon"],
        "vocab_size": info.base.vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": _name(dtype),
        "max_position_embeddings": _positions(base["max_position_embeddings"], rope),
        **rope,
    }
    tokens = ("bos_token_id", "eos_token_id")
    return config | {name: base[name] for name in tokens if base.get(name) is not None}


def _positions(of_base: int, rope: dict[str, Any]) -> int:
    """Return the draft's max_position_embeddings: the base's, or as many as its yarn reaches.

    vLLM raises a draft's number to the length it serves, but not under yarn, where it shortens the
    base's context to the draft's.
    """
    fields = rope["rope_parameters"]
    if rope_kind(fields) != "yarn" or ORIGINAL_LENGTH not in fields:
        return of_base
    return max(of_base, int(fields["factor"] * fields[ORIGINAL_LENGTH]))


def _grouped_fields(info: DraftInfo) -> dict[str, Any]:
    args = info.layer_args
    return {
        "model_type": "qwen3" if info.spec.qk_layernorm else "llama",
        "num_key_value_heads": args["num_query_groups"],
        "head_dim": args["kv_channels"],
        "mlp_bias": False,
    }


def _mla_fields(info: DraftInfo) -> dict[str, Any]:
    """Return the fields of multi-latent attention.

    ``model_type`` is not ``deepseek_v3``, which vLLM takes for that model's own next-token layers;
    published MLA drafts say ``kimi_k2``, the same class of configuration.
    """
    args = info.layer_args
    return {
        "model_type": "kimi_k2",
        "num_key_value_heads": args["num_attention_heads"],
        "q_lora_rank": args["q_lora_rank"],
        "kv_lora_rank": args["kv_lora_rank"],
        "qk_nope_head_dim": args["qk_head_dim"],
        "qk_rope_head_dim": args["qk_pos_emb_head_dim"],
        "v_head_dim": args["v_head_dim"],
        "first_k_dense_replace": info.num_layers,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
