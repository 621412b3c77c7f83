"""Output that appears whole: written under another name, then put in place by a rename.

A run that is killed leaves either the earlier content or the new one under the final name, never a
part of it. The other name stands beside the final one, so that both are on one file system.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path to write a file to, which replaces ``target`` on success and vanishes on error.

    The path differs between processes, so that two may write the same target.
    """
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield scratch
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write ``text`` to ``target``, in UTF-8."""
    with atomic_file(target) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(target: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``target`` as a JSON object."""
    write_text(target, json.dumps(content, indent=1) + "\n")


def part(target: Path) -> Path:
    """Return the name under which a file of a set is written, for ``put_in_place``.

    It is the same in every run: one that resumes overwrites what a killed one left.
    """
    return target.with_name(target.name + ".part")


def put_in_place(*targets: Path) -> None:
    """Give files that were written as ``part(target)`` their names, in this order.

    Readers must take the last one as the sign that the set is whole.
    """
    for target in targets:
        part(target).replace(target)


@contextmanager
def atomic_dir(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a new directory that becomes ``target`` on success and vanishes on error.

    With ``replace`` it takes the place of a directory that holds something; without, that is an
    ``OSError``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    scratch.mkdir()
    try:
        yield scratch
        if replace:
            replace_dir(scratch, target)
        else:
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_dir(scratch: Path, target: Path) -> None:
    """Rename directory ``scratch`` to ``target`` and delete what stood there.

    Between the two renames of a replacement there is no ``target`` for an instant.
    """
    earlier = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(earlier)
    try:
        scratch.rename(target)
    except OSError:
        if earlier.exists():
            earlier.rename(target)
        raise
    if earlier.exists():
        shutil.rmtree(earlier, ignore_errors=True)


def check_unused(directory: Path, parameter: str) -> None:
    """Raise ``UserError`` naming ``parameter`` unless ``directory`` is absent or empty."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise UserError(f"<{parameter}> {directory}: exists and is not a directory")
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"<{parameter}> {directory}: the directory exists and is not empty")


def checked_output(
    output: Path, overwrite: bool, replaceable: Callable[[dict[str, Any]], bool]
) -> Path:
    """Return ``output`` without symbolic links, if it may be written.

    With ``overwrite`` a directory whose config.json is ``replaceable`` may be replaced. Raises
    ``UserError`` naming ``<output>`` otherwise.
    """
    output = output.resolve()
    if output.exists() and not output.is_dir():
        raise UserError(f"<output> {output}: exists and is not a directory")
    if not output.is_dir() or not any(output.iterdir()):
        return output
    if not overwrite:
        raise UserError(f"<output> {output}: not empty; give <overwrite> to replace it")
    try:
        earlier = json.loads((output / "config.json").read_bytes())
    except (OSError, ValueError):
        earlier = None
    if not isinstance(earlier, dict) or not replaceable(earlier):
        raise UserError(f"<output> {output}: <overwrite> replaces only an exported draft")
    return output
