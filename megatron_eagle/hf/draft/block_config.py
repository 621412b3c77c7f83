"""config.json of an exported block draft (DFlash, DSpark), in each format.

Servers do not fail on a field that they miss: they take a default, which may be another network.
So every field that one of them reads is written, in every place where one looks for it.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_eagle.hf.draft.draft_rope import draft_rope
from megatron_eagle.hf.draft.formats import Format
from megatron_eagle.hf.draft.info import SPECULATORS_VERSION, DraftInfo


def block_config(info: DraftInfo, fmt: Format, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json of a block draft in ``fmt`` with weights of ``dtype``."""
    architecture = {"architectures": [info.spec.method.architectures[fmt.name]]}
    if fmt.name == "speculators":
        return {**architecture, **_speculators(info, dtype)}
    return {**architecture, **_servers(info, dtype)}


def _servers(info: DraftInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Return what vLLM and SGLang read. ``target_layer_ids`` are outputs of layers, from 0 on; the
    other servers' top-level ids of EAGLE-3 drafts, which count states, are left out."""
    spec, outputs = info.spec, list(info.aux_layers)
    inner = {"mask_token_id": spec.mask_token, "target_layer_ids": outputs}
    config = {
        **_layers(info, dtype),
        "block_size": spec.slots,
        "num_target_layers": info.base.megatron_args["num_layers"],
        "mask_token_id": spec.mask_token,
        "dflash_config": inner,
    }
    if info.compressed:
        config["draft_vocab_size"] = info.draft_vocab_size
    if spec.markov is None:
        return config
    return {**config, "target_layer_ids": outputs, **_heads(info), "dspark_bonus_anchor": False}


def _speculators(info: DraftInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Return the nested form of the speculators library, which vLLM reads too.

    Aux layer ids are the states after i layers. ``sliding_window_non_causal`` is true though no
    layer has a window: at false vLLM 0.33 runs layers of full attention causally, too.
    """
    spec = info.spec
    name = spec.method.server_method
    return {
        "speculators_model_type": name,
        "speculators_version": SPECULATORS_VERSION,
        "torch_dtype": _name(dtype),
        "draft_vocab_size": info.draft_vocab_size,
        "block_size": spec.slots,
        "aux_hidden_state_layer_ids": [i + 1 for i in info.aux_layers],
        "mask_token_id": spec.mask_token,
        "sliding_window_non_causal": True,
        "sample_from_anchor": spec.method.slot_zero_predicts,
        **({} if spec.markov is None else _heads(info)),
        "transformer_layer_config": _layers(info, dtype),
        "speculators_config": {
            "algorithm": name,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": info.ttt_steps}],
            "verifier": {
                "name_or_path": info.base.name,
                "architectures": info.base.hf_config.get("architectures", []),
            },
        },
    }


def _heads(info: DraftInfo) -> dict[str, Any]:
    """Return the fields of DSpark's heads. Both of the confidence head's are always written: where
    they are missing, vLLM and SGLang assume different widths."""
    assert info.spec.markov is not None
    kind, rank = info.spec.markov
    return {
        "markov_rank": rank,
        "markov_head_type": kind,
        "enable_confidence_head": info.spec.confidence_head,
        "confidence_head_with_markov": info.spec.confidence_head,
        "sample_from_anchor": True,
    }


def _layers(info: DraftInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Return the draft's layers as a Qwen3 configuration, all of full attention."""
    args, base = info.layer_args, info.base.hf_config
    tokens = ("bos_token_id", "eos_token_id")
    return {
        "model_type": "qwen3",
        "hidden_size": args["hidden_size"],
        "intermediate_size": args["ffn_hidden_size"],
        "num_hidden_layers": info.num_layers,
        "num_attention_heads": args["num_attention_heads"],
        "num_key_value_heads": args["num_query_groups"],
        "head_dim": args["kv_channels"],
        "hidden_act": "silu",
        "rms_norm_eps": args["norm_epsilon"],
        "attention_bias": False,
        "vocab_size": info.base.vocab_size,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * info.num_layers,
        "max_position_embeddings": base["max_position_embeddings"],
        "dtype": _name(dtype),
        "torch_dtype": _name(dtype),
        **draft_rope(info.base, mla=False),
        **{name: base[name] for name in tokens if base.get(name) is not None},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
