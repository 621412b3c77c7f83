"""The config.json of a draft, in the spelling of any project -> HfDraft.

Known writers: SafeAILab, SpecForge, NVIDIA ModelOpt, vLLM's own examples (a flat Llama
configuration), speculators (a nested one) and writers of MLA drafts (a DeepSeek configuration).
Fields that change the network to one this package does not compute are refused here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.hf.tables.config_fields import number, require, size, switch
from megatron_eagle.hf.tables.rope import comparable_rope

FLAT = (
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "EAGLE3LlamaForCausalLM",
)
MLA = (
    "Eagle3DeepseekV2ForCausalLM",
    "Eagle3DeepseekV3ForCausalLM",
    "Eagle3DeepSeekV3ForCausalLM",
)
QWEN3 = "Eagle3Qwen3ForCausalLM"
"""A draft whose queries and keys are normed, as its bases' are."""
QWEN3_HEAD_DIM = 128
"""What transformers' Qwen3Config has where a file says nothing."""
MLA_FIELDS = {
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
EAGLE1 = ("EagleLlamaForCausalLM", "LlamaForCausalLMEagle")
BASE_NAME = "LlamaForCausalLM"
"""Architecture of SafeAILab's first drafts, EAGLE-1 and EAGLE-3 alike."""
# Fields that change the network, and the one value that this package computes.
REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "logit_scale": 1.0,
    "parallel_drafting": False,
    "rope_interleave": True,
    "use_sliding_window": False,
}
# The same of eagle_config's switches, in drafts that read auxiliary hidden states.
EAGLE_SWITCHES = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
}


@dataclass(frozen=True)
class HfDraft:
    """Hold the fields of config.json, each in one spelling.

    Attributes:
        eagle1: the file describes an EAGLE-1 draft.
        mla: widths of multi-latent attention under Megatron's names, ``q_lora_rank`` 0 for none;
            None for grouped queries.
        rope: ``rope_type``, ``rope_theta`` and the fields of this type that are not None.
        inner_ids: ids of aux layers inside ``eagle_config``, None where it names none.
        outer_ids: the same at the top level: the state after i layers.
    """

    eagle1: bool
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mla: dict[str, int] | None
    vocab_size: int
    draft_vocab_size: int
    num_layers: int
    norm_epsilon: float
    rope: dict[str, Any]
    inner_ids: tuple[int, ...] | None
    outer_ids: tuple[int, ...] | None
    fc_norm: bool
    norm_output: bool
    norm_before_fc: bool
    norm_before_residual: bool
    qk_layernorm: bool


def parse_hf_draft(config: dict[str, Any], tensors: Iterable[str], source: str) -> HfDraft:
    """Parse ``config``; the names in ``tensors`` decide where the architecture is ambiguous.

    Raises ``UserError`` starting with ``source``, the file, for a draft of an unknown type or with
    a field that this package does not compute.
    """
    nested = "speculators_model_type" in config
    layer = _speculators_layer(config, source) if nested else config
    architecture = "" if nested else _architecture(config, source)
    early_eagle1 = architecture == BASE_NAME and not any("hidden_norm" in name for name in tensors)
    for key, value in REQUIRED_VALUES.items():
        if layer.get(key) not in (None, value):
            raise UserError(f"{source}: {key} = {layer[key]!r} is not supported, only {value!r}")
    _check_windows(layer, source)
    qk_layernorm = architecture == QWEN3 or (nested and layer["model_type"] == "qwen3")
    hidden, heads = size(layer, "hidden_size", source), size(layer, "num_attention_heads", source)
    vocab = size(layer, "vocab_size", source)
    eagle = config.get("eagle_config") or {}
    if not isinstance(eagle, dict):
        raise UserError(f"{source}: eagle_config must be an object, found {eagle!r}")
    eagle1 = architecture in EAGLE1 or early_eagle1
    if not eagle1:
        require(
            {key: value for key, value in eagle.items() if value is not None},
            EAGLE_SWITCHES,
            f"{source}: eagle_config",
        )
    return HfDraft(
        eagle1=eagle1,
        hidden_size=hidden,
        target_hidden_size=size(config, "target_hidden_size", source, hidden),
        intermediate_size=size(layer, "intermediate_size", source),
        num_heads=heads,
        num_kv_heads=size(layer, "num_key_value_heads", source, heads),
        head_dim=size(
            layer, "head_dim", source, QWEN3_HEAD_DIM if qk_layernorm else hidden // heads
        ),
        mla=_mla(layer, architecture, source),
        vocab_size=vocab,
        draft_vocab_size=size(config, "draft_vocab_size", source, vocab),
        num_layers=size(layer, "num_hidden_layers", source, 1),
        norm_epsilon=number(layer, "rms_norm_eps", source, 1e-6),
        rope=comparable_rope(layer, source),
        inner_ids=_aux_ids(eagle, source),
        outer_ids=_aux_ids(config, source),
        fc_norm=_any_switch(source, (config, "fc_norm"), (config, "use_aux_norm")),
        norm_output=_any_switch(
            source, (config, "norm_output"), (eagle, "return_hidden_post_norm")
        ),
        norm_before_fc=_any_switch(source, (eagle, "norm_before_fc"), (config, "norm_before_fc")),
        norm_before_residual=switch(config, "norm_before_residual", source),
        qk_layernorm=qk_layernorm,
    )


