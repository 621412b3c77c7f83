"""Stands for Weights & Biases where it is not installed: what is logged goes to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_file: list[Path] = []
config: dict[str, Any] = {}


def init(*, dir: str, name: str, project: str, config: dict[str, Any]) -> None:
    _file.append(Path(dir) / f"{project}-{name}.jsonl")


def log(values: dict[str, Any], step: int) -> None:
    """Append each value as a number; like the real one, steps must not go back."""
    lines = _file[0].read_text().splitlines() if _file[0].exists() else []
    assert not lines or json.loads(lines[-1])["step"] <= step, (values, step)
    with _file[0].open("a") as file:
        for key, value in values.items():
            file.write(json.dumps({"step": step, "key": key, "value": float(value)}) + "\n")


def finish() -> None: ...
