"""Write a Megatron ``torch_dist`` checkpoint in one process, one tensor in memory at a time.

torch.distributed.checkpoint asks its planner for the data of a write item just before writing it;
this planner then calls the item's ``load``. Neither a process group nor a GPU is needed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

# Key under which Megatron (dist_checkpointing.save) stores everything that is not a tensor.
COMMON_STATE = "common_state/shard_0_1"


@dataclass(frozen=True)
class Chunk:
    """Block [offset, offset + shape) of global tensor ``key``; ``load`` returns it, [*shape]."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


class _LazyPlanner(dcp.DefaultSavePlanner):
    """Save planner that plans chunks and objects instead of a state dict."""

    def __init__(self, chunks: Iterable[Chunk], objects: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {MetadataIndex(chunk.key, chunk.offset): chunk for chunk in chunks}
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        for index, chunk in self._chunks.items():
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)),
                properties=TensorProperties(dtype=chunk.dtype),
                size=torch.Size(chunk.global_shape),
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index.fqn in self._objects:
            return [self._objects[index.fqn]]
        chunk = self._chunks[index]
        tensor = chunk.load()
        assert tuple(tensor.shape) == chunk.shape and tensor.dtype == chunk.dtype, chunk.key
        return tensor.contiguous()


def write_torch_dist(
    path: Path, chunks: Iterable[Chunk], common: dict[str, Any], objects: Mapping[str, Any]
) -> None:
    """Write ``chunks``, which must tile their global tensors, in order, into directory ``path``.

    ``common`` is Megatron's common state and ``objects`` maps ShardedObject keys to values (plain
    values only, both). Peak memory is the largest chunk. Raises ``OSError`` when writing fails, and
    whatever a chunk's ``load`` raises.
    """
    objects = {COMMON_STATE: common, **objects}
    path.mkdir(parents=True, exist_ok=True)
    writer = dcp.FileSystemWriter(path, single_file_per_rank=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.save({}, storage_writer=writer, planner=_LazyPlanner(chunks, objects), no_dist=True)
        except dcp.CheckpointException as error:
            # DCP's own message is a traceback; one process has one failure.
            ((cause, _),) = error.failures.values()
            raise cause from None
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (path / "metadata.json").write_text(json.dumps(config), encoding="utf-8")
