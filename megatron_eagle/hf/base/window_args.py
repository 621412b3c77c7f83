"""The sliding windows of a config.json as Megatron arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.hf.tables.config_fields import size

KINDS = ("full_attention", "sliding_attention")
WindowLayers = Callable[[Mapping[str, Any], int], list[bool]]
"""(config, number of layers) -> whether each layer has a window, where windows are on."""


def every_layer(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Return true for every layer (Mistral, Mixtral, Qwen3-MoE)."""
    return [True] * layers


def upper_layers(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Follow ``layer_types``, or take the layers from ``max_window_layers`` on (Qwen2, Qwen3)."""
    first = config.get("max_window_layers", 28)
    return _by_layer_types(config, [layer >= first for layer in range(layers)])


def every_other_layer(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Follow ``layer_types``, or take layers 0, 2, 4 and so on (gpt-oss)."""
    return _by_layer_types(config, [layer % 2 == 0 for layer in range(layers)])


def window_args(
    config: Mapping[str, Any], switch: str, window_layers: WindowLayers, source: str
) -> dict[str, Any]:
    """Return ``window_size`` and ``window_attn_skip_freq``, or nothing where no layer has a window.

    ``switch`` names the field that turns windows on. Hugging Face's ``sliding_window`` counts a
    position's own key, Megatron's ``window_size`` only the keys before it. Raises UserError, naming
    ``source``, for other kinds of layers.
    """
    kinds = set(config.get("layer_types") or []) - set(KINDS)
    if kinds:
        raise UserError(f"{source}: layer_types {sorted(kinds)} are not supported")
    if not config.get(switch):
        return {}
    layers = size(config, "num_hidden_layers", source)
    windowed = window_layers(config, layers)
    if len(windowed) != layers:
        raise UserError(f"{source}: layer_types has {len(windowed)} entries for {layers} layers")
    window = size(config, "sliding_window", source)
    if not any(windowed) or window >= size(config, "max_position_embeddings", source):
        return {}
    if window < 2:
        raise UserError(f"{source}: sliding_window = {window} is not supported, at least 2")
    pattern = {} if all(windowed) else {"window_attn_skip_freq": [int(on) for on in windowed]}
    return {"window_size": [window - 1, 0], **pattern}


def _by_layer_types(config: Mapping[str, Any], default: list[bool]) -> list[bool]:
    types = config.get("layer_types")
    return default if types is None else [kind == "sliding_attention" for kind in types]
