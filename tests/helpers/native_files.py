"""Checkpoints of tiny tensors in the form in which Megatron saves them, without a run of its."""

from __future__ import annotations

import argparse
import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_eagle.checkpoint.writer import Chunk, write_torch_dist

HIDDEN, VOCAB, LAYERS = 8, 24, 2
ARGS: dict[str, Any] = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": 16,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 2,
    "max_position_embeddings": 64,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "add_bias_linear": False,
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "padded_vocab_size": VOCAB,
    "vocab_size": None,
    "make_vocab_size_divisible_by": 8,
    "tokenizer_type": "HuggingFaceTokenizer",
    "tokenizer_model": "somewhere",
    "params_dtype": torch.bfloat16,
    "fp8": None,
}
BRIDGE_LLAMA: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": None,
    "seq_length": 64,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "share_embeddings_and_output_weights": False,
}
"""What the Llama types here have in common in the fields of Megatron-Bridge's provider."""


def chunk(key: str, *shape: int) -> Chunk:
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    return Chunk(key, shape, (0,) * len(shape), shape, torch.float32, lambda: values)


def save(
    folder: Path,
    common: dict[str, Any],
    *more: Chunk,
    name: str = "iter_0000010",
    old: bool = True,
    stacked: bool = True,
) -> Path:
    """Write a checkpoint of tiny tensors, its common state in ``common.pt`` or in the shards;
    ``stacked``: a tensor of all layers is among them."""
    layers = chunk("decoder.layers.self_attention.linear_proj.weight", LAYERS, HIDDEN, HIDDEN)
    chunks = [
        chunk("embedding.word_embeddings.weight", VOCAB, HIDDEN),
        *([layers] if stacked else []),
        chunk("decoder.final_layernorm.weight", HIDDEN),
        chunk("output_layer.weight", VOCAB, HIDDEN),
        chunk("optimizer.state.exp_avg.output_layer.weight", VOCAB, HIDDEN),
    ]
    write_torch_dist(folder / name, [*chunks, *more], {} if old else common, {})
    text = name if name == "release" else str(int(name.removeprefix("iter_")))
    (folder / "latest_checkpointed_iteration.txt").write_text(text)
    if old:
        torch.save(common, folder / name / "common.pt")
    return folder


def namespace(**changes: Any) -> dict[str, Any]:
    args = {**ARGS, **changes}
    return {"args": argparse.Namespace(**args), "iteration": 10, "checkpoint_version": 3.0}


def as_older(source: Path, target: Path) -> Path:
    """Copy a checkpoint of Megatron's to ``target``, as releases before 0.19 wrote it: its common
    state in ``common.pt``, not among the shards' objects."""
    shutil.copytree(source, target)
    (iteration,) = target.glob("iter_*")
    metadata = pickle.loads((iteration / ".metadata").read_bytes())
    (index,) = (i for i in metadata.storage_data if i.fqn == "common_state/shard_0_1")
    place = metadata.storage_data.pop(index)
    del metadata.state_dict_metadata[index.fqn]
    content = (iteration / place.relative_path).read_bytes()
    content = content[place.offset : place.offset + place.length]
    (common,) = torch.load(io.BytesIO(content), weights_only=False)
    assert isinstance(common["args"], argparse.Namespace)
    torch.save(common, iteration / "common.pt")
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))
    return target


def as_bridge(source: Path, target: Path, model: dict[str, Any]) -> Path:
    """Copy what ``as_older`` made to ``target``, as Megatron-Bridge writes it: no arguments, but
    the fields ``model`` in run_config.yaml, and no tracker file of Megatron-LM's."""
    shutil.copytree(source, target)
    (iteration,) = target.glob("iter_*")
    torch.save({"iteration": 4, "checkpoint_version": 3.0}, iteration / "common.pt")
    (iteration / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    (target / "latest_checkpointed_iteration.txt").unlink()
    return iteration
