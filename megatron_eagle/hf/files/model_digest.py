"""A digest that tells two Hugging Face model directories apart without reading every byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

READ_WHOLE = 64 << 20
ENDS = 1 << 20
_KINDS = (".safetensors", ".json", ".jinja", ".model", ".txt")


def model_digest(directory: Path) -> str:
    """Return the SHA-256 of the names and sizes of a model's files, and of their contents: of files
    above 64 MiB only the first and the last MiB."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.suffix not in _KINDS or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            if size <= READ_WHOLE:
                digest.update(content.read())
            else:
                digest.update(content.read(ENDS))
                content.seek(size - ENDS)
                digest.update(content.read())
    return digest.hexdigest()
