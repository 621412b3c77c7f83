"""Documents as a Megatron-style dataset: one per sample, or several packed into a sample.

A sample is {"tokens": [S] int64, "loss_mask": [S] float32, "positions": [S] int64}. The mask is
aligned with the labels: entry i belongs to token i + 1, and is 0 where that token begins another
document. Positions restart at every document. Padding after the last document counts as one more
document; no other token attends to it. Documents with hidden states add "aux_hidden" [S, A * H] and
"final_hidden" [S, H], zero where training does not read them. The order of samples depends on
``seed`` alone, so a resumed run continues it.

Shapes: S sequence length, A aux layers, H hidden size of the base.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.data.bin_packing import pack
from megatron_eagle.data.documents import FittedDocuments
from megatron_eagle.data.features.store import needed_positions


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
