"""A trained draft's checkpoint made by hand, and the Hugging Face tensors it must convert to.

The Megatron tensors are assembled head by head and row by row with plain loops, so that nothing of
the conversion under test computes its own expectation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.writer import Chunk, write_torch_dist
from tests.helpers.trained_mla import (
    DEEPSEEK_YARN,
    YARN_ARGUMENTS,
    mla_arguments,
    mla_rope,
    mla_sizes,
    mla_tensors,
)

LINEAR_LAYERS = (
    "self_attention.linear_qkv",
    "self_attention.linear_q_proj",
    "self_attention.linear_q_up_proj",
    "self_attention.linear_kv_up_proj",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
EXTRA_STATES = ["draft.lm_head._extra_state"] + [
    f"draft.layers.{i}.{module}._extra_state" for i in range(2) for module in LINEAR_LAYERS
]
"""What Megatron's linear layers save beside their weights: nothing, under a name."""

ROPE = {"rope_theta": 50000.0}


@dataclass(frozen=True)
class Shape:
    """A draft small enough to read, no two of its sizes equal."""

    layers: int = 1
    hidden: int = 24
    heads: int = 6
    groups: int = 2
    head_dim: int = 10
    ffn: int = 14
    vocab: int = 53
    draft_vocab: int = 19
    padded_vocab: int = 32
    aux_layers: tuple[int, ...] = (1, 4, 7)
    base_layers: int = 11
    rope: dict[str, Any] = field(default_factory=lambda: dict(ROPE))
    algorithm: str = "eagle3"
    mask_token: int | None = None
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    qk_layernorm: bool = False
    mla: dict[str, int] = field(default_factory=dict)  # see tests.helpers.trained_mla
    base: dict[str, Any] = field(default_factory=dict)  # Megatron arguments other than the draft's


