"""Read the ``.metadata`` file of a torch_dist checkpoint without trusting it.

torch.distributed.checkpoint pickles that file. An unpickler calls whatever the file names, so this
one resolves only the classes listed here and refuses all others by name.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_eagle.errors import UserError

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")


class Inert:
    """Stand-in for bookkeeping classes whose content is not read."""


class ForbiddenClassError(Exception):
    """Raised for a pickle that names something outside ``ALLOWED``."""


ALLOWED: dict[tuple[str, str], Any] = {
    ("torch.distributed.checkpoint.metadata", "Metadata"): metadata.Metadata,
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"): metadata.MetadataIndex,
    ("torch.distributed.checkpoint.metadata", "StorageMeta"): metadata.StorageMeta,
    ("torch.distributed.checkpoint.metadata", "TensorProperties"): metadata.TensorProperties,
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): (
        metadata.TensorStorageMetadata
    ),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"): (
        metadata.BytesStorageMetadata
    ),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"): (
        metadata.ChunkStorageMetadata
    ),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): (
        metadata._MEM_FORMAT_ENCODING
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): filesystem._StoragePrefix,
    # Megatron appends every rank's save plan to the metadata.
    ("torch.distributed.checkpoint.planner", "SavePlan"): planner.SavePlan,
    ("torch.distributed.checkpoint.planner", "WriteItem"): planner.WriteItem,
    ("torch.distributed.checkpoint.planner", "WriteItemType"): planner.WriteItemType,
    ("torch.distributed.checkpoint.planner", "TensorWriteData"): planner.TensorWriteData,
    ("torch.distributed.checkpoint.planner", "BytesIOWriteData"): planner.BytesIOWriteData,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Inert,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): Inert,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    # The path the checkpoint was saved to, when the writer was given a Path: kept as its parts.
    ("pathlib", "PosixPath"): lambda *parts: parts,
    ("pathlib._local", "PosixPath"): lambda *parts: parts,
    **{("torch", name): getattr(torch, name) for name in FLOATS + INTEGERS},
}


class MetadataUnpickler(pickle.Unpickler):
    """Unpickler that resolves the names in ``ALLOWED`` only."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise ForbiddenClassError(f"{module}.{name}") from None


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


def read_metadata(path: Path) -> dict[str, StoredTensor]:
    """Read the tensors of a ``.metadata`` file by key; other entries are left out.

    Raises ``UserError`` naming the file when it cannot be parsed or names a class outside
    ``ALLOWED``.
    """
    try:
        with path.open("rb") as stream:
            return _tensor_records(stream)
    except ForbiddenClassError as error:
        raise UserError(
            f"{path}: refusing to unpickle {error}: not a class of checkpoint metadata"
        ) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail anywhere, with any type
        raise UserError(
            f"{path}: corrupted checkpoint metadata ({type(error).__name__}: {error})"
        ) from error


def _tensor_records(stream: IO[bytes]) -> dict[str, StoredTensor]:
    content = MetadataUnpickler(stream).load()
    if not isinstance(content, metadata.Metadata):
        raise TypeError(f"holds a {type(content).__name__}, not torch DCP Metadata")
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
