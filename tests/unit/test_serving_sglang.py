"""`make serve` with SGLang: a stand-in that answers as SGLang 0.5.23 does, of which nothing is run
here. ``tests/readers/test_sglang_counts.py`` runs SGLang's own lines that count."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.engine import Answer
from benchmarks.serving.measure import load
from benchmarks.serving.sglang_engine import Sglang
from tests.helpers.serving_stub import interpreter, server, setting

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "serving" / "run.py"

# The length of the prompt chooses the answer: [1] ends with the first token, which is no
# verification; the others are verified 3 times, never past position 0, and 2 times.
STUB = """
HISTOGRAMS = {1: [], 2: [1, 2], 3: [0, 1, 1]}
failed = False


class Stub(Handler):
    def do_GET(self):
        global failed
        assert self.path == "/health"
        self.reply("", 200 if failed else 503)  # once "starting"
        failed = True

    def do_POST(self):
        body = self.body()
        assert self.path == "/generate"
        ids, sampling = body["input_ids"], body["sampling_params"]
        assert sampling == {"temperature": 0, "max_new_tokens": 4}
        about = {"id": "x", "finish_reason": {"type": "length", "length": 4}, "prompt_tokens": 3}
        histogram = HISTOGRAMS[len(ids)]
        if "--speculative-algorithm" in words and histogram:
            accepted = sum(k * n for k, n in enumerate(histogram))
            about |= {
                "spec_accept_rate": accepted / (2 * sum(histogram)),
                "spec_accept_length": 4 / sum(histogram),
                "spec_num_correct_drafts": accepted,
                "spec_num_proposed_drafts": 2 * sum(histogram),
                "spec_verify_ct": sum(histogram),
                "spec_correct_drafts_histogram": histogram,
            }
        self.reply(json.dumps({"text": "", "output_ids": ids[::-1], "meta_info": about}))
"""
PROMPTS = [[1], [2, 3], [4, 5, 6]]
COUNTS = {"verifications": 5, "accepted_0": 4, "accepted_1": 1}
OURS = {
    "verifications": 5,
    "accepted": [3, 1],
    "server_accepted": [4, 1],
    "accepted_length": 1.8,
    "server_accepted_length": 2.0,
    "draft_tokens": 2,
    "max_new_tokens": 4,
    "prompts": 3,
}


def test_the_counts_are_those_of_all_answers(tmp_path: Path) -> None:
    with server(tmp_path, Sglang, STUB, device="cuda") as running:
        result = load(running, PROMPTS, at_a_time=2, max_tokens=4, repetitions=2)
    assert result.answers == [[1], [3, 2], [6, 5, 4]]
    assert result.counts == COUNTS and result.unlike_first == 0


def reply(**about: Any) -> dict[str, Any]:
    return {"text": "", "output_ids": [7, 8], "meta_info": about}


@pytest.mark.parametrize(
    ("histogram", "accepted"),
    [([4], (0, 0)), ([1, 2], (2, 0)), ([1, 2, 3], (5, 3)), ([0, 0, 2], (2, 2))],
)
def test_a_histogram_becomes_counts_per_position(
    tmp_path: Path, histogram: list[int], accepted: tuple[int, int]
) -> None:
    engine = Sglang(setting(tmp_path, tmp_path, "cuda"))
    answer = engine.answer(
        reply(
            spec_verify_ct=sum(histogram),
            spec_num_correct_drafts=sum(accepted),
            spec_correct_drafts_histogram=histogram,
        )
    )
    counts = {"verifications": sum(histogram), "accepted_0": accepted[0], "accepted_1": accepted[1]}
    assert answer == Answer([7, 8], counts)


@pytest.mark.parametrize(
    "about",
    [
        {"spec_verify_ct": 3, "spec_num_correct_drafts": 2},
        {
            "spec_verify_ct": 3,
            "spec_num_correct_drafts": 3,
            "spec_correct_drafts_histogram": [1, 2],
        },
    ],
)
def test_counts_that_do_not_add_up_are_an_error(tmp_path: Path, about: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="do not add up"):
        Sglang(setting(tmp_path, tmp_path, "cuda")).answer(reply(**about))


def run(folder: Path, *words: str, ours: dict[str, Any] = OURS) -> subprocess.CompletedProcess[str]:
    (folder / "ours.json").write_text(json.dumps(ours))
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in PROMPTS)
    )
    given = [
        *("--python", str(folder / "bin" / "python"), "--engine", "sglang", "--device", "cuda"),
        *("--base", str(folder), "--draft", str(folder), "--eval", str(folder / "ours.json")),
        *("--prompts", str(folder / "prompts.jsonl"), "--output", str(folder / "out.json")),
        *("--repetitions", "1", "--at-a-time", "1"),
    ]
    return subprocess.run(
        [sys.executable, str(RUN), *given, *words], capture_output=True, text=True, check=False
    )


def test_the_whole_command(tmp_path: Path) -> None:
    interpreter(tmp_path, STUB)
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[serve] starting SGLang without the draft" in done.stdout
    assert "| one prompt at a time: equal answers |  | 3 of 3 |  |" in done.stdout
    assert "| accepted length, 1 at a time | 2.0000 | 2.0000 | 1.8000 |" in done.stdout
    assert "| 5; 4, 1 | 5; 4, 1 | 5; 3, 1 |" in done.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["with"]["1"]["counts"] == COUNTS and figures["without"]["1"]["counts"] == {}
    done = run(tmp_path, ours={**OURS, "server_accepted": [4, 2]})
    assert done.returncode == 1
    assert done.stderr == "error: 1 at a time, the server counts otherwise than we do\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--device", "cpu"], "--engine sglang needs --device cuda: speculation on a CPU needs"),
        (["--parallel-drafting"], "--parallel-drafting: SGLang does not draft in parallel"),
        (["--method", "dflash"], "--method dflash: with --engine sglang it is eagle3 or eagle"),
    ],
)
def test_what_sglang_cannot_serve_is_one_line(tmp_path: Path, words: list[str], error: str) -> None:
    done = run(tmp_path, *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {error}") and done.stderr.count("\n") == 1


def test_what_sglang_is_told(tmp_path: Path) -> None:
    words = Sglang(setting(tmp_path, tmp_path, "cuda")).command(5)
    text = " ".join(words)
    assert "-m sglang.launch_server --host 127.0.0.1 --port 5" in text
    assert (
        f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {tmp_path} "
        "--speculative-num-steps 2 --speculative-eagle-topk 1 --speculative-num-draft-tokens 3"
    ) in text
    assert "--disable-radix-cache" in words and "--attention-backend triton" in text
