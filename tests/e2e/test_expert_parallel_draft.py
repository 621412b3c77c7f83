"""A MoE draft with MLA beside such a base, its experts cut over two ranks: trained and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_eagle.hf.base.import_base import import_base
from tests.e2e.launch import train
from tests.helpers.random_answers import write_answers
from tests.helpers.tiny_hf import make_base


@pytest.mark.slow
def test_resumes_as_it_was_cut(tmp_path: Path) -> None:
    make_base(tmp_path / "hf", "deepseek_v3", num_hidden_layers=7)
    import_base(tmp_path / "hf", tmp_path / "base")
    write_answers(tmp_path / "answers.jsonl")
    flags = [
        *("--eagle-base-checkpoint", tmp_path / "base", "--eagle-attention", "mla"),
        *("--eagle-train-data", tmp_path / "answers.jsonl", "--eagle-draft-vocab-size", 32),
        *("--eagle-num-experts", 4, "--eagle-moe-ffn-hidden-size", 32),
        *("--train-iters", 12, "--lr-decay-iters", 20),
    ]
    cut, draft = ["--expert-model-parallel-size", 2], tmp_path / "draft"
    saving = ["--save", draft, "--save-interval", 10]
    whole = train(2, tmp_path / "whole.jsonl", *flags, *cut, *saving)
    assert whole.returncode == 0, whole.output[-3000:]
    assert whole.metrics[12]["loss"] < whole.metrics[1]["loss"]
    (draft / "latest_checkpointed_iteration.txt").write_text("10")
    resumed = train(2, tmp_path / "resumed.jsonl", *flags, *cut, "--load", draft)
    assert resumed.returncode == 0, resumed.output[-3000:]
    for iteration in (11, 12):
        assert resumed.metrics[iteration]["loss"] == whole.metrics[iteration]["loss"]
    other = train(1, None, *flags, "--load", draft)
    assert "--expert-model-parallel-size 1: the MoE draft in --load" in other.error_line
    log = tmp_path / "weights.jsonl"
    weights = train(1, log, *flags, "--load", draft, "--no-load-optim")
    assert weights.returncode == 0, weights.output[-3000:]
    expected = whole.metrics[11]["loss"]
    assert weights.metrics[11]["loss"] == pytest.approx(expected, rel=1e-5)
