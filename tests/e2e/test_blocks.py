"""Block drafts by command: trained, resumed in another layout, measured, converted, imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Inputs
from tests.e2e.launch import ROOT, launch, train

MASK = 7
SIZES = ["--eagle-mask-token", MASK, "--eagle-aux-layers", 1, 3, 5, "--eagle-block-size", 4]
ALGORITHMS: dict[str, list[object]] = {
    "dflash": ["--eagle-algorithm", "dflash", *SIZES, "--eagle-anchors", 5],
    "dspark": [
        *("--eagle-algorithm", "dspark", *SIZES, "--eagle-confidence-head"),
        *("--eagle-markov-rank", 8, "--eagle-num-layers", 2, "--eagle-pack"),
    ],
}


@pytest.fixture(scope="module")
def data(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """The answers without the mask token."""
    file = tmp_path_factory.mktemp("masked") / "answers.jsonl"
    lines = [json.loads(line) for line in inputs.answers.read_text().splitlines()]
    for line in lines:
        for name in ("prompt_ids", "answer_ids"):
            line[name] = [8 if token == MASK else token for token in line[name]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Inputs(inputs.hf, inputs.base, file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_from_training_to_a_warm_start(name: str, data: Inputs, tmp_path: Path) -> None:
    words = [*ALGORITHMS[name], "--train-iters", 12, "--lr-decay-iters", 20]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": [i, 9, i + 3]}) + "\n" for i in range(5)))
    evaluating = ["--eagle-eval-prompts", prompts, "--eagle-eval-new-tokens", 8]
    whole = train(
        2, tmp_path / "whole.jsonl", *data.flags, *words, "--tensor-model-parallel-size", 2,
        "--sequence-parallel", "--save", tmp_path / "draft", "--save-interval", 10, *evaluating,
    )  # fmt: skip
    assert whole.returncode == 0, whole.output[-3000:]
    assert whole.metrics[12]["loss"] < whole.metrics[1]["loss"]
    assert ("expected_accepted_length" in whole.metrics[1]) == (name == "dspark")
    shutil.copytree(tmp_path / "draft", tmp_path / "again")
    (tmp_path / "again" / "latest_checkpointed_iteration.txt").write_text("10")
    resumed = train(
        2, tmp_path / "again.jsonl", *data.flags, *words, "--load", tmp_path / "again",
        "--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 3,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.output[-3000:]
    for iteration, line in resumed.metrics.items():
        expected = whole.metrics[iteration]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5), "the same anchors"
    figures = command(
        "eval_acceptance.py", "--base", data.base, "--draft", tmp_path / "draft", "--prompts",
        prompts, "--max-new-tokens", 8, "--output", tmp_path / "f.json",
    )  # fmt: skip
    assert "speculative answers equal the greedy ones" in figures
    assert len(json.loads((tmp_path / "f.json").read_text())["acceptance"]) == (
        3 if name == "dflash" else 4
    )
    out = command(
        "convert_to_hf.py", "--load", tmp_path / "draft", "--output", tmp_path / "hf", "--verify"
    )
    assert "verified: a block's outputs equal" in out
    warm = train(1, None, *data.flags, "--eagle-warm-start", tmp_path / "hf", "--train-iters", 1)
    assert warm.returncode == 0, warm.output[-3000:]


def command(tool: str, *words: object) -> str:
    run = launch(ROOT / "tools" / tool, 1, *words)
    assert run.returncode == 0, run.output[-3000:]
    return run.output


@pytest.mark.slow
def test_bad_input_is_one_line(inputs: Inputs, data: Inputs, tmp_path: Path) -> None:
    words = ALGORITHMS["dflash"]
    used = train(1, None, *inputs.flags, *words, "--train-iters", 2)
    assert "--eagle-mask-token 7: the data use this token" in used.error_line
    cut = train(
        2, None, *data.flags, *words, "--eagle-block-size", 12, "--context-parallel-size", 2
    )
    assert "tokens, fewer than --eagle-block-size 12" in cut.error_line
