"""Conversion of a JSON record of any supported form to token documents with loss masks.

A record that cannot be used is a ``ValueError`` saying why; ``prepare`` adds file and line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eagle.data.answers import join
from megatron_eagle.data.chat.conversations import CHAT_NAMES, parse_conversation
from megatron_eagle.data.chat.fields import is_absent
from megatron_eagle.data.chat.masked_tokens import Document, mask_tokens
from megatron_eagle.data.chat.template import ChatTemplate
from megatron_eagle.data.chat.tokenizer import load_tokenizer
from megatron_eagle.data.jsonl import ids, not_an_object, outside
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import reading

FORMS = ("prompt_ids", *CHAT_NAMES, "text")
"""Fields that tell a record's form, the first one first."""


@dataclass(frozen=True)
class RecordOptions:
    """Settings of the conversion, which can be pickled for worker processes.

    ``tokenizer``: Hugging Face directory or SentencePiece file. ``template``: file that replaces
    the tokenizer's own chat template. ``template_options``: variables of every rendering, as JSON
    has them. ``vocab_size``: of the base, when it is not the tokenizer's. ``append_eod``: end plain
    texts with the end-of-sequence token.
    """

    tokenizer: str
    template: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    append_eod: bool = True


class RecordReader:
    """Reader of the supported forms of records.

    ``messages`` or ``conversations``: the assistant's turns are supervised; ``text``: every token;
    ``prompt_ids`` with ``answer_ids``: the answer. Raises ``UserError`` for options that name no
    tokenizer or template.
    """

    def __init__(self, options: RecordOptions) -> None:
        self.options = options
        self.tokenizer = load_tokenizer(options.tokenizer)
        self.vocab_size = options.vocab_size or self.tokenizer.vocab_size
        self._templates: dict[str, ChatTemplate] = {}
        self._template = _read_template(options.template)

    def take_counts(self) -> Counter[str]:
        """Return what was rendered otherwise than conversations say since the last call, by the
        names in ``template.py``."""
        counts: Counter[str] = Counter()
        for template in self._templates.values():
            counts.update(template.counts)
            template.counts.clear()
        return +counts

    def read(self, record: Any) -> list[Document]:
        """Return the record's documents, each with a supervised token after its first.

        Raises ``ValueError`` saying what is wrong with the record.
        """
        if not isinstance(record, Mapping):
            raise ValueError(not_an_object(record))
        present = [name for name in FORMS if not is_absent(record.get(name))]
        form = next(iter(present or [name for name in FORMS if name in record]), None)
        if form == "prompt_ids":  # also beside messages: the ids are what the base itself wrote
            documents = [self._answer(record)]
        elif form in CHAT_NAMES:
            documents = self._chat(record)
        elif form == "text":
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
        source = self._template or self.tokenizer.chat_template(conversation.tools)
        if source is None:
            raise UserError(
                f"<tokenizer> {self.options.tokenizer} has no chat template; give <chat_template>"
            )
        if source not in self._templates:
            tokenizer = self.tokenizer
            special = [tokenizer.decode([i]) for i in sorted(tokenizer.special_ids)]
            self._templates[source] = ChatTemplate(
                source,
                tokenizer.names,
                self.options.template_options,
                special,
                tokenizer.end_tokens,
            )
        samples = self._templates[source].samples(conversation)
        return [mask_tokens(sample, self.tokenizer) for sample in samples]

    def _answer(self, record: Mapping[str, Any]) -> Document:
        prompt, answer = (
            np.asarray(ids(record, key, self.vocab_size), dtype=np.int64)
            for key in ("prompt_ids", "answer_ids")
        )
        return Document(*join(prompt, answer))

    def _text(self, text: Any) -> Document:
        if not isinstance(text, str) or not text.strip():
            raise ValueError("'text' is not a text")
        tokens, _ = self.tokenizer.encode(text)
        if self.options.append_eod:
            if self.tokenizer.eos_id is None:
                raise UserError(
                    f"<tokenizer> {self.options.tokenizer} has no end-of-sequence token; "
                    "give <no_append_eod>"
                )
            tokens = [*tokens, self.tokenizer.eos_id]
        return Document(np.asarray(tokens, dtype=np.int64), np.ones(len(tokens), dtype=bool))

    def _check(self, document: Document) -> None:
        if not document.mask[1:].any():
            raise ValueError("nothing in it is supervised: no assistant tokens")
        bad = document.ids[(document.ids < 0) | (document.ids >= self.vocab_size)]
        if len(bad):
            raise ValueError(outside(int(bad[0]), self.vocab_size))


def _read_template(file: str | None) -> str | None:
    if file is None:
        return None
    path = Path(file)
    with reading("chat_template", file):
        if not path.is_file():
            raise UserError(f"<chat_template> {literal(file)}: no such file")
        return path.read_text(encoding="utf-8")
