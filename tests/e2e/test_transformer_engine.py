"""Transformer Engine's real modules, their kernels computed in torch, beside Megatron's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import Inputs
from tests.e2e.launch import RECIPE, ROOT, Run, cpu_environment, launch, train
from tests.helpers.te_python import te_folder

pytestmark = pytest.mark.skipif(
    te_folder() is None, reason="transformer-engine's Python is not beside the environment"
)
FEW = ("llama:gqa", "deepseek_v2_lite:mla")
OTHERS = (
    "gpt_oss:gqa",
    "qwen2:gqa", "qwen3:gqa", "mixtral:gqa", "qwen3_moe:gqa", "qwen3_next:gqa", "qwen3_next:mtp",
    "glm4_moe:gqa", "deepseek_v2:mla", "deepseek_v3:gqa", "deepseek_v3:mla",
)  # fmt: skip
DRAFTS = ("two-layers", "moe", "eagle1", "eagle3.1", "p-eagle", "dflash", "dspark")


def _compare(cases: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.te_case", *cases]
    result = subprocess.run(
        command, env=cpu_environment(1), cwd=ROOT, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return dict(zip(cases, map(json.loads, lines), strict=True))


def _check(case: str, found: dict[str, Any]) -> None:
    local, engine = found["routers"]
    assert local == engine
    ours, with_states, without = found["core_attention"]
    assert ours == with_states == ["EagleCoreAttention"]
    has_window = case.startswith("gpt_oss")
    assert without == ["EagleCoreAttention" if has_window else "TEDotProductAttention"]
    assert found["base_weights_equal"] and found["draft_keys_differ"] == []
    assert found["te_to_local"] == found["local_to_te"] == found["te_to_te"] == "loads"
    assert found["calls"] > 0 and not found["draft_overwrites"]
    assert found["compared"] >= 8 and found["error"] < 1e-4, found
    assert found["error_with_its_attention"] < 1e-4, found


def test_layers_of_both_kinds_have_the_same_weights_checkpoints_losses_and_gradients() -> None:
    for case, found in _compare(FEW).items():
        _check(case, found)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_so_do_those_of_every_other_base(case: str) -> None:
    _check(case, _compare((case,))[case])


@pytest.mark.slow
def test_so_do_those_of_every_other_draft() -> None:
    for case, found in _compare(tuple(f"qwen3:{draft}" for draft in DRAFTS)).items():
        _check(case, found)


@pytest.mark.slow
def test_the_gpu_benchmark_measures_them(tmp_path: Path) -> None:
    """A wrong loss or gradient ends it with status 1."""
    words = ["--device", "cpu", "--tiny", "--iters", 1, "--skip-compiled", "--draft-vocab", 600]
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.te_gpu_kit"]
    result = subprocess.run(
        [*command, *map(str, words), "--report", tmp_path / "gpu.md"],
        env=cpu_environment(1), cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    checks = [line for line in result.stdout.splitlines() if "Transformer Engine's layers:" in line]
    assert len(checks) == 3 and all('"right": true' in line for line in checks)
    assert "| ours, Transformer Engine's layers | 2 |" in (tmp_path / "gpu.md").read_text()


def _with_te(*words: object) -> str:
    """Run a command with Transformer Engine's layers; what it printed."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.te_command", *map(str, words)],
        env=cpu_environment(1), cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


def _train_with_te(log: Path, *words: object) -> dict[int, float]:
    """The loss of each iteration."""
    printed = _with_te("train", *RECIPE, *words, "--eagle-log-file", log)
    assert "Transformer Engine's layers" in printed
    lines = map(json.loads, log.read_text().splitlines())
    return {line["iteration"]: line["loss"] for line in lines if "loss" in line}


def _losses(run: Run) -> dict[int, float]:
    assert run.returncode == 0, run.output[-2000:]
    return {iteration: figures["loss"] for iteration, figures in run.metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--eagle-pack", "--use-distributed-optimizer"]], ids=len)
def test_training_goes_on_with_layers_of_the_other_kind(
    options: list[str], inputs: Inputs, tmp_path: Path
) -> None:
    """Two iterations of each kind in turn, weights and Adam's state through the checkpoint: the
    losses are those of a run that never stopped."""
    words = [*inputs.flags, "--eagle-draft-vocab-size", 32, "--train-iters", 6, *options]
    local, engine = tmp_path / "local", tmp_path / "engine"
    expected = _losses(
        train(1, tmp_path / "whole.jsonl", *words, "--save", local, "--save-interval", 2)
    )
    resumed = _train_with_te(
        tmp_path / "resumed.jsonl", *words, "--load", local, "--ckpt-step", 2, "--save", engine,
        "--save-interval", 4, "--exit-interval", 4,
    )  # fmt: skip
    back = _losses(
        train(
            1, tmp_path / "back.jsonl", *words, "--load", engine, "--save", engine,
            "--save-interval", 4,
        )
    )  # fmt: skip
    assert {**resumed, **back} == pytest.approx({n: expected[n] for n in range(3, 7)}, rel=1e-4)
    assert list(resumed) == [3, 4] and list(back) == [5, 6]


@pytest.mark.slow
def test_a_draft_is_measured_with_them_while_training_and_after(
    inputs: Inputs, tmp_path: Path
) -> None:
    prompts, log = tmp_path / "prompts.jsonl", tmp_path / "log.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": [i, 2, 3]}) + "\n" for i in range(4)))
    _train_with_te(
        log, *inputs.flags, "--train-iters", 20, "--save", tmp_path, "--save-interval", 20,
        "--eagle-eval-prompts", prompts, "--eagle-eval-new-tokens", 8,
    )  # fmt: skip
    *_, measured = map(json.loads, log.read_text().splitlines())
    printed = _with_te(
        "eval", "--base", inputs.base, "--draft", tmp_path, "--prompts", prompts,
        "--max-new-tokens", 8, "--output", tmp_path / "engine.json",
    )  # fmt: skip
    assert "speculative answers equal the greedy ones" in printed
    words = ["--base", inputs.base, "--draft", tmp_path, "--prompts", prompts]
    words += ["--max-new-tokens", 8, "--output", tmp_path / "local.json"]
    assert launch(ROOT / "tools" / "eval_acceptance.py", 1, *words).returncode == 0
    figures = [json.loads((tmp_path / f"{kind}.json").read_text()) for kind in ("engine", "local")]
    assert figures[0]["acceptance"] == figures[1]["acceptance"] == measured["eval_acceptance"]
    assert figures[0]["accepted_length"] == measured["eval_accepted_length"] > 1


@pytest.mark.slow
def test_features_extracted_with_them_are_the_same(inputs: Inputs, tmp_path: Path) -> None:
    words = ["--base", inputs.base, "--data", inputs.answers, "--seq-length", 32]
    _with_te("extract-features", *words, "--output", tmp_path / "engine")
    tool = ROOT / "tools" / "extract_features.py"
    assert launch(tool, 1, *words, "--output", tmp_path / "local").returncode == 0
    shards = sorted(path.name for path in (tmp_path / "local").glob("shard_*.bin"))
    assert len(shards) >= 2
    for name in shards:
        ours, theirs = (np.fromfile(tmp_path / kind / name, "<f4") for kind in ("local", "engine"))
        assert len(ours) == len(theirs) > 0
        assert np.abs(theirs - ours).max() < 1e-5 * np.abs(ours).max(), name
