"""Prompts of an evaluation, read from a JSONL file, and the ids that end an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.directory import BaseInfo, token_ids


def read_prompt_ids(
    path: Path,
    tokenizer_dir: str | None,
    vocab_size: int,
    flag: str = "--prompts",
    tokenizer_flag: str = "--tokenizer",
) -> list[list[int]]:
    """Read token ids per line: ``prompt_ids``, or ``prompt`` encoded by the tokenizer of
    ``tokenizer_dir`` as plain text. Raises ``ValueError`` naming file and line, and the flags that
    gave them."""
    if not path.is_file():
        raise ValueError(f"{flag} {path}: no such file")
    tokenizer = None
    if tokenizer_dir is not None:
        tokenizer = _tokenizer(tokenizer_dir, tokenizer_flag)
    prompts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{flag} {path}: line {number}"
                ids = _ids(line, tokenizer, where, tokenizer_flag)
                prompts.append(_checked(ids, vocab_size, where))
    if not prompts:
        raise ValueError(f"{flag} {path}: holds no prompt")
    return prompts


def digest(prompts: Sequence[Sequence[int]]) -> str:
    """Return the SHA-256 of the ids, which tells the prompts of two evaluations apart."""
    return hashlib.sha256(json.dumps(list(map(list, prompts))).encode()).hexdigest()


def stop_ids(base: BaseInfo) -> list[int]:
    """Return the ids in the base's ``eos_token_id``."""
    return token_ids(base.hf_config, "eos_token_id")


def _tokenizer(directory: str, flag: str) -> Any:
    if not Path(directory).is_dir():
        raise ValueError(f"{flag} {directory}: no such directory")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def _ids(line: str, tokenizer: Any, where: str, tokenizer_flag: str) -> Any:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object")
    if "prompt_ids" in record:
        return record["prompt_ids"]
    if not isinstance(record.get("prompt"), str):
        raise ValueError(f"{where}: has neither prompt_ids nor prompt")
    if tokenizer is None:
        raise ValueError(f"{where}: holds text, which needs {tokenizer_flag}")
    return tokenizer(record["prompt"])["input_ids"]


def _checked(ids: Any, vocab_size: int, where: str) -> list[int]:
    if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
        raise ValueError(f"{where}: the prompt must be a non-empty list of token ids")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(f"{where}: token ids must lie in 0 to {vocab_size - 1}")
    return ids
