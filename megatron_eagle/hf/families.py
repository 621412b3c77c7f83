"""The name tables: which Hugging Face tensors make up which Megatron tensor, per family.

A new dense family is one `Family` here (and, where its config.json has new fields, a few lines in
`megatron_args`). Shapes are written with: V vocab_size, H hidden, Q heads x head_dim,
KV groups x head_dim, F ffn hidden, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Dims = dict[str, int]
Join = Callable[[Sequence[torch.Tensor], Dims], torch.Tensor]


@dataclass(frozen=True)
class Source:
    """One Hugging Face tensor: its name (inside its layer, or whole) and its symbolic shape."""

    name: str
    shape: tuple[str, ...]

    def sizes(self, dims: Dims) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(dims[symbol] for symbol in self.shape)


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor, made from `sources` by `join`; all sources share the trailing shape."""

    megatron: str
    sources: tuple[Source, ...]
    join: Join

    def sizes(self, dims: Dims) -> tuple[int, ...]:
        """Shape of the Megatron tensor: the sources' rows add up, the trailing shape stays."""
        shapes = [source.sizes(dims) for source in self.sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True)
class Family:
    """`layer` entries repeat for every layer below `layer_prefix`; `model` entries occur once."""

    name: str
    architecture: str
    layer: tuple[Entry, ...]
    model: tuple[Entry, ...]
    layer_prefix: str = "model.layers.{}."
    ignored_in_layer: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window_flag: str | None = None


def join_rows(parts: Sequence[torch.Tensor], dims: Dims) -> torch.Tensor:
    """The parts below one another: one tensor as it is, or [gate ; up] (its TP split is by halves,
    which Megatron's sharded state dict describes)."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def join_query_groups(parts: Sequence[torch.Tensor], dims: Dims) -> torch.Tensor:
    """q [Q, ...], k [KV, ...], v [KV, ...] -> rows per query group [q_1 .. q_r, k, v]."""
    grouped = [part.reshape(dims["groups"], -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _one(megatron: str, name: str, *shape: str) -> Entry:
    return Entry(megatron, (Source(name, shape),), join_rows)


def _qkv(megatron: str, suffix: str, *trailing: str) -> Entry:
    rows = {"q_proj": "Q", "k_proj": "KV", "v_proj": "KV"}
    sources = tuple(
        Source(f"self_attn.{name}.{suffix}", (symbol, *trailing)) for name, symbol in rows.items()
    )
    return Entry(megatron, sources, join_query_groups)


EMBEDDING = _one("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V", "H")
FINAL_NORM = _one("decoder.final_layernorm.weight", "model.norm.weight", "H")
OUTPUT = _one("output_layer.weight", "lm_head.weight", "V", "H")

LLAMA_LAYER = (
    _one("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "H"),
    _qkv("self_attention.linear_qkv.weight", "weight", "H"),
    _one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H", "Q"),
    _one("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "H"),
    Entry(
        "mlp.linear_fc1.weight",
        (
            Source("mlp.gate_proj.weight", ("F", "H")),
            Source("mlp.up_proj.weight", ("F", "H")),
        ),
        join_rows,
    ),
    _one("mlp.linear_fc2.weight", "mlp.down_proj.weight", "H", "F"),
)
QKV_BIAS = (_qkv("self_attention.linear_qkv.bias", "bias"),)
QK_NORM = (
    _one("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "D"),
    _one("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "D"),
)
MODEL = (EMBEDDING, FINAL_NORM, OUTPUT)

FAMILIES = {
    family.architecture: family
    for family in (
        Family("llama", "LlamaForCausalLM", LLAMA_LAYER, MODEL),
        Family(
            "mistral",
            "MistralForCausalLM",
            LLAMA_LAYER,
            MODEL,
            sliding_window_flag="sliding_window",
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            LLAMA_LAYER + QKV_BIAS,
            MODEL,
            qkv_bias=True,
            sliding_window_flag="use_sliding_window",
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            LLAMA_LAYER + QK_NORM,
            MODEL,
            qk_norm=True,
            sliding_window_flag="use_sliding_window",
        ),
    )
}


def family_of(config: dict[str, Any], source: str) -> Family:
    """The family of a config.json; ValueError, naming `source`, for one that has no table."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise ValueError(f"{source}: architectures must name exactly one class, found {names!r}")
    family = FAMILIES.get(names[0]) if isinstance(names[0], str) else None
    if family is None:
        raise ValueError(
            f"{source}: architecture {names[0]!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    return family
