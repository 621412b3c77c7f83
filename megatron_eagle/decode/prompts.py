"""Prompts of an evaluation, read from a JSONL file, and the ids that end an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.directory import BaseInfo, token_ids
from megatron_eagle.data.chat.conversations import CHAT_NAMES
from megatron_eagle.data.chat.prompts import PromptTemplate, read_prompt
from megatron_eagle.data.jsonl import ids, read_records
from megatron_eagle.errors import UserError
from megatron_eagle.hf.files.pretrained import load_hf_tokenizer
from megatron_eagle.user_files import reading_file

_TEXTS = ("prompt", "text", *CHAT_NAMES)


def read_prompt_ids(path: Path, tokenizer_dir: str | None, vocab_size: int) -> list[list[int]]:
    """Return token ids per line.

    A line holds ``prompt_ids``; a conversation to be answered or a user's ``prompt``, which the
    chat template of the tokenizer in ``tokenizer_dir`` renders; or ``text``, which it encodes as it
    is, as it does ``prompt`` if it has no chat template. Raises ``UserError`` naming file and line.
    """
    reader = None if tokenizer_dir is None else _TextReader(tokenizer_dir)
    prompts = []
    for where, record in read_records(path, "prompts"):
        if "prompt_ids" not in record or (record["prompt_ids"] is None and len(record) > 1):
            if not any(record.get(name) for name in _TEXTS):
                raise UserError(f"{where}: has neither prompt_ids nor prompt, messages or text")
            if reader is None:
                raise UserError(f"{where}: holds text, which needs <tokenizer>")
            with reading_file(where):
                record = {"prompt_ids": reader.ids(record, where)}
        prompts.append(ids(record, "prompt_ids", vocab_size, where))
    if not prompts:
        raise UserError(f"<prompts> {path}: holds no prompt")
    return prompts


def digest(prompts: Sequence[Sequence[int]]) -> str:
    """Return the SHA-256 of the ids, which tells the prompts of two evaluations apart."""
    return hashlib.sha256(json.dumps(list(map(list, prompts))).encode()).hexdigest()


def stop_ids(base: BaseInfo) -> list[int]:
    """Return the ids that end the base's answers: those of config.json and generation_config.json
    when the base was imported."""
    return token_ids(base.hf_config, "eos_token_id")


class _TextReader:
    """Reader of prompts that are not token ids yet."""

    def __init__(self, directory: str) -> None:
        if not Path(directory).is_dir():
            raise UserError(f"<tokenizer> {directory}: no such directory")
        self._tokenizer = load_hf_tokenizer(directory, "tokenizer")
        self._template = PromptTemplate(self._tokenizer)

    def ids(self, record: dict[str, Any], where: str) -> list[int]:
        text = record.get("text")
        if not text and not self._template.is_there and isinstance(record.get("prompt"), str):
            text = record["prompt"]
        if isinstance(text, str) and text:
            return self._tokenizer(text)["input_ids"]
        if text:
            raise UserError(f"{where}: 'text' is not a text")
        if not self._template.is_there:
            raise UserError(f"{where}: holds messages, but <tokenizer> has no chat template")
        return self._template.ids(read_prompt(record, where), where)
