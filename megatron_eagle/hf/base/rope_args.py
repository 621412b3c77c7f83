"""The rotary embedding of a config.json as Megatron arguments, and what no argument can say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.hf.tables.config_fields import number
from megatron_eagle.hf.tables.rope import ORIGINAL_LENGTH, complete_rope, rope_fields

MEGATRON_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, ORIGINAL_LENGTH: 8192}
"""Constants in Megatron's llama3 rope, of which only the factor is an argument."""


def rope_args(config: Mapping[str, Any], partial: bool, source: str) -> dict[str, Any]:
    """Return Megatron argument names -> values.

    ``partial``: whether the model's Hugging Face class reads ``partial_rotary_factor``. Raises
    UserError, naming ``source``, for what Megatron cannot compute.
    """
    rope = complete_rope(config, source)
    theta = rope["rope_theta"]
    if theta != int(theta):
        raise UserError(f"{source}: rope_theta = {theta}, but <rotary_base> is an integer")
    percent = _rotary_percent(config, partial, source)
    args: dict[str, Any] = {"rotary_base": int(theta), "rotary_percent": percent}
    if _is_megatron_llama3(rope):
        args |= {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    return args


def rope_beyond_args(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the description that ``megatron_eagle.attention.rope`` computes angles from.

    It is empty where the arguments of ``rope_args`` say everything.
    """
    rope = complete_rope(config, source)
    return {} if rope["rope_type"] == "default" or _is_megatron_llama3(rope) else rope


def _rotary_percent(config: Mapping[str, Any], partial: bool, source: str) -> float:
    """Return the fraction of a head's channels that is rotated."""
    name = "partial_rotary_factor"
    fraction = number({name: config.get(name), **rope_fields(config, source)}, name, source, 1.0)
    if fraction > 1.0 or (fraction != 1.0 and not partial):
        raise UserError(
            f"{source}: {name} = {fraction} is not supported: this model's class in transformers "
            "rotates whole heads, other readers do not"
        )
    return fraction


def _is_megatron_llama3(rope: Mapping[str, Any]) -> bool:
    return rope["rope_type"] == "llama3" and all(
        rope[key] == value for key, value in MEGATRON_LLAMA3.items()
    )
