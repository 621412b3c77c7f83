"""JSONL of a base's own answers (tools/regenerate.py) as a Megatron-style dataset.

A line holds ``prompt_ids`` and ``answer_ids``; the answer is supervised, the prompt only read.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class AnswerDataset(torch.utils.data.Dataset):
    """``num_samples`` samples of ``seq_length`` tokens: every epoch all answers once, reshuffled.

    A sample is {"tokens": [S] int64, "loss_mask": [S] float32}; the mask is label-aligned (entry i
    speaks of token i + 1), and what follows the answer is padding that nothing looks at. Longer
    conversations are cut at S. The order depends on ``seed`` alone, so a resumed run continues it.
    """

    def __init__(
        self, file: str, vocab_size: int, seq_length: int, num_samples: int, seed: int
    ) -> None:
        self.conversations = read_answers(file, vocab_size)
        self.seq_length, self.num_samples, self.seed = seq_length, num_samples, seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, position = divmod(int(index), len(self.conversations))
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch))
            self._epoch, self._order = epoch, order.permutation(len(self.conversations))
        prompt, answer = self.conversations[self._order[position]]
        ids = np.concatenate([prompt, answer])[: self.seq_length]
        tokens = np.zeros(self.seq_length, dtype=np.int64)
        tokens[: len(ids)] = ids
        loss_mask = np.zeros(self.seq_length, dtype=np.float32)
        loss_mask[max(0, len(prompt) - 1) : len(ids) - 1] = 1.0
        return {"tokens": torch.from_numpy(tokens), "loss_mask": torch.from_numpy(loss_mask)}


def read_answers(file: str, vocab_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt ids, answer ids) of every line; ``ValueError`` naming file and line if one is bad."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--eagle-train-data {file}: no such file")
    conversations = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                conversations.append(_parse(line, vocab_size, f"{file}:{number}"))
    if not conversations:
        raise ValueError(f"--eagle-train-data {file}: the data set is empty")
    return conversations


def count_answers(file: str, vocab_size: int) -> Tensor:
    """How often each id is supervised, [V] int64."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for _, answer in read_answers(file, vocab_size):
        counts += np.bincount(answer, minlength=vocab_size)
    return torch.from_numpy(counts)


def _parse(line: str, vocab_size: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        record = json.loads(line)
        prompt, answer = record["prompt_ids"], record["answer_ids"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
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
