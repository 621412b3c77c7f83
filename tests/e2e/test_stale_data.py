"""A node with an old copy of the data stops the run before its first step, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Inputs
from tests.e2e.launch import train
from tests.helpers.random_answers import write_answers

STALE = Path(__file__).with_name("train_with_stale_data.py")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--eagle-draft-vocab-size", 32], "the draft's vocabulary"),
        pytest.param([], "--eagle-train-data", marks=pytest.mark.slow),
    ],
)
def test_another_copy_on_one_rank_is_named(
    words: list[object], what: str, inputs: Inputs, tmp_path: Path
) -> None:
    """Ranks with other vocabularies would exchange rows of other tokens, and no loss would tell."""
    answers, log = tmp_path / "answers.jsonl", tmp_path / "log.jsonl"
    answers.write_bytes(inputs.answers.read_bytes())
    write_answers(tmp_path / "stale.jsonl", lines=8)
    flags = ["--eagle-base-checkpoint", inputs.base, "--eagle-train-data", answers]
    run = train(2, log, *flags, *words, "--train-iters", 2, script=STALE)
    assert run.returncode != 0
    assert run.error_line.startswith(f"error: {what}: rank 1 on "), run.error_line
    assert "put it on storage that all nodes share" in run.error_line
    assert run.metrics == {}
