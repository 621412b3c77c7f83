"""Bases whose numbers or description cannot be right: refused at import, by the tensor's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eagle.hf.base.import_base import import_base
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
