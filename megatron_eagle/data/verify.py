"""Check a prepared data set against its summary: counts, sizes and checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_eagle.data.features.store import checksum
from megatron_eagle.data.indexed import IndexedDocuments
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import read_json_object, reading_file

LARGEST_VOCABULARY = 2**31
"""Bound for ids of a data set whose summary is gone."""


def verify_data_set(prefix: str) -> int:
    """Read the data set ``prefix`` and return the number of its documents.

    Raises ``UserError`` naming the file at fault.
    """
    file = Path(f"{prefix}.json")
    summary = read_json_object(file) if file.is_file() else {}
    vocab_size = summary.get("vocab_size", LARGEST_VOCABULARY)
    sums = summary.get("sha256", {})
    for name in sums if isinstance(sums, dict) else ():
        if checksum(Path(prefix).with_name(Path(name).name)) != sums[name]:
            raise UserError(
                f"{literal(Path(prefix).with_name(name))}: damaged, its checksum differs"
            )
    with reading_file(prefix):
        documents = IndexedDocuments(prefix, vocab_size)
    found: dict[str, Any] = {
        "documents": len(documents),
        "tokens": int(documents.lengths.sum()),
        "supervised_tokens": documents.supervised(),
    }
    for name, count in found.items():
        if name in summary and summary[name] != count:
            raise UserError(
                f"{literal(prefix)}: {count} {name}, its summary {literal(file)} says "
                f"{literal(summary[name])}"
            )
    return len(documents)
