"""Tiny random bases with a next-token module of their own, written as their families' are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.tiny_hf import SIZES, make_base, wrap_text
from tests.reference.mtp import MTPConfig, ReferenceMTP

KINDS = ("deepseek_v3", "glm4_moe", "mimo", "qwen3_next", "qwen3_5")
MTP_KINDS = ("qwen3_next", "qwen3_5")
"""Whose module is `mtp`, and whose layer is `mtp.layers.0`."""
LAYERS = 4
_EXPERTS = {
    "num_experts": 8, "topk": 3, "expert_size": 24, "groups": 4, "topk_group": 2,
}  # fmt: skip
_SIZES = {
    "hidden_size": SIZES["hidden_size"],
    "intermediate_size": SIZES["intermediate_size"],
    "num_heads": SIZES["num_attention_heads"],
    "num_kv_heads": SIZES["num_key_value_heads"],
    "rms_eps": SIZES["rms_norm_eps"],
}
CONFIGS = {
    "deepseek_v3": MTPConfig(
        **_SIZES, **_EXPERTS, shared_size=48, head_dim=6, scaling=2.5,
        q_lora_rank=20, kv_lora_rank=16, qk_rope_head_dim=4, v_head_dim=8,
    ),
    "glm4_moe": MTPConfig(
        **_SIZES, **_EXPERTS, shared_size=24, head_dim=12, rotary=6, rope_theta=1e6,
        qkv_bias=True, qk_norm=True,
    ),
    "qwen3_next": MTPConfig(
        **_SIZES, num_experts=4, topk=2, expert_size=24, shared_size=40, head_dim=16, rotary=4,
        qk_norm=True, qwen3_next=True,
    ),
    "qwen3_5": MTPConfig(**_SIZES, head_dim=16, rotary=4, qk_norm=True, qwen3_next=True),
    "mimo": MTPConfig(**_SIZES, head_dim=6, rotary=6, qkv_bias=True, hidden_first=True),
}  # fmt: skip
AROUND = {
    "deepseek_v3": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "mimo": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
    "qwen3_next": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
}
FIELDS = {"qwen3_next": {"mlp_only_layers": []}}
"""Fields of a base with which its module has the layer of `CONFIGS`."""
AROUND["glm4_moe"], AROUND["qwen3_5"] = AROUND["deepseek_v3"], AROUND["qwen3_next"]


def prefix_of(kind: str) -> str:
    """What the names of the module's tensors begin with."""
    others = {"mimo": "model.mtp_layers.0."} | dict.fromkeys(MTP_KINDS, "mtp.")
    return others.get(kind, f"model.layers.{LAYERS}.")


def name_in_file(kind: str, parameter: str) -> str:
    """The name in the base's files of a parameter of the oracle."""
    ours = ("embedding_norm", "hidden_norm", "joining", "final_norm")
    names = dict(zip(ours, AROUND[kind], strict=True))
    module, _, rest = parameter.partition(".")
    if kind in MTP_KINDS and module not in names:
        module = f"layers.0.{module}"
    return f"{prefix_of(kind)}{names.get(module, module)}.{rest}"


def make_module_base(
    directory: Path, kind: str, **fields: Any
) -> tuple[torch.nn.Module, ReferenceMTP]:
    """Write a base of `kind` with a module in `directory`, in two shards, the module's tensors in
    both; return the base's model and the oracle with the module's weights."""
    fields = FIELDS.get(kind, {}) | fields
    model = make_base(directory, kind, num_hidden_layers=LAYERS, **fields)
    if kind == "qwen3_5":
        wrap_text(directory)  # as it is published
    elif kind != "qwen3_next":  # which does not say that there is one
        config = json.loads((directory / "config.json").read_text())
        config["num_nextn_predict_layers"] = 1
        (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    reference = random_module(kind)
    module = {name_in_file(kind, name): p.detach() for name, p in reference.named_parameters()}
    if kind in ("deepseek_v3", "glm4_moe"):
        module[f"{prefix_of(kind)}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        module[f"{prefix_of(kind)}shared_head.head.weight"] = tensors["lm_head.weight"]
    write_shards(directory, tensors, module)
    return model, reference


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor in the safetensors files of `directory`."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def random_module(kind: str) -> ReferenceMTP:
    """An oracle with random weights."""
    torch.manual_seed(5)
    reference = ReferenceMTP(CONFIGS[kind])
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            norm = "norm" in name.rsplit(".", 2)[-2] and not CONFIGS[kind].qwen3_next
            parameter.normal_(0.0, 0.2).add_(1.0 if norm else 0.0)
    return reference


def write_shards(directory: Path, tensors: dict[str, Tensor], module: dict[str, Tensor]) -> None:
    """Write two safetensors files and their index; each holds a part of the module."""
    names = sorted(module)
    half = len(names) // 2
    shards = {
        "model-00001-of-00002.safetensors": tensors | {n: module[n] for n in names[:half]},
        "model-00002-of-00002.safetensors": {n: module[n] for n in names[half:]},
    }
    for file, content in shards.items():
        copies = {name: tensor.clone().contiguous() for name, tensor in content.items()}
        save_file(copies, directory / file, metadata={"format": "pt"})
    index = {name: file for file, content in shards.items() for name in content}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
    (directory / "model.safetensors").unlink(missing_ok=True)
