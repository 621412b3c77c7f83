"""Check a draft's checkpoint: every checksum, all tensors there, every weight a number."""

from __future__ import annotations

from pathlib import Path

from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.errors import UserError, literal
from megatron_eagle.hf.draft.checkpoint import read_entries, read_info
from megatron_eagle.hf.draft.names import PREFIX


def verify_draft(directory: str | Path) -> int:
    """Read everything in the checkpoint ``directory``, optimizer included; return its bytes.

    Raises ``UserError`` naming the file or tensor at fault.
    """
    checkpoint = CheckpointReader.open(directory)
    checkpoint.check_files()
    info = read_info(checkpoint)
    if info.has_names:
        read_entries(checkpoint, info)
    size = 0
    for key, tensor in checkpoint.read_all():
        size += tensor.nbytes
        if key.startswith(PREFIX) and tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{literal(checkpoint.directory)}: {key} holds NaN or infinite values")
    return size
