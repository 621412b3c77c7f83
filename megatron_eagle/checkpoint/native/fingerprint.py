"""Identify the weights of a checkpoint by the first bytes of each tensor, whatever its layout.

Reading all weights of a large model would take minutes on every rank. Whatever trains or merges a
model changes the first numbers of some tensor.
"""

from __future__ import annotations

import hashlib
import io
import zipfile

from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.errors import UserError, literal

SAMPLE = 64
"""Bytes of a tensor, of its first row on any layout in use."""
MODEL = ("embedding.", "decoder.", "output_layer.")


def fingerprint(checkpoint: CheckpointReader) -> str:
    """Return the SHA-256 of names, shapes and first bytes of the model's tensors."""
    digest = hashlib.sha256()
    names = checkpoint.keys()
    for key in names:
        if key.startswith(MODEL):
            digest.update(f"{key} {checkpoint.shape(key)} ".encode())
            digest.update(first_bytes(checkpoint, key))
    return digest.hexdigest()


def first_bytes(checkpoint: CheckpointReader, key: str) -> bytes:
    """Return the first ``SAMPLE`` bytes of a tensor, fewer if its first block has fewer."""
    chunk = checkpoint.first_chunk(key)
    path = checkpoint.directory / chunk.file
    try:
        with path.open("rb") as stream:
            window = _Window(stream, chunk.start, chunk.length)
            with zipfile.ZipFile(io.BufferedReader(window)) as archive:
                (name,) = (n for n in archive.namelist() if n.endswith("/data/0"))
                with archive.open(name) as data:
                    return data.read(SAMPLE)
    except OSError as error:
        raise UserError(f"{literal(path)}: {literal(error.strerror)}") from error
    except (zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{literal(path)}: corrupted shard: {key} cannot be decoded") from error


class _Window(io.RawIOBase):
    """The bytes ``[start, start + length)`` of an open file as a file of their own."""

    def __init__(self, stream: io.BufferedReader, start: int, length: int) -> None:
        super().__init__()
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        count = max(0, min(len(view), self._length - self._at))
        self._stream.seek(self._start + self._at)
        data = self._stream.read(count)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)
