"""JSONL files: lines parsed, token ids checked, and large files cut into pieces of whole lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import reading

ONE_A_LINE = "one record a line is wanted (jq -c '.[]' makes lines of a JSON array)"


def parse_lines(content: bytes, first_line: int = 1) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of every line that is not blank.

    For a line that is not JSON, or text that UTF-8 cannot write, the value is a ``UserError``
    saying why; the caller may go on.
    """
    for number, line in enumerate(content.split(b"\n"), start=first_line):
        if line.strip():
            yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        value = json.loads(line.decode("utf-8"))
        if b"\\ud" in line or b"\\uD" in line:  # half of a character, unless both halves are there
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return UserError(f"not text: {error.reason}, {literal(ascii(error.object[error.start]))}")
    except Exception as error:  # also a deep nesting and an integer of thousands of digits
        if line.lstrip()[:1] == b"[":
            return UserError(f"not JSON on one line ({literal(error)}); {ONE_A_LINE}")
        return UserError(f"not JSON ({literal(error)})")
    return value


def not_an_object(value: Any) -> str:
    """Return the words for a line whose JSON ``value`` is no record."""
    array = f" but an array; {ONE_A_LINE}" if isinstance(value, list) else ""
    return f"not a JSON object{array}"


def read_records(file: str | Path, parameter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (``FILE:LINE``, JSON object) of every line that is not blank.

    Raises ``UserError`` naming ``parameter`` when there is no such file, and naming file and line
    when a line is not a JSON object.
    """
    path = Path(file)
    with reading(parameter, file):
        if not path.is_file():
            raise UserError(f"<{parameter}> {literal(file)}: no such file")
        yield from _records(path, str(file))


def _records(path: Path, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            for _, value in parse_lines(line):
                where = f"{file}:{number}"
                if isinstance(value, UserError):
                    raise UserError(f"{where}: {value.message}")
                if not isinstance(value, dict):
                    raise UserError(f"{where}: {not_an_object(value)}")
                yield where, value


def ids(record: Mapping[str, Any], key: str, vocab_size: int, where: str = "") -> list[int]:
    """Return the token ids that ``record`` holds under ``key``, at least one.

    Raises ``UserError``, starting with ``where``, unless they are a list of integers from 0 to
    ``vocab_size`` - 1.
    """
    name = f"{where}: {key}" if where else key
    values = record.get(key)
    if not isinstance(values, list) or not values or not all(type(i) is int for i in values):
        raise UserError(f"{name} must be a non-empty list of token ids")
    for bad in (min(values), max(values)):
        if not 0 <= bad < vocab_size:
            raise UserError(f"{name}: {outside(bad, vocab_size)}")
    return values


def outside(token: int, vocab_size: int) -> str:
    """Return the words for a token id that the vocabulary does not have."""
    return f"token id {token} is outside the vocabulary's 0 to {vocab_size - 1}"


@dataclass(frozen=True)
class FilePiece:
    """Bytes ``start`` to ``end`` of ``file``: whole lines, the first of them ``first_line``."""

    file: str
    start: int
    end: int
    first_line: int

    def read(self) -> bytes:
        """Return the bytes."""
        with open(self.file, "rb") as data:
            data.seek(self.start)
            return data.read(self.end - self.start)


def cut(file: str, size: int) -> Iterator[FilePiece]:
    """Yield pieces of about ``size`` bytes that cover ``file``, in order.

    Raises ``UserError`` naming ``<input>`` when there is no such file.
    """
    with reading("input", file):
        if not Path(file).is_file():
            raise UserError(f"<input> {literal(file)}: no such file")
    start, line = 0, 1
    with open(file, "rb") as data:
        while block := data.read(size):
            block += data.readline()
            yield FilePiece(file, start, start + len(block), line)
            start += len(block)
            line += block.count(b"\n")
