"""P-EAGLE from training to vLLM's files: trained, resumed in another layout, verified, decoded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Inputs
from tests.e2e.launch import ROOT, cpu_environment, launch, train

pytestmark = pytest.mark.slow

FLAGS = ["--eagle-algorithm", "p-eagle", "--eagle-mask-token", 60, "--eagle-draft-vocab-size", 40]
RUNNER = "drafts in parallel in its first model runner alone"


@pytest.fixture(scope="module")
def trained(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve iterations at TP 2 with sequence parallelism, the last two again at TP 1."""
    folder = tmp_path_factory.mktemp("p-eagle")
    words = [*inputs.flags, *FLAGS, "--train-iters", 12, "--save", folder / "draft"]
    whole = train(
        2, folder / "whole.jsonl", *words, "--save-interval", 10,
        "--tensor-model-parallel-size", 2, "--sequence-parallel",
    )  # fmt: skip
    assert whole.returncode == 0, whole.output[-3000:]
    assert whole.metrics[12]["loss"] < whole.metrics[1]["loss"]
    assert "> to be served: vLLM" in whole.output and RUNNER in whole.output
    load = ["--load", folder / "draft", "--ckpt-step", 10, "--save-interval", 2]
    rest = train(1, folder / "rest.jsonl", *words, *load)
    assert set(rest.metrics) == {11, 12}, rest.output[-3000:]
    for iteration, line in rest.metrics.items():
        for key in ("loss", "loss_2", "accuracy_2", "simulated_accepted_length"):
            assert line[key] == pytest.approx(whole.metrics[iteration][key], rel=1e-5), key
    return folder / "draft"


def test_its_files_are_vllm_s_and_give_the_same_logits(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/convert_to_hf.py", "--load", trained, "--verify"]
    command += ["--output", tmp_path / "hf", "--format", "vllm"]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT, capture_output=True, text=True, env=cpu_environment(1),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "verified: 4 steps equal" in done.stdout and "P-EAGLE draft for" in done.stdout
    assert "note: vLLM" in done.stdout and RUNNER in done.stdout
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["ptd_token_id"] == 60


def test_it_decodes_what_the_base_says(trained: Path, inputs: Inputs, tmp_path: Path) -> None:
    prompts = [json.dumps({"prompt_ids": [3 + i, 9, 20 + i]}) for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    run = launch(
        ROOT / "tools" / "eval_acceptance.py", 1, "--base", inputs.base, "--draft", trained,
        "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 12, "--draft-tokens", 3,
        "--output", tmp_path / "figures.json",
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["equal_to_greedy"] is True
    assert 1.0 <= figures["accepted_length"] <= 4.0
