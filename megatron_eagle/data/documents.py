"""Training documents from any source: token ids, and which of them are supervised.

Shapes: N documents, M of them kept, n tokens of one document, V ids of the base's vocabulary,
A aux layers, H hidden size of the base, r tokens whose aux layers are stored, m supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.config import EagleConfig
from megatron_eagle.data.answers import AnswerDocuments
from megatron_eagle.data.bin_packing import pack
from megatron_eagle.data.features.store import FeatureDocuments, needed_positions
from megatron_eagle.data.indexed import MASK_SUFFIX, IndexedDocuments, dataset_exists
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import reading


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
    with reading("train_data", train_data):
        if prefix := _prefix_of(train_data):
            raise UserError(
                f"<train_data> {literal(train_data)}: a file of a prepared data set, which is "
                f"named without its suffix: <train_data> {literal(prefix)}"
            )
        if Path(train_data).is_file():
            return AnswerDocuments(train_data, vocab_size)
        if not dataset_exists(train_data):
            raise UserError(
                f"<train_data> {literal(train_data)}: no such file, and no "
                f"{literal(train_data)}.bin/.idx"
            )
        return IndexedDocuments(train_data, vocab_size)


def _prefix_of(train_data: str) -> str | None:
    """Return the prefix of the data set that the file ``train_data`` belongs to, if it is one."""
    for suffix in (".bin", ".idx", ".json", ".bad.txt"):
        prefix = train_data.removesuffix(suffix).removesuffix(MASK_SUFFIX)
        if prefix != train_data and dataset_exists(prefix):
            return prefix
    return None


def training_documents(options: EagleConfig, base: BaseInfo) -> Documents:
    """Open the documents that ``options`` name: stored features, or training data."""
    directory = options.train.offline_features
    if directory is not None:
        with reading("offline_features", directory):
            return FeatureDocuments(directory, base.fingerprint, base.vocab_size)
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


class DocumentDataset(torch.utils.data.Dataset):
    """Dataset of ``num_samples`` samples: all documents in every epoch, reshuffled.

    With ``packed`` a sample holds as many documents as fit. The documents of a sample are chosen
    once, so that the number of samples is known; the order of samples changes every epoch.
    """

    def __init__(
        self, documents: FittedDocuments, num_samples: int, seed: int, packed: bool = False
    ) -> None:
        self.documents, self.num_samples, self.seed = documents, num_samples, seed
        self.seq_length = documents.seq_length
        self.members: Sequence[np.ndarray] = [np.array([i]) for i in range(len(documents))]
        if packed:
            self.members = pack(documents.lengths, self.seq_length, seed)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def samples_per_epoch(self) -> int:
        """Return the number of samples that hold every document once."""
        return len(self.members)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, position = divmod(int(index), len(self.members))
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch))
            self._epoch, self._order = epoch, order.permutation(len(self.members))
        tokens = np.zeros(self.seq_length, dtype=np.int64)
        loss_mask = np.zeros(self.seq_length, dtype=np.float32)
        positions = np.zeros(self.seq_length, dtype=np.int64)
        hidden: dict[str, Tensor] = {}
        at = 0
        for member in self.members[self._order[position]]:
            ids, mask = self.documents[int(member)]
            end = at + len(ids)
            self._place_hidden(hidden, int(member), mask, at)
            tokens[at:end], positions[at:end] = ids, np.arange(len(ids))
            loss_mask[at : end - 1] = mask[1:]
            at = end
        positions[at:] = np.arange(self.seq_length - at)
        return {
            "tokens": torch.from_numpy(tokens),
            "loss_mask": torch.from_numpy(loss_mask),
            "positions": torch.from_numpy(positions),
            **hidden,
        }

    def _place_hidden(
        self, hidden: dict[str, Tensor], member: int, mask: np.ndarray, at: int
    ) -> None:
        """Write the hidden states of document ``member``, if any, from position ``at`` on."""
        stored = self.documents.hidden(member)
        if stored is None:
            return
        aux_hidden, final_hidden = stored
        if not hidden:
            hidden["aux_hidden"] = aux_hidden.new_zeros(self.seq_length, aux_hidden.shape[1])
            hidden["final_hidden"] = final_hidden.new_zeros(self.seq_length, final_hidden.shape[1])
        hidden["aux_hidden"][at : at + len(aux_hidden)] = aux_hidden
        hidden["final_hidden"][at + needed_positions(mask)[1]] = final_hidden
