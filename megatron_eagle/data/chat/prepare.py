"""JSONL to a Megatron ``.bin/.idx`` data set of ids with one of the loss mask, in resumable steps.

The input is cut into pieces of whole lines, each tokenized into a part (``parts.py``). The parts
are joined in the order of the input, so the result does not depend on the number of processes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eagle.checkpoint.atomic import owned_output, take_back, write_json, write_text
from megatron_eagle.checkpoint.atomic import part as part_of
from megatron_eagle.data.chat.notes import notes
from megatron_eagle.data.chat.parts import Part, make_parts
from megatron_eagle.data.chat.records import RecordOptions, RecordReader
from megatron_eagle.data.features.store import checksum
from megatron_eagle.data.indexed import DatasetWriter, dataset_exists
from megatron_eagle.data.jsonl import FilePiece, cut
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import read_json_object

Progress = Callable[[str], None]
PIECE_BYTES = 4 << 20
NAMED_LINES = 5
_PROGRESS_SECONDS = 5


def prepare(
    inputs: list[str],
    prefix: str,
    options: RecordOptions,
    *,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
    piece_bytes: int = PIECE_BYTES,
    progress: Progress = print,
) -> dict[str, Any]:
    """Write the data set ``prefix`` and return its summary, which is also in ``prefix.json``.

    With ``skip_bad`` bad lines are left out and listed in ``prefix.bad.txt``. Raises ``UserError``
    naming the parameter, or file and line, before anything at ``prefix`` is replaced; finished
    parts are kept for the next run.
    """
    with owned_output(Path(prefix), "output_prefix") as was_killed:
        for beside in (Path(f"{prefix}.json"), _listing(prefix)):
            take_back(beside)
        if was_killed or _scratch(prefix).is_dir():
            finished = _finished(inputs, prefix, options)
            if finished is not None and not overwrite:
                shutil.rmtree(_scratch(prefix), ignore_errors=True)
                return finished
        if dataset_exists(prefix) and not overwrite:
            raise UserError(
                f"<output_prefix> {literal(prefix)}: exists already; <overwrite> replaces it"
            )
        return _prepare(
            inputs,
            prefix,
            options,
            workers=workers,
            skip_bad=skip_bad,
            piece_bytes=piece_bytes,
            progress=progress,
        )


def _scratch(prefix: str) -> Path:
    """Return the directory of the parts, which a run that is killed leaves behind."""
    return Path(f"{prefix}.parts")


def _finished(inputs: list[str], prefix: str, options: RecordOptions) -> dict[str, Any] | None:
    """Return the summary of this very data set if it is there; else None."""
    if not dataset_exists(prefix):
        return None
    file = Path(f"{prefix}.json")
    try:
        summary = read_json_object(file)
        made = file.stat().st_mtime
        if any(Path(name).stat().st_mtime > made for name in inputs):
            return None
    except (UserError, OSError):
        return None
    made_by = {"inputs": inputs, "options": json.loads(json.dumps(asdict(options)))}
    return summary if made_by.items() <= summary.items() else None


def _prepare(
    inputs: list[str],
    prefix: str,
    options: RecordOptions,
    *,
    workers: int,
    skip_bad: bool,
    piece_bytes: int,
    progress: Progress,
) -> dict[str, Any]:
    vocab_size = RecordReader(options).vocab_size  # also fails early on a bad tokenizer
    scratch = _scratch(prefix)
    scratch.mkdir(parents=True, exist_ok=True)
    pieces = [piece for file in inputs for piece in cut(file, piece_bytes)]
    parts: list[Part] = []
    for part in _reported(pieces, make_parts(pieces, options, scratch, workers), progress):
        if part.bad and not skip_bad:
            more = f" (and {len(part.bad) - 1} more in its piece)" if len(part.bad) > 1 else ""
            raise UserError(f"{part.bad[0]}{more}; <skip_bad_lines> leaves bad lines out")
        parts.append(part)
    if not sum(part.documents for part in parts):
        raise UserError(f"<input> {' '.join(inputs)}: no usable record in it")
    bad = [str(UserError(line)) for part in parts for line in part.bad]
    with DatasetWriter(prefix, vocab_size) as writer:
        summary = _join(parts, writer, vocab_size)
        summary |= {"bad_lines": len(bad), "inputs": inputs, "options": asdict(options)}
        writer.beside = partial(_write_beside, writer, prefix, summary, bad)
    _report(summary, bad, prefix, progress)
    shutil.rmtree(scratch)
    return summary


def _reported(pieces: list[FilePiece], parts: Iterable[Part], progress: Progress) -> Iterator[Part]:
    """Yield ``parts``, those of ``pieces``, and report every few seconds how far they are."""
    total, done, records = sum(piece.end - piece.start for piece in pieces), 0, 0
    started = reported = time.monotonic()
    for piece, part in zip(pieces, parts, strict=True):
        done, records = done + piece.end - piece.start, records + part.records
        now = time.monotonic()
        if now - reported > _PROGRESS_SECONDS or done == total:
            reported, pace = now, (now - started) / done
            progress(
                f"{done / 2**20:.1f} of {total / 2**20:.1f} MiB, {records:,} records, "
                f"{(total - done) * pace / 60:.1f} min left"
            )
        yield part


def _join(parts: list[Part], writer: DatasetWriter, vocab_size: int) -> dict[str, Any]:
    """Write the parts' documents and return the counts of the data set."""
    for part in parts:
        with np.load(part.file, allow_pickle=False) as arrays:
            writer.add(arrays["ids"], arrays["mask"], arrays["lengths"])
    return {
        "records": sum(part.records for part in parts),
        "documents": writer.documents,
        "tokens": writer.tokens,
        "supervised_tokens": writer.supervised,
        "longest_document": writer.longest,
        "counts": dict(sum((Counter(part.counts) for part in parts), Counter[str]())),
        "vocab_size": vocab_size,
    }


def _listing(prefix: str) -> Path:
    return Path(f"{prefix}.bad.txt")


def _write_beside(
    writer: DatasetWriter, prefix: str, summary: dict[str, Any], bad: list[str]
) -> None:
    """Write the summary, which gets the checksums of the data set, and the list of bad lines; or
    delete the list of an earlier data set."""
    summary["sha256"] = {file.name: checksum(part_of(file)) for file in writer.files}
    write_json(Path(f"{prefix}.json"), summary)
    if bad:
        write_text(_listing(prefix), "\n".join(bad) + "\n")
    else:
        _listing(prefix).unlink(missing_ok=True)


def _report(summary: dict[str, Any], bad: list[str], prefix: str, progress: Progress) -> None:
    """Report what was rendered otherwise than the records say, and list bad lines in a file."""
    for note in notes(summary["counts"]):
        progress(f"note: {note}")
    if bad:
        progress(f"{len(bad):,} bad lines left out, all named in {_listing(prefix)}:")
        for line in bad[:NAMED_LINES]:
            progress(f"  {line}")
