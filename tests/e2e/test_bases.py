"""Training and decoding beside MoE and MLA bases, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.hf.base.import_base import import_base
from tests.e2e.launch import ROOT, launch, train
from tests.helpers.random_answers import write_answers
from tests.helpers.tiny_hf import make_base

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "mscale": 0.7}
SCALED = YARN | {"mscale_all_dim": 1.0, "original_max_position_embeddings": 16}
MLA = ["--eagle-attention", "mla"]
BASES = [
    pytest.param("qwen3_moe", {"mlp_only_layers": [0, 3]}, [], id="qwen3_moe"),
    pytest.param("qwen3_next", {"full_attention_interval": 3}, [], id="qwen3_next"),
    pytest.param("gpt_oss", {}, [], id="gpt_oss"),
    pytest.param("deepseek_v2", {"q_lora_rank": None}, [], id="deepseek_v2"),
    pytest.param("deepseek_v2", {"q_lora_rank": None}, MLA, id="deepseek_v2-mla-draft"),
    pytest.param("deepseek_v3", {"rope_parameters": SCALED}, [], id="deepseek_v3"),
    pytest.param("deepseek_v3", {"rope_parameters": SCALED}, MLA, id="deepseek_v3-mla-draft"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "fields", "flags"), BASES)
def test_every_base_trains_a_draft_and_decodes_with_it(
    family: str, fields: dict[str, Any], flags: list[str], tmp_path: Path
) -> None:
    """The base stays as it is, the loss falls, the cache gives the answers it gives without
    speculation, and a converted MLA draft is the one that was trained."""
    make_base(tmp_path / "hf", family, num_hidden_layers=7, **fields)
    import_base(tmp_path / "hf", tmp_path / "base")
    write_answers(tmp_path / "answers.jsonl")
    run = train(
        1, tmp_path / "log.jsonl", "--eagle-base-checkpoint", tmp_path / "base",
        "--eagle-train-data", tmp_path / "answers.jsonl", "--eagle-draft-vocab-size", 32,
        "--eagle-ttt-steps", 3, "--save", tmp_path / "draft", "--save-interval", 20, *flags,
        script=ROOT / "tests" / "e2e" / "train_and_check_base.py",
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    assert "THE BASE IS UNCHANGED" in run.output
    assert run.metrics[20]["loss"] < run.metrics[1]["loss"]
    answers = (tmp_path / "answers.jsonl").read_text().splitlines()[:4]
    prompts = [json.dumps({"prompt_ids": json.loads(line)["prompt_ids"]}) for line in answers]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    decoded = launch(
        ROOT / "tools" / "eval_acceptance.py", 2, "--base", tmp_path / "base",
        "--draft", tmp_path / "draft", "--prompts", tmp_path / "prompts.jsonl",
        "--max-new-tokens", 12,
    )  # fmt: skip
    assert decoded.returncode == 0, decoded.output[-3000:]
    assert "speculative answers equal the greedy ones" in decoded.output
    if flags and fields.get("q_lora_rank", 1) is not None:
        command = [sys.executable, "tools/convert_to_hf.py", "--load", str(tmp_path / "draft")]
        command += ["--output", str(tmp_path / "draft_hf"), "--verify"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run_tool = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
        assert run_tool.returncode == 0, run_tool.stderr.decode()
