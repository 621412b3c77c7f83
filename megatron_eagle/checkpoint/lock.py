"""A lock on an output place, so that two runs never write the same one.

It is ``flock`` on a small file that names its holder: the kernel lets go when the process ends,
however it ends. File systems without locks give a warning and no protection.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_eagle.errors import UserError, literal
from megatron_eagle.user_files import reading

logger = logging.getLogger("megatron_eagle")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class OutputLock:
    """The lock ``file`` of an output place, held by this process until ``release``.

    Attributes:
        was_killed: whether the last holder ended without letting go.
    """

    def __init__(self, file: Path, descriptor: int, was_killed: bool) -> None:
        self.file, self._descriptor, self.was_killed = file, descriptor, was_killed

    @classmethod
    def take(cls, file: Path, parameter: str, place: Path) -> OutputLock:
        """Take the lock, or raise ``UserError`` naming ``parameter``, ``place`` and its holder.

        Directories above ``file`` are made. Also raises ``UserError`` where nothing can be written.
        """
        where = f"<{parameter}> {literal(place)}"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            while (lock := cls._attempt(file, where)) is None:
                pass  # its last holder has just deleted the file
        except OSError as error:
            raise UserError(f"{where}: cannot be written: {literal(error.strerror)}") from error
        return lock

    @classmethod
    def _attempt(cls, file: Path, where: str) -> OutputLock | None:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(f"{where}: in use by {holder}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            logger.warning("%s: no locks on this file system: a second run is not noticed", file)
        if not _is_still(file, descriptor):
            os.close(descriptor)
            return None
        was_killed = os.fstat(descriptor).st_size > 0
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(_this_process()).encode())
        return cls(file, descriptor, was_killed)

    def release(self) -> None:
        """Delete the file and let go of the lock."""
        with contextlib.suppress(OSError):
            self.file.unlink()
        os.close(self._descriptor)


@contextlib.contextmanager
def output_lock(place: Path, parameter: str) -> Iterator[bool]:
    """Hold the lock on ``place``, the value of ``parameter``, inside. Its file lies beside it.

    Yields whether the last run that wrote ``place`` was killed, be it after it had finished.
    """
    with reading(parameter, place):
        beside = place.resolve()
        file = beside.with_name(f".{beside.name}.lock")
    lock = OutputLock.take(file, parameter, place)
    try:
        yield lock.was_killed
    finally:
        lock.release()


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv[:2]),
    }


def _holder(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        text = f"process {about['pid']} on {about['host']} since {about['since']}"
    except Exception:  # it is being written at this moment
        text = "another run"
    return literal(text)
