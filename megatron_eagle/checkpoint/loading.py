"""The one door to ``dist_checkpointing.load``: no file runs code, and every error is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException

from megatron_eagle.checkpoint.safe_reading import read_checkpoints_safely
from megatron_eagle.compat import dist_checkpointing
from megatron_eagle.errors import UserError, literal, message_of
from megatron_eagle.user_files import first_line


def load_sharded(state: dict[str, Any], directory: Path, source: str, **options: Any) -> Any:
    """Load the sharded state dict ``state`` from the ``torch_dist`` directory, in any layout.

    A collective of all ranks. ``options`` are those of Megatron's ``load``. Raises ``UserError``,
    starting with ``source``, whatever fails.
    """
    read_checkpoints_safely()
    try:
        return dist_checkpointing.load(state, str(directory), **options)
    except (Exception, CheckpointException) as error:  # readers fail in many ways
        raise UserError(f"{source}: cannot be loaded: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Return one line on why a load failed, for a message of ``UserError``: the first rank's own
    words, since torch's CheckpointException (no Exception) only lists the ranks."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, UserError):
        return message_of(error)
    return literal(first_line(error) or type(error).__name__)
