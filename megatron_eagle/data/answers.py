"""JSONL of a base's own answers (tools/regenerate.py) as training documents.

A line holds ``prompt_ids`` and ``answer_ids``; the answer is supervised, the prompt only read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.data.jsonl_chunks import parse_lines


class AnswerDocuments:
    """The conversations of a JSONL of answers, held in memory. ``lengths`` [N] int64."""

    def __init__(self, file: str, vocab_size: int) -> None:
        self.conversations = read_answers(file, vocab_size)
        self.lengths = np.asarray([len(p) + len(a) for p, a in self.conversations], dtype=np.int64)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [n] int64 and mask [n] bool of one conversation."""
        prompt, answer = self.conversations[index]
        mask = np.zeros(len(prompt) + len(answer), dtype=bool)
        mask[len(prompt) :] = True
        return np.concatenate([prompt, answer]), mask

    def counts(self, vocab_size: int) -> Tensor:
        """How often each id is supervised, [V] int64."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for _, answer in self.conversations:
            counts += np.bincount(answer, minlength=vocab_size)
        return torch.from_numpy(counts)


def read_answers(file: str, vocab_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt ids, answer ids) of every line; ``ValueError`` naming file and line if one is bad."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--eagle-train-data {file}: no such file")
    conversations = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            for _, record in parse_lines(line, number):
                conversations.append(_parse(record, vocab_size, f"{file}:{number}"))
    if not conversations:
        raise ValueError(f"--eagle-train-data {file}: the data set is empty")
    return conversations


def _parse(record: Any, vocab_size: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(record, ValueError):
        raise ValueError(f"{where}: {record}")
    try:
        prompt, answer = record["prompt_ids"], record["answer_ids"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: not a JSON object with prompt_ids and answer_ids ({error!r})"
        ) from None
    arrays = []
    for name, ids in (("prompt_ids", prompt), ("answer_ids", answer)):
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            raise ValueError(f"{where}: {name} must be a non-empty list of token ids")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ValueError(f"{where}: {name} has an id outside the base's 0 to {vocab_size - 1}")
        arrays.append(np.asarray(ids, dtype=np.int64))
    return arrays[0], arrays[1]
