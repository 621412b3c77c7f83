"""Tokenizers that give each token's characters, as loss masks need: Hugging Face, SentencePiece."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_eagle.errors import UserError
from megatron_eagle.hf.files.generation_config import end_ids
from megatron_eagle.hf.files.pretrained import load_hf_tokenizer
from megatron_eagle.user_files import naming, panics_caught, reading

Offsets = list[tuple[int, int]]


class TextTokenizer(Protocol):
    """Tokenizer whose ``special_ids`` may end a turn.

    ``names`` maps the names by which chat templates know special tokens (``bos_token``) to them.
    ``end_tokens`` are those that the model ends an answer with, as far as its directory says.
    """

    vocab_size: int
    eos_id: int | None
    special_ids: set[int]
    names: dict[str, str]
    end_tokens: list[str]

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        """Return the ids of ``text``, nothing added, and the characters [start, end) of each."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``, special tokens included."""
        ...

    def chat_template(self, tools: list[Any] | None) -> str | None:
        """Return the tokenizer's own template, if it has one."""
        ...


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Load the tokenizer of a Hugging Face directory or a SentencePiece ``.model`` file.

    Raises ``UserError`` naming ``path`` when it holds no tokenizer that gives offsets.
    """
    source = Path(path)
    if source.is_file() and source.suffix == ".model":
        return SentencePieceTokenizer(source)
    if not source.is_dir():
        raise UserError(
            f"<tokenizer> {path}: neither a Hugging Face directory nor a SentencePiece .model file"
        )
    return HuggingFaceTokenizer(source)


def special_names(tokenizer: Any) -> dict[str, str]:
    """Return the special tokens of a Hugging Face tokenizer by the names templates know them by."""
    named = tokenizer.special_tokens_map
    return {key: str(value) for key, value in named.items() if not isinstance(value, list)}


class HuggingFaceTokenizer:
    """Fast tokenizer of a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        self.inner: Any = load_hf_tokenizer(directory, "tokenizer")
        if not self.inner.is_fast:
            raise UserError(
                f"<tokenizer> {directory}: masks need token offsets, which only a fast tokenizer "
                "(tokenizer.json) gives"
            )
        with naming("tokenizer"), reading("tokenizer", directory):
            self._read_tokens(directory)

    def _read_tokens(self, directory: Path) -> None:
        self.vocab_size = len(self.inner)
        self.eos_id: int | None = self.inner.eos_token_id
        added = self.inner.added_tokens_decoder
        self.special_ids = {i for i, token in added.items() if token.special}
        self.special_ids |= set(self.inner.all_special_ids)
        self.names = special_names(self.inner)
        ends = {*end_ids(directory), *([] if self.eos_id is None else [self.eos_id])}
        self.end_tokens = [self.decode([i]) for i in sorted(ends) if i < self.vocab_size]

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        with panics_caught():
            encoded = self.inner(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        return encoded["input_ids"], encoded["offset_mapping"]

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def chat_template(self, tools: list[Any] | None) -> str | None:
        if not self.inner.chat_template:
            return None
        return self.inner.get_chat_template(None, tools)


@dataclass
class SentencePieceTokenizer:
    """SentencePiece model.

    Control pieces that a text spells out (``</s>``) become their ids, as in the Hugging Face form
    of such a tokenizer; the texts between them are encoded one by one.
    """

    file: Path
    names: dict[str, str] = field(default_factory=dict)
    end_tokens: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        import sentencepiece

        with reading("tokenizer", self.file):
            self.inner: Any = sentencepiece.SentencePieceProcessor(model_file=str(self.file))
        self.vocab_size: int = self.inner.vocab_size()
        eos = self.inner.eos_id()
        self.eos_id: int | None = eos if eos >= 0 else None
        control = [i for i in range(self.vocab_size) if self.inner.IsControl(i)]
        self.special_ids = set(control)
        self._control = {self.inner.id_to_piece(i): i for i in control}
        spelled = sorted(map(re.escape, self._control), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(spelled) + ")") if spelled else None
        for name in ("bos", "eos", "unk", "pad"):
            index = getattr(self.inner, f"{name}_id")()
            if index >= 0:
                self.names[f"{name}_token"] = self.inner.id_to_piece(index)
        self.end_tokens = [] if self.eos_id is None else [self.names["eos_token"]]

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        ids: list[int] = []
        offsets: Offsets = []
        at = 0
        for part in self._split.split(text) if self._split else [text]:
            if part in self._control:
                ids.append(self._control[part])
                offsets.append((at, at + len(part)))
            elif part:
                encoded = self.inner.encode(part, return_type="offset_mapping")
                ids += encoded["ids"]
                offsets += [(at + start, at + end) for start, end in encoded["offsets"]]
            at += len(part)
        return ids, offsets

    def decode(self, ids: list[int]) -> str:
        words: list[str] = []
        run: list[int] = []
        for token in [*ids, None]:
            if token is not None and token not in self.special_ids:
                run.append(token)
                continue
            words.append(self.inner.decode(run) if run else "")
            run = []
            if token is not None:
                words.append(self.inner.id_to_piece(token))
        return "".join(words)

    def chat_template(self, tools: list[Any] | None) -> str | None:
        return None
