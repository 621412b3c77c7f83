"""--eagle-eval-prompts in a run through pretrain(): logged, the best kept, training undisturbed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_eagle.checkpoint.directory import ACCEPTED_LENGTH_NAME
from megatron_eagle.hf.draft.export import export_draft
from tests.e2e.conftest import Inputs
from tests.e2e.launch import ROOT, Run, launch, train
from tests.helpers.tiny_hf import SIZES

DRAFT = ["--eagle-draft-vocab-size", 24, "--eagle-ttt-steps", 3, "--lr", "2e-2"]
PP2 = ["--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 3]
OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(1)
    lines = [
        [rng.randrange(SIZES["vocab_size"]) for _ in range(rng.randint(2, 9))] for _ in "1234567"
    ]
    file = tmp_path_factory.mktemp("prompts") / "eval.jsonl"
    file.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in lines))
    return file


TIMES = ("seconds", "supervised_tokens_per_second_per_gpu")


def evaluating(prompts: Path, interval: int) -> list[object]:
    return ["--eagle-eval-prompts", prompts, "--eagle-eval-interval", interval,
            "--eagle-eval-new-tokens", 12]  # fmt: skip


def measured(log: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {line["iteration"]: line for line in lines if "eval_accepted_length" in line}


def same_training(run: Run, other: Run) -> None:
    assert set(run.metrics) == set(other.metrics) != set()
    for iteration, line in run.metrics.items():
        found = other.metrics[iteration]
        assert {k: v for k, v in line.items() if k not in TIMES} == {
            k: v for k, v in found.items() if k not in TIMES
        }, iteration


def figures(draft: Path, inputs: Inputs, prompts: Path, ranks: int, *words: object) -> Any:
    """What the tool says of a saved draft."""
    output = draft.parent / "figures.json"
    run = launch(
        ROOT / "tools" / "eval_acceptance.py", ranks, "--base", inputs.base, "--draft", draft,
        "--prompts", prompts, "--max-new-tokens", 12, "--output", output, *words,
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    return json.loads(output.read_text())


def test_pipeline_run_keeps_the_best_and_trains_as_without(
    inputs: Inputs, prompts: Path, tmp_path: Path
) -> None:
    log, save = tmp_path / "log.jsonl", tmp_path / "draft"
    flags = [*inputs.flags, *DRAFT, *PP2]
    plain = train(2, tmp_path / "plain.jsonl", *flags)
    run = train(
        2, log, *flags, *evaluating(prompts, 8), "--save", save, "--save-interval", 10,
        "--save-retain-interval", 20,
    )  # fmt: skip
    assert plain.returncode == 0 and run.returncode == 0, run.output[-3000:]
    same_training(plain, run)
    lines = measured(log)
    assert sorted(lines) == [8, 16, 20]
    lengths = {i: line["eval_accepted_length"] for i, line in lines.items()}
    best = max(lengths, key=lambda i: (lengths[i], -i))
    assert lengths[best] > 1.0, "nothing was accepted: the test shows nothing"
    assert lines[20]["best_iteration"] == best
    (kept,) = (save / "best").glob("iter_*")
    assert kept.name == f"iter_{best:07d}"
    said = json.loads((kept / ACCEPTED_LENGTH_NAME).read_text())
    assert said["accepted_length"] == lengths[best]
    found = figures(save / "best", inputs, prompts, 2, "--pipeline-model-parallel-size", 2)
    assert found["accepted_length"] == lengths[best], "the draft that was kept is another"
    assert found["acceptance"] == lines[best]["eval_acceptance"]
    export_draft(save / "best", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"{lengths[best]:.3f} tokens per verification" in card and kept.name in card


LAYOUTS = [
    pytest.param(2, ["--tensor-model-parallel-size", 2, "--sequence-parallel"], id="tp2-sp"),
    pytest.param(2, OVERLAP, id="dp2-do"),
    pytest.param(2, ["--context-parallel-size", 2], id="cp2"),
    pytest.param(4, [*PP2, *OVERLAP, "--global-batch-size", 8], id="pp2-dp2-do"),
    pytest.param(2, ["--bf16", *OVERLAP], id="dp2-do-bf16"),
]


@slow
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_training_is_the_same_with_and_without(
    ranks: int, layout: list, inputs: Inputs, prompts: Path, tmp_path: Path
) -> None:
    """And what was measured is what the tool finds of the checkpoint saved then, at TP 1."""
    flags = [*inputs.flags, *DRAFT, *layout, "--train-iters", 12]
    plain = train(ranks, tmp_path / "plain.jsonl", *flags)
    save = ["--save", tmp_path / "draft", "--save-interval", 12]
    run = train(ranks, tmp_path / "log.jsonl", *flags, *evaluating(prompts, 5), *save)
    assert plain.returncode == 0 and run.returncode == 0, run.output[-3000:]
    same_training(plain, run)
    lines = measured(tmp_path / "log.jsonl")
    assert sorted(lines) == [5, 10, 12]
    if "--bf16" not in layout:
        found = figures(tmp_path / "draft", inputs, prompts, 1)
        assert found["accepted_length"] == lines[12]["eval_accepted_length"]


@slow
def test_resuming_keeps_the_best_so_far(inputs: Inputs, prompts: Path, tmp_path: Path) -> None:
    """Iterations 10 to 20 again, from a best that they cannot reach; then with other settings."""
    save = tmp_path / "draft"
    flags = [*inputs.flags, *DRAFT, "--save", save, "--save-interval", 10]
    whole = train(1, None, *flags, *evaluating(prompts, 5))
    assert whole.returncode == 0, whole.output[-3000:]
    (kept,) = (save / "best").glob("iter_*")
    said = json.loads((kept / ACCEPTED_LENGTH_NAME).read_text())
    (kept / ACCEPTED_LENGTH_NAME).write_text(json.dumps({**said, "accepted_length": 3.5}))
    before = {file: file.read_bytes() for file in kept.iterdir()}
    shutil.rmtree(save / "iter_0000020")
    (save / "latest_checkpointed_iteration.txt").write_text("10")
    resumed = train(1, tmp_path / "log.jsonl", *flags, "--load", save, *evaluating(prompts, 5))
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert sorted(measured(tmp_path / "log.jsonl")) == [15, 20]
    assert {file: file.read_bytes() for file in kept.iterdir()} == before
    refused = train(1, None, *flags, *evaluating(prompts, 5), "--eagle-eval-draft-tokens", 2)
    assert refused.returncode != 0
    assert "was measured with draft_tokens 3, this run has 2" in refused.error_line
