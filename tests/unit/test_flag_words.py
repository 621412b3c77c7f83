"""Only commands know their flags: library code names parameters as ``<name>`` in its messages.

Read from the source of every room below ``training`` and ``cli``, except ``config``, which owns the
``--eagle-*`` flags. Docstrings may mention flags.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_eagle"
KNOWS_FLAGS = {"cli", "config", "training"}
SERVERS_FLAGS = "hf/draft/commands.py"
"""The commands on a model card tell a server's own flags."""

FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*|(?<![\w/])tools/\w+")


def words_of(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every flag and tool path in a string that is not a docstring."""
    tree = ast.parse(source)
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            for text in FLAG.findall(node.value):
                yield node.lineno, text


def offenders() -> dict[str, list[str]]:
    """What each room has of them."""
    rooms: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE)
        room = path.parts[0].removesuffix(".py")
        if room not in KNOWS_FLAGS and path.as_posix() != SERVERS_FLAGS:
            for line, text in words_of(file.read_text()):
                rooms.setdefault(room, []).append(f"{path}:{line}: {text}")
    return rooms


def test_library_code_has_no_flags() -> None:
    lines = [line for room in offenders().values() for line in room]
    assert not lines, "\n" + "\n".join(lines)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise ValueError(f"--load {x}: no")', ["--load"]),
        ('"use --a-b or tools/import_base.py"', []),  # a statement of its own: documentation
        ('x = "use --a-b or tools/import_base.py"', ["--a-b", "tools/import_base"]),
        ('def f():\n    """Read --load."""\n    return "a--b", "--", "-" * 3', []),
    ],
)
def test_the_checker_finds_flags_in_words(source: str, found: list[str]) -> None:
    assert [text for _, text in words_of(source)] == found
