"""Writing one shard of offline features: it is there whole, or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_eagle.data.documents import FittedDocuments
from megatron_eagle.data.features.base_rows import SequenceRows
from megatron_eagle.data.features.store import (
    ROW_FILES,
    FeaturePlan,
    checksum,
    needed_rows,
    shard_file,
)


class ShardWriter:
    """Files of the documents ``members``, as ``.part`` until :meth:`finish`."""

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
        self.needed = [needed_rows(mask) for _, mask in self.tokens]
        counts = [(captured, len(targets)) for captured, targets in self.needed]
        self.starts = np.concatenate([[[0, 0]], np.cumsum(counts, axis=0)])
        self.maps: dict[str, np.ndarray[Any, Any]] = {}
        for column, kind in enumerate(ROW_FILES):
            shape = (int(self.starts[-1, column]), self.codecs[kind].row_bytes)
            self.maps[kind] = np.memmap(self._part(kind), np.uint8, "w+", shape=shape)

    def _part(self, kind: str) -> Path:
        file = shard_file(self.directory, self.shard, kind)
        return file.with_name(file.name + ".part")

    def add(self, chosen: Sequence[int], rows: SequenceRows) -> None:
        """Store what is needed of the documents ``chosen``, which ``rows`` hold in this order."""
        for index, start in zip(chosen, rows.starts, strict=True):
            own = index - self.first
            count, targets = self.needed[own]
            first, second = self.starts[own]
            wanted = torch.from_numpy(targets + start).to(rows.final.device)
            self.maps["captured"][first : first + count] = self.codecs["captured"].encode(
                rows.features[start : start + count]
            )
            self.maps["final"][second : second + len(targets)] = self.codecs["final"].encode(
                rows.final[wanted]
            )

    def finish(self) -> None:
        """Put the files in place; the description with sizes and checksums comes last."""
        for kind in ROW_FILES:
            self.maps.pop(kind).flush()  # type: ignore[attr-defined]
        with self._part("documents").open("wb") as file:
            np.savez(
                file,
                ids=np.concatenate([ids for ids, _ in self.tokens]).astype(np.int32),
                mask=np.concatenate([mask for _, mask in self.tokens]).astype(np.uint8),
                lengths=np.asarray([len(ids) for ids, _ in self.tokens], dtype=np.int64),
            )
        description: dict[str, dict[str, Any]] = {"bytes": {}, "sha256": {}}
        for kind in (*ROW_FILES, "documents"):
            name = shard_file(self.directory, self.shard, kind).name
            description["sha256"][name] = checksum(self._part(kind))
            description["bytes"][name] = self._part(kind).stat().st_size
            self._part(kind).replace(self.directory / name)
        write_json(shard_file(self.directory, self.shard, "json"), description)


def is_done(directory: Path, shard: int) -> bool:
    """Whether the shard is there, whole."""
    return shard_file(directory, shard, "json").is_file()


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a file that appears whole."""
    partial = file.with_name(file.name + ".part")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
