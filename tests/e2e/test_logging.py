"""Megatron's own logging: what TensorBoard's event file, Weights & Biases, the log line and the
JSONL hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Inputs
from tests.e2e.launch import ROOT, train

pytest.importorskip("tensorboard", reason="tensorboard is not installed")
STEPS = 3
WITH_WANDB = ROOT / "tests" / "helpers" / "fake_wandb" / "train.py"


def test_trackers_get_losses_accuracies_and_accepted_lengths(
    inputs: Inputs, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prompts, log = tmp_path / "prompts.jsonl", tmp_path / "log.jsonl"
    prompts.write_text(json.dumps({"prompt_ids": [1, 2, 3]}) + "\n")
    run = train(
        2, log, *inputs.flags, "--tensor-model-parallel-size", 2, "--train-iters", 4,
        "--log-interval", 2, "--log-throughput", "--log-timers-to-tensorboard",
        "--check-for-spiky-loss", "--tensorboard-dir", tmp_path / "events",
        "--eagle-eval-prompts", prompts, "--eagle-eval-new-tokens", 4, "--eagle-eval-interval", 4,
        "--wandb-project", "drafts", "--wandb-exp-name", "one", "--wandb-save-dir", tmp_path,
        script=WITH_WANDB,
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    scalars = {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }
    per_step = [f"{name}_{step}" for name in ("loss", "accuracy") for step in range(STEPS)]
    for tag in ("loss", *per_step, "simulated_accepted_length", "vocab_coverage"):
        assert list(scalars[tag]) == [1, 2, 3, 4], tag
        interval = [scalars[tag][2 * i + 1] + scalars[tag][2 * i + 2] for i in range(2)]
        logged = [run.metrics[iteration][tag] for iteration in (2, 4)]
        assert [mean / 2 for mean in interval] == pytest.approx(logged, rel=1e-5), tag
    assert list(scalars["eval_accepted_length"]) == [4]
    rate = "supervised_tokens_per_second_per_gpu"
    assert list(scalars[rate]) == [2, 4]
    assert scalars[rate][4] == pytest.approx(run.metrics[4][rate], rel=1e-2)
    assert scalars[rate][4] > 0 and scalars["throughput"][4] >= 0
    assert f"{rate}:" in run.output and "throughput per GPU" in run.output
    seconds = scalars["iteration-time"][4] * 2
    rows = run.metrics[4]["supervised_rows"] - run.metrics[2]["supervised_rows"]
    assert scalars[rate][4] == pytest.approx(rows / seconds / 2, rel=0.1)
    tracked: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (tmp_path / "drafts-one.jsonl").read_text().splitlines()):
        tracked.setdefault(line["key"], {})[line["step"]] = line["value"]
    for tag in ("loss", *per_step, "simulated_accepted_length", "eval_accepted_length", rate):
        assert tracked[tag] == pytest.approx(scalars[tag], rel=1e-5), tag
