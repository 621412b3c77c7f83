"""The tensors that the ``.metadata`` file of a torch_dist checkpoint describes, read safely."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint import filesystem, metadata

from megatron_eagle.checkpoint.safe_unpickler import load_metadata
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import first_line


@dataclass(frozen=True)
class StoredChunk:
    """Block of a tensor, and the bytes ``[start, start + length)`` of ``file`` that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    def overlaps(self, other: StoredChunk) -> bool:
        """Tell whether both cover an element of the tensor."""
        spans = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        return all(a < b + m and b < a + n for a, n, b, m in spans)


@dataclass(frozen=True)
class StoredTensor:
    """Global shape and dtype of a tensor, and its chunks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]

    def tiling_fault(self) -> str | None:
        """Return None if the chunks cover the shape exactly once, else what is wrong."""
        for chunk in self.chunks:
            ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            if min(chunk.offsets, default=0) < 0 or any(
                end > limit for end, limit in zip(ends, self.shape, strict=True)
            ):
                return f"the chunk at {chunk.offsets} leaves the shape {self.shape}"
        for i, chunk in enumerate(self.chunks):
            if any(chunk.overlaps(other) for other in self.chunks[:i]):
                return f"chunks overlap at {chunk.offsets}"
        covered = sum(prod(chunk.sizes) for chunk in self.chunks)
        if covered != prod(self.shape):
            return f"chunks hold {covered} of {prod(self.shape)} elements"
        return None


def read_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, StoredChunk]]:
    """Read the tensors of a ``.metadata`` file, and the places of its other objects, by key.

    Raises ``UserError`` naming the file when it cannot be parsed or names a class that checkpoint
    metadata have no use for.
    """
    with path.open("rb") as stream:
        content = load_metadata(stream, literal(path))
    try:
        return _tensor_records(content), _object_places(content)
    except Exception as error:  # fields of any type, where torch writes one
        raise UserError(
            f"{literal(path)}: corrupted checkpoint metadata ({type(error).__name__}: "
            f"{literal(first_line(error))})"
        ) from error


def _tensor_records(content: metadata.Metadata) -> dict[str, StoredTensor]:
    places = {
        (index.fqn, tuple(index.offset or ())): info for index, info in content.storage_data.items()
    }
    return {
        key: StoredTensor(
            shape=tuple(stored.size),
            dtype=stored.properties.dtype,
            chunks=tuple(
                _chunk(block, places[key, tuple(block.offsets)])
                for block in stored.chunks
                if (key, tuple(block.offsets)) in places
            ),
        )
        for key, stored in content.state_dict_metadata.items()
        if isinstance(stored, metadata.TensorStorageMetadata)
    }


def _object_places(content: metadata.Metadata) -> dict[str, StoredChunk]:
    return {
        index.fqn: StoredChunk((), (), info.relative_path, info.offset, info.length)
        for index, info in content.storage_data.items()
        if isinstance(content.state_dict_metadata.get(index.fqn), metadata.BytesStorageMetadata)
    }


def _chunk(block: metadata.ChunkStorageMetadata, info: filesystem._StorageInfo) -> StoredChunk:
    if info.transform_descriptors:
        raise TypeError(f"stream transforms {info.transform_descriptors} are not supported")
    return StoredChunk(
        offsets=tuple(block.offsets),
        sizes=tuple(block.sizes),
        file=info.relative_path,
        start=info.offset,
        length=info.length,
    )
