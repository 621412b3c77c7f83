"""Make PyTorch's own reader of checkpoints safe: no code runs, damage is told with its file.

``dist_checkpointing.load``, with which Megatron reads bases and resumes runs, ends in
``torch.distributed.checkpoint``. That unpickles ``.metadata`` and every object that is no tensor
without restrictions, and compares no checksum (torch/distributed/checkpoint/filesystem.py and
default_planner.py of PyTorch 2.13).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from typing import IO, Any

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint._nested_dict import set_element

from megatron_eagle.checkpoint.entry_checksums import entry_fault
from megatron_eagle.checkpoint.safe_unpickler import load_metadata
from megatron_eagle.compat import patch, require
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import first_line

_READER = "torch.distributed.checkpoint.filesystem:FileSystemReader"
_PLANNER = "torch.distributed.checkpoint.default_planner:DefaultLoadPlanner"
_PLACE = "_megatron_eagle_shard"
"""Attribute of a reader with the name of the file that it read last."""
_FORCED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_CLASS = re.compile(r"\b(?:GLOBAL|class|function) ([\w.]+)")


def read_checkpoints_safely() -> None:
    """Replace the functions of PyTorch's reader that trust a file; twice is the same as once.

    Also drop the environment variable that makes ``torch.load`` unpickle anything: Megatron relies
    on PyTorch's default for files of its older formats.
    """
    os.environ.pop(_FORCED, None)
    patch(f"{_READER}.read_metadata", _read_metadata, "unpickle metadata by an allow-list")
    patch(f"{_PLANNER}.load_bytes", _load_bytes, "unpickle objects with weights_only")
    slice_file = require(f"{_READER}._slice_file")
    patch(f"{_READER}._slice_file", _checked_slice(slice_file), "compare checksums of shards")
    read_data = require(f"{_READER}.read_data")
    patch(f"{_READER}.read_data", _named_errors(read_data), "name the shard that is damaged")


def _read_metadata(self: Any, *args: Any, **kwargs: Any) -> metadata.Metadata:
    path = self._get_metadata_path(kwargs.get("rank"))
    with self.fs.create_stream(path, "rb") as stream:
        content = load_metadata(stream, literal(path))
    storage = getattr(content, "storage_meta", None) or metadata.StorageMeta()
    storage.load_id = self.load_id
    content.storage_meta = storage
    return content


def _load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
    name = read_item.dest_index.fqn
    loaded = load_object(value, name)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


def load_object(stream: IO[bytes], name: str) -> Any:
    """Unpickle the object ``name`` of a checkpoint: plain values, tensors and Megatron's own
    classes of options and states. Raises ``UserError`` for any other class, naming it."""
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and tensor decoding each fail in their own way
        named = _CLASS.search(str(error))
        why = (
            f"refusing to unpickle {named[1]}: not a class of checkpoints"
            if named
            else f"cannot be decoded: {first_line(error)}"
        )
        raise UserError(f"{literal(name)}: {literal(why)}") from error


def _checked_slice(slice_file: Callable[..., IO[bytes]]) -> Callable[..., IO[bytes]]:
    def checked(self: Any, file: IO[bytes], info: Any) -> IO[bytes]:
        path = literal(getattr(file, "name", "a shard file"))
        setattr(self, _PLACE, path)
        size, needed = file.seek(0, io.SEEK_END), info.offset + info.length
        if size < needed:
            raise UserError(f"{path}: shard file is truncated: {size} bytes, {needed} expected")
        content = slice_file(self, file, info).read()
        if fault := entry_fault(content):
            raise UserError(f"{path}: corrupted shard: bytes {info.offset} to {needed}: {fault}")
        return io.BytesIO(content)

    return checked


def _named_errors(read_data: Callable[..., Any]) -> Callable[..., Any]:
    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return read_data(self, *args, **kwargs)
        except (OSError, UserError) as error:
            if isinstance(error, OSError) or getattr(self, _PLACE, "") in error.message:
                raise
            raise UserError(f"{getattr(self, _PLACE)}: {error.message}") from error
        except Exception as error:  # zip, pickle and tensor decoding each fail in their own way
            place = getattr(self, _PLACE, literal(self.path))
            raise UserError(
                f"{place}: corrupted shard: cannot be decoded ({literal(first_line(error))})"
            ) from error

    return named
