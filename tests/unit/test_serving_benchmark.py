"""`make serve` against a stand-in for the server: requests, counters, the tables, the end of it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.serving.measure import Load, load
from benchmarks.serving.tables import table
from benchmarks.serving.vllm_engine import Vllm
from tests.helpers.serving_stub import interpreter, server, setting

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "serving" / "run.py"

STUB = """
asked = 0


class Stub(Handler):
    def do_GET(self):
        lines = [f"vllm:spec_decode_num_drafts_total{{}} {2.0 * asked}"]
        for i, each in enumerate((2, 1)):
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines.append(f'{name}{{position="{i}"}} {float(each * asked)}')
        self.reply("\\n".join(lines))

    def do_POST(self):
        global asked
        body = self.body()
        assert self.path == "/v1/completions" and body["temperature"] == 0
        asked += 1
        self.reply(json.dumps({"choices": [{"token_ids": body["prompt"][::-1]}]}))
"""
OURS: dict[str, Any] = {
    "verifications": 6,
    "accepted": [6, 2],
    "server_accepted": [6, 3],
    "accepted_length": 1 + 8 / 6,
    "server_accepted_length": 2.5,
}


def test_a_server_is_asked_counted_and_ended(tmp_path: Path) -> None:
    prompts = [[1, 2], [3], [4, 5, 6]]
    with server(tmp_path, Vllm, STUB) as running:
        assert running.process is not None
        number = running.process.pid
        result = load(running, prompts, at_a_time=2, max_tokens=4, repetitions=3)
        assert result.answers == [[2, 1], [3], [6, 5, 4]] and len(result.seconds) == 3
        assert result.counts == {"verifications": 6, "accepted_0": 6, "accepted_1": 3}
        assert running.cpu_seconds() > 0
    assert not psutil.pid_exists(number)
    text, wrong = table({2: result}, {2: result}, OURS, whole=True)
    assert wrong == [] and "| 2 at a time: equal answers |  | 3 of 3 |" in text
    assert "6; 6, 3 | 6; 6, 3 | 6; 6, 2 |" in text


def test_a_terminated_run_ends_its_server(tmp_path: Path) -> None:
    hanging = f"""
        if asked > 1:
            open({str(tmp_path / "waiting")!r}, "w").close()
            time.sleep(300)
"""
    stub = STUB.replace("asked += 1\n", "asked += 1" + hanging)
    ours = {**OURS, "draft_tokens": 2, "max_new_tokens": 4, "prompts": 40}
    (tmp_path / "ours.json").write_text(json.dumps(ours))
    words = [
        *(sys.executable, str(RUN), "--python", str(interpreter(tmp_path, stub))),
        *("--base", str(tmp_path), "--draft", str(tmp_path)),
        *("--eval", str(tmp_path / "ours.json"), "--output", str(tmp_path / "out.json")),
    ]
    run = psutil.Popen(words, stdout=subprocess.DEVNULL)
    processes = [run]
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "waiting").exists():
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.1)
        (child,) = run.children()
        processes.append(child)
        run.terminate()
        assert run.wait(timeout=30) == 128 + signal.SIGTERM
        assert not child.is_running()
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_server_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1.*no such model"):
        server(tmp_path, Vllm, "raise SystemExit('no such model')").__enter__()


def test_differences_are_named() -> None:
    plain = Load([[1, 2]], [1.0], [1.0], unlike_first=1)
    drafted = Load([[1, 3]], [1.0], [1.0], {"verifications": 6, "accepted_0": 6, "accepted_1": 2})
    _, wrong = table({1: plain}, {1: drafted}, OURS, whole=True)
    assert wrong == [
        "one prompt at a time, 1 of 1 answers differ with the draft",
        "1 at a time without the draft, repetitions differ",
        "1 at a time, the server counts otherwise than we do",
    ]


def test_what_vllm_is_told(tmp_path: Path) -> None:
    given = setting(tmp_path, tmp_path / "bin" / "python")
    assert given.draft is not None
    words = Vllm(given).command(5)
    assert json.loads(words[-1]) == {
        "method": "eagle3",
        "model": str(tmp_path),
        "num_speculative_tokens": 2,
    }
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and "--enforce-eager" in words
    at_once = replace(given, device="cuda", draft=replace(given.draft, parallel=True))
    words = Vllm(at_once).command(5)
    assert json.loads(words[-1])["parallel_drafting"] and "--enforce-eager" not in words
    assert "--speculative-config" not in Vllm(replace(given, draft=None)).command(5)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--draft", "nothing"], "error: --draft nothing: no such file or directory"),
        (["--eval", "{}"], "error: --eval {}: an earlier release wrote it; run eval again"),
    ],
)
def test_what_cannot_be_served_is_one_line(tmp_path: Path, words: list[str], error: str) -> None:
    old = tmp_path / "old.json"
    old.write_text("{}")
    given = ["--base", ".", "--draft", ".", "--eval", str(old), "--python", sys.executable]
    extra = [word.format(old) for word in words]
    run = subprocess.run(
        [sys.executable, str(RUN), *given, *extra], capture_output=True, text=True, cwd=tmp_path
    )
    assert (run.returncode, run.stderr, run.stdout) == (2, f"{error.format(old)}\n", "")
