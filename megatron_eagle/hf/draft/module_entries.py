"""The name table of a draft that is its base's own next-token module, made of the base's tables.

Its layer has the base's names, the tensors around it those that ``hf/base/module_names.py`` gives
to the family. Shapes: H hidden, H2 = 2H, E experts; the others as in ``hf/tables/entries.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_eagle.errors import UserError
from megatron_eagle.hf.base.delta_net_tables import join_gated_groups, split_gated_groups
from megatron_eagle.hf.base.families import FAMILIES, Family
from megatron_eagle.hf.base.megatron_args import facts_of
from megatron_eagle.hf.base.module_names import DEEPSEEK, ModuleNames
from megatron_eagle.hf.draft.entry import (
    DraftEntry,
    Join,
    Split,
    one_entry,
    split_query_groups,
    split_rows,
)
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.tables.entries import (
    Dims,
    Entry,
    Source,
    join_query_groups,
    join_rows,
)

SPLITS: dict[Join, Split] = {
    join_rows: split_rows,
    join_query_groups: split_query_groups,
    join_gated_groups: split_gated_groups,
}
"""How to undo the joins of the tables of bases that have next-token modules."""


def family_of_base(info: DraftInfo) -> Family:
    """Return the family of the draft's base; raise ``UserError`` for one that Megatron trained."""
    for family in FAMILIES.values():
        if family.name == info.base.family:
            return family
    raise UserError(
        f"<algorithm> {info.spec.algorithm}: the base is {info.base.family}, and the names of a "
        "next-token module are those of a family that import-base knows"
    )


def names_of_module(info: DraftInfo) -> ModuleNames | None:
    """Return the names of the module in the base's files; None for a family without modules."""
    return family_of_base(info).module


def module_prefix(info: DraftInfo) -> str:
    """Return the prefix of the module's tensors in the base's files."""
    names = names_of_module(info) or DEEPSEEK
    return names.prefixes(info.base.megatron_args["num_layers"], 1)[0]


def module_entries(info: DraftInfo) -> list[DraftEntry]:
    """Return the entry of every tensor of the module, by the names inside a draft's checkpoint and
    the full names in the base's files. A family without modules gets DeepSeek's names."""
    family = family_of_base(info)
    names = family.module or DEEPSEEK
    facts = facts_of(info.base.hf_config, family, f"base {info.base.name}")
    prefix = module_prefix(info)
    entries = [
        one_entry("embedding_norm.weight", names.embedding_norm, "H"),
        one_entry("hidden_norm.weight", names.hidden_norm, "H"),
        _joining(names),
        one_entry("norm.weight", names.final_norm, "H"),
    ]
    layer = [
        _layer_entry(entry, info.dims)
        for entry in family.in_layer(facts, moe=info.spec.num_experts is not None)
    ]
    return [entry.named("draft.", prefix) for entry in entries] + [
        entry.named("draft.layers.0.", prefix + names.layer) for entry in layer
    ]


def _joining(names: ModuleNames) -> DraftEntry:
    """Return the entry of ``fc``, which reads [embedding ; hidden]."""
    entry = one_entry("fc.weight", names.joining, "H", "H2")
    if not names.hidden_first:
        return entry
    return replace(entry, split=_swap_halves, join=_swapped)


def _swap_halves(tensor: Tensor, sources: Sequence[Source], dims: Dims) -> list[Tensor]:
    return [_swapped([tensor], dims)]


def _swapped(parts: Sequence[Tensor], dims: Dims) -> Tensor:
    return torch.cat(parts[0].chunk(2, dim=1)[::-1], dim=1)


def _layer_entry(entry: Entry, dims: Dims) -> DraftEntry:
    """Return the entry of a tensor of the layer, whose join can be undone."""
    split = SPLITS[entry.join]
    if not entry.per_expert:
        return DraftEntry(entry.megatron, entry.shape, entry.sources, split, entry.join)
    per_expert, experts = len(entry.sources), range(dims["E"])
    sources = tuple(
        replace(source, name=source.name.format(expert))
        for expert in experts
        for source in entry.sources
    )

    def split_experts(tensor: Tensor, parts: Sequence[Source], dims: Dims) -> list[Tensor]:
        return [part for one in tensor for part in split(one, entry.sources, dims)]

    def join_experts(parts: Sequence[Tensor], dims: Dims) -> Tensor:
        starts = range(0, len(parts), per_expert)
        return torch.stack([entry.join(parts[i : i + per_expert], dims) for i in starts])

    return DraftEntry(entry.megatron, ("E", *entry.shape), sources, split_experts, join_experts)
