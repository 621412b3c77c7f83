"""A user's mistake: one line that names the flag or file, a non-zero exit, no hang."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Inputs
from tests.e2e.launch import train

IN_FLAGS = [
    (["--eagle-ttt-steps", 0], "--eagle-ttt-steps must be at least 1, not 0"),
    (["--eagle-aux-layers", 2, 2], "--eagle-aux-layers names a layer twice"),
    (["--eagle-aux-layers", 1, 7], "--eagle-aux-layers 7 is out of range"),
    (["--eagle-draft-vocab-size", 62], "--eagle-draft-vocab-size 62 exceeds"),
    (["--seq-length", 4], "--seq-length 4 is too short"),
    (["--hidden-size", 64], "--hidden-size 64 contradicts the base checkpoint"),
    (["--pipeline-model-parallel-size", 2], "--pipeline-model-parallel-size 2 is not supported"),
    (["--multi-latent-attention"], "--multi-latent-attention is not supported"),
    (["--eval-iters", 3], "--eval-iters 3: --eagle-train-data has no validation"),
    (["--transformer-impl", "transformer_engine"], "Transformer Engine is not installed"),
]


@pytest.mark.parametrize(("words", "message"), IN_FLAGS, ids=lambda value: str(value)[:40])
def test_bad_flags(words: list, message: str, inputs: Inputs) -> None:
    run = train(1, None, *inputs.flags, *words)
    assert run.returncode != 0
    assert message in run.error_line


def test_tensor_parallel_that_does_not_divide_the_heads(inputs: Inputs) -> None:
    run = train(3, None, *inputs.flags, "--tensor-model-parallel-size", 3)
    assert run.returncode != 0
    assert "--tensor-model-parallel-size 3 does not divide the base's" in run.error_line


def test_missing_base(tmp_path: Path, inputs: Inputs) -> None:
    words = ["--eagle-base-checkpoint", tmp_path / "absent"]
    run = train(2, None, *inputs.flags, *words, "--tensor-model-parallel-size", 2)
    assert run.returncode != 0
    assert str(tmp_path / "absent") in run.error_line


def test_base_whose_weights_have_other_dimensions(tmp_path: Path, inputs: Inputs) -> None:
    shutil.copytree(inputs.base, tmp_path / "base")
    file = tmp_path / "base" / "eagle_base.json"
    description = json.loads(file.read_text())
    description["megatron_args"]["ffn_hidden_size"] = 96
    file.write_text(json.dumps(description))
    words = ["--eagle-base-checkpoint", tmp_path / "base", "--tensor-model-parallel-size", 2]
    run = train(2, None, *inputs.flags, *words)
    assert run.returncode != 0
    assert str(tmp_path / "base") in run.error_line
    assert "shape" in run.error_line


def test_empty_data(tmp_path: Path, inputs: Inputs) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    words = ["--eagle-train-data", tmp_path / "empty.jsonl", "--tensor-model-parallel-size", 2]
    run = train(2, None, *inputs.flags, *words)
    assert run.returncode != 0
    assert "the data set is empty" in run.error_line


def test_resuming_another_draft(tmp_path: Path, inputs: Inputs) -> None:
    save = ["--save", tmp_path / "draft", "--save-interval", 1, "--exit-interval", 1]
    vocabulary = ["--eagle-draft-vocab-size", 32]
    assert train(1, None, *inputs.flags, *vocabulary, *save).returncode == 0
    load = [*inputs.flags, "--load", tmp_path / "draft"]
    other_vocabulary = train(1, None, *load, "--eagle-draft-vocab-size", 40)
    assert "has 32 ids" in other_vocabulary.error_line
    other_layers = train(1, None, *load, *vocabulary, "--eagle-aux-layers", 0, 2, 3)
    assert other_layers.returncode != 0
    assert "--eagle-aux-layers" in other_layers.error_line
