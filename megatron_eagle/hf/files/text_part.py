"""The language model inside a multimodal model's files, as if it stood there alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.user_files import read_json_object

TIED = "tie_word_embeddings"
_OF_THE_WHOLE = ("quantization_config", "dtype", "torch_dtype", TIED)


@dataclass(frozen=True)
class TextPart:
    """Where the language model is in the files of a multimodal architecture.

    ``architecture``: that of the language model alone. ``prefix``: in front of its names where
    those of the language model alone begin with "model.". ``others``: in front of the names of the
    other parts.
    """

    architecture: str
    prefix: str
    others: tuple[str, ...]

    def name(self, stored: str) -> str | None:
        """Return the name that a stored tensor has in the language model, None if it is in no
        language model."""
        if stored.startswith(self.others):
            return None
        inside = stored.startswith(self.prefix)
        return f"model.{stored.removeprefix(self.prefix)}" if inside else stored

    def config(self, config: Mapping[str, Any], source: str) -> dict[str, Any]:
        """Return the config.json of the language model alone.

        Raises UserError, naming ``source``, if there is none in ``config``, or the two disagree
        about the output layer.
        """
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise UserError(f"{source}: text_config must be a JSON object")
        if config.get(TIED, text.get(TIED)) != text.get(TIED, config.get(TIED)):
            raise UserError(f"{source}: {TIED} is {config[TIED]}, and not that of text_config")
        shared = {name: config[name] for name in _OF_THE_WHOLE if config.get(name) is not None}
        return {**shared, **text, "architectures": [self.architecture]}


TEXT_PARTS = {
    "Qwen3_5ForConditionalGeneration": TextPart(
        "Qwen3_5ForCausalLM", "model.language_model.", ("model.visual.",)
    ),
}
"""Multimodal architecture -> its language model."""


def read_text_config(path: Path) -> dict[str, Any]:
    """Read the config.json in ``path``; of a multimodal model, return its language model's.

    Raises UserError, naming ``path``, for a file that is none.
    """
    config = read_json_object(path)
    part = text_part_of(config)
    return config if part is None else part.config(config, str(path))


def text_part_of(config: Mapping[str, Any]) -> TextPart | None:
    """Return where the language model is in the files of a multimodal config.json, else None."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    return TEXT_PARTS.get(name) if isinstance(name, str) else None
