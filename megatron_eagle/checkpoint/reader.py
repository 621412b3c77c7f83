"""Read whole tensors of a Megatron ``torch_dist`` checkpoint in one process, without a group.

The tensors are unsharded, whatever layout wrote them. Nothing in the files can run code: metadata
is unpickled with the allow-list of ``safe_unpickler.py``, tensors with ``weights_only=True``.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.directory import checkpoint_directory
from megatron_eagle.checkpoint.entry_checksums import entry_fault
from megatron_eagle.checkpoint.native.formats import refused_backend
from megatron_eagle.checkpoint.safe_metadata import StoredChunk, StoredTensor, read_metadata
from megatron_eagle.checkpoint.safe_reading import load_object
from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import read_json, reading_file


def _check_backend(path: Path) -> None:
    """Raise ``UserError`` unless metadata.json ``path`` says that the format is ``torch_dist``."""
    if not path.is_file():
        raise UserError(f"{literal(path)}: missing, so this is not a whole Megatron checkpoint")
    content = read_json(path)
    backend = content.get("sharded_backend") if isinstance(content, dict) else None
    if backend is None:
        raise UserError(f"{literal(path)}: not Megatron's description of a checkpoint")
    if backend != "torch_dist":
        raise refused_backend(path, backend)


class CheckpointReader:
    """One iteration of a checkpoint, of a draft or a base.

    Every error is a ``UserError`` naming the file at fault.
    """

    def __init__(
        self,
        directory: Path,
        tensors: dict[str, StoredTensor],
        objects: dict[str, StoredChunk] | None = None,
    ) -> None:
        self.directory = directory
        self._tensors, self._objects = tensors, objects or {}

    @classmethod
    def open(cls, path: str | Path) -> CheckpointReader:
        """Open the latest iteration in the save directory ``path``, or an ``iter_`` directory."""
        with reading_file(path):
            directory = checkpoint_directory(path)
            _check_backend(directory / "metadata.json")
            return cls(directory, *read_metadata(directory / ".metadata"))

    def keys(self) -> list[str]:
        """Return the keys of the tensors, sorted; pickled objects (RNG states) have none here."""
        return sorted(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the global shape."""
        return self._record(key).shape

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors, unsharded, on the CPU, in the dtype saved.

        Memory: the tensors and one chunk. Raises ``UserError`` for an unknown key, chunks that do
        not tile the global shape, a missing or truncated shard file, and a payload that is not the
        tensor that the metadata describes.
        """
        by_file: dict[str, list[tuple[str, StoredChunk]]] = {}
        for key in dict.fromkeys(keys):
            for chunk in self._checked_chunks(key):
                by_file.setdefault(chunk.file, []).append((key, chunk))
        for name, wanted in by_file.items():
            self._check_file(name, wanted)
        result = {
            key: torch.empty(self._record(key).shape, dtype=self._record(key).dtype)
            for key in dict.fromkeys(keys)
        }
        for name, wanted in by_file.items():
            with (self.directory / name).open("rb") as stream:
                for key, chunk in sorted(wanted, key=lambda item: item[1].start):
                    region = tuple(
                        slice(offset, offset + size)
                        for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)
                    )
                    result[key][region] = self._read(stream, key, chunk)
        return result

    def has_object(self, key: str) -> bool:
        """Tell whether there is an object ``key``, which is no tensor."""
        return key in self._objects

    def load_object(self, key: str) -> Any:
        """Read the object ``key``, such as Megatron's common state, with ``weights_only``.

        Raises what ``load`` raises.
        """
        if key not in self._objects:
            raise UserError(f"{self.directory}: no object {key!r} in this checkpoint")
        place = self._objects[key]
        self._check_file(place.file, [(key, place)])
        path = self.directory / place.file
        with reading_file(path), path.open("rb") as stream:
            content = self._entry(stream, key, place)
            return load_object(io.BytesIO(content), f"{path}: {key}")

    def check_files(self) -> None:
        """Raise ``UserError`` naming the first shard file that is missing or too short for what
        the metadata place in it."""
        wanted: dict[str, list[tuple[str, StoredChunk]]] = {}
        for key, record in self._tensors.items():
            for chunk in record.chunks:
                wanted.setdefault(chunk.file, []).append((key, chunk))
        for key, place in self._objects.items():
            wanted.setdefault(place.file, []).append((key, place))
        for name in sorted(wanted):
            self._check_file(name, wanted[name])

    def read_all(self) -> Iterator[tuple[str, Tensor]]:
        """Read everything, file by file: yield every chunk of a tensor, in the order in which they
        were written, and check the objects between them.

        Raises what ``load`` raises.
        """
        by_file: dict[str, list[tuple[str, StoredChunk]]] = {}
        for key in self.keys():
            for chunk in self._checked_chunks(key):
                by_file.setdefault(chunk.file, []).append((key, chunk))
        for key, place in self._objects.items():
            by_file.setdefault(place.file, []).append((key, place))
        for name, wanted in sorted(by_file.items()):
            self._check_file(name, wanted)
            with (self.directory / name).open("rb") as stream:
                for key, chunk in sorted(wanted, key=lambda item: item[1].start):
                    if key in self._tensors:
                        yield key, self._read(stream, key, chunk)
                    else:
                        self._entry(stream, key, chunk)

    def load_rows(self, key: str, rows: Sequence[int]) -> Tensor:
        """Read the ascending ``rows`` of a tensor's leading axis, in the dtype saved.

        Only chunks that hold one of them are read. Memory: the result and one chunk. Raises what
        ``load`` raises.
        """
        record, wanted = self._record(key), torch.tensor(rows)
        if not 0 <= rows[0] <= rows[-1] < record.shape[0]:
            raise UserError(f"{self.directory}: {key} has {record.shape[0]} rows, not {rows[-1]}")
        result = torch.empty((len(rows), *record.shape[1:]), dtype=record.dtype)
        for chunk in self._checked_chunks(key):
            first, count = chunk.offsets[0], chunk.sizes[0]
            inside = ((wanted >= first) & (wanted < first + count)).nonzero().flatten()
            if not len(inside):
                continue
            self._check_file(chunk.file, [(key, chunk)])
            with (self.directory / chunk.file).open("rb") as stream:
                part = self._read(stream, key, chunk)
            region = tuple(
                slice(offset, offset + size)
                for offset, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
            )
            target = slice(int(inside[0]), int(inside[-1]) + 1)
            result[(target, *region)] = part[wanted[inside] - first]
        return result

    def first_rows(self, key: str) -> Tensor:
        """Read the chunk of ``key`` that begins at row 0 and has all columns.

        Raises what ``load`` raises, and ``UserError`` if columns are cut.
        """
        shape = self._record(key).shape
        for chunk in self._checked_chunks(key):
            if not any(chunk.offsets) and chunk.sizes[1:] == tuple(shape[1:]):
                self._check_file(chunk.file, [(key, chunk)])
                with (self.directory / chunk.file).open("rb") as stream:
                    return self._read(stream, key, chunk)
        raise UserError(f"{self.directory}: {key} is not stored in blocks of rows")

    def first_chunk(self, key: str) -> StoredChunk:
        """Return the block of ``key`` at offset 0, whose file holds it. Raises what ``load``
        raises."""
        chunk = next(c for c in self._checked_chunks(key) if not any(c.offsets))
        self._check_file(chunk.file, [(key, chunk)])
        return chunk

    def _record(self, key: str) -> StoredTensor:
        if key not in self._tensors:
            raise UserError(f"{self.directory}: no tensor {key!r} in this checkpoint")
        return self._tensors[key]

    def _checked_chunks(self, key: str) -> tuple[StoredChunk, ...]:
        """Return the chunks of a tensor, which tile its shape and can lie in their bytes."""
        record = self._record(key)
        with reading_file(self.directory / ".metadata"):
            fault = record.tiling_fault()
        if fault:
            raise UserError(f"{self.directory}: incomplete checkpoint: {key}: {fault}")
        for chunk in record.chunks:
            # Before memory of the announced size is asked for.
            if prod(chunk.sizes) * record.dtype.itemsize > chunk.length or chunk.start < 0:
                raise UserError(
                    f"{self.directory / '.metadata'}: corrupted checkpoint metadata: {key} "
                    f"{chunk.sizes} cannot lie in {chunk.length} bytes"
                )
        return record.chunks

    def _check_file(self, name: str, wanted: list[tuple[str, StoredChunk]]) -> None:
        path = self.directory / name
        if not path.is_file():
            raise UserError(f"{path}: shard file is missing (it holds {wanted[0][0]})")
        size, needed = path.stat().st_size, max(c.start + c.length for _, c in wanted)
        if size < needed:
            raise UserError(f"{path}: shard file is truncated: {size} bytes, {needed} expected")

    def _read(self, stream: IO[bytes], key: str, chunk: StoredChunk) -> Tensor:
        path = self.directory / chunk.file
        content = self._entry(stream, key, chunk)
        try:
            value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and tensor decoding each fail in their own way
            raise UserError(f"{path}: corrupted shard: {key} cannot be decoded") from error
        record = self._record(key)
        if not isinstance(value, Tensor) or value.dtype != record.dtype:
            raise UserError(f"{path}: corrupted shard: {key} is not a {record.dtype} tensor")
        if tuple(value.shape) != chunk.sizes:
            raise UserError(
                f"{path}: corrupted shard: {key} is {tuple(value.shape)}, not {chunk.sizes}"
            )
        return value

    def _entry(self, stream: IO[bytes], key: str, place: StoredChunk) -> bytes:
        """Read the bytes of an entry, whose checksums are right."""
        stream.seek(place.start)
        content = stream.read(place.length)
        if fault := entry_fault(content):
            raise UserError(
                f"{self.directory / place.file}: corrupted shard: {key} cannot be decoded: {fault}"
            )
        return content
