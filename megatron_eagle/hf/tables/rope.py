"""The rotary embedding in a config.json: the one place that knows its two spellings.

Older files have ``rope_theta`` beside ``rope_scaling``, newer ones everything in
``rope_parameters``; the oldest name of ``rope_type`` is ``type``. Only ``plain_draft``, which
verifies an export independently, reads the fields without this module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.tables.config_fields import number, size, switch

DEFAULT_THETA = 10000.0
ORIGINAL_LENGTH = "original_max_position_embeddings"
NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH),
    "yarn": (
        "factor",
        ORIGINAL_LENGTH,
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""Supported rope types -> the fields that each one reads."""
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def rope_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the rope fields as they stand in config.json, from either spelling; maybe empty.

    ``rope_theta`` is among them only in the newer spelling. Raises UserError, naming ``source``,
    for fields that differ between types of layers.
    """
    fields: Any = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{source}: {key} must be a JSON object, found {literal(repr(value))}")
        fields = value or fields
    if any(isinstance(value, dict) for value in fields.values()):
        raise UserError(f"{source}: rope parameters per layer type are not supported: {fields}")
    return fields


def rope_kind(fields: Mapping[str, Any]) -> str:
    """Return the rope type that ``fields`` (see ``rope_fields``) name."""
    return fields.get("rope_type", fields.get("type", "default"))


def complete_rope(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ``rope_type``, ``rope_theta`` and every number of the type, checked, none left out.

    This is the description that ``megatron_eagle.attention.rope`` computes angles from. Raises
    UserError, naming ``source``, for an unsupported type and a missing or impossible number.
    """
    fields = rope_fields(config, source)
    kind, theta = _supported_kind(fields, source), _theta(config, fields, source)
    readers = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
    if kind != "default":
        longest = size(config, "max_position_embeddings", source)
        fields = {ORIGINAL_LENGTH: longest, **fields}
    return {"rope_type": kind, "rope_theta": theta, **readers[kind](fields, source)}


def comparable_rope(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the rope of a draft in a form in which equal ropes are equal dictionaries.

    Both spellings give the same; values that are null or the default are left out. Raises
    UserError, naming ``source``, for an unsupported type and for partially rotated heads.
    """
    fields = rope_fields(config, source)
    if fields.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UserError(f"{source}: partial_rotary_factor is not supported, only 1.0")
    kind, theta = _supported_kind(fields, source), _theta(config, fields, source)
    fields = {ORIGINAL_LENGTH: config.get("max_position_embeddings"), **fields}
    numbers = {
        key: fields[key]
        for key in NUMBERS[kind]
        if fields.get(key) is not None and fields[key] != YARN_DEFAULTS.get(key)
    }
    return {"rope_type": kind, "rope_theta": theta, **numbers}


def both_spellings(fields: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """Return config.json's rope fields in both spellings, for whole heads and base ``theta``.

    ``fields`` are as ``rope_fields`` returns them, of a supported type, whose numbers alone are
    kept. Readers disagree about ``partial_rotary_factor``, so drafts rotate all channels of their
    heads; and a multimodal base's sections (``mrope_section``) are of positions that no draft has.
    """
    kind = rope_kind(fields)
    numbers = {key: fields[key] for key in NUMBERS[kind] if key in fields}
    scaling: dict[str, Any] = {"rope_type": kind, **numbers}
    return {
        "rope_theta": theta,
        **({} if kind == "default" else {"rope_scaling": scaling}),
        "rope_parameters": {**scaling, "rope_theta": theta},
    }


def _supported_kind(fields: Mapping[str, Any], source: str) -> str:
    kind = rope_kind(fields)
    if not isinstance(kind, str) or kind not in NUMBERS:
        known = ", ".join(map(repr, NUMBERS))
        raise UserError(f"{source}: rope type {kind!r} is not supported; known: {known}")
    return kind


def _theta(config: Mapping[str, Any], fields: Mapping[str, Any], source: str) -> float:
    return number({**config, **fields}, "rope_theta", source, DEFAULT_THETA)


def _default(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {}


def _linear(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {"factor": number(fields, "factor", source)}


def _llama3(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    factors = ("factor", "low_freq_factor", "high_freq_factor")
    numbers = {key: number(fields, key, source) for key in factors}
    if numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise UserError(f"{source}: llama3 rope with low_freq_factor >= high_freq_factor")
    return {**numbers, ORIGINAL_LENGTH: size(fields, ORIGINAL_LENGTH, source)}


def _yarn(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    original = size(fields, ORIGINAL_LENGTH, source)
    factor = number(fields, "factor", source)
    return {
        "factor": factor,
        "beta_fast": number(fields, "beta_fast", source, YARN_DEFAULTS["beta_fast"]),
        "beta_slow": number(fields, "beta_slow", source, YARN_DEFAULTS["beta_slow"]),
        "truncate": switch(fields, "truncate", source, True),
        "attention_factor": _yarn_attention_factor(fields, factor, source),
        ORIGINAL_LENGTH: original,
    }


def _yarn_attention_factor(fields: Mapping[str, Any], factor: float, source: str) -> float:
    """Return the attention factor as stated, or derived from ``mscale`` and ``factor``."""
    if fields.get("attention_factor") is not None:
        return number(fields, "attention_factor", source)
    for key in ("mscale", "mscale_all_dim"):
        if fields.get(key):
            number(fields, key, source)
    numerator, denominator = fields.get("mscale"), fields.get("mscale_all_dim")
    if numerator and denominator:
        return _yarn_mscale(factor, numerator) / _yarn_mscale(factor, denominator)
    return _yarn_mscale(factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    """Return yarn's attention factor for a context ``factor`` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
