"""A JSONL file cut into pieces of whole lines that workers read on their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Chunk:
    """Bytes ``start`` to ``end`` of ``file``, the first of them on line ``first_line``."""

    file: str
    start: int
    end: int
    first_line: int

    def read(self) -> bytes:
        with open(self.file, "rb") as data:
            data.seek(self.start)
            return data.read(self.end - self.start)


def cut(file: str, size: int) -> Iterator[Chunk]:
    """Chunks of about ``size`` bytes, whole lines each; ``ValueError`` if there is no such file."""
    if not Path(file).is_file():
        raise ValueError(f"--input {file}: no such file")
    start, line = 0, 1
    with open(file, "rb") as data:
        while block := data.read(size):
            block += data.readline()
            yield Chunk(file, start, start + len(block), line)
            start += len(block)
            line += block.count(b"\n")


def parse_lines(content: bytes, first_line: int) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that is not blank; a value that is an exception says why
    the line is no JSON."""
    for number, line in enumerate(content.split(b"\n"), start=first_line):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            yield number, ValueError(f"not JSON ({error})")
