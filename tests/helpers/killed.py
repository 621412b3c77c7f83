"""A command in a process of its own that kills itself at one of its file operations."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_eagle.testing.harness import start_rank, stop_rank

_OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")
COMMAND = Path(__file__).resolve().parents[1] / "e2e" / "command.py"


def run_killed(words: list[str], under: Path, scratch: Path, at: int = 0) -> tuple[int, int, str]:
    """Run ``megatron-eagle`` with ``words``; return exit status, operations and what was printed.

    File operations below ``under`` that create, change or delete something are counted; before the
    ``at``-th one the process kills itself (-9). 0 for none.
    """
    counted, printed = scratch / "operations", scratch / "printed"
    counted.write_text("0")
    process = start_rank(_main, words, str(under), at, str(counted), str(printed))
    try:
        process.join(120)
        assert process.exitcode is not None, f"{words} hangs"
        return process.exitcode, int(counted.read_text() or 0), printed.read_text()
    finally:
        stop_rank(process)


def _main(words: list[str], under: str, at: int, counted: str, printed: str) -> None:
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ[name] = value
    counter = os.open(counted, os.O_WRONLY)
    _kill_at(at, under, counter)
    sys.argv = ["megatron-eagle", *words]
    runpy.run_path(str(COMMAND), run_name="__main__")


def _kill_at(at: int, under: str, counter: int) -> None:
    state = {"count": 0}

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in _OPERATIONS:
            path = args[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike) or under not in os.fsdecode(path):
            return
        state["count"] += 1
        os.pwrite(counter, str(state["count"]).encode(), 0)
        if state["count"] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
