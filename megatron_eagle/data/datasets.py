"""Documents as a Megatron-style dataset: one a sample, or packed to the sequence length.

A sample is {"tokens": [S] int64, "loss_mask": [S] float32, "positions": [S] int64}. The mask is
label-aligned (entry i speaks of token i + 1, and never of another document's first). Positions
restart at every document; what follows the last one is padding that nothing looks at, and counts
as a document of its own. Documents with hidden states add {"captured": [S, A * H],
"final": [S, H]}, zeros where none are needed. The order depends on ``seed`` alone, so a resumed run
continues it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.data.bin_packing import pack
from megatron_eagle.data.documents import FittedDocuments
from megatron_eagle.data.features.store import needed_rows


class DocumentDataset(torch.utils.data.Dataset):
    """``num_samples`` samples: every epoch all samples once, reshuffled.

    ``packed``: several documents a sample, as many as fit. Which documents share a sample is
    settled once, so that the number of samples is known; their order changes every epoch.
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
        found = self.documents.hidden(member)
        if found is None:
            return
        captured, final = found
        if not hidden:
            hidden["captured"] = captured.new_zeros(self.seq_length, captured.shape[1])
            hidden["final"] = final.new_zeros(self.seq_length, final.shape[1])
        hidden["captured"][at : at + len(captured)] = captured
        hidden["final"][at + needed_rows(mask)[1]] = final
