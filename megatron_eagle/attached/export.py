"""Yield a draft in training under the names of its Hugging Face files, one whole tensor at a time.

D draft vocabulary, V base vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.compat import ShardedTensor, apply_factories, nested_values
from megatron_eagle.hf.draft.export import check_convertible, hf_tensors, vocabulary_maps
from megatron_eagle.hf.draft.formats import Format, check_servers
from megatron_eagle.hf.draft.info import DraftInfo
from megatron_eagle.hf.draft.names import METADATA, VOCAB_IDS, draft_entries
from megatron_eagle.parallel.collectives import all_gather


@torch.no_grad()
def export_tensors(
    module: Any, info: DraftInfo, fmt: Format, dtype: torch.dtype, tp_group: ProcessGroup
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the weights in ``dtype`` and of the vocabulary maps ``d2t`` int64 [D]
    and ``t2d`` bool [V], in the order of the name table, on every tensor-parallel rank.

    ``module`` is the draft's Megatron model. One all-gather over ``tp_group`` per cut tensor, when
    it is reached: all its ranks must read to the end.
    """
    source = "the draft"
    check_convertible(info, source)
    check_servers(fmt, info)
    shards = _shards(module)
    for entry in draft_entries(info, fmt):
        whole = gathered(shards[entry.megatron], tp_group)
        yield from hf_tensors(entry, whole, info, dtype, f"{source}: {entry.megatron}")
        if entry.megatron == "draft.fc.weight" and fmt.name in info.spec.method.zero_fc_bias:
            yield "fc.bias", whole.new_zeros(whole.shape[0], dtype=dtype)
    (ids,) = shards[VOCAB_IDS]
    for name, tensor in vocabulary_maps(ids.data.cpu(), info, f"{source}: {VOCAB_IDS}").items():
        yield name, tensor.to(ids.data.device)


def _shards(module: Any) -> dict[str, list[Any]]:
    """Return this rank's shards of every tensor of the checkpoint, by its key."""
    sharded = module.sharded_state_dict()
    apply_factories(sharded)  # [gate ; up] becomes two shards that share the parameter's memory
    shards: dict[str, list[Any]] = {}
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensor) and value.key != METADATA:
            shards.setdefault(value.key, []).append(value)
    return shards


def gathered(shards: list[Any], group: ProcessGroup) -> Tensor:
    """Return the whole tensor of which this rank holds ``shards``, padding included.

    Ranks of ``group`` hold equal shapes, in their order. One all-gather over it per shard, none for
    a tensor that every rank has whole.
    """
    if len(shards) == 1 and tuple(shards[0].local_shape) == tuple(shards[0].global_shape):
        return shards[0].data
    whole = shards[0].data.new_empty(tuple(shards[0].global_shape))
    for shard in shards:
        for rank, part in enumerate(all_gather(shard.data, group)):
            _place(whole, part, shard, rank - group.rank())
    return whole


def _place(whole: Tensor, part: Tensor, shard: Any, ranks_away: int) -> None:
    """Copy the ``part`` of a rank so many ranks away from this one, whose part is ``shard``."""
    target = whole
    for dim, (start, size) in enumerate(zip(shard.global_offset, shard.local_shape, strict=True)):
        if size != shard.global_shape[dim]:
            start += ranks_away * size
        target = target.narrow(dim, start, size)
    target.copy_(part)
