"""Megatron indexed datasets with a mask beside them.

``PREFIX.bin/.idx`` holds the ids, one document a conversation; ``PREFIX_loss_mask.bin/.idx`` holds
for every token 1 if it is itself supervised, in uint8 and with the same documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MASK_SUFFIX = "_loss_mask"
_BLOCK = 1 << 24


def dataset_exists(prefix: str) -> bool:
    """Whether ``prefix`` names an indexed dataset."""
    return Path(f"{prefix}.idx").is_file() and Path(f"{prefix}.bin").is_file()


class DatasetWriter:
    """Writes both datasets under other names and puts them in place when all is written, the index
    of the ids last: a data set that can be opened is whole."""

    def __init__(self, prefix: str, vocab_size: int) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix = prefix
        self.documents = self.tokens = self.supervised = self.longest = 0
        self._dtype = DType.optimal_dtype(vocab_size)
        self._builders: dict[str, Any] = {
            prefix: IndexedDatasetBuilder(f"{prefix}.bin.part", dtype=self._dtype),
            prefix + MASK_SUFFIX: IndexedDatasetBuilder(
                f"{prefix}{MASK_SUFFIX}.bin.part", dtype=np.uint8
            ),
        }

    def add(self, ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents of ``lengths`` laid end to end in ``ids`` and ``mask``."""
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends, strict=True):
            for builder, values in zip(self._builders.values(), (ids, mask), strict=True):
                builder.add_document(values[start:end], [int(end - start)])
        self.documents += len(lengths)
        self.tokens += len(ids)
        self.supervised += int(mask.sum())
        self.longest = max(self.longest, int(lengths.max(initial=0)))

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for prefix, builder in self._builders.items():
            if kind is None:
                builder.finalize(f"{prefix}.idx.part")
            else:
                builder.data_file.close()
        if kind is None:
            Path(f"{self.prefix}.idx").unlink(missing_ok=True)
            for prefix in reversed(self._builders):
                for suffix in ("bin", "idx"):
                    Path(f"{prefix}.{suffix}.part").replace(f"{prefix}.{suffix}")


class IndexedDocuments:
    """The documents of ``PREFIX`` with their masks, memory-mapped.

    Raises ``ValueError`` naming the prefix when the mask is missing or of other documents, when the
    files are damaged, or an id lies beyond ``vocab_size``.
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self.prefix = prefix
        where = f"--eagle-train-data {prefix}"
        if not dataset_exists(prefix):
            raise ValueError(f"{where}: {prefix}.idx and {prefix}.bin are not both there")
        if not dataset_exists(prefix + MASK_SUFFIX):
            raise ValueError(
                f"{where}: {prefix}{MASK_SUFFIX}.bin/.idx are missing; make them with "
                "tools/prepare_data.py, or supervise every token with --data-path"
            )
        self._ids = _open(prefix, where)
        self._mask = _open(prefix + MASK_SUFFIX, where)
        self.lengths: np.ndarray = np.asarray(self._ids.sequence_lengths, dtype=np.int64)
        if not np.array_equal(self.lengths, self._mask.sequence_lengths):
            raise ValueError(f"{where}: its loss mask has other documents than its ids")
        if not len(self.lengths):
            raise ValueError(f"{where}: the data set is empty")
        if int(self.lengths.min()) == 0:
            raise ValueError(f"{where}: document {int(self.lengths.argmin())} is empty")
        self._check_ids(vocab_size, where)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [n] int64 and mask [n] bool of one document."""
        return self._ids[index].astype(np.int64), self._mask[index] > 0

    def counts(self, vocab_size: int) -> Tensor:
        """How often each id is supervised, [V] int64. A pass over both files."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for ids, mask in zip(self._blocks(self._ids), self._blocks(self._mask), strict=True):
            counts += np.bincount(ids[mask > 0], minlength=vocab_size)
        return torch.from_numpy(counts)

    def _check_ids(self, vocab_size: int, where: str) -> None:
        for ids in self._blocks(self._ids):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"{where}: token id {low if low < 0 else high} is outside the base's "
                    f"0 to {vocab_size - 1}"
                )

    def _blocks(self, dataset: Any) -> Iterator[np.ndarray]:
        """All tokens of a data set in the order of its file, a few million at a time."""
        prefix = self.prefix if dataset is self._ids else self.prefix + MASK_SUFFIX
        tokens = np.memmap(f"{prefix}.bin", dtype=dataset.index.dtype, mode="r")
        for start in range(0, len(tokens), _BLOCK):
            yield tokens[start : start + _BLOCK]


def _open(prefix: str, where: str) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        dataset = IndexedDataset(prefix, multimodal=False, mmap=True)
    except (OSError, ValueError, AssertionError, KeyError) as error:
        raise ValueError(f"{where}: {prefix}.idx is damaged: {error}") from error
    last = int(dataset.index.sequence_pointers[-1]) if len(dataset) else 0
    item = np.dtype(dataset.index.dtype).itemsize
    needed = last + int(dataset.sequence_lengths[-1]) * item if len(dataset) else 0
    found = Path(f"{prefix}.bin").stat().st_size
    if found != needed:
        raise ValueError(f"{where}: {prefix}.bin has {found} bytes, its index speaks of {needed}")
    return dataset
