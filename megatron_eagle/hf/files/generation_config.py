"""End tokens of a Hugging Face model: config.json and generation_config.json each list some.

Servers stop at all of them. Whatever else generation_config.json says (penalties, temperatures) is
how somebody likes the model to be sampled, not what it is, and is left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.directory import token_ids
from megatron_eagle.errors import UserError
from megatron_eagle.hf.files.text_part import read_text_config
from megatron_eagle.user_files import read_json_object

_FILE = "generation_config.json"
_KEY = "eos_token_id"


def end_ids(directory: Path) -> list[int]:
    """Return the end tokens in both files of ``directory``, which may lack either.

    Raises ``UserError`` naming file and field for ids that are none.
    """
    config = directory / "config.json"
    return united_ends(read_text_config(config) if config.is_file() else {}, directory)


def united_ends(config: dict[str, Any], directory: Path) -> list[int]:
    """Return the end tokens of ``config``, then those that generation_config.json adds.

    Raises ``UserError`` naming file and field for ids that are none.
    """
    ends = _ids(config, directory / "config.json")
    generation = directory / _FILE
    added = _ids(read_json_object(generation), generation) if generation.is_file() else []
    return list(dict.fromkeys([*ends, *added]))


def with_all_ends(config: dict[str, Any], directory: Path, vocab_size: int) -> dict[str, Any]:
    """Return ``config`` with every end token of its ``directory`` in ``eos_token_id``.

    It is unchanged if generation_config.json adds none. Raises ``UserError`` naming that file for
    an id outside the vocabulary.
    """
    ends, own = united_ends(config, directory), token_ids(config, _KEY)
    added = ends[len(dict.fromkeys(own)) :]
    for token in added:
        if not 0 <= token < vocab_size:
            raise UserError(
                f"{directory / _FILE}: {_KEY} {token} is outside the vocabulary's 0 to "
                f"{vocab_size - 1}"
            )
    return {**config, _KEY: ends} if added else config


def _ids(config: dict[str, Any], file: Path) -> list[int]:
    ids = token_ids(config, _KEY)
    if not all(type(token) is int for token in ids):
        raise UserError(f"{file}: {_KEY} must be a token id or a list of them, not {ids[:4]}")
    return ids
