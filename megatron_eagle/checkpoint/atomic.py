"""Output that appears whole: written under another name, then put in place by a rename.

A run that is killed leaves either the earlier content or the new one under the final name, never a
part of it. The other name stands beside the final one, so that both are on one file system. Bytes
are on the disk before the rename is.
"""

from __future__ import annotations

import contextlib
import ctypes
import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.lock import output_lock
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import read_json_object, reading

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def owned_output(target: Path, parameter: str) -> Iterator[bool]:
    """Hold the lock on ``target``, the value of ``parameter``, and clear up after killed runs.

    What a killed run has moved away is taken back, what it left half-written is deleted. Yields
    whether the last run was killed: it may have put ``target`` in place before. Raises
    ``UserError`` if another run holds the lock.
    """
    with output_lock(target, parameter) as was_killed:
        take_back(target.resolve())
        yield was_killed


def take_back(target: Path) -> None:
    """Bring back an earlier ``target`` that a killed run had moved away, and delete its scratch.

    The caller holds the lock on ``target``: no other run is writing it. Ranks of one run may do
    this at the same time.
    """
    name = re.escape(target.name)
    # The last two are the names that earlier releases used.
    moved = re.compile(rf"\.{name}\.\d+\.old")
    scratch = re.compile(rf"\.{name}\.(\d+\.(part|old|tmp)|partial-\d+)")
    if not target.parent.is_dir():
        return
    beside = [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}.")]
    earlier = [path for path in beside if moved.fullmatch(path.name)]
    if earlier and not target.exists():
        with contextlib.suppress(OSError):  # another rank was faster
            earlier[0].rename(target)
    for path in beside:
        if scratch.fullmatch(path.name) and path.exists():
            _delete(path)


def delete_scratch(directory: Path) -> None:
    """Delete what a killed run was writing by ``atomic_file`` into ``directory``, whose lock the
    caller holds before any rank of the run writes there."""
    for path in directory.glob(".*.part"):
        if re.fullmatch(r"\..+\.\d+\.part", path.name):
            _delete(path)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path to write a file to, which replaces ``target`` on success and vanishes on error.

    The path differs between processes, so that two may write the same target.
    """
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield scratch
        sync(scratch)
        scratch.replace(target)
        sync(target.parent)
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
        sync(part(target))
    for target in targets:
        if target is targets[-1]:
            sync(target.parent)
        part(target).replace(target)
    sync(targets[-1].parent)


@contextmanager
def atomic_dir(target: Path, replace: bool = False, was_killed: bool = False) -> Iterator[Path]:
    """Yield a new directory that becomes ``target`` on success and vanishes on error.

    With ``replace`` it takes the place of a directory that holds something; without, that is an
    ``OSError``. If the last run ``was_killed``, a ``target`` that holds the same is that run's and
    is left as it is, and one that holds anything else is a ``UserError``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    scratch.mkdir()
    try:
        yield scratch
        if was_killed and target.is_dir() and any(target.iterdir()):
            if not _same_content(scratch, target):
                raise UserError(f"{literal(target)}: the directory exists and is not empty")
        elif replace:
            replace_dir(scratch, target)
        else:
            _sync_tree(scratch)
            scratch.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_dir(scratch: Path, target: Path) -> None:
    """Rename directory ``scratch`` to ``target`` and delete what stood there.

    The two change places in one step where the system can do that. Elsewhere there is no ``target``
    for an instant, and ``take_back`` mends what a run that is killed in it leaves.
    """
    _sync_tree(scratch)
    earlier = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists() and exchange(scratch, target):
        scratch.rename(earlier)
    else:
        if target.exists():
            target.rename(earlier)
        try:
            scratch.rename(target)
        except OSError:
            if earlier.exists():
                earlier.rename(target)
            raise
    sync(target.parent)
    if earlier.exists():
        shutil.rmtree(earlier, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; return False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = (os.fsencode(path) for path in (one, other))
    source, target = paths
    return rename(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_EXCHANGE) == 0


def sync(path: Path) -> None:
    """Wait until the file ``path``, or the names in the directory ``path``, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))


def _same_content(one: Path, other: Path) -> bool:
    """Return whether two directories hold the same files, byte for byte."""
    names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    others = {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    return names == others and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names
    )


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_unused(directory: Path, parameter: str) -> None:
    """Raise ``UserError`` naming ``parameter`` unless ``directory`` is absent or empty."""
    with reading(parameter, directory):
        _check_unused(directory, parameter)


def _check_unused(directory: Path, parameter: str) -> None:
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
        earlier = read_json_object(output / "config.json")
    except UserError:
        earlier = None
    if earlier is None or not replaceable(earlier):
        raise UserError(f"<output> {output}: <overwrite> replaces only an exported draft")
    return output
