"""Check a base that Megatron saved: nothing missing, nothing damaged, and a model that is known."""

from __future__ import annotations

from pathlib import Path

from megatron_eagle.checkpoint.base_description import read_base
from megatron_eagle.checkpoint.native.describe import EMBEDDING
from megatron_eagle.checkpoint.native.fingerprint import MODEL
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.errors import UserError, literal


def is_base(directory: str | Path) -> bool:
    """Return whether the checkpoint in ``directory`` is of a model, not of a draft."""
    keys = CheckpointReader.open(directory).keys()
    return EMBEDDING in keys


def verify_native_base(directory: str | Path) -> str:
    """Read everything in the checkpoint, optimizer included, compare every checksum, and return a
    line that says what it holds.

    Raises ``UserError`` naming the file or tensor at fault, and for a model that is no base.
    """
    checkpoint = CheckpointReader.open(directory)
    checkpoint.check_files()
    base, size = read_base(directory), 0
    for key, tensor in checkpoint.read_all():
        if not key.startswith(MODEL):
            continue
        size += tensor.nbytes
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{literal(checkpoint.directory)}: {key} holds NaN or infinite values")
    args = base.megatron_args
    return (
        f"a base ({base.source or base.family}), {args['num_layers']} layers of width "
        f"{args['hidden_size']}, {size / 2**30:.2f} GiB of weights, all checksums are right"
    )
