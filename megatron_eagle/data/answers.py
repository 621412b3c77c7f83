"""The base's own answers, a JSONL written by ``data/regenerate.py``, as training documents.

A line holds ``prompt_ids`` and ``answer_ids``; the answer is supervised, the prompt only read.
Shapes: N conversations, n tokens of one of them, V ids of the base's vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.data.jsonl import ids, read_records
from megatron_eagle.errors import UserError


class AnswerDocuments:
    """Conversations of a JSONL of answers, held in memory; ``lengths`` [N] int64 in tokens."""

    def __init__(self, file: str, vocab_size: int) -> None:
        self.conversations = read_answers(file, vocab_size)
        self.lengths = np.asarray([len(p) + len(a) for p, a in self.conversations], dtype=np.int64)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [n] int64 and mask [n] bool (True: supervised) of one conversation."""
        prompt, answer = self.conversations[index]
        return join(prompt, answer)

    def counts(self, vocab_size: int) -> Tensor:
        """Count how often each id is supervised, [V] int64."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for _, answer in self.conversations:
            counts += np.bincount(answer, minlength=vocab_size)
        return torch.from_numpy(counts)


def join(prompt: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids [n] of prompt and answer, and the mask [n] bool that is True in the answer."""
    mask = np.zeros(len(prompt) + len(answer), dtype=bool)
    mask[len(prompt) :] = True
    return np.concatenate([prompt, answer]), mask


def read_answers(file: str, vocab_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read (prompt ids, answer ids), int64, of every line.

    Raises ``UserError`` naming file and line of the first bad one, or the file if it has none.
    """
    conversations = [
        (
            np.asarray(ids(record, "prompt_ids", vocab_size, where), dtype=np.int64),
            np.asarray(ids(record, "answer_ids", vocab_size, where), dtype=np.int64),
        )
        for where, record in read_records(file, "train_data")
    ]
    if not conversations:
        raise UserError(f"<train_data> {file}: the data set is empty")
    return conversations
