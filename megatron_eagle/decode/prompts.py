"""Prompts of an evaluation, read from a JSONL file, and the ids that end an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.directory import BaseInfo, end_ids
from megatron_eagle.data.jsonl import ids, read_records
from megatron_eagle.errors import UserError


def read_prompt_ids(path: Path, tokenizer_dir: str | None, vocab_size: int) -> list[list[int]]:
    """Return token ids per line: ``prompt_ids``, or ``prompt`` encoded as plain text.

    The tokenizer of ``tokenizer_dir`` encodes. Raises ``UserError`` naming file and line.
    """
    tokenizer = None if tokenizer_dir is None else _tokenizer(tokenizer_dir)
    prompts = []
    for where, record in read_records(path, "prompts"):
        if "prompt_ids" not in record:
            record = {"prompt_ids": _encoded(record, tokenizer, where)}
        prompts.append(ids(record, "prompt_ids", vocab_size, where))
    if not prompts:
        raise UserError(f"<prompts> {path}: holds no prompt")
    return prompts


def digest(prompts: Sequence[Sequence[int]]) -> str:
    """Return the SHA-256 of the ids, which tells the prompts of two evaluations apart."""
    return hashlib.sha256(json.dumps(list(map(list, prompts))).encode()).hexdigest()


def stop_ids(base: BaseInfo) -> list[int]:
    """Return the ids at which a server ends an answer of ``base``."""
    return end_ids(base.hf_config)


def _tokenizer(directory: str) -> Any:
    if not Path(directory).is_dir():
        raise UserError(f"<tokenizer> {directory}: no such directory")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def _encoded(record: dict[str, Any], tokenizer: Any, where: str) -> Any:
    if not isinstance(record.get("prompt"), str):
        raise UserError(f"{where}: has neither prompt_ids nor prompt")
    if tokenizer is None:
        raise UserError(f"{where}: holds text, which needs <tokenizer>")
    return tokenizer(record["prompt"])["input_ids"]
