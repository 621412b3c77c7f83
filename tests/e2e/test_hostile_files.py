"""Code in files of strangers: no command runs it, whatever door the file comes through."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_eagle.checkpoint.writer import write_torch_dist
from tests.e2e.conftest import Inputs
from tests.e2e.launch import ROOT, Run, launch, train
from tests.helpers.hostile import CALLS, Hostile, model_with_code
from tests.helpers.trained_draft import TrainedDraft, chunked

TOOLS = ROOT / "tools"
Attempt = Callable[[Path], Run]


def with_metadata(source: Path, target: Path, call: str, trap: Path) -> Path:
    """Copy a checkpoint and put a call in front of its metadata."""
    shutil.copytree(source, target)
    (file,) = target.glob("*/.metadata")
    call_first = b"\x80\x04" + pickle.dumps(Hostile(call, trap), 2)[2:-1] + b"0"
    file.write_bytes(call_first + file.read_bytes()[2:])
    return target


def with_object(target: Path, key: str, call: str, trap: Path) -> Path:
    """Write a draft's checkpoint with one object that calls when it is unpickled."""
    draft = TrainedDraft.make()
    draft.save(target)
    (iteration,) = target.glob("iter_*")
    payload = Hostile(call, trap)
    common = {"args": payload} if key == "common" else {"iteration": 1}
    shutil.rmtree(iteration)
    write_torch_dist(
        iteration, chunked(draft.tensors()), common, {"rng_state/shard_0_1": [payload]}
    )
    return target


def reached(run: Run, trap: Path, what: str) -> None:
    """Check that ``run`` was refused in one line and that nothing ran."""
    assert not trap.exists(), f"{what}: code ran"
    assert run.returncode != 0, f"{what}: accepted\n{run.output[-2000:]}"
    assert "Traceback" not in run.output, f"{what}\n{run.output[-3000:]}"
    assert run.error_line, what


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS[:3])
def test_a_base_runs_no_code(call: str, inputs: Inputs, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    base = with_metadata(inputs.base, tmp_path / "base", call, trap)
    data = ["--eagle-base-checkpoint", base, "--eagle-train-data", inputs.answers]
    attempts: dict[str, Callable[[], Run]] = {
        "train": lambda: train(1, None, *data),
        "train from the base's layers": lambda: train(1, None, *data, "--eagle-init-from-base"),
        "extract-features": lambda: launch(
            TOOLS / "extract_features.py", 1, "--base", base, "--data", inputs.answers,
            "--seq-length", 32, "--output", tmp_path / "features",
        ),
        "eval": lambda: launch(
            TOOLS / "eval_acceptance.py", 1, "--base", base, "--draft", "none",
            "--prompts", inputs.answers, "--max-new-tokens", 4,
        ),
        "verify": lambda: launch(ROOT / "tests/e2e/command.py", 1, "verify", base),
    }  # fmt: skip
    for name, attempt in attempts.items():
        reached(attempt(), trap, f"{name}, {call}")


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS[:3])
def test_a_draft_runs_no_code(call: str, inputs: Inputs, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    TrainedDraft.make().save(tmp_path / "draft")
    hostile = {
        "metadata": with_metadata(tmp_path / "draft", tmp_path / "metadata", call, trap),
        "common": with_object(tmp_path / "common", "common", call, trap),
        "rng": with_object(tmp_path / "rng", "rng", call, trap),
    }
    for name, draft in hostile.items():
        for way in ("--load", "--eagle-warm-start"):
            if way == "--eagle-warm-start" and name != "metadata":
                continue  # reads tensors alone
            run = train(1, None, *inputs.flags, way, draft, "--eagle-draft-vocab-size", 19)
            reached(run, trap, f"train {way}, {name}, {call}")
    words = ["--load", hostile["metadata"], "--output", tmp_path / "hf"]
    reached(launch(TOOLS / "convert_to_hf.py", 1, *words), trap, f"convert, {call}")
    words = ["--base", inputs.base, "--draft", hostile["metadata"], "--prompts", inputs.answers]
    reached(launch(TOOLS / "eval_acceptance.py", 1, *words), trap, f"eval, {call}")


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_draft_in_a_pickle_runs_no_code(inputs: Inputs, tmp_path: Path) -> None:
    trap, directory = tmp_path / "trap", tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLMEagle3"]})
    )
    torch.save({"fc.weight": Hostile("mkdir", trap)}, directory / "pytorch_model.bin")
    words = ["--hf", directory, "--base", inputs.base, "--save", tmp_path / "draft"]
    reached(launch(TOOLS / "import_draft.py", 1, *words), trap, "import-draft")
    run = train(1, None, *inputs.flags, "--eagle-warm-start", directory)
    reached(run, trap, "train --eagle-warm-start")


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_python_beside_a_tokenizer_or_model_is_not_run(inputs: Inputs, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    model = model_with_code(tmp_path / "model", trap)
    (tmp_path / "texts.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    out = tmp_path / "out"
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model]
    attempts: dict[str, Callable[[], Run]] = {
        "prepare-data": lambda: launch(
            TOOLS / "prepare_data.py", 1, "--input", tmp_path / "texts.jsonl", "--tokenizer", model,
            "--output-prefix", out,
        ),
        "regenerate": lambda: launch(
            TOOLS / "regenerate.py", 1, "--model", model, "--prompts", tmp_path / "prompts.jsonl",
            "--output", out,
        ),
        "eval": lambda: launch(
            TOOLS / "eval_acceptance.py", 1, "--base", inputs.base, "--draft", "none",
            "--prompts", tmp_path / "prompts.jsonl", "--tokenizer", model,
        ),
        "import-base": lambda: launch(TOOLS / "import_base.py", 1, "--hf", model, "--save", out),
        "train": lambda: train(1, None, *inputs.flags, *tokenizer),
        "train, allowed": lambda: train(
            1, None, *inputs.flags, *tokenizer, "--trust-remote-code"
        ),
    }  # fmt: skip
    for name, attempt in attempts.items():
        run = attempt()
        reached(run, trap, name)
        assert "Do you wish to run" not in run.output, name


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_flags_in_the_description_of_a_base_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    shutil.copytree(inputs.base, tmp_path / "base")
    file = tmp_path / "base" / "eagle_base.json"
    content = json.loads(file.read_text())
    planted = {"save": str(tmp_path / "planted"), "save_interval": 1}
    content["megatron_args"] |= planted
    file.write_text(json.dumps(content))
    words = ["--eagle-base-checkpoint", tmp_path / "base", "--eagle-train-data", inputs.answers]
    run = train(1, None, *words)
    assert "eagle_base.json" in run.error_line
    assert not (tmp_path / "planted").exists()
