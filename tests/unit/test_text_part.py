"""The language model of a multimodal model's files, and files that have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eagle.errors import UserError
from megatron_eagle.hf.files.safetensors_dir import SafetensorsDir
from tests.helpers.tiny_hf import make_base, wrap_text


def wrapped(directory: Path, **outer: Any) -> Path:
    """A multimodal model's files; ``outer`` replaces fields of config.json."""
    make_base(directory, "qwen3_5")
    wrap_text(directory)
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | outer))
    return directory


def test_it_reads_as_the_language_model_alone(tmp_path: Path) -> None:
    make_base(tmp_path / "text", "qwen3_5")
    alone, inside = SafetensorsDir(tmp_path / "text"), SafetensorsDir(wrapped(tmp_path / "both"))
    assert inside.config == alone.config
    assert set(inside.headers) == set(alone.headers)
    for name in alone.headers:
        assert inside.tensor(name).equal(alone.tensor(name)), name


def test_fields_of_the_whole_are_the_language_model_s(tmp_path: Path) -> None:
    config = SafetensorsDir(wrapped(tmp_path, quantization_config={"quant_method": "fp8"})).config
    assert config["quantization_config"] == {"quant_method": "fp8"}


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        ({"text_config": None}, "text_config must be a JSON object"),
        ({"text_config": [1]}, "text_config must be a JSON object"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, and not that of text_config"),
    ],
)
def test_a_config_without_a_language_model_is_one_line(
    outer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"config.json: {message}") as error:
        SafetensorsDir(wrapped(tmp_path, **outer))
    assert "\n" not in str(error.value)


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    file = wrapped(tmp_path) / "model.safetensors"
    save_file({**load_file(file), "model.norm.weight": torch.ones(48)}, file)
    with pytest.raises(UserError, match=r"model.*norm\.weight is model.*norm\.weight too"):
        SafetensorsDir(tmp_path)
