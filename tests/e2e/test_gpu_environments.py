"""The training command in three environments: torch alone, Transformer Engine, Apex.

What a GPU decides is decided before any tensor is there: these tests parse and build as on a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.testing.harness import run_distributed
from tests.e2e.conftest import Inputs
from tests.e2e.launch import RECIPE, ROOT, cpu_environment
from tests.helpers.environment_case import parse_rank
from tests.helpers.te_python import te_folder

CASE = (sys.executable, "-W", "ignore", "-m", "tests.helpers.environment_case")


def _run(*words: object, pythonpath: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = cpu_environment(1)
    if pythonpath is not None:
        environment["PYTHONPATH"] += f":{pythonpath}"
    return subprocess.run(
        [*CASE, *map(str, words)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip


def _parse(inputs: Inputs, *words: object) -> dict[str, Any]:
    line = [str(word) for word in [*RECIPE, *inputs.flags, *words]]
    (found,) = run_distributed(parse_rank, 1, line)
    return found


def test_torch_alone_gets_megatrons_own_layers(inputs: Inputs) -> None:
    assert _parse(inputs, "--bf16", "--eval-iters", 32) == {
        "layers": "local",
        "rope_fusion": False,
        "gradient_fusion": False,
        "persist_layer_norm": False,
        "eval_iters": 0,
    }


def test_transformer_engine_by_name_needs_it_installed(inputs: Inputs) -> None:
    error = _parse(inputs, "--transformer-impl", "transformer_engine")["error"]
    assert error.startswith("--transformer-impl transformer_engine: Transformer Engine is not")


@pytest.mark.skipif(
    te_folder() is None, reason="transformer-engine's Python is not beside the venv"
)
def test_transformer_engine_is_taken_where_it_is_installed(inputs: Inputs) -> None:
    result = _run("parse-te", *RECIPE, *inputs.flags, "--bf16")
    assert result.returncode == 0, result.stderr[-2000:]
    *_, line = result.stdout.splitlines()
    assert json.loads(line) == {
        "layers": "transformer_engine",
        "rope_fusion": True,
        "gradient_fusion": True,
        "persist_layer_norm": True,
        "eval_iters": 0,
    }
    assert "> Transformer Engine's layers" in result.stdout


def test_apex_changes_neither_training_nor_evaluation(inputs: Inputs, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt_ids": [1, 2, 3]}) + "\n")
    log = tmp_path / "log.jsonl"
    result = _run(
        "train", tmp_path / "draft", prompts, *RECIPE, *inputs.flags,
        "--train-iters", 2, "--eagle-log-file", log,
        pythonpath=ROOT / "tests" / "helpers" / "fake_apex",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.count("accepted length") >= 2
    assert "--max-new-tokens 4, fp32" in result.stdout
    assert "--max-new-tokens 4, bf16" in result.stdout
    assert len(log.read_text().splitlines()) == 2
