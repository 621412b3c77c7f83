"""A rank that dies takes the run down with an error, at once, and the run goes on from its save."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Inputs
from tests.e2e.launch import EXAMPLE, RECIPE, cpu_environment, torchrun_command, train

FLAGS = ["--eagle-draft-vocab-size", 32, "--pipeline-model-parallel-size", 2,
         "--decoder-first-pipeline-num-layers", 4]  # fmt: skip


def rank_process(launcher: int, rank: int) -> psutil.Process:
    for process in psutil.Process(launcher).children(recursive=True):
        if str(EXAMPLE) in process.cmdline() and process.environ().get("RANK") == str(rank):
            return process
    raise AssertionError(f"rank {rank} is not running")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_stage_ends_the_run_and_load_goes_on(
    rank: int, inputs: Inputs, tmp_path: Path
) -> None:
    save = ["--save", tmp_path / "draft", "--save-interval", 5]
    words = [*RECIPE, *inputs.flags, *FLAGS, *save, "--train-iters", 2000,
             "--eagle-log-file", tmp_path / "log.jsonl"]  # fmt: skip
    with subprocess.Popen(
        torchrun_command(EXAMPLE, 2, *words),
        env=cpu_environment(2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as run:
        tracker = tmp_path / "draft" / "latest_checkpointed_iteration.txt"
        deadline = time.monotonic() + 120
        while not (tracker.exists() and int(tracker.read_text() or 0) >= 5):
            assert run.poll() is None and time.monotonic() < deadline, "it did not get to a save"
            time.sleep(0.2)
        rank_process(run.pid, rank).send_signal(signal.SIGKILL)
        assert run.wait(timeout=60) != 0
    saved = int(tracker.read_text())
    resumed = train(
        2, tmp_path / "resumed.jsonl", *inputs.flags, *FLAGS, "--load", tmp_path / "draft",
        "--train-iters", 2000, "--exit-interval", saved + 5,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert min(resumed.metrics) == saved + 1
