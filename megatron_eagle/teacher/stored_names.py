"""The names under which a checkpoint keeps the base's weights.

Megatron stacks the layers of a homogeneous model on a leading axis or numbers them, and a norm has
Transformer Engine's name (that of the linear layer it is fused into) or its own: which of these
depends on the release, on the layer implementation and on the kind of model that saved it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from megatron_eagle.compat import ShardedTensor, ShardedTensorFactory, nested_values

_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.")
NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("input_layernorm.", "self_attention.in_proj.layer_norm_"),
    ("input_layernorm.", "self_attention.layer_norm_"),
    ("norm.", "mixer.in_proj.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)
"""A norm's own name -> the one it has inside Transformer Engine's fused layer."""
WEIGHTS = ("decoder.", "embedding.", "output_layer.")
"""Prefixes of the weights of a base; other tensors (optimizer, MTP layers) are not read."""


def is_numbered(keys: Collection[str]) -> bool:
    """Return whether the layers in ``keys`` are numbered, not stacked."""
    return any(_NUMBERED.match(key) for key in keys)


def stored_name(key: str, keys: Collection[str]) -> str:
    """Return the name of ``keys`` under which the weight ``key`` is stored; itself if none is."""
    if key in keys:
        return key
    for own, fused in NORMS:
        for before, after in ((own, fused), (fused, own)):
            if before in key and key.replace(before, after) in keys:
                return key.replace(before, after)
    return key


def sharded_weights(gpt: Any, keys: Collection[str]) -> dict[str, Any]:
    """Return ``gpt.sharded_state_dict()`` with its layers stacked or numbered as in ``keys``."""
    if not is_numbered(keys):
        return gpt.sharded_state_dict()
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": gpt.pg_collection.dp_cp}
    return gpt.sharded_state_dict(metadata=metadata)


def adopt_names(sharded: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Return ``sharded``, changed in place, with the names that its tensors have in ``keys``."""
    names = set(keys)
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensor):
            value.key = stored_name(value.key, names)
    return sharded


def unread_weights(gpt: Any, sharded: dict[str, Any], keys: Collection[str]) -> list[str]:
    """Return the weights in ``keys`` of this stage that ``sharded`` does not ask for."""
    values = list(nested_values(sharded))
    asked = {v.key for v in values if isinstance(v, ShardedTensor | ShardedTensorFactory)}
    # A recurrent layer's fused projections are stored in parts, which have names of their own.
    parts = tuple(f"{v.key}." for v in values if isinstance(v, ShardedTensorFactory))
    here = {layer.layer_number - 1 for layer in getattr(gpt.decoder, "layers", ())}
    return sorted(
        key
        for key in keys
        if key.startswith(WEIGHTS)
        and key not in asked
        and not key.startswith(parts)
        and _belongs_here(key, gpt, here)
    )


def _belongs_here(key: str, gpt: Any, layers: Collection[int]) -> bool:
    """Return whether a weight is one of this pipeline stage's."""
    if match := _NUMBERED.match(key):
        return int(match[1]) in layers
    if key.startswith("decoder.layers."):
        return bool(layers)
    if key.startswith("decoder."):
        return bool(layers) and gpt.post_process
    return gpt.pre_process if key.startswith("embedding.") else gpt.post_process
