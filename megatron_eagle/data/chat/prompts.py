"""Prompts for a Hugging Face tokenizer: records of conversations to be answered, as token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_eagle.data.chat.conversations import Conversation, parse_prompt
from megatron_eagle.data.chat.notes import notes
from megatron_eagle.data.chat.template import ChatTemplate
from megatron_eagle.data.chat.tokenizer import special_names
from megatron_eagle.errors import UserError, message_of
from megatron_eagle.user_files import reading_file


def read_prompt(record: Mapping[str, Any], where: str) -> Conversation:
    """Return the conversation to be answered in ``record``.

    Raises ``UserError``, starting with ``where``, for a record that holds none.
    """
    with reading_file(where):
        try:
            return parse_prompt(record)
        except ValueError as error:
            raise UserError(f"{where}: {message_of(error)}") from error


class PromptTemplate:
    """Chat template of a tokenizer, which turns a conversation into the ids that a server sends."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._templates: dict[str, ChatTemplate] = {}

    @property
    def is_there(self) -> bool:
        """Return whether the tokenizer has a chat template."""
        return bool(self._tokenizer.chat_template)

    def notes(self) -> Iterator[str]:
        """Yield what was rendered otherwise than the prompts so far say."""
        counts: Counter[str] = Counter()
        for template in self._templates.values():
            counts.update(template.counts)
        yield from notes(counts)

    def ids(self, prompt: Conversation, where: str) -> list[int]:
        """Return the ids of ``prompt`` up to where its answer begins.

        Raises ``UserError``, starting with ``where``, when the template refuses it or leaves
        something of it out.
        """
        with reading_file(where):
            source = self._tokenizer.get_chat_template(None, prompt.tools)
            if source not in self._templates:
                self._templates[source] = ChatTemplate(source, special_names(self._tokenizer), {})
            try:
                text = self._templates[source].prompt(prompt)
            except ValueError as error:
                raise UserError(f"{where}: {message_of(error)}") from error
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
