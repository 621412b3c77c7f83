"""Conversations as they are taught, for a person to look at: supervised text between marks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_eagle.data.chat.masked_tokens import Document
from megatron_eagle.data.chat.notes import notes
from megatron_eagle.data.chat.records import RecordOptions, RecordReader
from megatron_eagle.data.chat.tokenizer import TextTokenizer
from megatron_eagle.data.jsonl import parse_lines
from megatron_eagle.errors import UserError, message_of

OPEN, CLOSE = ">>>", "<<<"
"""Marks before and after supervised text."""


def shown(inputs: list[str], options: RecordOptions, count: int) -> Iterator[str]:
    """Yield the first ``count`` usable records of ``inputs``, and the notes on them, as text.

    Bad lines before them are named. Raises ``UserError`` naming the parameter at fault.
    """
    reader, left = RecordReader(options), count
    yield f"supervised text stands between {OPEN} and {CLOSE}"
    for file in inputs:
        for number, line in _lines(file):
            if not left:
                break
            for _, record in parse_lines(line):
                where = f"{file}:{number}"
                try:
                    if isinstance(record, UserError):
                        raise record
                    documents = reader.read(record)
                except ValueError as error:
                    yield f"--- {where}: {UserError(message_of(error))}"
                    continue
                left -= 1
                for nth, document in enumerate(documents, start=1):
                    of = f", document {nth} of {len(documents)}" if len(documents) > 1 else ""
                    supervised = int(document.mask.sum())
                    yield f"--- {where}{of}: {len(document.ids)} tokens, {supervised} supervised"
                    yield marked_text(document, reader.tokenizer)
    for note in notes(reader.take_counts()):
        yield f"note: {note}"


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    if not Path(file).is_file():
        raise UserError(f"<input> {file}: no such file")
    with open(file, "rb") as lines:
        yield from enumerate(lines, start=1)


def marked_text(document: Document, tokenizer: TextTokenizer) -> str:
    """Return the text of the document's tokens with ``OPEN`` and ``CLOSE`` around supervised ones.

    It is read off the tokens, not off the template, so it is what is taught.
    """
    mask = document.mask.astype(np.int8)
    edges = np.flatnonzero(np.diff(mask)) + 1
    words = []
    for run in np.split(np.arange(len(mask)), edges):
        text = tokenizer.decode(document.ids[run].tolist())
        words.append(f"{OPEN}{text}{CLOSE}" if mask[run[0]] else text)
    return "".join(words)
