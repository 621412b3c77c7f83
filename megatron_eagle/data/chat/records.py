"""One JSON record -> token documents with their masks, whatever form the record has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eagle.data.chat.conversations import parse_conversation
from megatron_eagle.data.chat.masked_tokens import Document, mask_tokens
from megatron_eagle.data.chat.template import ChatTemplate
from megatron_eagle.data.chat.tokenizer import load_tokenizer

_MAX_IDS = 2**31
"""What a token takes on disk is at most an int32."""


@dataclass(frozen=True)
class RecordOptions:
    """How records become tokens; picklable, so that workers build their own reader of it.

    ``tokenizer``: Hugging Face directory or SentencePiece file. ``template``: file that stands in
    for the tokenizer's own chat template. ``template_options``: JSON object of the
    variables that every rendering gets. ``vocab_size``: of the base, when it is not the
    tokenizer's. ``append_eod``: end plain texts with the end-of-sequence token.
    """

    tokenizer: str
    template: str | None = None
    template_options: str = "{}"
    vocab_size: int | None = None
    append_eod: bool = True


class RecordReader:
    """Reads ``messages`` or ``conversations`` (assistant supervised), ``text`` (everything
    supervised), and ``prompt_ids`` with ``answer_ids`` (the answer supervised)."""

    def __init__(self, options: RecordOptions) -> None:
        self.options = options
        self.tokenizer = load_tokenizer(options.tokenizer)
        self.vocab_size = options.vocab_size or self.tokenizer.vocab_size
        self._templates: dict[str, ChatTemplate] = {}
        self._given = _read_template(options.template)

    @property
    def unstable_turns(self) -> int:
        """Turns so far that became samples of their own, see :mod:`.chat_template`."""
        return sum(template.unstable_turns for template in self._templates.values())

    def read(self, record: Any) -> list[Document]:
        """The record's documents, each with at least one supervised token after its first.

        Raises ``ValueError`` saying what is wrong with the record.
        """
        if not isinstance(record, Mapping):
            raise ValueError("not a JSON object")
        if "messages" in record or "conversations" in record:
            documents = self._chat(record)
        elif "prompt_ids" in record:
            documents = [_answer(record)]
        elif "text" in record:
            documents = [self._text(record["text"])]
        else:
            raise ValueError(
                "the record has none of messages, conversations, text, prompt_ids but "
                f"{sorted(record)[:4]}"
            )
        for document in documents:
            self._check(document)
        return documents

    def _chat(self, record: Mapping[str, Any]) -> list[Document]:
        conversation = parse_conversation(record)
        source = self._given or self.tokenizer.chat_template(conversation.tools)
        if source is None:
            raise ValueError(
                f"--tokenizer {self.options.tokenizer} has no chat template; give --chat-template"
            )
        if source not in self._templates:
            options = json.loads(self.options.template_options)
            self._templates[source] = ChatTemplate(source, self.tokenizer.names, options)
        samples = self._templates[source].samples(conversation)
        return [mask_tokens(sample, self.tokenizer) for sample in samples]

    def _text(self, text: Any) -> Document:
        if not isinstance(text, str) or not text.strip():
            raise ValueError("'text' is not a text")
        ids, _ = self.tokenizer.encode(text)
        if self.options.append_eod:
            if self.tokenizer.eos_id is None:
                raise ValueError(
                    f"--tokenizer {self.options.tokenizer} has no end-of-sequence token; "
                    "give --no-append-eod"
                )
            ids = [*ids, self.tokenizer.eos_id]
        return Document(np.asarray(ids, dtype=np.int64), np.ones(len(ids), dtype=bool))

    def _check(self, document: Document) -> None:
        if not document.mask[1:].any():
            raise ValueError("nothing in it is supervised: no assistant tokens")
        if document.ids.min() < 0 or document.ids.max() >= self.vocab_size:
            bad = document.ids[(document.ids < 0) | (document.ids >= self.vocab_size)][0]
            raise ValueError(
                f"token id {bad} is outside the vocabulary's 0 to {self.vocab_size - 1}"
            )


def _read_template(file: str | None) -> str | None:
    if file is None:
        return None
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--chat-template {file}: no such file")
    return path.read_text(encoding="utf-8")


def _answer(record: Mapping[str, Any]) -> Document:
    parts = []
    for name in ("prompt_ids", "answer_ids"):
        ids = record.get(name)
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            raise ValueError(f"{name} must be a non-empty list of token ids")
        if abs(worst := max(ids, key=abs)) >= _MAX_IDS:
            raise ValueError(f"token id {worst} is outside any vocabulary")
        parts.append(np.asarray(ids, dtype=np.int64))
    mask = np.zeros(len(parts[0]) + len(parts[1]), dtype=bool)
    mask[len(parts[0]) :] = True
    return Document(np.concatenate(parts), mask)
