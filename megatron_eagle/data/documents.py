"""Training documents from any source: token ids, and which of them are supervised.

Shapes: N documents, M of them kept, n tokens of one document, V ids of the base's vocabulary,
A aux layers, H hidden size of the base, r tokens whose aux layers are stored, m supervised tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import EagleConfig
from megatron_eagle.data.answers import AnswerDocuments
from megatron_eagle.data.features.store import FeatureDocuments, needed_positions
from megatron_eagle.data.indexed import IndexedDocuments, dataset_exists
from megatron_eagle.errors import UserError


class Documents(Protocol):
    """Conversations or texts in a fixed order; ``lengths`` [N] int64 in tokens."""

    lengths: np.ndarray

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [n] int64 and mask [n] bool (True: the token is supervised)."""
        ...

    def counts(self, vocab_size: int) -> Tensor:
        """Count how often each id is supervised, [V] int64."""
        ...


def open_documents(train_data: str, vocab_size: int) -> Documents:
    """Open ``train_data``: a JSONL of answers, or the prefix of a prepared data set.

    Raises ``UserError`` naming it when it cannot be read whole or holds an id that a base with
    ``vocab_size`` ids does not have.
    """
    if Path(train_data).is_file():
        return AnswerDocuments(train_data, vocab_size)
    if not dataset_exists(train_data):
        raise UserError(f"<train_data> {train_data}: no such file, and no {train_data}.bin/.idx")
    return IndexedDocuments(train_data, vocab_size)


def training_documents(options: EagleConfig, base: BaseInfo) -> Documents:
    """Open the documents that ``options`` name: stored features, or training data."""
    if options.train.offline_features is not None:
        return FeatureDocuments(options.train.offline_features, base.fingerprint, base.vocab_size)
    assert options.train.train_data is not None
    return open_documents(options.train.train_data, base.vocab_size)


class FittedDocuments:
    """Documents cut at ``seq_length``, without those that have nothing supervised before the cut.

    ``chosen`` [M] are the indices of the documents kept, ``lengths`` [M] their lengths after the
    cut; ``tokens_cut`` counts the tokens lost and ``left_out`` the documents. Raises ``UserError``
    if no document is left.
    """

    def __init__(self, documents: Documents, seq_length: int) -> None:
        self.documents, self.seq_length = documents, seq_length
        long = np.flatnonzero(documents.lengths > seq_length)
        useless = [i for i in long if not documents[int(i)][1][1:seq_length].any()]
        self.chosen = np.setdiff1d(np.arange(len(documents.lengths)), useless)
        if not len(self.chosen):
            raise UserError(
                f"<seq_length> {seq_length}: no document has a supervised token that early"
            )
        self.lengths = np.minimum(documents.lengths[self.chosen], seq_length)
        self.tokens_cut = int((documents.lengths[long] - seq_length).sum())
        self.left_out = len(useless)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = self.documents[int(self.chosen[index])]
        return ids[: self.seq_length], mask[: self.seq_length]

    def hidden(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Return aux_hidden [r, A * H] of the first r tokens and final_hidden [m, H] of the m
        supervised ones, or None for documents without stored features."""
        if not isinstance(self.documents, FeatureDocuments):
            return None
        aux_hidden, final_hidden = self.documents.hidden(int(self.chosen[index]))
        count, targets = needed_positions(self[index][1])
        return aux_hidden[:count], final_hidden[: len(targets)]
