"""Two pipeline stages in bf16 under Megatron's own trainer: evaluations, saves, exits and resuming
between iterations that overlap."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.e2e.launch import train
from tests.helpers.corpus import corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_goes_on_alike_when_evaluated_stopped_and_resumed(tmp_path: Path) -> None:
    made = corpus(tmp_path, "SentencePieceTokenizer")
    flags = ["--eagle-base-checkpoint", made.base, *made.flags, "--eagle-draft-vocab-size", 380,
             "--bf16", "--micro-batch-size", 1, "--global-batch-size", 5]  # fmt: skip
    stages = ["--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 3]
    save = ["--save", tmp_path / "draft", "--save-interval", 10]
    evaluations = ["--eval-interval", 4, "--eval-iters", 2]
    alone = train(1, tmp_path / "alone.jsonl", *flags)
    whole = train(2, tmp_path / "whole.jsonl", *flags, *stages, *save)
    evaluated = train(2, tmp_path / "evaluated.jsonl", *flags, *stages, *evaluations)
    for run in (alone, whole, evaluated):
        assert run.returncode == 0, run.output[-3000:]
        assert len(run.metrics) == 20
        assert all(math.isfinite(line["loss"]) for line in run.metrics.values())
    assert "validation loss at iteration 8" in evaluated.output
    for iteration, line in whole.metrics.items():
        assert evaluated.metrics[iteration]["loss"] == line["loss"]
        assert line["loss"] == pytest.approx(alone.metrics[iteration]["loss"], rel=0.02)
    (tmp_path / "draft" / "latest_checkpointed_iteration.txt").write_text("10")
    load = ["--load", tmp_path / "draft"]
    resumed = train(2, tmp_path / "resumed.jsonl", *flags, *stages, *load)
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert sorted(resumed.metrics) == list(range(11, 21))
    for iteration, line in resumed.metrics.items():
        assert line["loss"] == whole.metrics[iteration]["loss"]
    # At once, and not foreseen: the second iteration has begun.
    stopped = train(2, tmp_path / "stop.jsonl", *flags, *stages, "--exit-duration-in-mins", -1)
    assert stopped.returncode == 0, stopped.output[-3000:]
    assert list(stopped.metrics) == [1]
