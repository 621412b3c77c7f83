"""The name table of a draft: each Megatron tensor, and the Hugging Face tensors in it.

Shapes are written with: H draft hidden, H2 = 2H, AH = A aux layers x base hidden, HD head_dim,
Q heads x head_dim, KV groups x head_dim, QKV = Q + 2 KV, F ffn hidden, F2 = 2F, D draft vocabulary;
MR rank of a Markov head; of multi-latent attention QR, KR, P, LQ, LKV, LV as in
``hf/tables/entries.py``.
Linear weights are [out, in] on both sides.
"""

from __future__ import annotations

from megatron_eagle.hf.draft.entry import (
    DraftEntry,
    first,
    one_entry,
    repeat,
    split_query_groups,
    split_rows,
)
from megatron_eagle.hf.draft.formats import Format
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.module_entries import module_entries
from megatron_eagle.hf.tables.entries import Source, join_query_groups, join_rows

PREFIX = "draft."
VOCAB_IDS = f"{PREFIX}vocab_ids"
METADATA = f"{PREFIX}metadata"

HEAD = (
    one_entry("norm.weight", "norm.weight", "H"),
    one_entry("lm_head.weight", "lm_head.weight", "D", "H", padded=True),
)
MLP = (
    one_entry("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "H"),
    DraftEntry(
        megatron="mlp.linear_fc1.weight",
        shape=("F2", "H"),
        sources=(
            Source("mlp.gate_proj.weight", ("F", "H")),
            Source("mlp.up_proj.weight", ("F", "H")),
        ),
        split=split_rows,
        join=join_rows,
    ),
    one_entry("mlp.linear_fc2.weight", "mlp.down_proj.weight", "H", "F"),
)
# The first layer norms embedding and hidden state each, then concatenates them: input width 2H.
FIRST_NORMS = (
    one_entry("input_layernorm.embedding_norm.weight", "input_layernorm.weight", "H"),
    one_entry("input_layernorm.hidden_norm.weight", "hidden_norm.weight", "H"),
)


def draft_entries(info: DraftInfo, fmt: Format) -> list[DraftEntry]:
    """Return the entry of every tensor of a draft, under full names on both sides."""
    if info.spec.method.is_base_module:
        return module_entries(info)
    if info.spec.method.drafts_blocks:
        return _block_entries(info)
    joins_by_fc = info.spec.method.joins_by_fc
    entries = [entry.named(PREFIX, "") for entry in _outside_layers(info)]
    for i in range(info.num_layers):
        hf_prefix = fmt.layer_prefix(i, info)
        for entry in _layer(info, i, ("input_layernorm",) if joins_by_fc else fmt.later_norms):
            entries.append(entry.named(f"{PREFIX}layers.{i}.", hf_prefix))
    return entries


def _layer(info: DraftInfo, index: int, later_norms: tuple[str, ...]) -> tuple[DraftEntry, ...]:
    mla = info.spec.uses_mla
    # Where fc joins embedding and hidden state, the first layer has no norm in front of it.
    joins_by_fc = info.spec.method.joins_by_fc
    columns = "H" if index or joins_by_fc else "H2"
    attention = _mla_attention(info, columns) if mla else _grouped_attention(info, columns)
    norms: tuple[DraftEntry, ...] = () if joins_by_fc else FIRST_NORMS
    if index:
        name = "input_layernorm.weight" if mla else "self_attention.linear_qkv.layer_norm_weight"
        sources = tuple(Source(f"{norm}.weight", ("H",)) for norm in later_norms)
        norms = (DraftEntry(name, ("H",), sources, split=repeat, join=first),)
    return (*norms, *attention, *MLP)


def _grouped_attention(info: DraftInfo, columns: str) -> tuple[DraftEntry, ...]:
    rows = {"q_proj": "Q", "k_proj": "KV", "v_proj": "KV"}
    qkv = DraftEntry(
        megatron="self_attention.linear_qkv.weight",
        shape=("QKV", columns),
        sources=tuple(
            Source(f"self_attn.{name}.weight", (row, columns)) for name, row in rows.items()
        ),
        split=split_query_groups,
        join=join_query_groups,
    )
    norms = ("q", "k") if info.spec.norms_heads else ()
    return (
        qkv,
        *(
            one_entry(f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_norm.weight", "HD")
            for x in norms
        ),
        one_entry("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H", "Q"),
    )


def _mla_attention(info: DraftInfo, columns: str) -> tuple[DraftEntry, ...]:
    names = {
        "linear_kv_down_proj.weight": ("kv_a_proj_with_mqa.weight", "KR+P", columns),
        "linear_kv_up_proj.layer_norm_weight": ("kv_a_layernorm.weight", "KR"),
        "linear_kv_up_proj.weight": ("kv_b_proj.weight", "LKV", "KR"),
        "linear_proj.weight": ("o_proj.weight", "H", "LV"),
    }
    if info.dims["QR"]:
        names |= {
            "linear_q_down_proj.weight": ("q_a_proj.weight", "QR", columns),
            "linear_q_up_proj.layer_norm_weight": ("q_a_layernorm.weight", "QR"),
            "linear_q_up_proj.weight": ("q_b_proj.weight", "LQ", "QR"),
        }
    else:
        names["linear_q_proj.weight"] = ("q_proj.weight", "LQ", columns)
    return tuple(
        one_entry(f"self_attention.{name}", f"self_attn.{hf_name}", *shape)
        for name, (hf_name, *shape) in names.items()
    )


def _outside_layers(info: DraftInfo) -> list[DraftEntry]:
    method = info.spec.method
    entries = [one_entry("fc.weight", "fc.weight", "H", "H2" if method.joins_by_fc else "AH")]
    if method.norms_each_aux_layer:
        names = [f"fc_norm.{i}.weight" for i in range(len(info.aux_layers))]
        entries += [one_entry(name, name, "H") for name in names]
    elif info.spec.norm_before_fc:
        entries += [one_entry("input_norm.weight", "input_norm.weight", "AH")]
    if method.learns_mask_hidden:
        entries += [one_entry("mask_hidden.weight", "mask_hidden", "1", "AH")]
    return entries if method.shares_base_head else [*entries, *HEAD]


def _block_entries(info: DraftInfo) -> list[DraftEntry]:
    """Return the entries of a block draft, whose layers are all alike."""
    names = [
        ("fc.weight", "fc.weight", "H", "AH"),
        ("hidden_norm.weight", "hidden_norm.weight", "H"),
    ]
    entries = [*(one_entry(*name) for name in names), *(HEAD if info.stores_head else HEAD[:1])]
    if info.spec.markov is not None:
        entries += _markov(info.spec.markov[0])
    if info.spec.confidence_head:
        to = "confidence_head.proj"
        entries.append(one_entry("confidence.weight", f"{to}.weight", "1", "H+MR"))
        entries.append(one_entry("confidence.bias", f"{to}.bias", "1"))
    layer = (
        one_entry("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "H"),
        *_grouped_attention(info, "H"),
        *MLP,
    )
    return [entry.named(PREFIX, "") for entry in entries] + [
        entry.named(f"{PREFIX}layers.{i}.", f"layers.{i}.")
        for i in range(info.num_layers)
        for entry in layer
    ]


def _markov(kind: str) -> list[DraftEntry]:
    entries = [
        one_entry("markov.w1.weight", "markov_head.markov_w1.weight", "V", "MR", padded=True),
        one_entry("markov.w2.weight", "markov_head.markov_w2.weight", "D", "MR", padded=True),
    ]
    projections = {
        "gated": ("gate_proj", "MR", "H+MR"),
        "rnn": ("joint_proj", "MR+MR+MR", "MR+MR+H"),
    }
    if kind in projections:
        name, rows, columns = projections[kind]
        to = f"markov_head.{name}"
        entries.append(one_entry("markov.projection.weight", f"{to}.weight", rows, columns))
        entries.append(one_entry("markov.projection.bias", f"{to}.bias", rows))
    return entries
