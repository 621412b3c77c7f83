"""The config.json of a block draft (DFlash, DSpark) of any project -> HfBlockDraft.

Known writers: z-lab and SpecForge (``dflash_config``), DeepSpec (all fields at the top level) and
speculators (nested, layers counted as states). Fields that change the network to one this package
does not compute are refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.hf.draft.parse_config import REQUIRED_VALUES, HfDraft
from megatron_eagle.hf.tables.config_fields import number, size, switch
from megatron_eagle.hf.tables.rope import comparable_rope

ARCHITECTURES = {
    "DFlashDraftModel": "dflash",
    "Qwen3DSparkModel": "dspark",
    "DSparkDraftModel": "dspark",
}
_SPECULATORS = ("dflash", "dspark")


@dataclass(frozen=True)
class HfBlockDraft:
    """Hold the fields of config.json, each in one spelling.

    ``draft``: what it has in common with other drafts. ``aux_layers``: ids of outputs, None where
    the file names none. ``markov``: kind and rank.
    """

    algorithm: str
    draft: HfDraft
    aux_layers: tuple[int, ...] | None
    block_size: int
    mask_token: int
    markov: tuple[str, int] | None
    confidence_head: bool


def is_block_config(config: dict[str, Any]) -> bool:
    """Tell whether config.json is that of a block draft, of whatever project."""
    names = config.get("architectures")
    known = isinstance(names, list) and any(name in ARCHITECTURES for name in names)
    return known or config.get("speculators_model_type") in _SPECULATORS


def parse_block_draft(config: dict[str, Any], source: str) -> HfBlockDraft:
    """Parse ``config``; raise ``UserError`` starting with ``source`` for a field that this package
    does not compute."""
    nested = "speculators_model_type" in config
    layer = _nested_layer(config, source) if nested else config
    inner = config.get("dflash_config") or {}
    if not isinstance(inner, dict):
        raise UserError(f"{source}: dflash_config must be an object, found {inner!r}")
    algorithm = config["speculators_model_type"] if nested else _algorithm(config, source)
    _check_network(config, layer, inner, algorithm, source)
    hidden = size(layer, "hidden_size", source)
    heads, vocab = size(layer, "num_attention_heads", source), size(layer, "vocab_size", source)
    common = HfDraft(
        eagle1=False,
        hidden_size=hidden,
        target_hidden_size=size(config, "target_hidden_size", source, hidden),
        intermediate_size=size(layer, "intermediate_size", source),
        num_heads=heads,
        num_kv_heads=size(layer, "num_key_value_heads", source, heads),
        head_dim=size(layer, "head_dim", source, hidden // heads),
        mla=None,
        vocab_size=vocab,
        draft_vocab_size=size(config, "draft_vocab_size", source, vocab),
        num_layers=size(layer, "num_hidden_layers", source),
        norm_epsilon=number(layer, "rms_norm_eps", source, 1e-6),
        rope=comparable_rope(layer, source),
        inner_ids=None,
        outer_ids=None,
        fc_norm=False,
        norm_output=False,
        norm_before_fc=False,
        norm_before_residual=False,
        qk_layernorm=False,
    )
    mask = inner.get("mask_token_id", config.get("mask_token_id"))
    if type(mask) is not int or mask < 0:
        raise UserError(f"{source}: mask_token_id must be a token id, found {mask!r}")
    dspark = algorithm == "dspark"
    confidence = dspark and switch(config, "enable_confidence_head", source)
    if confidence and not switch(config, "confidence_head_with_markov", source):
        raise UserError(f"{source}: confidence_head_with_markov = False is not supported")
    block_size = size({**inner, **config}, "block_size", source)
    return HfBlockDraft(
        algorithm=algorithm,
        draft=common,
        aux_layers=_aux_layers(config, inner, nested, source),
        block_size=block_size,
        mask_token=mask,
        markov=_markov(config, source) if dspark else None,
        confidence_head=confidence,
    )


def _algorithm(config: dict[str, Any], source: str) -> str:
    names = config["architectures"]
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise UserError(f"{source}: architectures must name exactly one class, found {names!r}")
    return ARCHITECTURES[names[0]]


def _nested_layer(config: dict[str, Any], source: str) -> dict[str, Any]:
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, dict):
        raise UserError(f"{source}: transformer_layer_config is missing")
    from transformers import Qwen3Config

    return Qwen3Config(**layer).to_dict()  # the library leaves out what is a default


def _check_network(
    config: dict[str, Any], layer: dict[str, Any], inner: dict[str, Any], kind: str, source: str
) -> None:
    if layer.get("model_type", "qwen3") != "qwen3":
        raise UserError(f"{source}: layers of type {layer['model_type']!r}, only 'qwen3'")
    for key, value in REQUIRED_VALUES.items():
        if layer.get(key) not in (None, value):
            raise UserError(f"{source}: {key} = {layer[key]!r} is not supported, only {value!r}")
    if "sliding_attention" in (layer.get("layer_types") or ()) or inner.get("use_swa"):
        raise UserError(f"{source}: layers with a sliding window are not supported")
    if inner.get("causal") or config.get("is_causal"):
        raise UserError(f"{source}: a causal block is not supported, its slots see each other")
    if inner.get("input_embedding_scale", 1.0) != 1.0:
        raise UserError(f"{source}: input_embedding_scale is not supported, only 1.0")
    anchored = {**inner, **config}.get("sample_from_anchor", kind == "dspark")
    if anchored != (kind == "dspark"):
        raise UserError(
            f"{source}: sample_from_anchor = {anchored!r} is not supported in a {kind} draft"
        )


def _markov(config: dict[str, Any], source: str) -> tuple[str, int]:
    kind = config.get("markov_head_type") or "vanilla"
    if not isinstance(kind, str):
        raise UserError(f"{source}: markov_head_type must be a name, found {kind!r}")
    return kind, size(config, "markov_rank", source)


def _aux_layers(
    config: dict[str, Any], inner: dict[str, Any], nested: bool, source: str
) -> tuple[int, ...] | None:
    """Return the aux layers as ids of outputs. The speculators library counts states."""
    ids = inner.get("target_layer_ids") or config.get("target_layer_ids")
    if nested:
        ids = config.get("aux_hidden_state_layer_ids")
    if not ids:
        return None
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise UserError(f"{source}: aux layers must be numbers, found {ids!r}")
    outputs = [i - 1 for i in ids] if nested else ids
    if outputs != sorted(set(outputs)) or outputs[0] < 0:
        raise UserError(
            f"{source}: aux layers must ascend and be outputs of layers, found {outputs}"
        )
    return tuple(outputs)
