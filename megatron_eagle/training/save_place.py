"""The directory of ``--save``: one run has it, it can be written, and the disk has room for it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.atomic import delete_scratch
from megatron_eagle.checkpoint.lock import OutputLock
from megatron_eagle.user_files import reading

logger = logging.getLogger("megatron_eagle")
LOCK_NAME = ".lock"
BYTES_PER_PARAMETER = 16
"""Of a checkpoint: the weight, its fp32 master and Adam's two moments, none of them rounded."""


@contextmanager
def own_save(args: Any) -> Iterator[None]:
    """Hold the lock on ``--save`` inside, on the first rank; the other ranks do nothing.

    Raises ``UserError`` naming ``<save>`` and the holder if another run has it, or if the directory
    cannot be made or written.
    """
    if args.save is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    with reading("save", args.save):
        directory = Path(args.save).resolve()
    lock = OutputLock.take(directory / LOCK_NAME, "save", Path(args.save))
    try:
        delete_scratch(directory)
        yield
    finally:
        lock.release()


def warn_if_disk_is_small(save: str | None, parameters: int) -> None:
    """Warn if the disk under ``save`` has no room for one checkpoint of ``parameters`` weights."""
    if save is None or os.environ.get("RANK", "0") != "0":
        return
    needed, free = parameters * BYTES_PER_PARAMETER, shutil.disk_usage(save).free
    if needed > free:
        logger.warning(
            "--save %s: a checkpoint takes about %.2f GiB, the disk has %.2f GiB free",
            save,
            needed / 2**30,
            free / 2**30,
        )
