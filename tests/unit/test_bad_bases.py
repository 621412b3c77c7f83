"""Bases that cannot be right are refused by name; and what a base is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eagle.hf.base.import_base import import_base, model_name
from tests.helpers.tiny_hf import make_base


def test_a_base_with_nan_or_another_head_is_refused_by_tensor(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    make_base(hf, "llama", num_hidden_layers=4)
    whole = load_file(hf / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    for value in (float("nan"), float("inf")):
        weight = whole[name].clone()
        weight[1, 2] = value
        save_file({**whole, name: weight}, hf / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinite values"):
            import_base(hf, tmp_path / "base")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    embedding = whole["model.embed_tokens.weight"]
    other = {**whole, "lm_head.weight": embedding + 1}
    save_file(other, hf / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        import_base(hf, tmp_path / "base")
    save_file({**whole, "lm_head.weight": embedding.clone()}, hf / "model.safetensors")
    import_base(hf, tmp_path / "base")
    assert torch.equal(embedding, whole["model.embed_tokens.weight"])


def test_a_base_has_a_name_by_which_servers_find_it(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--Tiny-1B--x" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "acme/Tiny-1B--x"
    (tmp_path / "link").symlink_to(snapshot)
    assert model_name(tmp_path / "link") == "acme/Tiny-1B--x"
    assert model_name(tmp_path) == str(tmp_path.resolve())
