"""The name tables of Qwen3-Next and Qwen3.5: gated delta nets, gated attention, a gated shared
expert.

All its norms but the delta net's store their weight's difference from 1, as Megatron's do with
apply_layernorm_1p. The symbols of the shapes are explained in ``megatron_eagle.hf.tables.entries``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_eagle.hf.base.moe_tables import moe, shared_experts
from megatron_eagle.hf.tables.entries import Dims, Entry, Join, Source, Table, one

QKVZ = Source("linear_attn.in_proj_qkvz.weight", ("DK+DK+DV+DV", "H"))
QKV = Source("linear_attn.in_proj_qkv.weight", ("DK+DK+DV", "H"))
BA = Source("linear_attn.in_proj_ba.weight", ("NV+NV", "H"))
CONVOLUTION = Source("linear_attn.conv1d.weight", ("DK+DK+DV", "1", "C"))
_IN_PROJ = "self_attention.in_proj.weight."
_CONVOLUTION = "self_attention.conv1d.weight."


def join_gated_groups(parts: Sequence[Tensor], dims: Dims) -> Tensor:
    """Return q [2Q, ...], whose heads are a query and a gate each, k and v [KV, ...] as rows per
    query group [q_1 .. q_r, gate_1 .. gate_r, k, v]."""
    both, groups = parts[0].unflatten(0, (dims["N"], 2, -1)), dims["groups"]
    pieces = [both[:, 0].flatten(0, 1), both[:, 1].flatten(0, 1), *parts[1:]]
    return torch.cat([piece.unflatten(0, (groups, -1)) for piece in pieces], dim=1).flatten(0, 1)


def split_gated_groups(tensor: Tensor, sources: Sequence[Source], dims: Dims) -> list[Tensor]:
    """Return the parts that :func:`join_gated_groups` joined."""
    groups = dims["groups"]
    queries, keys = (dims[name] // groups for name in ("Q", "KV"))
    cut = tensor.unflatten(0, (groups, -1)).split([queries, queries, keys, keys], dim=1)
    query, gate, key, value = (part.flatten(0, 1) for part in cut)
    heads = [part.unflatten(0, (dims["N"], 1, -1)) for part in (query, gate)]
    return [torch.cat(heads, dim=1).flatten(0, 2), key, value]


GATED_ATTENTION: Table = {
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight", "H"),
    "self_attention.linear_qkv.weight": partial(
        Entry,
        shape=("Q+Q+KV+KV", "H"),
        sources=(
            Source("self_attn.q_proj.weight", ("Q+Q", "H")),
            Source("self_attn.k_proj.weight", ("KV", "H")),
            Source("self_attn.v_proj.weight", ("KV", "H")),
        ),
        join=join_gated_groups,
    ),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", "HD"),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", "HD"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", "H", "Q"),
}


def _by_key_head(number: int, sizes: tuple[str, ...]) -> Join:
    """Return the join that takes part ``number`` of rows which lie key head by key head, each with
    a part of every one of ``sizes``."""

    def take(parts: Sequence[Tensor], dims: Dims) -> Tensor:
        heads = dims["key_heads"]
        rows = [dims[size] // heads for size in sizes]
        return parts[0].unflatten(0, (heads, -1)).split(rows, dim=1)[number].flatten(0, 1)

    return take


def _rows(number: int, sizes: tuple[str, ...]) -> Join:
    """Return the join that takes part ``number`` of rows that lie part after part."""

    def take(parts: Sequence[Tensor], dims: Dims) -> Tensor:
        return parts[0].split([dims[size] for size in sizes])[number]

    return take


def _parts(
    prefix: str, names: Sequence[str], source: Source, cut: Callable[[int, tuple[str, ...]], Join]
) -> dict[str, partial[Entry]]:
    """Return the rows of the Megatron tensors ``names``, each a part of the rows of ``source``."""
    sizes = tuple(source.shape[0].split("+"))
    return {
        prefix + name: partial(
            Entry,
            shape=(sizes[number], *source.shape[1:]),
            sources=(source,),
            join=cut(number, sizes),
        )
        for number, name in enumerate(names)
    }


_BESIDE_IN_PROJ: Table = {
    "self_attention.in_proj.layer_norm_weight": ("input_layernorm.weight", "H"),
    **_parts(_CONVOLUTION, ("query", "key", "value"), CONVOLUTION, _rows),
    "self_attention.A_log": ("linear_attn.A_log", "NV"),
    "self_attention.dt_bias": ("linear_attn.dt_bias", "NV"),
    "self_attention.out_norm.weight": ("linear_attn.norm.weight", "VD"),
    "self_attention.out_proj.weight": ("linear_attn.out_proj.weight", "H", "DV"),
}
DELTA_NET: Table = {
    **_parts(_IN_PROJ, ("query", "key", "value", "z"), QKVZ, _by_key_head),
    **_parts(_IN_PROJ, ("beta", "alpha"), BA, _by_key_head),
    **_BESIDE_IN_PROJ,
}
"""Qwen3-Next's: two matrices, whose rows lie key head by key head."""

SPLIT_DELTA_NET: Table = {
    **_parts(_IN_PROJ, ("query", "key", "value"), QKV, _rows),
    f"{_IN_PROJ}z": ("linear_attn.in_proj_z.weight", "DV", "H"),
    f"{_IN_PROJ}beta": ("linear_attn.in_proj_b.weight", "NV", "H"),
    f"{_IN_PROJ}alpha": ("linear_attn.in_proj_a.weight", "NV", "H"),
    **_BESIDE_IN_PROJ,
}
"""Qwen3.5's: four matrices, part after part."""

GATED_MOE: Table = {
    **moe("mlp", "gate", "gate_proj", "up_proj", "down_proj"),
    **shared_experts("mlp.shared_expert"),
    "mlp.shared_experts.gate_weight": one("mlp.shared_expert_gate.weight", "1", "H"),
}
