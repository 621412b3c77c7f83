"""An unpickler for the ``.metadata`` of torch_dist checkpoints that cannot run code.

torch.distributed.checkpoint pickles that file, and an unpickler calls whatever the file names. This
one resolves the classes listed here and refuses all others by name.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import first_line

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


def load_metadata(stream: IO[bytes], source: str) -> metadata.Metadata:
    """Return the content of a ``.metadata`` file, in which no class but those of ``ALLOWED`` is.

    Every place that it names lies in a file beside it. Raises ``UserError``, starting with
    ``source``, otherwise and for a damaged file.
    """
    try:
        content = MetadataUnpickler(stream).load()
        _check(content)
    except ForbiddenClassError as error:
        raise UserError(
            f"{source}: refusing to unpickle {literal(error)}: not a class of checkpoint metadata"
        ) from error
    except UserError as error:
        raise UserError(f"{source}: {error.message}") from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail anywhere, with any type
        raise UserError(
            f"{source}: corrupted checkpoint metadata ({type(error).__name__}: "
            f"{literal(first_line(error))})"
        ) from error
    return content


def _check(content: Any) -> None:
    """Check the parts that torch and ``safe_metadata`` take for granted."""
    if not isinstance(content, metadata.Metadata):
        raise TypeError(f"holds a {type(content).__name__}, not torch DCP Metadata")
    for part in (content.state_dict_metadata, content.storage_data):
        if not isinstance(part, dict):
            raise TypeError(f"holds a {type(part).__name__} instead of a dictionary")
    storage_meta = getattr(content, "storage_meta", None)
    if storage_meta is not None and not isinstance(storage_meta, metadata.StorageMeta):
        raise TypeError(f"holds a {type(storage_meta).__name__} as its storage")
    for info in content.storage_data.values():
        name = info.relative_path
        if Path(name).name != name:
            raise UserError(f"{literal(repr(name))} is not a file name")
        if not (
            type(info.offset) is type(info.length) is int and min(info.offset, info.length) >= 0
        ):
            raise TypeError(f"{name}: bytes {info.offset!r} and {info.length!r} are no place")
