"""What a cluster does to a run: preemption, Ctrl-C, two jobs, full disks, NaN, cut files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from megatron_eagle.checkpoint.lock import OutputLock
from tests.e2e.conftest import Inputs
from tests.e2e.launch import EXAMPLE, RECIPE, cpu_environment, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
DRAFT = ["--eagle-draft-vocab-size", 32]
WITH_NAN = Path(__file__).with_name("train_with_nan.py")


def started(output: Path, *words: object) -> subprocess.Popen[bytes]:
    """Start training on one rank, without a launcher; a pipe would fill up and stop it.

    It hears Ctrl-C also where these tests run in the background of a shell, which ignores it there.
    """
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), *RECIPE, *map(str, words)],
        env={**cpu_environment(1), **single, "MASTER_PORT": str(20000 + os.getpid() % 10000)},
        stdout=output.open("wb"), stderr=subprocess.STDOUT,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for_lines(file: Path, count: int, run: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + 300
    while not (file.exists() and len(file.read_text().splitlines()) >= count):
        ended = run.poll() is not None or time.monotonic() > deadline
        assert not ended, output.read_text()[-3000:]
        time.sleep(0.1)


def test_sigterm_saves_and_ctrl_c_ends(inputs: Inputs, tmp_path: Path) -> None:
    log, save, printed = (tmp_path / name for name in ("log.jsonl", "draft", "printed"))
    words = [*inputs.flags, *DRAFT, "--train-iters", 5000, "--eagle-log-file", log]
    words += ["--save", save, "--load", save, "--save-interval", 100_000]
    run = started(printed, *words)
    wait_for_lines(log, 3, run, printed)
    second = train(1, None, *words)
    assert f"--save {save}: in use by process {run.pid} on " in second.error_line
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) == 0, printed.read_text()[-2000:]
    done = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= done < 5000
    lines = len(log.read_text().splitlines())
    run = started(printed, *words)
    wait_for_lines(log, lines + 2, run, printed)
    run.send_signal(signal.SIGINT)
    status, text = run.wait(timeout=120), printed.read_text()
    assert status == 130 and "Traceback" not in text, text[-2000:]
    assert json.loads(log.read_text().splitlines()[lines])["iteration"] == done + 1
    assert not (save / ".lock").exists() or OutputLock.take(save / ".lock", "save", save)


def test_a_full_disk_under_the_log_costs_its_lines(inputs: Inputs, tmp_path: Path) -> None:
    words = ["--eagle-log-file", "/dev/full", "--save", tmp_path / "draft", "--save-interval", 20]
    run = train(1, None, *inputs.flags, *DRAFT, *words)
    assert run.returncode == 0, run.output[-2000:]
    assert run.output.count("--eagle-log-file /dev/full: cannot be written") == 1
    assert (tmp_path / "draft" / "latest_checkpointed_iteration.txt").read_text() == "20"


def test_a_nan_on_one_stage_stops_all_and_is_left_out_in_the_end(
    inputs: Inputs, tmp_path: Path
) -> None:
    """Two runs end before the optimizer sees it; the third one's losses are those of a run on one
    rank that was told to leave the iteration out."""
    save = tmp_path / "draft"
    common = [*inputs.flags, *DRAFT, "--train-iters", 6]
    words = [*common, "--save", save, "--load", save, "--save-interval", 100]
    words += ["--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 4]
    for times in (1, 2):
        run = train(2, None, *words, script=WITH_NAN)
        assert run.returncode and "Traceback" not in run.output, run.output[-3000:]
        assert "iteration 3: the gradient is NaN; the weights are as they were" in run.error_line
        assert json.loads((save / "rejected_iterations.json").read_text()) == {"3": times}
    last = train(2, tmp_path / "last.jsonl", *words, script=WITH_NAN)
    assert last.returncode == 0, last.output[-3000:]
    told = train(1, tmp_path / "told.jsonl", *common, "--iterations-to-skip", 3)
    assert sorted(last.metrics) == sorted(told.metrics) == [1, 2, 4, 5, 6]
    for iteration, line in told.metrics.items():
        assert last.metrics[iteration]["loss"] == pytest.approx(line["loss"], rel=1e-4)


def test_weights_that_diverge_are_one_line(inputs: Inputs, tmp_path: Path) -> None:
    """A learning rate that sends the weights to infinity: every iteration after the first fails."""
    save = tmp_path / "draft"
    wild = [*inputs.flags, *DRAFT, "--save", save, "--load", save, "--save-interval", 100]
    wild += ["--lr-decay-style", "constant", "--lr", "1e38", "--clip-grad", 0, "--train-iters", 9]
    run = train(1, None, *wild)
    assert run.returncode and "Traceback" not in run.output, run.output[-3000:]
    assert "iteration 2: the gradient is " in run.error_line
    noted = save / "rejected_iterations.json"
    assert json.loads(noted.read_text()) == {"2": 1}
    noted.write_text(json.dumps(dict.fromkeys(("2", "3", "4", "5"), 2)))
    assert "it is the weights, not the data" in train(1, None, *wild).error_line


def test_resuming_what_was_cut_or_changed(inputs: Inputs, tmp_path: Path) -> None:
    save = tmp_path / "draft"
    words = [*inputs.flags, *DRAFT, "--save", save, "--load", save, "--save-interval", 1]
    assert train(1, None, *words, "--exit-interval", 2).returncode == 0
    changes = {
        ("--global-batch-size", 2): "--global-batch-size 2: the run in --load",
        ("--train-iters", 40): "--train-iters 40: the run in --load",
        ("--use-distributed-optimizer",): "saved without --use-distributed-optimizer",
        ("--load", tmp_path / "absent"): f"--load {tmp_path / 'absent'}: no checkpoint there",
    }
    for more, expected in changes.items():
        assert expected in train(1, None, *words, *more).error_line
    other = tmp_path / "answers.jsonl"
    other.write_text("".join(inputs.answers.read_text().splitlines(keepends=True)[:-1]))
    run = train(1, None, *words, "--eagle-train-data", other, "--exit-interval", 3)
    assert run.returncode == 0 and "was trained on other data (40 then, 39 now)" in run.output
    (shard,) = (save / "iter_0000003").glob("__0_0.distcp")
    whole = shard.read_bytes()
    flipped = bytes([whole[len(whole) // 2] ^ 4])
    for content in (
        whole[:-5000],
        whole[: len(whole) // 2] + flipped + whole[len(whole) // 2 + 1 :],
        None,
    ):
        shard.unlink()
        if content is not None:
            shard.write_bytes(content)
        assert shard.name in train(1, None, *words).error_line


def test_a_place_that_cannot_be_written_is_refused_early(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ["--save", tmp_path / "file" / "draft", "--save-interval", 10]
    run = train(1, None, *inputs.flags, *words)
    assert f"--save {tmp_path / 'file' / 'draft'}: cannot be written" in run.error_line
    assert "loading the base" not in run.output
