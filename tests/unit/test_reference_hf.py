"""The oracle reads exported files strictly, and shares no code with what it judges."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.reference.eagle3 import ReferenceConfig, ReferenceEagle3

TESTS = Path(__file__).parents[1]
VOCAB_IDS = torch.tensor([0, 3, 4])
HF = {
    "hidden_size": 8,
    "target_hidden_size": 6,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 7,
    "draft_vocab_size": 3,
    "num_hidden_layers": 1,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-6,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2]},
    "norm_before_residual": True,
}


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def sample(directory: Path, layers: int = 1) -> tuple[dict[str, Any], ReferenceEagle3]:
    hf = {**HF, "num_hidden_layers": layers}
    write(directory, hf, {})
    config = ReferenceConfig.from_hf(directory / "config.json")
    return hf, ReferenceEagle3(config, torch.randn(7, 8), VOCAB_IDS)


def test_every_field_is_read_from_config_and_objective(tmp_path: Path) -> None:
    write(tmp_path, HF, {})
    config = ReferenceConfig.from_hf(tmp_path / "config.json", ttt_steps=7)
    assert config == ReferenceConfig(
        hidden_size=8, target_hidden_size=6, intermediate_size=12, num_heads=4, num_kv_heads=2,
        head_dim=4, vocab_size=7, draft_vocab_size=3, num_layers=1, num_aux=2, rope_theta=500.0,
        rms_eps=1e-6, ttt_steps=7, norm_before_residual=True,
    )  # fmt: skip


def test_file_names_are_the_served_ones(tmp_path: Path) -> None:
    _, model = sample(tmp_path)
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    assert shapes == {
        "fc.weight": [8, 12],
        "midlayer.input_layernorm.weight": [8],
        "midlayer.hidden_norm.weight": [8],
        "midlayer.self_attn.q_proj.weight": [16, 16],
        "midlayer.self_attn.k_proj.weight": [8, 16],
        "midlayer.self_attn.v_proj.weight": [8, 16],
        "midlayer.self_attn.o_proj.weight": [8, 16],
        "midlayer.mlp.gate_proj.weight": [12, 8],
        "midlayer.mlp.up_proj.weight": [12, 8],
        "midlayer.mlp.down_proj.weight": [8, 12],
        "midlayer.post_attention_layernorm.weight": [8],
        "norm.weight": [8],
        "lm_head.weight": [3, 8],
        "d2t": [3],
        "t2d": [7],
    }


@pytest.mark.parametrize("layers", [1, 2])
def test_a_written_directory_comes_back_equal(tmp_path: Path, layers: int) -> None:
    hf, model = sample(tmp_path, layers)
    tensors = {**model.state_dict(), "embed_tokens.weight": model.embed_weight}
    if layers == 2:
        tensors["layers.1.hidden_norm.weight"] = tensors["layers.1.input_layernorm.weight"].clone()
    write(tmp_path, hf, tensors)
    loaded = ReferenceEagle3.from_hf(tmp_path, model.embed_weight, torch.float64)
    assert loaded.vocab_ids.equal(VOCAB_IDS)
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor.to(loaded.state_dict()[name].dtype)), name


def test_equal_vocabularies_need_no_d2t(tmp_path: Path) -> None:
    _, model = sample(tmp_path)
    tensors = {k: v for k, v in model.state_dict().items() if k not in ("d2t", "t2d")}
    tensors["lm_head.weight"] = torch.randn(7, 8)
    write(tmp_path, {**HF, "draft_vocab_size": 7}, tensors)
    loaded = ReferenceEagle3.from_hf(tmp_path, model.embed_weight)
    assert loaded.vocab_ids.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("norm.weight", None, RuntimeError),
        ("layers.1.input_layernorm.weight", torch.full((8,), 2.0), ValueError),
        ("fc.bias", torch.zeros(8), RuntimeError),
        ("d2t", None, ValueError),
        ("d2t", torch.tensor([0, 2, 1]), ValueError),
        ("t2d", torch.ones(7, dtype=torch.bool), ValueError),
        ("embed_tokens.weight", torch.zeros(7, 8), ValueError),
    ],
)
def test_wrong_files_do_not_load(
    tmp_path: Path, name: str, value: Tensor | None, error: type[Exception]
) -> None:
    hf, model = sample(tmp_path, layers=2)
    tensors = {**model.state_dict(), "layers.1.hidden_norm.weight": torch.ones(8)}
    ReferenceEagle3.from_hf(write(tmp_path, hf, tensors), model.embed_weight)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(error):
        ReferenceEagle3.from_hf(write(tmp_path, hf, tensors), model.embed_weight)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_scaling": {"rope_type": "longrope"}},
        {"hidden_act": "gelu"},
    ],
)
def test_unimplemented_variants_raise(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path, {**HF, **change}, {})
    with pytest.raises(ValueError, match="does not implement"):
        ReferenceConfig.from_hf(tmp_path / "config.json")


def test_d2t_is_the_offset_of_ascending_ids(tmp_path: Path) -> None:
    _, model = sample(tmp_path)
    assert model.d2t.tolist() == [0, 2, 2]
    assert model.t2d.nonzero().flatten().tolist() == VOCAB_IDS.tolist()
    for bad in ([3, 0, 4], [0, 3, 3], [0, 3, 7], [-1, 3, 4], [0, 3]):
        with pytest.raises(ValueError, match="vocab_ids"):
            ReferenceEagle3(model.config, model.embed_weight, torch.tensor(bad))


def test_the_oracle_is_independent() -> None:
    allowed = {"__future__", "collections", "dataclasses", "json", "math", "pathlib", "typing",
               "torch", "safetensors", "tests"}  # fmt: skip
    files = sorted((TESTS / "reference").glob("*.py"))
    assert {f.name for f in files} >= {"eagle3.py", "decode.py"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "."]
            for name in names:
                assert name.split(".")[0] in allowed, f"{file.name} imports {name}"
                assert not name.startswith("tests") or name.startswith("tests.reference.")
