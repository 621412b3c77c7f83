"""The description of a base: from a file of the user's, from its importer, or from Megatron."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_eagle.checkpoint.directory import (
    BASE_JSON_NAME,
    BaseInfo,
    checkpoint_directory,
    load_base_json,
    parse_base,
)
from megatron_eagle.checkpoint.native.describe import describe_checkpoint
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import naming, read_json, reading_file


def read_base(directory: str | Path, description: str | Path | None = None) -> BaseInfo:
    """Describe the base in ``directory``, which may be one iteration of a save directory.

    ``description`` is a file in the format of eagle_base.json that is believed instead of the
    checkpoint; without it, eagle_base.json in the directory is, and without that the arguments
    that Megatron saved. Nothing is written, and nothing in the files is run. Raises ``UserError``
    naming the file at fault.
    """
    if description is not None:
        return _read_file(Path(description))
    root = Path(directory)
    with reading_file(root):
        if not root.is_dir():
            raise UserError(f"{literal(root)}: no such base checkpoint directory")
        if (root / BASE_JSON_NAME).exists():
            return load_base_json(root)
        if checkpoint_directory(root) == root and (root.parent / BASE_JSON_NAME).exists():
            return load_base_json(root.parent)
        return describe_checkpoint(root)


def _read_file(path: Path) -> BaseInfo:
    with naming("base_description"):
        return parse_base(read_json(path), literal(path))


def with_vocab_size(info: BaseInfo, vocab_size: int | None = None) -> BaseInfo:
    """Return ``info`` with another (unpadded) ``vocab_size``, if one is given."""
    if vocab_size is None:
        return info
    if not 0 < vocab_size <= info.vocab_size:
        raise UserError(
            f"<vocab_size> {vocab_size}: the checkpoint has {info.vocab_size} rows of vocabulary"
        )
    args = {**info.megatron_args, "vocab_size": vocab_size}
    config = {**info.hf_config, "vocab_size": vocab_size}
    return replace(info, vocab_size=vocab_size, megatron_args=args, hf_config=config)
