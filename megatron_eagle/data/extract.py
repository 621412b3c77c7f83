"""Running a base over documents and writing what a draft learns from: offline features.

Documents are packed into sequences, so that short ones cost no padding. Shards are written by the
ranks in turn, each put in place whole; a run that was killed goes on with the shards that lack.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.attention.packing import Packing
from megatron_eagle.data.documents import FittedDocuments
from megatron_eagle.data.feature_store import (
    ROW_FILES,
    FeaturePlan,
    checksum,
    needed_rows,
    read_plan,
    shard_file,
)
from megatron_eagle.data.packing import pack
from megatron_eagle.teacher.base import FrozenBase

Progress = Callable[[str], None]


def survey(documents: FittedDocuments, row_bytes: tuple[int, int]) -> tuple[list[int], str]:
    """Bytes of every document's rows, given those of a captured and of a final row, and a digest of
    all tokens and masks."""
    sizes, digest = [], hashlib.sha256()
    for index in range(len(documents)):
        ids, mask = documents[index]
        digest.update(ids.tobytes() + mask.tobytes())
        captured, targets = needed_rows(mask)
        sizes.append(captured * row_bytes[0] + len(targets) * row_bytes[1])
    return sizes, digest.hexdigest()


def cut_into_shards(sizes: list[int], limit: int) -> tuple[int, ...]:
    """Numbers of documents of shards of about ``limit`` bytes, in order."""
    shards, filled = [0], 0
    for size in sizes:
        if filled and filled + size > limit:
            shards.append(0)
            filled = 0
        shards[-1] += 1
        filled += size
    return tuple(shards)


def begin(plan: FeaturePlan, directory: Path, total: int, progress: Progress) -> None:
    """Say what will be written, check that it fits, and leave the plan in ``directory``.

    Raises ``ValueError`` when the disk is too small, or the directory holds another extraction.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "plan.json").is_file():
        begun = read_plan(directory, "plan.json")
        # Measured again in another layout, sizes differ in their last digits.
        if begun != replace(plan, layer_sizes=begun.layer_sizes):
            raise ValueError(
                f"--output {directory}: holds features of other options, data or base; choose "
                "another directory"
            )
    elif any(directory.iterdir()):
        raise ValueError(f"--output {directory}: is not empty")
    else:
        _write_json(directory / "plan.json", plan.as_dict())
    lacking = [i for i in range(len(plan.shards)) if not _is_done(directory, i)]
    share = total * len(lacking) / len(plan.shards)
    free = shutil.disk_usage(directory).free
    progress(
        f"{sum(plan.shards):,} documents, {total / 2**30:.2f} GiB in {len(plan.shards)} shards as "
        f"{plan.stored}; {len(lacking)} shards to write, {free / 2**30:.1f} GiB free"
    )
    if share > free:
        raise ValueError(
            f"--output {directory}: {share / 2**30:.2f} GiB to write, {free / 2**30:.2f} GiB free"
        )


def extract(
    base: FrozenBase,
    documents: FittedDocuments,
    plan: FeaturePlan,
    directory: Path,
    replica: tuple[int, int],
    progress: Progress,
) -> None:
    """Write this replica's share of the missing shards: all ranks of a tensor-parallel group call
    it alike, its first rank writes. ``replica``: number and count of data-parallel replicas."""
    writes = base.tp_group.rank() == 0
    firsts = np.cumsum([0, *plan.shards])
    todo = [
        shard
        for shard in range(replica[0], len(plan.shards), replica[1])
        if not _is_done(directory, shard)
    ]
    started, tokens = time.monotonic(), 0
    for done, shard in enumerate(todo, start=1):
        members = range(int(firsts[shard]), int(firsts[shard + 1]))
        writer = _ShardWriter(documents, members, plan, directory, shard) if writes else None
        for group in _together(base, documents.lengths[members.start : members.stop], plan):
            chosen = [members.start + int(i) for i in group]
            rows = _run(base, [documents[i][0] for i in chosen])
            if writer is not None:
                writer.add(chosen, *rows)
        if writer is not None:
            writer.finish()
        tokens += int(documents.lengths[members.start : members.stop].sum())
        pace = (time.monotonic() - started) / done
        progress(
            f"{done}/{len(todo)} shards, {tokens / (time.monotonic() - started):.0f} tokens/s, "
            f"{pace * (len(todo) - done) / 60:.1f} min left"
        )


def finish(directory: Path) -> None:
    """Write the index, all shards being there."""
    plan = read_plan(directory, "plan.json")
    lacking = [i for i in range(len(plan.shards)) if not _is_done(directory, i)]
    assert not lacking, f"shards {lacking} are not written"
    _write_json(directory / "index.json", plan.as_dict())


def _together(base: FrozenBase, lengths: np.ndarray, plan: FeaturePlan) -> list[np.ndarray]:
    """Which documents run in one sequence: one each where the base cannot tell them apart."""
    if base.config.multi_latent_attention:
        return [np.array([i]) for i in range(len(lengths))]
    return pack(lengths, plan.seq_length, 0)


@torch.no_grad()
def _run(base: FrozenBase, documents: list[np.ndarray]) -> tuple[Tensor, Tensor, list[int]]:
    """Captured layers [S, A * H] and final hidden [S, H] of documents laid end to end, and where
    each begins."""
    ids = torch.from_numpy(np.concatenate(documents)).unsqueeze(0)
    positions = torch.cat([torch.arange(len(d)) for d in documents]).unsqueeze(0)
    device = base.embedding_weight.device
    packing = Packing.of(positions).to(positions.to(device)) if len(documents) > 1 else None
    outputs = base(ids.to(device), packing)
    starts = np.cumsum([0, *(len(d) for d in documents)])[:-1].tolist()
    return outputs.features[:, 0], outputs.final_hidden[:, 0], starts


class _ShardWriter:
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

    def add(self, chosen: list[int], captured: Tensor, final: Tensor, starts: list[int]) -> None:
        for index, start in zip(chosen, starts, strict=True):
            own = index - self.first
            rows, targets = self.needed[own]
            first, second = self.starts[own]
            wanted = torch.from_numpy(targets + start).to(final.device)
            self.maps["captured"][first : first + rows] = self.codecs["captured"].encode(
                captured[start : start + rows]
            )
            self.maps["final"][second : second + len(targets)] = self.codecs["final"].encode(
                final[wanted]
            )

    def finish(self) -> None:
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
        _write_json(shard_file(self.directory, self.shard, "json"), description)


def _is_done(directory: Path, shard: int) -> bool:
    return shard_file(directory, shard, "json").is_file()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_name(file.name + ".part")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
