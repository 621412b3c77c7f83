"""A damaged base directory is refused by the import in one line, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_eagle.cli.import_base import main


def assert_refused(
    whole: Path, damage: Callable[[Path], Any], message: str, folder: Path, capsys: Any
) -> None:
    """Import a copy of ``whole`` that ``damage`` was done to, in the empty ``folder``."""
    shutil.copytree(whole, folder / "hf")
    damage(folder / "hf")
    assert main(["--hf", str(folder / "hf"), "--save", str(folder / "base")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert [path.name for path in folder.iterdir()] == ["hf"]
