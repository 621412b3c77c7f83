"""SAVE/best: what it remembers, and that a run that dies leaves a whole draft there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.checkpoint.directory import ACCEPTED_LENGTH_NAME, resolve_checkpoint
from megatron_eagle.training import best_checkpoint
from megatron_eagle.training.best_checkpoint import BestCheckpoint

SETTINGS = {"prompts_sha256": "0", "draft_tokens": 3}


def written(directory: Path, name: str, length: float) -> Path:
    """What has been saved of an iteration, before it gets its place."""
    path = directory / f"{name}.partial"
    path.mkdir(parents=True)
    for file in ("metadata.json", ".metadata"):
        (path / file).write_text("{}")
    figures = {**SETTINGS, "accepted_length": length, "iteration": int(name[5:])}
    (path / ACCEPTED_LENGTH_NAME).write_text(json.dumps(figures))
    return path


def put(directory: Path, iteration: int, length: float) -> None:
    name = f"iter_{iteration:07d}"
    BestCheckpoint(directory, length, iteration)._put_in_place(
        written(directory, name, length), name
    )


def test_one_draft_is_kept_and_remembered(tmp_path: Path) -> None:
    assert BestCheckpoint.open(tmp_path, SETTINGS).accepted_length == 0.0
    for iteration, length in ((10, 1.5), (30, 1.75), (30, 2.0)):
        put(tmp_path, iteration, length)
        found = BestCheckpoint.open(tmp_path, SETTINGS)
        assert (found.accepted_length, found.iteration) == (length, iteration)
        assert [path.name for path in tmp_path.glob("iter_*")] == [f"iter_{iteration:07d}"]


@pytest.mark.parametrize("dies_at", ["rename", "write_text", "rmtree"])
def test_a_run_that_dies_leaves_a_whole_draft(
    dies_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 10, 1.5)

    def die(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner = {"rename": Path, "rmtree": best_checkpoint.shutil}.get(dies_at, best_checkpoint)
        patch.setattr(owner, dies_at, die)
        with pytest.raises(KeyboardInterrupt):
            put(tmp_path, 30, 1.75)
    found = BestCheckpoint.open(tmp_path, SETTINGS)
    assert found.iteration == (30 if dies_at == "rmtree" else 10)
    assert resolve_checkpoint(tmp_path).is_dir()
    put(tmp_path, 40, 2.0)
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000040"]


def test_other_figures_do_not_compare(tmp_path: Path) -> None:
    put(tmp_path, 10, 1.5)
    with pytest.raises(ValueError, match="draft_tokens 3, this run has 5; move it away"):
        BestCheckpoint.open(tmp_path, {**SETTINGS, "draft_tokens": 5})
    (tmp_path / "iter_0000010" / ACCEPTED_LENGTH_NAME).write_text("{}")
    with pytest.raises(ValueError, match=f"{ACCEPTED_LENGTH_NAME}: cannot be read"):
        BestCheckpoint.open(tmp_path, SETTINGS)
