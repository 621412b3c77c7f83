"""The boundary of a user's files: whatever fails while one is read becomes one line that names it.

A file can fail in more ways than can be listed: too deep, too long, cut off, of another kind, gone.
So readers do not list exceptions; they read inside ``reading``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError, literal, names_parameter

LONGEST_REASON = 300
"""Characters of another library's words that a message shows."""


@contextmanager
def reading(parameter: str, path: object) -> Iterator[None]:
    """Turn every exception inside into a ``UserError`` that names ``<parameter>`` and ``path``.

    A ``UserError`` says more than this function could, and is passed on.
    """
    with _naming(f"<{parameter}> {literal(path)}"):
        yield


@contextmanager
def naming(parameter: str) -> Iterator[None]:
    """Put ``<parameter>`` in front of a ``UserError`` inside that names no parameter."""
    try:
        yield
    except UserError as error:
        if names_parameter(error):
            raise
        raise UserError(f"<{parameter}> {error.message}") from error


@contextmanager
def reading_file(path: object) -> Iterator[None]:
    """Turn every exception inside into a ``UserError`` that starts with ``path``."""
    with _naming(literal(path)):
        yield


@contextmanager
def _naming(source: str) -> Iterator[None]:
    try:
        with panics_caught():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source}: {literal(reason(error))}") from error


@contextmanager
def panics_caught() -> Iterator[None]:
    """Turn a panic of a library in Rust (tokenizers, safetensors), which Python takes for no
    ``Exception``, into a ``RuntimeError``."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(first_line(error)) from error


def reason(error: BaseException) -> str:
    """Return one line on why a file could not be read, for an exception of any library."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, RecursionError):
        return "cannot be read: nested too deep"
    if isinstance(error, MemoryError):
        return "cannot be read: it asks for more memory than there is"
    if isinstance(error, UnicodeDecodeError):
        return "cannot be read: not UTF-8"
    words = first_line(error)
    if isinstance(error, ValueError | OSError) and words:
        return f"cannot be read: {words}"
    return f"cannot be read ({type(error).__name__}{': ' if words else ''}{words})"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = lines[0] if lines else ""
    return words if len(words) <= LONGEST_REASON else words[: LONGEST_REASON - 3] + "..."


def parse_json(content: str | bytes, source: str) -> Any:
    """Return the value of a JSON text of a user.

    Raises ``UserError``, starting with ``source``, whatever is wrong with it: Python's parser fails
    with four different exceptions, among them for a deep nesting and for an integer of 5,000
    digits.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{source}: not valid JSON (nested too deep)") from None
    except Exception as error:
        raise UserError(f"{source}: not valid JSON ({literal(first_line(error))})") from None


def read_json(path: Path) -> Any:
    """Return the JSON value in ``path``; raise ``UserError``, naming it, if there is none."""
    if not path.is_file():
        raise UserError(f"{literal(path)}: no such file")
    with reading_file(path):
        content = path.read_bytes()
    return parse_json(content, literal(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``; raise ``UserError``, naming it, if there is none."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{literal(path)}: expected a JSON object, found {type(value).__name__}")
    return value
