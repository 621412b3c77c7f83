"""Writer of one shard of offline features, which appears whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_eagle.checkpoint.atomic import part, put_in_place, write_json
from megatron_eagle.data.documents import FittedDocuments
from megatron_eagle.data.features.base_rows import SequenceRows
from megatron_eagle.data.features.store import (
    ROW_FILES,
    FeaturePlan,
    checksum,
    needed_positions,
    shard_file,
)


class ShardWriter:
    """Files of the documents ``members``, under other names until ``finish``."""

    def __init__(
        self,
        documents: FittedDocuments,
        members: range,
        plan: FeaturePlan,
        directory: Path,
        shard: int,
    ) -> None:
        self.directory, self.shard = directory, shard
        self.codecs = {kind: plan.codec(kind) for kind in ROW_FILES}
        self.tokens = [documents[i] for i in members]
        self.first = members.start
        self.needed = [needed_positions(mask) for _, mask in self.tokens]
        counts = [(with_aux, len(targets)) for with_aux, targets in self.needed]
        self.starts = np.concatenate([[[0, 0]], np.cumsum(counts, axis=0)])
        self.maps: dict[str, np.ndarray[Any, Any]] = {}
        for column, kind in enumerate(ROW_FILES):
            shape = (int(self.starts[-1, column]), self.codecs[kind].row_bytes)
            self.maps[kind] = np.memmap(part(self._file(kind)), np.uint8, "w+", shape=shape)

    def _file(self, kind: str) -> Path:
        return shard_file(self.directory, self.shard, kind)

    def add(self, chosen: Sequence[int], rows: SequenceRows) -> None:
        """Store the hidden states that training reads of the documents ``chosen``.

        ``rows`` holds these documents, in this order.
        """
        for index, start in zip(chosen, rows.starts, strict=True):
            member = index - self.first
            count, targets = self.needed[member]
            first, second = self.starts[member]
            target_rows = torch.from_numpy(targets + start).to(rows.final.device)
            self.maps["captured"][first : first + count] = self.codecs["captured"].encode(
                rows.features[start : start + count]
            )
            self.maps["final"][second : second + len(targets)] = self.codecs["final"].encode(
                rows.final[target_rows]
            )

    def finish(self) -> None:
        """Put the files in place; the description with sizes and checksums comes last."""
        for kind in ROW_FILES:
            self.maps.pop(kind).flush()  # type: ignore[attr-defined]
        with part(self._file("documents")).open("wb") as stream:
            np.savez(
                stream,
                ids=np.concatenate([ids for ids, _ in self.tokens]).astype(np.int32),
                mask=np.concatenate([mask for _, mask in self.tokens]).astype(np.uint8),
                lengths=np.asarray([len(ids) for ids, _ in self.tokens], dtype=np.int64),
            )
        description: dict[str, dict[str, Any]] = {"bytes": {}, "sha256": {}}
        files = [self._file(kind) for kind in (*ROW_FILES, "documents")]
        for file in files:
            description["sha256"][file.name] = checksum(part(file))
            description["bytes"][file.name] = part(file).stat().st_size
        put_in_place(*files)
        write_json(self._file("json"), description)


def is_done(directory: Path, shard: int) -> bool:
    """Tell whether the shard is there and whole."""
    return shard_file(directory, shard, "json").is_file()
