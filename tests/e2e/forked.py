"""``torchrun`` without its start: ranks forked from a process that has imported Megatron already.

A launch of two ranks takes a second where ``torchrun`` takes ten, most of it imports. It does to
them what ``torchrun`` does: the variables that tell a rank who it is, one output, and when a rank
fails the others are stopped and the whole fails with 1. They cannot compile: see
``RANK_ENVIRONMENT`` in megatron_eagle/testing/harness.py.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_eagle.testing.harness import start_rank, stop_rank


def run_forked(
    script: Path, ranks: int, words: Sequence[str], environment: Mapping[str, str], timeout: float
) -> tuple[int, str]:
    """Run ``script`` with the arguments ``words`` on ``ranks`` processes: the exit status, and
    everything they printed. ``TimeoutError`` says what was printed until then."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stop:
        output = Path(scratch) / "output"
        shared = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        running: dict[int, BaseProcess] = {}
        for rank in range(ranks):
            own = {**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = start_rank(_rank_main, str(script), words, own, str(output), os.getcwd())
            stop.callback(stop_rank, process)
            running[process.sentinel] = process
        failed = _wait(running, time.monotonic() + timeout)
        stop.close()
        printed = output.read_text()
    if failed is None:
        raise TimeoutError(f"{script.name} on {ranks} ranks ran over {timeout:g} s\n{printed}")
    return int(failed), printed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(running: dict[int, BaseProcess], deadline: float) -> bool | None:
    """Whether a rank failed, as soon as one did or all have ended; ``None`` at the deadline."""
    while running:
        ready = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        for sentinel in ready:
            assert isinstance(sentinel, int)
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                return True
    return False


def _rank_main(
    script: str, words: Sequence[str], environment: dict[str, str], output: str, folder: str
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(printed, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
