"""An output directory that appears whole, by a rename, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def checked_output(
    output: Path, overwrite: bool, replaceable: Callable[[dict[str, Any]], bool]
) -> Path:
    """``output`` without symbolic links, if it may be written.

    With ``overwrite`` a directory whose config.json is ``replaceable`` may be replaced. Raises
    ValueError naming --output otherwise.
    """
    output = output.resolve()
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: exists and is not a directory")
    if not output.is_dir() or not any(output.iterdir()):
        return output
    if not overwrite:
        raise ValueError(f"--output {output}: not empty; give --overwrite to replace it")
    try:
        earlier = json.loads((output / "config.json").read_bytes())
    except (OSError, ValueError):
        earlier = None
    if not isinstance(earlier, dict) or not replaceable(earlier):
        raise ValueError(f"--output {output}: --overwrite replaces only an exported draft")
    return output


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new directory beside `target` that takes its place on success and vanishes on failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    earlier = target.with_name(f".{target.name}.{os.getpid()}.old")
    scratch.mkdir()
    try:
        yield scratch
        if target.exists():
            target.rename(earlier)
        try:
            scratch.rename(target)
        except OSError:
            if earlier.exists():
                earlier.rename(target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)
