"""Prompts of an evaluation, read from a JSONL file, and the ids that end an answer."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.directory import BaseInfo, token_ids
from megatron_eagle.data.chat.conversations import CHAT_NAMES
from megatron_eagle.data.chat.fields import is_absent
from megatron_eagle.data.chat.prompts import PromptTemplate, read_prompt
from megatron_eagle.data.jsonl import ids, read_records
from megatron_eagle.errors import UserError
from megatron_eagle.hf.files.pretrained import load_hf_tokenizer
from megatron_eagle.user_files import reading_file

logger = logging.getLogger("megatron_eagle")
_TEXTS = ("prompt", *CHAT_NAMES, "text")
"""Fields that hold a prompt as text; the first one that a record has is read."""


def read_prompt_ids(path: Path, tokenizer_dir: str | None, vocab_size: int) -> list[list[int]]:
    """Return token ids per line.

    A line holds ``prompt_ids``; a conversation to be answered or a user's ``prompt``, which the
    chat template of the tokenizer in ``tokenizer_dir`` renders; or ``text``, which it encodes as it
    is, as it does ``prompt`` if it has no chat template. The first rank logs what was rendered
    otherwise than the prompts say. Raises ``UserError`` naming file and line.
    """
    reader = None if tokenizer_dir is None else _TextReader(tokenizer_dir)
    prompts = []
    for where, record in read_records(path, "prompts"):
        form = next((name for name in _TEXTS if not is_absent(record.get(name))), None)
        if is_absent(record.get("prompt_ids")) and (form or "prompt_ids" not in record):
            if form is None:
                raise UserError(f"{where}: has neither prompt_ids nor prompt, messages or text")
            if reader is None:
                raise UserError(f"{where}: holds text, which needs <tokenizer>")
            with reading_file(where):
                record = {"prompt_ids": reader.ids(record, form, where)}
        prompts.append(ids(record, "prompt_ids", vocab_size, where))
    if not prompts:
        raise UserError(f"<prompts> {path}: holds no prompt")
    if reader is not None and os.environ.get("RANK", "0") == "0":
        for note in reader.notes():
            logger.warning("%s: %s", path, note)
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

    def ids(self, record: dict[str, Any], form: str, where: str) -> list[int]:
        """Return the ids of what ``record`` holds under the name ``form``."""
        if form != "text" and self._template.is_there:
            return self._template.ids(read_prompt(record, where), where)
        if form in CHAT_NAMES or (form == "prompt" and not isinstance(record[form], str)):
            raise UserError(f"{where}: holds messages, but <tokenizer> has no chat template")
        if not isinstance(record[form], str):
            raise UserError(f"{where}: 'text' is not a text")
        return self._tokenizer(record[form])["input_ids"]

    def notes(self) -> Iterator[str]:
        """Yield what was rendered otherwise than the prompts so far say."""
        yield from self._template.notes()
