"""A class in a server's source, found without importing it: its methods and its base classes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def class_of(models: Path, name: str) -> tuple[Path, ast.ClassDef]:
    """The one class ``name`` in the files of ``models``."""
    for file in sorted(models.glob("*.py")):
        if f"class {name}" in file.read_text():
            for node in parsed(file).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return file, node
    raise AssertionError(f"{models} has no class {name}")


def ancestry(models: Path, name: str) -> Iterator[tuple[Path, ast.ClassDef]]:
    """The class and its base classes among the files of ``models``, nearest first."""
    file, node = class_of(models, name)
    yield file, node
    for base in node.bases:
        if isinstance(base, ast.Name) and any(
            f"class {base.id}" in other.read_text() for other in models.glob("*.py")
        ):
            yield from ancestry(models, base.id)


def inherits(models: Path, name: str, marker: str) -> bool:
    """Whether the class or one of its base classes names ``marker`` among its bases."""
    return any(
        ast.unparse(base) == marker for _, node in ancestry(models, name) for base in node.bases
    )


def method_source(models: Path, name: str, method: str) -> str | None:
    """The source of the class's or the nearest base class's ``method``, or None."""
    for _, node in ancestry(models, name):
        for child in node.body:
            if isinstance(child, ast.FunctionDef) and child.name == method:
                return ast.unparse(child)
    return None
