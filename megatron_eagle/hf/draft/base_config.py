"""The config.json of a base that Megatron trained, from a Hugging Face directory of the user's.

The arguments of such a base say its dimensions and its rope, but neither its class nor its special
tokens. The directory adds these; where both speak, they must agree.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.files.text_part import read_text_config
from megatron_eagle.hf.tables.rope import comparable_rope
from megatron_eagle.user_files import naming

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
}
"""Fields of config.json that every class has -> Megatron's arguments."""


def with_hf_config(base: BaseInfo, directory: Path) -> BaseInfo:
    """Return ``base`` with the config.json of ``directory``.

    Raises ``UserError`` naming ``<hf_config>`` and the field in which the two contradict each
    other.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"<hf_config> {literal(path)}: no such file")
    with naming("hf_config"):
        config = read_text_config(path)
    expected: dict[str, Any] = {field: base.megatron_args[name] for field, name in SIZES.items()}
    for field, value in expected.items():
        if config.get(field) != value:
            hint = "; describe-base can write another" if field == "vocab_size" else ""
            raise UserError(
                f"<hf_config> {literal(path)}: {field} is {literal(config.get(field))}, the base "
                f"of this draft has {value}{hint}"
            )
    if base.megatron_args.get("position_embedding_type", "rope") == "rope":
        _check_rope(base, config, path)
    return replace(base, hf_config={**base.hf_config, **config})


def _check_rope(base: BaseInfo, config: dict[str, Any], path: Path) -> None:
    source = f"<hf_config> {literal(path)}"
    longest = base.hf_config["max_position_embeddings"]
    theirs = comparable_rope({**_whole_heads(config), "max_position_embeddings": longest}, source)
    ours = comparable_rope(_whole_heads(base.hf_config), f"base {base.name}")
    if theirs != ours:
        raise UserError(f"{source}: rope {literal(theirs)}, the base of this draft has {ours}")


def _whole_heads(config: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` as if rope turned whole heads, which a draft's does."""
    name = "partial_rotary_factor"
    nested = {
        key: {**fields, name: None}
        for key in ("rope_parameters", "rope_scaling")
        if isinstance(fields := config.get(key), dict)
    }
    return {**config, name: None, **nested}
