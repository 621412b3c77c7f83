"""Drafts of other EAGLE generations: trained, resumed in another layout, not mixed up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Inputs
from tests.e2e.launch import train

pytestmark = pytest.mark.slow

ALGORITHMS = {
    "eagle1": ["--eagle-algorithm", "eagle1"],
    "eagle3.1": [
        *("--eagle-algorithm", "eagle3.1", "--eagle-norm-before-residual"),
        *("--eagle-draft-vocab-size", 32),
    ],
    "moe": [
        "--eagle-num-experts",
        4,
        "--eagle-moe-ffn-hidden-size",
        32,
        "--eagle-loss",
        "lk-alpha",
    ],
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_trains_and_resumes_in_another_layout(name: str, inputs: Inputs, tmp_path: Path) -> None:
    words = [*ALGORITHMS[name], "--train-iters", 12, "--lr-decay-iters", 20]
    whole = train(
        2, tmp_path / "whole.jsonl", *inputs.flags, *words, "--tensor-model-parallel-size", 2,
        "--sequence-parallel", "--save", tmp_path / "draft", "--save-interval", 10,
    )  # fmt: skip
    assert whole.returncode == 0, whole.output[-3000:]
    assert whole.metrics[12]["loss"] < whole.metrics[1]["loss"]
    assert ("regression_0" in whole.metrics[1]) == (name == "eagle1")
    shutil.copytree(tmp_path / "draft", tmp_path / "again")
    (tmp_path / "again" / "latest_checkpointed_iteration.txt").write_text("10")
    log = tmp_path / "again.jsonl"
    resumed = train(1, log, *inputs.flags, *words, "--load", tmp_path / "again")
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert set(resumed.metrics) == {11, 12}
    for iteration, line in resumed.metrics.items():
        assert line["loss"] == pytest.approx(whole.metrics[iteration]["loss"], rel=1e-5)
    if name == "moe":
        words = ["--eagle-num-experts", 2]
        other = train(1, None, *inputs.flags, *words, "--load", tmp_path / "draft")
        assert "--eagle-num-experts: this run has 2, the draft in" in other.error_line
        return
    other = train(1, None, *inputs.flags, "--load", tmp_path / "draft")
    assert other.returncode != 0
    assert f"--eagle-algorithm: this run has eagle3, the draft in --load {tmp_path}/draft " in (
        other.error_line
    )
