"""Prompts of an evaluation: token ids from a JSONL file, and the ids that end an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.directory import BaseInfo, token_ids
from megatron_eagle.errors import UserError


def read_prompt_ids(path: Path, tokenizer_dir: str | None, vocab_size: int) -> list[list[int]]:
    """Token ids per line: ``prompt_ids``, or ``prompt`` encoded by the tokenizer of
    ``tokenizer_dir`` as plain text. Raises ``UserError`` naming file and line."""
    if not path.is_file():
        raise UserError(f"<prompts> {path}: no such file")
    tokenizer = None if tokenizer_dir is None else _tokenizer(tokenizer_dir)
    prompts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"<prompts> {path}: line {number}"
                ids = _ids(line, tokenizer, where)
                prompts.append(_checked(ids, vocab_size, where))
    if not prompts:
        raise UserError(f"<prompts> {path}: holds no prompt")
    return prompts


def digest(prompts: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the ids: which prompts a figure is of."""
    return hashlib.sha256(json.dumps(list(map(list, prompts))).encode()).hexdigest()


def stop_ids(base: BaseInfo) -> list[int]:
    """The ids in the base's ``eos_token_id``."""
    return token_ids(base.hf_config, "eos_token_id")


def _tokenizer(directory: str) -> Any:
    if not Path(directory).is_dir():
        raise UserError(f"<tokenizer> {directory}: no such directory")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def _ids(line: str, tokenizer: Any, where: str) -> Any:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object")
    if "prompt_ids" in record:
        return record["prompt_ids"]
    if not isinstance(record.get("prompt"), str):
        raise UserError(f"{where}: has neither prompt_ids nor prompt")
    if tokenizer is None:
        raise UserError(f"{where}: holds text, which needs <tokenizer>")
    return tokenizer(record["prompt"])["input_ids"]


def _checked(ids: Any, vocab_size: int, where: str) -> list[int]:
    if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
        raise UserError(f"{where}: the prompt must be a non-empty list of token ids")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise UserError(f"{where}: token ids must lie in 0 to {vocab_size - 1}")
    return ids
