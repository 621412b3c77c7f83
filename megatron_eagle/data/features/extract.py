"""Extraction of offline features: running a base over documents and writing its hidden states.

Data-parallel replicas of the base take the shards in turn; a run after a killed one writes the
missing shards. The content does not depend on the layout, apart from the base's own rounding.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch

from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.data.bin_packing import pack
from megatron_eagle.data.documents import FittedDocuments
from megatron_eagle.data.features.base_rows import BaseRows
from megatron_eagle.data.features.codec import RowCodec
from megatron_eagle.data.features.shard_writer import ShardWriter, is_done, write_json
from megatron_eagle.data.features.store import FeaturePlan, needed_rows, read_plan
from megatron_eagle.pipeline.exchange import StageExchange

Progress = Callable[[str], None]
IDLE = [np.zeros(1, dtype=np.int64)]
"""The sequence of a replica that has nothing left to do."""


@dataclass(frozen=True)
class Replica:
    """Number and count of the base's data-parallel replicas. ``in_step``: expert parallelism spans
    replicas, so every replica must run the same number of forwards."""

    number: int = 0
    count: int = 1
    in_step: bool = False


def plan_features(
    exchange: StageExchange,
    info: BaseInfo,
    documents: FittedDocuments,
    source: str,
    stored: str,
    shard_bytes: int,
) -> tuple[FeaturePlan, int]:
    """Plan the extraction from ``documents``, which ``source`` names; return the plan and its size
    in bytes. Runs the base once on random tokens: a collective of all its ranks."""
    base = exchange.base
    width, layers = base.config.hidden_size, base.capture.layers
    row_bytes = [RowCodec(stored, blocks, width).row_bytes for blocks in (len(layers), 1)]
    sizes, digest = survey(documents, row_bytes)
    plan = FeaturePlan(
        base=info.name,
        fingerprint=info.fingerprint,
        source=source,
        documents=digest,
        seq_length=documents.seq_length,
        aux_layers=layers,
        hidden_size=width,
        vocab_size=info.vocab_size,
        stored=stored,
        computed=str(base.embedding_weight.dtype).removeprefix("torch."),
        layer_sizes=tuple(base.layer_sizes(exchange).tolist()),
        shards=cut_into_shards(sizes, shard_bytes),
    )
    return plan, sum(sizes)


def survey(documents: FittedDocuments, row_bytes: Sequence[int]) -> tuple[list[int], str]:
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
        write_json(directory / "plan.json", plan.as_dict())
    lacking = [i for i in range(len(plan.shards)) if not is_done(directory, i)]
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
    rows: BaseRows,
    documents: FittedDocuments,
    plan: FeaturePlan,
    directory: Path,
    replica: Replica,
    progress: Progress,
) -> None:
    """Write this replica's share of the missing shards; all its ranks call it alike, and with
    ``replica.in_step`` all ranks at once."""
    firsts = np.cumsum([0, *plan.shards])
    shares = [
        {i: _together(documents, firsts, i) for i in _missing(plan, directory, number, replica)}
        for number in (range(replica.count) if replica.in_step else [replica.number])
    ]
    if replica.in_step:
        torch.distributed.barrier()  # nobody finishes a shard before all have counted
    todo = shares[replica.number if replica.in_step else 0]
    counts = [sum(map(len, share.values())) for share in shares]
    idle = max(counts) - sum(map(len, todo.values()))
    own = ([documents[i][0] for i in group] for group in chain(*todo.values()))
    found = rows.run(chain(own, repeat(IDLE, idle)))
    started, tokens = time.monotonic(), 0
    for done, (shard, groups) in enumerate(todo.items(), start=1):
        members = range(int(firsts[shard]), int(firsts[shard + 1]))
        writer = ShardWriter(documents, members, plan, directory, shard) if rows.has_rows else None
        for group in groups:
            hidden = next(found)
            if writer is not None and hidden is not None:
                writer.add(group, hidden)
        if writer is not None:
            writer.finish()
        tokens += int(documents.lengths[members.start : members.stop].sum())
        pace = (time.monotonic() - started) / done
        progress(
            f"{done}/{len(todo)} shards, {tokens / (time.monotonic() - started):.0f} tokens/s, "
            f"{pace * (len(todo) - done) / 60:.1f} min left"
        )
    deque(found, maxlen=0)  # idle sequences, and until everything sent has left


def _missing(plan: FeaturePlan, directory: Path, number: int, replica: Replica) -> list[int]:
    shards = range(number, len(plan.shards), replica.count)
    return [shard for shard in shards if not is_done(directory, shard)]


def finish(directory: Path) -> None:
    """Write the index, all shards being there."""
    plan = read_plan(directory, "plan.json")
    lacking = [i for i in range(len(plan.shards)) if not is_done(directory, i)]
    assert not lacking, f"shards {lacking} are not written"
    write_json(directory / "index.json", plan.as_dict())


def _together(documents: FittedDocuments, firsts: np.ndarray, shard: int) -> list[list[int]]:
    """Which documents of a shard run in one sequence, the same in every layout."""
    first, stop = int(firsts[shard]), int(firsts[shard + 1])
    groups = pack(documents.lengths[first:stop], documents.seq_length, 0)
    return [[first + int(i) for i in group] for group in groups]