def hf_tensors(
    shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The draft as a server sees it: random weights under Hugging Face names, d2t and t2d."""
    torch.manual_seed(seed)
    q, kv = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    hidden = shape.hidden
    eagle1 = shape.algorithm == "eagle1"
    captured = len(shape.aux_layers)
    sizes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, 2 * hidden)}
    if not eagle1:
        sizes = {
            "fc.weight": (hidden, captured * hidden),
            "norm.weight": (hidden,),
            "lm_head.weight": (shape.draft_vocab, hidden),
        }
    if shape.algorithm == "eagle3.1":
        sizes |= {f"fc_norm.{i}.weight": (hidden,) for i in range(captured)}
    if shape.algorithm == "p-eagle":
        sizes["mask_hidden"] = (1, captured * hidden)
    if shape.norm_before_fc:
        sizes["input_norm.weight"] = (captured * hidden,)
    for i in range(shape.layers):
        prefix = prefix_of(shape, i)
        width = 2 * hidden if i == 0 and not eagle1 else hidden
        if not eagle1:
            sizes |= {
                f"{prefix}input_layernorm.weight": (hidden,),
                f"{prefix}hidden_norm.weight": (hidden,),
            }
        elif i > 0:
            sizes[f"{prefix}input_layernorm.weight"] = (hidden,)
        attention: dict[str, tuple[int, ...]] = {
            "q_proj": (q, width),
            "k_proj": (kv, width),
            "v_proj": (kv, width),
            "o_proj": (hidden, q),
        }
        if shape.qk_layernorm:
            attention |= {"q_norm": (shape.head_dim,), "k_norm": (shape.head_dim,)}
        if shape.mla:
            attention = mla_sizes(shape.mla, shape.heads, hidden, width)
        sizes |= {f"{prefix}self_attn.{name}.weight": size for name, size in attention.items()}
        sizes |= {
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (shape.ffn, hidden),
            f"{prefix}mlp.up_proj.weight": (shape.ffn, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, shape.ffn),
        }
    tensors = {name: torch.randn(size).to(dtype) for name, size in sizes.items()}
    for i in range(1, 1 if eagle1 else shape.layers):
        tensors[f"layers.{i}.hidden_norm.weight"] = tensors[f"layers.{i}.input_layernorm.weight"]
    if shape.draft_vocab < shape.vocab:
        ids = sorted(torch.randperm(shape.vocab)[: shape.draft_vocab].tolist())
        tensors["d2t"] = torch.tensor([token - i for i, token in enumerate(ids)])
        tensors["t2d"] = torch.tensor([token in ids for token in range(shape.vocab)])
    return tensors


def prefix_of(shape: Shape, layer: int) -> str:
    one = shape.layers == 1 and shape.algorithm != "eagle1"
    return "midlayer." if one else f"layers.{layer}."


def megatron_tensors(shape: Shape, hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same draft under the checkpoint's keys, with vocab_ids and without metadata."""
    offsets = hf.get("d2t", torch.zeros(shape.draft_vocab, dtype=torch.int64))
    ids = torch.tensor([i + int(offset) for i, offset in enumerate(offsets)])
    result = {"draft.vocab_ids": ids}
    for name in hf:
        if name in ("fc.weight", "norm.weight") or name.startswith(("fc_norm.", "input_norm.")):
            result[f"draft.{name}"] = hf[name]
    if shape.algorithm == "p-eagle":
        result["draft.mask_hidden.weight"] = hf["mask_hidden"]
    if shape.algorithm != "eagle1":
        head = hf["lm_head.weight"]
        padding = torch.full((shape.padded_vocab - shape.draft_vocab, shape.hidden), 77.0)
        result["draft.lm_head.weight"] = torch.cat([head, padding.to(head)])
    for i in range(shape.layers):
        layer = f"draft.layers.{i}."
        prefix = prefix_of(shape, i)
        own = {k.removeprefix(prefix): v for k, v in hf.items() if k.startswith(prefix)}
        if i == 0 and shape.algorithm == "eagle1":
            pass
        elif i == 0:
            result |= {
                f"{layer}input_layernorm.embedding_norm.weight": own["input_layernorm.weight"],
                f"{layer}input_layernorm.hidden_norm.weight": own["hidden_norm.weight"],
            }
        else:
            norm = "input_layernorm" if shape.mla else "self_attention.linear_qkv.layer_norm"
            result[f"{layer}{norm}{'.' if shape.mla else '_'}weight"] = own[
                "input_layernorm.weight"
            ]
        if shape.mla:
            result |= mla_tensors(f"{layer}self_attention.", own)
        else:
            result[f"{layer}self_attention.linear_qkv.weight"] = _interleaved(shape, own)
        if shape.qk_layernorm:
            result |= {
                f"{layer}self_attention.{x}_layernorm.weight": own[f"self_attn.{x}_norm.weight"]
                for x in "qk"
            }
        result |= {
            f"{layer}self_attention.linear_proj.weight": own["self_attn.o_proj.weight"],
            f"{layer}mlp.linear_fc1.layer_norm_weight": own["post_attention_layernorm.weight"],
            f"{layer}mlp.linear_fc1.weight": torch.cat(
                [own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]]
            ),
            f"{layer}mlp.linear_fc2.weight": own["mlp.down_proj.weight"],
        }
    return result


def _interleaved(shape: Shape, own: dict[str, Tensor]) -> Tensor:
    size, per_group = shape.head_dim, shape.heads // shape.groups
    rows = []
    for group in range(shape.groups):
        for head in range(group * per_group, (group + 1) * per_group):
            rows.append(own["self_attn.q_proj.weight"][head * size : (head + 1) * size])
        rows.append(own["self_attn.k_proj.weight"][group * size : (group + 1) * size])
        rows.append(own["self_attn.v_proj.weight"][group * size : (group + 1) * size])
    return torch.cat(rows)


