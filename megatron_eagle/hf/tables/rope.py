"""The rotary embedding of a config.json: Megatron's flags, and what no flag can say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_eagle.hf.tables.config_fields import number, size, switch

# What Megatron's RotaryEmbedding hard-codes; only the factor is a flag.
MEGATRON_LLAMA3 = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}


def rope_args(config: Mapping[str, Any], partial: bool, source: str) -> dict[str, Any]:
    """Megatron argparse names -> values; `partial`: the model's class reads
    partial_rotary_factor."""
    rope = described_rope(config, source)
    base = rope["rope_theta"]
    if base != int(base):
        raise ValueError(f"{source}: rope_theta = {base}, but --rotary-base is an integer")
    percent = _rotary_percent(config, partial, source)
    args: dict[str, Any] = {"rotary_base": int(base), "rotary_percent": percent}
    if _is_megatrons(rope):
        args |= {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    return args


def rope_beyond_flags(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The description that :mod:`megatron_eagle.attention.rope` reads; empty where the flags of
    :func:`rope_args` say all."""
    rope = described_rope(config, source)
    return {} if rope["rope_type"] == "default" or _is_megatrons(rope) else rope


def _rotary_percent(config: Mapping[str, Any], partial: bool, source: str) -> float:
    """The part of a head's channels that positions turn."""
    name = "partial_rotary_factor"
    part = number({name: config.get(name), **rope_fields(config)}, name, 1.0, source)
    if part > 1.0 or (part != 1.0 and not partial):
        raise ValueError(
            f"{source}: {name} = {part} is not supported: transformers' class of this model turns "
            "whole heads, other readers do not"
        )
    return float(part)


def _is_megatrons(rope: Mapping[str, Any]) -> bool:
    return rope["rope_type"] == "llama3" and all(
        rope[key] == value for key, value in MEGATRON_LLAMA3.items()
    )


def rope_fields(config: Mapping[str, Any]) -> Any:
    """Both spellings: rope_scaling beside rope_theta, and the newer rope_parameters."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def described_rope(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """rope_type, rope_theta and every number of its kind, checked."""
    rope = rope_fields(config)
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{source}: rope parameters per layer type are not supported: {rope}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(number({**config, **rope}, "rope_theta", 10000.0, source))
    described: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    if kind == "default":
        return described
    readers = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
    if kind not in readers:
        known = ", ".join(map(repr, ["default", *readers]))
        raise ValueError(f"{source}: rope type {kind!r} is not supported; known: {known}")
    original = size(config, "max_position_embeddings", source)
    return described | readers[kind]({"original_max_position_embeddings": original, **rope}, source)


def _linear(rope: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {"factor": float(number(rope, "factor", None, source))}


def _llama3(rope: Mapping[str, Any], source: str) -> dict[str, Any]:
    numbers = {
        key: float(number(rope, key, None, source))
        for key in ("factor", "low_freq_factor", "high_freq_factor")
    }
    if numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise ValueError(f"{source}: llama3 rope with low_freq_factor >= high_freq_factor")
    return numbers | _original(rope, source)


def _yarn(rope: Mapping[str, Any], source: str) -> dict[str, Any]:
    original = _original(rope, source)
    factor = float(number(rope, "factor", None, source))
    given = rope.get("attention_factor")
    if given is None:
        numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
        if numerator and denominator:
            given = yarn_mscale(factor, numerator) / yarn_mscale(factor, denominator)
        else:
            given = yarn_mscale(factor, 1.0)
    return {
        "factor": factor,
        "beta_fast": float(number(rope, "beta_fast", 32.0, source)),
        "beta_slow": float(number(rope, "beta_slow", 1.0, source)),
        "truncate": switch(rope, "truncate", True, source),
        "attention_factor": float(given),
        **original,
    }


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much yarn strengthens attention over a context ``factor`` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original(rope: Mapping[str, Any], source: str) -> dict[str, Any]:
    key = "original_max_position_embeddings"
    return {key: size(rope, key, source)}
