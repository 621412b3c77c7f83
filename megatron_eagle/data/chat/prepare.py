"""JSONL -> Megatron ``.bin/.idx`` of ids and, beside it, of the loss mask; resumable.

The input is cut into chunks of whole lines. A finished chunk is a file named after the options and
the bytes it was made of, put in place by a rename; a run that was killed finds its chunks again,
and a run with other options or other text never takes one for its own. The chunks are then joined
in the input's order, so the result does not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eagle.data.chat.records import RecordOptions, RecordReader
from megatron_eagle.data.indexed import DatasetWriter, dataset_exists
from megatron_eagle.data.jsonl_chunks import Chunk, cut, parse_lines

Progress = Callable[[str], None]
CHUNK_BYTES = 4 << 20
NAMED_LINES = 5


@dataclass(frozen=True)
class Part:
    """A finished chunk: its file, how many of its lines were good, and the bad ones' reasons."""

    file: Path
    records: int
    documents: int
    unstable_turns: int
    bad: tuple[str, ...]


def prepare(
    inputs: list[str],
    prefix: str,
    options: RecordOptions,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress = print,
) -> dict[str, Any]:
    """Write the data set ``prefix`` and return its summary, which is also ``prefix.json``.

    Raises ``ValueError`` naming flag, or file and line, before anything at ``prefix`` is replaced;
    chunks that are done stay for the next run. With ``skip_bad`` bad lines are left out and all of
    them listed in ``prefix.bad.txt``.
    """
    if dataset_exists(prefix) and not overwrite:
        raise ValueError(f"--output-prefix {prefix}: exists already; --overwrite replaces it")
    vocab_size = RecordReader(options).vocab_size  # also fails early on a bad tokenizer
    scratch = Path(f"{prefix}.parts")
    scratch.mkdir(parents=True, exist_ok=True)
    chunks = [chunk for file in inputs for chunk in cut(file, chunk_bytes)]
    parts: list[Part] = []
    for part in _make_parts(chunks, options, scratch, workers, progress):
        if part.bad and not skip_bad:
            more = f" (and {len(part.bad) - 1} more in its chunk)" if len(part.bad) > 1 else ""
            raise ValueError(f"{part.bad[0]}{more}; --skip-bad-lines leaves bad lines out")
        parts.append(part)
    if not sum(part.documents for part in parts):
        raise ValueError(f"--input {' '.join(inputs)}: no usable record in it")
    bad = [line for part in parts for line in part.bad]
    summary = _join(parts, prefix, vocab_size)
    summary |= {"bad_lines": len(bad), "inputs": inputs, "options": asdict(options)}
    _report(summary, bad, prefix, progress)
    Path(f"{prefix}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(scratch)
    return summary


def _make_parts(
    chunks: list[Chunk], options: RecordOptions, scratch: Path, workers: int, progress: Progress
) -> Iterator[Part]:
    total, done, records = sum(c.end - c.start for c in chunks), 0, 0
    started = said = time.monotonic()
    jobs = ((chunk, options, scratch) for chunk in chunks)
    if workers > 1:
        context = multiprocessing.get_context("forkserver")
        # Imported once, for all workers.
        modules = ["transformers.models.auto.tokenization_auto", __name__]
        context.set_forkserver_preload(modules)
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
        results = pool.map(_make_part_of, jobs)
    else:
        results = map(_make_part_of, jobs)
    try:
        for chunk, part in zip(chunks, results, strict=True):
            done, records = done + chunk.end - chunk.start, records + part.records
            now = time.monotonic()
            if now - said > 5 or done == total:
                said, pace = now, (now - started) / done
                progress(
                    f"{done / 2**20:.1f} of {total / 2**20:.1f} MiB, {records:,} records, "
                    f"{(total - done) * pace / 60:.1f} min left"
                )
            yield part
    except BrokenProcessPool:
        raise ValueError(
            f"--workers {workers}: a worker was killed (out of memory?); run the command again "
            "to go on"
        ) from None
    finally:
        if workers > 1:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its workers, which would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_readers: dict[RecordOptions, RecordReader] = {}


def _make_part_of(job: tuple[Chunk, RecordOptions, Path]) -> Part:
    chunk, options, scratch = job
    content = chunk.read()
    key = hashlib.sha256(repr((options, _stamp(options))).encode() + content).hexdigest()
    file = scratch / f"{key}.npz"
    if not file.exists():
        if options not in _readers:
            _readers[options] = RecordReader(options)
        _write_part(file, _readers[options], content)
    with np.load(file, allow_pickle=False) as part:
        bad = [
            f"{chunk.file}:{chunk.first_line + line}: {reason}"
            for line, reason in zip(part["bad_lines"], part["bad_reasons"], strict=True)
        ]
        records, documents, unstable = (int(n) for n in part["numbers"])
    return Part(file, records, documents, unstable, tuple(bad))


def _stamp(options: RecordOptions) -> list[tuple[str, int, int]]:
    """Name, size and time of the tokenizer's and template's files: another tokenizer in the same
    place makes other chunks."""
    source = Path(options.tokenizer)
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    files += [Path(options.template)] if options.template else []
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _write_part(file: Path, reader: RecordReader, content: bytes) -> None:
    documents, records, unstable = [], 0, reader.unstable_turns
    bad_lines, bad_reasons = [], []
    for offset, record in parse_lines(content, 0):
        try:
            if isinstance(record, ValueError):
                raise record
            documents += reader.read(record)
            records += 1
        except ValueError as error:
            bad_lines.append(offset)
            bad_reasons.append(str(error).replace("\n", " "))
    partial = file.with_suffix(f".{os.getpid()}.part")
    with partial.open("wb") as output:
        np.savez(
            output,
            ids=np.concatenate([d.ids for d in documents] or [np.empty(0)]).astype(np.int32),
            mask=np.concatenate([d.mask for d in documents] or [np.empty(0)]).astype(np.uint8),
            lengths=np.asarray([len(d.ids) for d in documents], dtype=np.int64),
            numbers=np.asarray([records, len(documents), reader.unstable_turns - unstable]),
            bad_lines=np.asarray(bad_lines, dtype=np.int64),
            bad_reasons=np.asarray(bad_reasons, dtype=np.str_),
        )
    partial.replace(file)


def _join(parts: list[Part], prefix: str, vocab_size: int) -> dict[str, Any]:
    with DatasetWriter(prefix, vocab_size) as writer:
        for part in parts:
            with np.load(part.file, allow_pickle=False) as content:
                writer.add(content["ids"], content["mask"], content["lengths"])
    return {
        "records": sum(part.records for part in parts),
        "documents": writer.documents,
        "tokens": writer.tokens,
        "supervised_tokens": writer.supervised,
        "longest_document": writer.longest,
        "unstable_turns": sum(part.unstable_turns for part in parts),
        "vocab_size": vocab_size,
    }


def _report(summary: dict[str, Any], bad: list[str], prefix: str, progress: Progress) -> None:
    if summary["unstable_turns"]:
        progress(
            f"note: the chat template is not prefix-stable: {summary['unstable_turns']:,} earlier "
            "turns look otherwise once the conversation goes on (thinking or a system prompt "
            "moves); each became a document of its own, as the model saw it"
        )
    if bad:
        listing = Path(f"{prefix}.bad.txt")
        listing.write_text("\n".join(bad) + "\n", encoding="utf-8")
        progress(f"{len(bad):,} bad lines left out, all named in {listing}:")
        for line in bad[:NAMED_LINES]:
            progress(f"  {line}")
