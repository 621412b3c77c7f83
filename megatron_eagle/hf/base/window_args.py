"""The sliding windows of a config.json as Megatron arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_eagle.hf.tables.config_fields import size

KINDS = ("full_attention", "sliding_attention")
WindowLayers = Callable[[Mapping[str, Any], int], list[bool]]


def every_layer(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Mistral, Mixtral, Qwen3-MoE: all layers or none."""
    return [True] * layers


def upper_layers(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Qwen2 and Qwen3: those that layer_types names, or from max_window_layers on."""
    first = config.get("max_window_layers", 28)
    return _named(config, [layer >= first for layer in range(layers)])


def every_other_layer(config: Mapping[str, Any], layers: int) -> list[bool]:
    """gpt-oss: those that layer_types names, or layers 0, 2, 4 and so on."""
    return _named(config, [layer % 2 == 0 for layer in range(layers)])


def window_args(config: Mapping[str, Any], flag: str, which: WindowLayers, source: str) -> dict:
    """``window_size`` and ``window_attn_skip_freq``, or nothing where no window is at work.

    ``flag`` names the field that switches windows on. Hugging Face's sliding_window counts a row's
    own key, Megatron's window_size the keys before it.
    """
    kinds = set(config.get("layer_types") or []) - set(KINDS)
    if kinds:
        raise ValueError(f"{source}: layer_types {sorted(kinds)} are not supported")
    if not config.get(flag):
        return {}
    layers = size(config, "num_hidden_layers", source)
    windowed = which(config, layers)
    if len(windowed) != layers:
        raise ValueError(f"{source}: layer_types has {len(windowed)} entries for {layers} layers")
    window = size(config, "sliding_window", source)
    if not any(windowed) or window >= size(config, "max_position_embeddings", source):
        return {}
    if window < 2:
        raise ValueError(f"{source}: sliding_window = {window} is not supported, at least 2")
    pattern = {} if all(windowed) else {"window_attn_skip_freq": [int(on) for on in windowed]}
    return {"window_size": [window - 1, 0], **pattern}


def _named(config: Mapping[str, Any], default: list[bool]) -> list[bool]:
    types = config.get("layer_types")
    return default if types is None else [kind == "sliding_attention" for kind in types]
