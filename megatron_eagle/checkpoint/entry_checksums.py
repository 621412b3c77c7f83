"""The CRC-32 of every part of an entry that ``torch.save`` wrote into a shard file.

An entry is a zip archive of stored parts. PyTorch writes their checksums and compares none of them
when it reads, so that a flipped bit would become a wrong weight.
"""

from __future__ import annotations

import io
import zipfile
import zlib

_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = 30
"""Bytes of a part's header in front of its name and its extra field, whose lengths end it."""


def entry_fault(content: bytes) -> str | None:
    """Return None if every checksum in the entry ``content`` is right, else what is wrong.

    Anything but a zip archive has no checksums and is left to the unpickler.
    """
    if not content.startswith(_ZIP):
        return None
    view = memoryview(content)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for part in archive.infolist():
                start = _data_start(view, part.header_offset)
                stop = start + part.compress_size
                if stop > len(content) or zlib.crc32(view[start:stop]) != part.CRC:
                    return "a checksum differs"
    except Exception as error:  # a damaged archive fails in many ways
        return f"damaged ({type(error).__name__})"
    return None


def _data_start(view: memoryview, header: int) -> int:
    lengths = header + _LOCAL_HEADER - 4
    name, extra = (int.from_bytes(view[at : at + 2], "little") for at in (lengths, lengths + 2))
    return header + _LOCAL_HEADER + name + extra
