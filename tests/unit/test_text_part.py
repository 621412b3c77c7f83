"""The language model of a multimodal model's files, and files that have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eagle.errors import UserError
from megatron_eagle.hf.base.import_base import import_base
from megatron_eagle.hf.draft.base_config import with_hf_config
from megatron_eagle.hf.draft.draft_rope import draft_rope
from megatron_eagle.hf.files.generation_config import end_ids
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


def test_its_end_tokens_are_found(tmp_path: Path) -> None:
    config = json.loads((wrapped(tmp_path) / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 8]}))
    assert end_ids(tmp_path) == [5, 8]


def test_a_draft_beside_it_has_plain_rope(tmp_path: Path) -> None:
    """The base's three sections and its turned part of a head are no draft's, in either file."""
    rope = {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        "mrope_interleaved": True, "mrope_section": [1, 1, 0],
    }  # fmt: skip
    make_base(tmp_path / "hf", "qwen3_5", rope_parameters=rope)
    wrap_text(tmp_path / "hf")
    base = import_base(tmp_path / "hf", tmp_path / "base")
    plain = {"rope_type": "default", "rope_theta": 1e7}
    assert draft_rope(base, mla=False) == {"rope_theta": 1e7, "rope_parameters": plain}
    assert with_hf_config(base, tmp_path / "hf").hf_config == base.hf_config


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