def metadata_json(shape: Shape) -> dict[str, Any]:
    """The content of draft.metadata."""
    layers = [] if shape.algorithm == "eagle1" else list(shape.aux_layers)
    own = {
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_dim,
    }
    if shape.mla:
        own |= mla_arguments(shape.mla, shape.heads)
    of_base = {**own, **shape.base}
    of_base["group_query_attention"] = of_base["num_query_groups"] != of_base["num_attention_heads"]
    scaled_mla = bool(shape.mla) and shape.rope.get("rope_scaling") == DEEPSEEK_YARN
    return {
        "format": "megatron_eagle.draft",
        "version": 2,
        "spec": {
            "num_layers": shape.layers,
            "aux_layers": layers or None,
            "draft_vocab_size": shape.draft_vocab if shape.draft_vocab < shape.vocab else None,
            "algorithm": shape.algorithm,
            **({"attention": "mla"} if shape.mla else {}),
            "mask_token": shape.mask_token,
            "norm_before_fc": shape.norm_before_fc,
            "norm_before_residual": shape.norm_before_residual,
            "qk_layernorm": shape.qk_layernorm,
            **{name: own[name] for name in shape.base if name in own},
        },
        "ttt_steps": 4,
        "training": {},
        "base": {
            "format": "megatron_eagle.base",
            "version": 1,
            "family": "llama",
            "name": "tiny-base",
            "fingerprint": "0" * 64,
            "vocab_size": shape.vocab,
            "hf_config": {
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096,
                "bos_token_id": 1,
                "eos_token_id": [2, 3],
                **shape.rope,
            },
            "megatron_args": {
                "num_layers": shape.base_layers,
                "hidden_size": shape.hidden,
                **of_base,
                "norm_epsilon": 1e-5,
                "rotary_base": int(shape.rope.get("rope_theta", 50000)),
                "vocab_size": shape.vocab,
                **(YARN_ARGUMENTS if scaled_mla else {}),
            },
            "rope": mla_rope(shape.rope["rope_theta"]) if scaled_mla else {},
        },
    }


def metadata_tensor(content: Any) -> Tensor:
    text = json.dumps(content).encode()
    return torch.tensor(list(text.ljust(16384)), dtype=torch.uint8)


def chunked(tensors: dict[str, Tensor], parts: int = 1) -> list[Chunk]:
    """Every tensor cut into up to `parts` blocks of rows, as TP ranks would save it."""
    chunks = []
    for key, tensor in tensors.items():
        for part in torch.arange(tensor.shape[0]).tensor_split(min(parts, tensor.shape[0])):
            start, rows = int(part[0]), len(part)
            chunks.append(
                Chunk(
                    key=key,
                    global_shape=tuple(tensor.shape),
                    offset=(start,) + (0,) * (tensor.dim() - 1),
                    shape=(rows, *tensor.shape[1:]),
                    dtype=tensor.dtype,
                    load=partial(tensor.narrow, 0, start, rows),
                )
            )
    return chunks


def save_iteration(root: Path, chunks: Iterable[Chunk], iteration: int = 120) -> Path:
    """Write a checkpoint directory with one iteration; returns the iteration's directory."""
    directory = root / f"iter_{iteration:07d}"
    objects = {"rng_state/shard_0_1": [1], **{f"{name}/shard_0_1": None for name in EXTRA_STATES}}
    write_torch_dist(directory, chunks, {"iteration": iteration}, objects)
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return directory


@dataclass
class TrainedDraft:
    """A checkpoint to be: change `stored` or `metadata`, then `save`."""

    shape: Shape
    hf: dict[str, Tensor]
    stored: dict[str, Tensor]
    metadata: Any

    @classmethod
    def make(cls, dtype: torch.dtype = torch.float32, **changes: Any) -> TrainedDraft:
        shape = Shape(**{**asdict(Shape()), **changes})
        hf = hf_tensors(shape, dtype=dtype)
        return cls(shape, hf, megatron_tensors(shape, hf), metadata_json(shape))

    def tensors(self) -> dict[str, Tensor]:
        optimizer = {"optimizer.state.exp_avg.draft.norm.weight": torch.zeros(self.shape.hidden)}
        return {"draft.metadata": metadata_tensor(self.metadata), **self.stored, **optimizer}

    def save(self, root: Path, parts: int = 1) -> Path:
        return save_iteration(root, chunked(self.tensors(), parts))
