"""Check a base checkpoint against its own description: every checksum, and the fingerprint."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from megatron_eagle.checkpoint.directory import load_base_json
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.errors import UserError, literal


def verify_base(directory: str | Path) -> int:
    """Read the whole base in ``directory`` and return the bytes of its weights.

    The fingerprint in eagle_base.json is the SHA-256 of all weights in the order in which they were
    written. Raises ``UserError`` naming the file that is damaged.
    """
    base, digest, size = load_base_json(directory), hashlib.sha256(), 0
    for _, tensor in CheckpointReader.open(directory).read_all():
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
        size += tensor.nbytes
    if digest.hexdigest() != base.fingerprint:
        raise UserError(
            f"{literal(directory)}: these are not the weights that were imported: their SHA-256 "
            f"begins with {digest.hexdigest()[:16]}, the one in the description with "
            f"{literal(base.fingerprint[:16])}"
        )
    return size
