"""How often the ids of Megatron ``.bin/.idx`` data occur: what a draft vocabulary is chosen by.

Counted over the documents training will read: the training part of ``--split``, each data set with
its weight in the blend. Of a large data set every n-th document is read, up to a bound.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from megatron_eagle.errors import UserError

TOKENS_PER_DATA_SET = 50_000_000
"""Plenty to rank ids by frequency; reading it takes seconds."""

_SCALE = 2**40
_PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class TrainingBlend:
    """Data set prefixes, their weights (``None``: by size), and the share that is for training."""

    prefixes: list[str]
    weights: list[float] | None
    train_share: float

    @classmethod
    def of(cls, args: Any) -> TrainingBlend:
        """From Megatron's flags; ``ValueError`` if they name no training data."""
        blend, per_split = get_blend_and_blend_per_split(args)
        chosen = blend or (per_split and per_split[0])
        if not chosen:
            raise UserError("no training data: give --eagle-train-data or --data-path")
        prefixes, weights = chosen
        parts = [float(part) for part in (args.split or "1").split(",")]
        share = parts[0] / sum(parts) if blend else 1.0
        return cls(list(prefixes), None if weights is None else list(weights), share)


def count_tokens(blend: TrainingBlend, vocab_size: int) -> Tensor:
    """[V] int64, proportional to how often training sees each id. Every rank reads for itself.

    Raises ``ValueError`` naming the data set for an id that the base does not have.
    """
    counts = np.zeros(vocab_size)
    for index, prefix in enumerate(blend.prefixes):
        found, tokens = _count(prefix, blend.train_share, vocab_size)
        weight = tokens if blend.weights is None else blend.weights[index]
        counts += found * (weight / max(1, found.sum()))
    return torch.from_numpy((counts / max(counts.sum(), 1e-30) * _SCALE).astype(np.int64))


def _count(prefix: str, share: float, vocab_size: int) -> tuple[np.ndarray, int]:
    """Counts of the documents read, and the tokens of all that training may read."""
    dataset = IndexedDataset(prefix, multimodal=False, mmap=True)
    documents = round(len(dataset) * share)
    tokens = int(dataset.sequence_lengths[:documents].sum(dtype=np.int64))
    counts = np.zeros(vocab_size, dtype=np.int64)
    told = time.monotonic()
    for document in range(0, documents, -(-tokens // TOKENS_PER_DATA_SET) or 1):
        ids = dataset[document]
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise UserError(
                f"--data-path {prefix}: token id {int(ids.max())} is outside the base's "
                f"0 to {vocab_size - 1}"
            )
        counts += np.bincount(ids, minlength=vocab_size)
        if time.monotonic() - told > _PROGRESS_SECONDS and os.environ.get("RANK", "0") == "0":
            print(f"> counting tokens of {prefix}: {document:,} of {documents:,}", flush=True)
            told = time.monotonic()
    return counts, tokens
