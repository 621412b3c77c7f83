"""A user's mistake: one line that names the flag or file, a non-zero exit, no hang."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_eagle.hf.base.import_base import import_base
from tests.e2e.conftest import Inputs
from tests.e2e.launch import TRAIN_COMMAND, torchrun, train
from tests.helpers.tiny_hf import make_base


def test_a_bad_flag_is_refused(inputs: Inputs) -> None:
    run = train(1, None, *inputs.flags, "--eagle-ttt-steps", 0)
    assert run.returncode != 0
    assert run.error_line == "error: --eagle-ttt-steps must be at least 1, not 0"


def test_tensor_parallelism_that_does_not_divide_the_heads_is_refused(inputs: Inputs) -> None:
    run = train(3, None, *inputs.flags, "--tensor-model-parallel-size", 3)
    assert run.returncode != 0
    assert "--tensor-model-parallel-size 3 does not divide the base's" in run.error_line


def test_a_missing_base_is_refused(tmp_path: Path, inputs: Inputs) -> None:
    words = ["--eagle-base-checkpoint", tmp_path / "absent"]
    run = train(2, None, *inputs.flags, *words, "--tensor-model-parallel-size", 2)
    assert run.returncode != 0
    assert str(tmp_path / "absent") in run.error_line


def test_a_base_whose_weights_have_other_dimensions_is_refused(
    tmp_path: Path, inputs: Inputs
) -> None:
    shutil.copytree(inputs.base, tmp_path / "base")
    file = tmp_path / "base" / "eagle_base.json"
    description = json.loads(file.read_text())
    description["megatron_args"]["ffn_hidden_size"] = 96
    file.write_text(json.dumps(description))
    words = ["--eagle-base-checkpoint", tmp_path / "base", "--tensor-model-parallel-size", 2]
    run = train(2, None, *inputs.flags, *words, script=TRAIN_COMMAND, launcher=torchrun)
    assert run.returncode != 0
    assert str(tmp_path / "base") in run.error_line
    assert "shape" in run.error_line


def test_empty_data_are_refused(tmp_path: Path, inputs: Inputs) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    words = ["--eagle-train-data", tmp_path / "empty.jsonl", "--tensor-model-parallel-size", 2]
    run = train(2, None, *inputs.flags, *words)
    assert run.returncode != 0
    assert "the data set is empty" in run.error_line


def test_resuming_another_draft_is_refused(tmp_path: Path, inputs: Inputs) -> None:
    save = ["--save", tmp_path / "draft", "--save-interval", 1, "--exit-interval", 1]
    vocabulary = ["--eagle-draft-vocab-size", 32]
    assert train(1, None, *inputs.flags, *vocabulary, *save).returncode == 0
    load = [*inputs.flags, "--load", tmp_path / "draft"]
    other_vocabulary = train(1, None, *load, "--eagle-draft-vocab-size", 40)
    assert "has 32 ids" in other_vocabulary.error_line
    other_layers = train(1, None, *load, *vocabulary, "--eagle-aux-layers", 0, 2, 3)
    assert other_layers.returncode != 0
    assert "--eagle-aux-layers" in other_layers.error_line
    ids = torch.arange(29, 61)
    save_file({"vocab_ids": ids}, tmp_path / "map.safetensors")
    other_map = train(1, None, *load, "--eagle-vocab-map", tmp_path / "map.safetensors")
    assert "--eagle-vocab-map" in other_map.error_line and "other ids" in other_map.error_line
    make_base(tmp_path / "hf", "llama", num_hidden_layers=7, seed=8)
    import_base(tmp_path / "hf", tmp_path / "base")
    other_base = train(1, None, *load, *vocabulary, "--eagle-base-checkpoint", tmp_path / "base")
    assert other_base.returncode != 0
    assert "trained on another base" in other_base.error_line
