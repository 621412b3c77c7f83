"""Parts of a data set in the making: pieces of the input, tokenized by one or more processes.

A part is a file named after the options and the bytes it was made of, put in place by a rename. A
run that was killed finds its parts again, and a run with other options or other text makes its own.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_eagle.checkpoint.atomic import atomic_file
from megatron_eagle.data.chat.records import RecordOptions, RecordReader
from megatron_eagle.data.jsonl import FilePiece, parse_lines
from megatron_eagle.errors import UserError, literal, message_of
from megatron_eagle.user_files import first_line


@dataclass(frozen=True)
class Part:
    """A finished piece: its file, how many records and documents it has, what they were rendered
    without (names as in ``template.py``), and ``FILE:LINE: reason`` of each bad line."""

    file: Path
    records: int
    documents: int
    counts: dict[str, int]
    bad: tuple[str, ...]


def make_parts(
    pieces: list[FilePiece], options: RecordOptions, scratch: Path, workers: int
) -> Iterator[Part]:
    """Yield the part of every piece, in order, made by ``workers`` processes.

    Raises ``UserError`` naming ``<workers>`` when one of them is killed.
    """
    if workers == 1:
        yield from map(PartMaker(options, scratch).part, pieces)
        return
    context = multiprocessing.get_context("forkserver")
    # Imported once, for all workers.
    context.set_forkserver_preload(["transformers.models.auto.tokenization_auto", __name__])
    pool = ProcessPoolExecutor(workers, context, _Worker.start, (options, scratch))
    try:
        yield from pool.map(_Worker.part, pieces)
    except BrokenProcessPool:
        raise UserError(
            f"<workers> {workers}: a worker was killed (out of memory?); run the command again "
            "to continue"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


class PartMaker:
    """Maker of parts in ``scratch``, which loads the tokenizer when the first one is missing."""

    def __init__(self, options: RecordOptions, scratch: Path) -> None:
        self.options, self.scratch = options, scratch

    @cached_property
    def reader(self) -> RecordReader:
        """Return the reader, which all pieces share."""
        return RecordReader(self.options)

    def part(self, piece: FilePiece) -> Part:
        """Return the part of ``piece``, made now unless an earlier run has left it."""
        content = piece.read()
        settings = json.dumps([asdict(self.options), _stamp(self.options)], sort_keys=True)
        key = hashlib.sha256(settings.encode() + content).hexdigest()
        file = self.scratch / f"{key}.npz"
        if not file.exists():
            write_part(file, self.reader, content)
        with np.load(file, allow_pickle=False) as arrays:
            bad = [
                f"{piece.file}:{piece.first_line + line}: {reason}"
                for line, reason in zip(arrays["bad_lines"], arrays["bad_reasons"], strict=True)
            ]
            records, documents = (int(n) for n in arrays["numbers"])
            counts = json.loads(str(arrays["counts"]))
        return Part(file, records, documents, counts, tuple(bad))


class _Worker:
    """State of a worker process, which the pool sets up once and then sends pieces alone."""

    maker: PartMaker

    @classmethod
    def start(cls, options: RecordOptions, scratch: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        cls.maker = PartMaker(options, scratch)
        threading.Thread(target=_end_with_parent, daemon=True).start()

    @classmethod
    def part(cls, piece: FilePiece) -> Part:
        return cls.maker.part(piece)


def _end_with_parent() -> None:
    """End this worker with its parent, which cannot stop it when killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _stamp(options: RecordOptions) -> list[tuple[str, int, int]]:
    """Return name, size and time of the tokenizer's and template's files.

    Another tokenizer in the same directory then makes other parts.
    """
    source = Path(options.tokenizer)
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    files += [Path(options.template)] if options.template else []
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def bad_record(error: Exception) -> str:
    """Return why a record is bad that failed by an exception of a library."""
    return literal(f"{type(error).__name__}: {first_line(error)}")


def write_part(file: Path, reader: RecordReader, content: bytes) -> None:
    """Tokenize the lines of ``content``; write documents, counts and bad lines to ``file``."""
    documents, records = [], 0
    bad_lines, bad_reasons = [], []
    for offset, record in parse_lines(content, first_line=0):
        try:
            if isinstance(record, UserError):
                raise record
            documents += reader.read(record)
            records += 1
        except Exception as error:  # a record can fail in any way, in templates and tokenizers too
            reason = message_of(error) if isinstance(error, ValueError) else bad_record(error)
            bad_lines.append(offset)
            bad_reasons.append(reason.replace("\n", " "))
    with atomic_file(file) as scratch, scratch.open("wb") as output:
        np.savez(
            output,
            ids=np.concatenate([d.ids for d in documents] or [np.empty(0)]).astype(np.int32),
            mask=np.concatenate([d.mask for d in documents] or [np.empty(0)]).astype(np.uint8),
            lengths=np.asarray([len(d.ids) for d in documents], dtype=np.int64),
            numbers=np.asarray([records, len(documents)]),
            counts=np.asarray(json.dumps(reader.take_counts())),
            bad_lines=np.asarray(bad_lines, dtype=np.int64),
            bad_reasons=np.asarray(bad_reasons, dtype=np.str_),
        )