def _any_switch(source: str, *fields: tuple[dict[str, Any], str]) -> bool:
    """Return whether one of the ``(config, key)`` switches, which say the same thing, is on."""
    return any([switch(config, key, source) for config, key in fields])


def _mla(config: dict[str, Any], architecture: str, source: str) -> dict[str, int] | None:
    if architecture not in MLA:
        if config.get("kv_lora_rank"):
            raise UserError(
                f"{source}: kv_lora_rank = {config['kv_lora_rank']!r} in a draft of Llama type"
            )
        return None
    found = {name: size(config, field, source) for name, field in MLA_FIELDS.items()}
    low_rank = config.get("q_lora_rank") is not None
    return {"q_lora_rank": size(config, "q_lora_rank", source) if low_rank else 0, **found}


def _speculators_layer(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the layer configuration inside a config.json of the speculators library."""
    kind = config["speculators_model_type"]
    if kind != "eagle3":
        raise UserError(f"{source}: speculators_model_type {kind!r} is not supported")
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, dict):
        raise UserError(f"{source}: transformer_layer_config is missing")
    model_type = layer.get("model_type", "qwen3")
    if model_type not in ("llama", "qwen3"):
        raise UserError(
            f"{source}: transformer_layer_config of type {model_type!r} is not supported, only "
            "'llama' and 'qwen3'"
        )
    if "norm_before_residual" not in config:  # vLLM and the library assume opposite values
        raise UserError(f"{source}: norm_before_residual is missing")
    from transformers import LlamaConfig, Qwen3Config

    kind = LlamaConfig if model_type == "llama" else Qwen3Config
    return kind(**layer).to_dict()  # the library leaves out what is a default


def _check_windows(layer: dict[str, Any], source: str) -> None:
    """Raise ``UserError`` for layers that attend to a window alone."""
    kinds = layer.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{source}: layer_types {kinds!r} is not supported, only 'full_attention'")


def _architecture(config: dict[str, Any], source: str) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise UserError(f"{source}: architectures must name exactly one class, found {names!r}")
    known = (*FLAT, QWEN3, *MLA, *EAGLE1, BASE_NAME)
    if names[0] not in known:
        raise UserError(
            f"{source}: architecture {names[0]!r} is not an EAGLE draft of Llama or MLA type; "
            f"known: {', '.join(known)}"
        )
    return names[0]


def _aux_ids(fields: dict[str, Any], source: str) -> tuple[int, ...] | None:
    """Return the ids of aux layers that ``fields`` name, in ascending order, or None."""
    value = fields.get("eagle_aux_hidden_state_layer_ids")
    if value is None or value == []:
        return None
    if not isinstance(value, list) or any(type(i) is not int for i in value):
        raise UserError(f"{source}: aux layers must be numbers, found {value!r}")
    if value != sorted(set(value)) or value[0] < 0:
        raise UserError(f"{source}: aux layers must ascend and be outputs of layers, found {value}")
    return tuple(value)
