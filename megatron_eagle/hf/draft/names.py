"""The name table of a draft: each Megatron tensor, and the Hugging Face tensors in it.

Shapes are written with: H draft hidden, H2 = 2H, AH = A aux layers x base hidden, HD head_dim,
Q heads x head_dim, KV groups x head_dim, QKV = Q + 2 KV, F ffn hidden, F2 = 2F, D draft vocabulary;
MR rank of a Markov head; of multi-latent attention QR, KR, P, LQ, LKV, LV as in
``hf/tables/entries.py``.
Linear weights are [out, in] on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_eagle.hf.draft.formats import Format
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.tables.entries import Dims, Source, join_query_groups, join_rows

PREFIX = "draft."
VOCAB_IDS = f"{PREFIX}vocab_ids"
METADATA = f"{PREFIX}metadata"

Split = Callable[[Tensor, Sequence[Source], Dims], list[Tensor]]
Join = Callable[[Sequence[Tensor], Dims], Tensor]


@dataclass(frozen=True)
class DraftEntry:
    """One row of the table: a Megatron tensor and the Hugging Face tensors in it.

    Attributes:
        megatron: name of the tensor in the checkpoint.
        shape: its shape in symbols.
        sources: the Hugging Face tensors.
        split: cuts the Megatron tensor into ``sources``, in their order (export).
        join: makes the Megatron tensor from ``sources`` (import).
        padded: the stored tensor may have more rows than ``shape``; the last ones are padding.
    """

    megatron: str
    shape: tuple[str, ...]
    sources: tuple[Source, ...]
    split: Split
    join: Join
    padded: bool = False

    def sizes(self, dims: Dims) -> tuple[int, ...]:
        """Return the shape in numbers, without padding."""
        return Source(self.megatron, self.shape).sizes(dims)

    def accepts(self, shape: tuple[int, ...], dims: Dims) -> bool:
        """Return whether a stored tensor may have this shape."""
        rows, *columns = self.sizes(dims)
        has_padding = self.padded and len(shape) > 0 and shape[0] > rows
        return shape == (shape[0] if has_padding else rows, *columns)

    def named(self, megatron_prefix: str, hf_prefix: str) -> DraftEntry:
        """Return the same entry with a prefix in front of the names of each side."""
        sources = tuple(replace(part, name=hf_prefix + part.name) for part in self.sources)
        return replace(self, megatron=megatron_prefix + self.megatron, sources=sources)


def split_rows(tensor: Tensor, sources: Sequence[Source], dims: Dims) -> list[Tensor]:
    """Cut a tensor whose rows are those of the sources, one after another, then padding."""
    rows = [part.sizes(dims)[0] for part in sources]
    return list(tensor[: sum(rows)].split(rows))


def split_query_groups(tensor: Tensor, sources: Sequence[Source], dims: Dims) -> list[Tensor]:
    """Sort rows [q_1 .. q_r, k, v] of each query group into q [Q, N], k [KV, N] and v [KV, N]."""
    rows = [part.sizes(dims)[0] // dims["groups"] for part in sources]
    grouped = tensor.unflatten(0, (dims["groups"], -1))
    return [part.flatten(0, 1) for part in grouped.split(rows, dim=1)]


def repeat(tensor: Tensor, sources: Sequence[Source], dims: Dims) -> list[Tensor]:
    """Return the whole tensor for every source."""
    return [tensor] * len(sources)


def first(parts: Sequence[Tensor], dims: Dims) -> Tensor:
    """Return the first of equal tensors, the inverse of ``repeat``."""
    return parts[0]


def _one(megatron: str, name: str, *shape: str, padded: bool = False) -> DraftEntry:
    """Return the entry of a tensor that is the same on both sides."""
    return DraftEntry(
        megatron=megatron,
        shape=shape,
        sources=(Source(name, shape),),
        split=split_rows,
        join=join_rows,
        padded=padded,
    )


HEAD = (
    _one("norm.weight", "norm.weight", "H"),
    _one("lm_head.weight", "lm_head.weight", "D", "H", padded=True),
)
MLP = (
    _one("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "H"),
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
    _one("mlp.linear_fc2.weight", "mlp.down_proj.weight", "H", "F"),
)
# The first layer norms embedding and hidden state each, then concatenates them: input width 2H.
FIRST_NORMS = (
    _one("input_layernorm.embedding_norm.weight", "input_layernorm.weight", "H"),
    _one("input_layernorm.hidden_norm.weight", "hidden_norm.weight", "H"),
)


def draft_entries(info: DraftInfo, fmt: Format) -> list[DraftEntry]:
    """Return the entry of every tensor of a draft, under full names on both sides."""
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
            _one(f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_norm.weight", "HD")
            for x in norms
        ),
        _one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H", "Q"),
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
        _one(f"self_attention.{name}", f"self_attn.{hf_name}", *shape)
        for name, (hf_name, *shape) in names.items()
    )


def _outside_layers(info: DraftInfo) -> list[DraftEntry]:
    method = info.spec.method
    entries = [_one("fc.weight", "fc.weight", "H", "H2" if method.joins_by_fc else "AH")]
    if method.norms_each_aux_layer:
        names = [f"fc_norm.{i}.weight" for i in range(len(info.aux_layers))]
        entries += [_one(name, name, "H") for name in names]
    elif info.spec.norm_before_fc:
        entries += [_one("input_norm.weight", "input_norm.weight", "AH")]
    if method.learns_mask_hidden:
        entries += [_one("mask_hidden.weight", "mask_hidden", "1", "AH")]
    return entries if method.shares_base_head else [*entries, *HEAD]


def _block_entries(info: DraftInfo) -> list[DraftEntry]:
    """Return the entries of a block draft, whose layers are all alike."""
    names = [
        ("fc.weight", "fc.weight", "H", "AH"),
        ("hidden_norm.weight", "hidden_norm.weight", "H"),
    ]
    entries = [*(_one(*name) for name in names), *(HEAD if info.stores_head else HEAD[:1])]
    if info.spec.markov is not None:
        entries += _markov(info.spec.markov[0])
    if info.spec.confidence_head:
        to = "confidence_head.proj"
        entries.append(_one("confidence.weight", f"{to}.weight", "1", "H+MR"))
        entries.append(_one("confidence.bias", f"{to}.bias", "1"))
    layer = (
        _one("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "H"),
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
        _one("markov.w1.weight", "markov_head.markov_w1.weight", "V", "MR", padded=True),
        _one("markov.w2.weight", "markov_head.markov_w2.weight", "D", "MR", padded=True),
    ]
    projections = {
        "gated": ("gate_proj", "MR", "H+MR"),
        "rnn": ("joint_proj", "MR+MR+MR", "MR+MR+H"),
    }
    if kind in projections:
        name, rows, columns = projections[kind]
        to = f"markov_head.{name}"
        entries.append(_one("markov.projection.weight", f"{to}.weight", rows, columns))
        entries.append(_one("markov.projection.bias", f"{to}.bias", rows))
    return entries
