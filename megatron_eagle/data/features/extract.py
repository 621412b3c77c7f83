"""Extraction of offline features: run the base over documents and store its hidden states.

Data-parallel replicas of the base take the shards in turn; a run that was killed continues with the
shards that are missing. The files do not depend on the layout, up to the base's own rounding.
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

from megatron_eagle.checkpoint.atomic import delete_scratch, write_json
from megatron_eagle.checkpoint.directory import BaseInfo
from megatron_eagle.data.bin_packing import pack
from megatron_eagle.data.documents import FittedDocuments
from megatron_eagle.data.features.base_rows import BaseRows
from megatron_eagle.data.features.codec import RowCodec
from megatron_eagle.data.features.shard_writer import ShardWriter, is_done
from megatron_eagle.data.features.store import FeaturePlan, needed_positions, read_plan
from megatron_eagle.errors import UserError
from megatron_eagle.pipeline.exchange import StageExchange

Progress = Callable[[str], None]
IDLE = [np.zeros(1, dtype=np.int64)]
"""Sequence that a replica runs when it has no documents left but others do."""


@dataclass(frozen=True)
class Replica:
    """Number of this data-parallel replica of the base, and their count.

    ``in_step``: expert parallelism spans the replicas, so every one must run the same number of
    forward passes.
    """

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
    """Plan the features of ``documents``, which come from ``source``; return plan and bytes.

    Runs the base once on random tokens, to measure its layers: a collective of all its ranks.
    """
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
    """Return the bytes of every document's rows and a digest of all tokens and masks.

    ``row_bytes`` are the bytes of one token's aux hidden states and of its final hidden state.
    """
    sizes, digest = [], hashlib.sha256()
    for index in range(len(documents)):
        ids, mask = documents[index]
        digest.update(ids.tobytes() + mask.tobytes())
        with_aux, targets = needed_positions(mask)
        sizes.append(with_aux * row_bytes[0] + len(targets) * row_bytes[1])
    return sizes, digest.hexdigest()


def cut_into_shards(sizes: list[int], limit: int) -> tuple[int, ...]:
    """Cut documents of ``sizes`` into shards of about ``limit`` bytes; return their counts."""
    shards, filled = [0], 0
    for size in sizes:
        if filled and filled + size > limit:
            shards.append(0)
            filled = 0
        shards[-1] += 1
        filled += size
    return tuple(shards)


def begin(plan: FeaturePlan, directory: Path, total: int, progress: Progress) -> None:
    """Report what will be written, check that it fits, and write the plan into ``directory``.

    Raises ``UserError`` when the disk is too small or the directory holds another extraction.
    """
    directory.mkdir(parents=True, exist_ok=True)
    delete_scratch(directory)
    if (directory / "plan.json").is_file():
        begun = read_plan(directory, "plan.json")
        # Layer sizes measured in another layout differ in their last digits.
        if begun != replace(plan, layer_sizes=begun.layer_sizes):
            raise UserError(
                f"<output> {directory}: holds features of other options, data or base; choose "
                "another directory"
            )
    elif any(directory.iterdir()):
        raise UserError(f"<output> {directory}: is not empty")
    else:
        write_json(directory / "plan.json", plan.as_dict())
    missing = _missing(plan, directory)
    needed = total * len(missing) / len(plan.shards)
    free = shutil.disk_usage(directory).free
    progress(
        f"{sum(plan.shards):,} documents, {total / 2**30:.2f} GiB in {len(plan.shards)} shards as "
        f"{plan.stored}; {len(missing)} shards to write, {free / 2**30:.1f} GiB free"
    )
    if needed > free:
        raise UserError(
            f"<output> {directory}: {needed / 2**30:.2f} GiB to write, {free / 2**30:.2f} GiB free"
        )


def extract(
    rows: BaseRows,
    documents: FittedDocuments,
    plan: FeaturePlan,
    directory: Path,
    replica: Replica,
    progress: Progress,
) -> None:
    """Write this replica's part of the missing shards.

    A collective of the replica's ranks, and with ``replica.in_step`` of all ranks.
    """
    firsts = np.cumsum([0, *plan.shards])
    todo_by_replica = {
        number: {
            shard: _sequences(documents, firsts, shard)
            for shard in _missing(plan, directory)
            if shard % replica.count == number
        }
        for number in (range(replica.count) if replica.in_step else [replica.number])
    }
    if replica.in_step:
        torch.distributed.barrier()  # nobody finishes a shard before all have counted
    todo = todo_by_replica[replica.number]
    counts = {n: sum(map(len, shards.values())) for n, shards in todo_by_replica.items()}
    idle = max(counts.values()) - counts[replica.number]
    sequences = ([documents[i][0] for i in group] for group in chain(*todo.values()))
    results = rows.run(chain(sequences, repeat(IDLE, idle)))
    started, tokens = time.monotonic(), 0
    for done, (shard, groups) in enumerate(todo.items(), start=1):
        members = range(int(firsts[shard]), int(firsts[shard + 1]))
        writer = ShardWriter(documents, members, plan, directory, shard) if rows.has_rows else None
        for group in groups:
            hidden = next(results)
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
    deque(results, maxlen=0)  # run the idle sequences and wait for all sends


def _missing(plan: FeaturePlan, directory: Path) -> list[int]:
    """Return the shards that are not written yet."""
    return [shard for shard in range(len(plan.shards)) if not is_done(directory, shard)]


def finish(directory: Path) -> None:
    """Write the index; all shards must be there."""
    plan = read_plan(directory, "plan.json")
    missing = _missing(plan, directory)
    assert not missing, f"shards {missing} are not written"
    write_json(directory / "index.json", plan.as_dict())


def _sequences(documents: FittedDocuments, firsts: np.ndarray, shard: int) -> list[list[int]]:
    """Group the documents of a shard into sequences, in the same way in every layout."""
    first, stop = int(firsts[shard]), int(firsts[shard + 1])
    groups = pack(documents.lengths[first:stop], documents.seq_length, 0)
    return [[first + int(i) for i in group] for group in groups]
