"""Megatron indexed data sets of token ids, each with a second one that holds the loss mask.

``PREFIX.bin/.idx`` holds the ids, one document per conversation. ``PREFIX_loss_mask.bin/.idx``
holds the same documents in uint8: 1 for every supervised token, else 0.
Shapes: N documents, n tokens of one of them, V ids of the base's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.checkpoint.atomic import part, put_in_place
from megatron_eagle.data.jsonl import outside
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import first_line

MASK_SUFFIX = "_loss_mask"
_BLOCK = 1 << 24


def dataset_exists(prefix: str) -> bool:
    """Tell whether ``prefix`` names an indexed data set."""
    return Path(f"{prefix}.idx").is_file() and Path(f"{prefix}.bin").is_file()


class DatasetWriter:
    """Write both data sets under other names and put them in place when all is written.

    The index of the ids comes last: a data set that can be opened is whole. What ``beside`` writes
    when the data set is complete, such as its summary, is whole by then, too.
    """

    beside: Callable[[], None] | None = None
    files: Sequence[Path] = ()
    """The files of both data sets; until all are written, they lie under ``part(file)``."""

    def __init__(self, prefix: str, vocab_size: int) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix = prefix
        self.documents = self.tokens = self.supervised = self.longest = 0
        dtype = DType.optimal_dtype(vocab_size)
        self._builders: dict[str, Any] = {
            data: IndexedDatasetBuilder(str(part(Path(f"{data}.bin"))), dtype=dtype)
            for data, dtype in ((prefix, dtype), (prefix + MASK_SUFFIX, np.uint8))
        }

    def add(self, ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents of ``lengths``, concatenated in ``ids`` and ``mask``."""
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
        if kind is not None:
            for builder in self._builders.values():
                builder.data_file.close()
            return
        files: list[Path] = []
        for prefix, builder in self._builders.items():
            bin_file, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
            builder.finalize(str(part(index)))
            files = [bin_file, index, *files]
        self.files = files
        files[-1].unlink(missing_ok=True)  # from here on the earlier data set is not there
        if self.beside is not None:
            self.beside()
        put_in_place(*files)


class IndexedDocuments:
    """Documents of ``PREFIX`` with their masks, memory-mapped.

    Raises ``UserError`` naming the prefix when the mask is missing or belongs to other documents,
    when a file is damaged, or when an id is not below ``vocab_size``.
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self.prefix = prefix
        where = f"<train_data> {prefix}"
        if not dataset_exists(prefix):
            raise UserError(f"{where}: {prefix}.idx and {prefix}.bin are not both there")
        if not dataset_exists(prefix + MASK_SUFFIX):
            raise UserError(
                f"{where}: {prefix}{MASK_SUFFIX}.bin/.idx are missing; prepare the data again, or "
                "train on every token with <data_path>"
            )
        self._ids = _open(prefix, where)
        self._mask = _open(prefix + MASK_SUFFIX, where)
        self.lengths: np.ndarray = np.asarray(self._ids.sequence_lengths, dtype=np.int64)
        if not np.array_equal(self.lengths, self._mask.sequence_lengths):
            raise UserError(f"{where}: its loss mask and its ids are of different documents")
        if not len(self.lengths):
            raise UserError(f"{where}: the data set is empty")
        if int(self.lengths.min()) == 0:
            raise UserError(f"{where}: document {int(self.lengths.argmin())} is empty")
        self._check_ids(vocab_size, where)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [n] int64 and mask [n] bool (True: supervised) of one document."""
        return self._ids[index].astype(np.int64), self._mask[index] > 0

    def counts(self, vocab_size: int) -> Tensor:
        """Count how often each id is supervised, [V] int64, in one pass over both files."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for ids, mask in zip(self._blocks(self._ids), self._blocks(self._mask), strict=True):
            counts += np.bincount(ids[mask > 0], minlength=vocab_size)
        return torch.from_numpy(counts)

    def supervised(self) -> int:
        """Count the supervised tokens."""
        return sum(int((mask > 0).sum()) for mask in self._blocks(self._mask))

    def _check_ids(self, vocab_size: int, where: str) -> None:
        for ids in self._blocks(self._ids):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocab_size:
                raise UserError(f"{where}: {outside(low if low < 0 else high, vocab_size)}")

    def _blocks(self, dataset: Any) -> Iterator[np.ndarray]:
        """Yield all tokens of a data set in the order of its file, a few million at a time."""
        prefix = self.prefix if dataset is self._ids else self.prefix + MASK_SUFFIX
        tokens = np.memmap(f"{prefix}.bin", dtype=dataset.index.dtype, mode="r")
        for start in range(0, len(tokens), _BLOCK):
            yield tokens[start : start + _BLOCK]


def _open(prefix: str, where: str) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        dataset = IndexedDataset(prefix, multimodal=False, mmap=True)
    except Exception as error:  # an index can be damaged in any way
        raise UserError(
            f"{where}: {literal(prefix)}.idx is damaged: {literal(first_line(error))}"
        ) from error
    last = int(dataset.index.sequence_pointers[-1]) if len(dataset) else 0
    item = np.dtype(dataset.index.dtype).itemsize
    needed = last + int(dataset.sequence_lengths[-1]) * item if len(dataset) else 0
    size = Path(f"{prefix}.bin").stat().st_size
    if size != needed:
        raise UserError(f"{where}: {prefix}.bin has {size} bytes, its index needs {needed}")
    return dataset
