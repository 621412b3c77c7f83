"""Session: the one time limit of `make test-servers`, and the engines' processes within it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = float(os.environ.get("SERVERS_SECONDS", "900"))


class Session:
    """All tests of the engines together, which have ``seconds`` from its start.

    What does not fit fails by its name: a test that has not begun, and each job of an engine that
    was ended.

    Attributes:
        end: when the time is over, on ``time.monotonic``, which is one clock for all processes.
        spent: stage -> seconds that it took.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds
        self.spent: dict[str, float] = {}

    @property
    def over(self) -> str:
        """What to say of something that the time did not suffice for; empty while there is some."""
        if time.monotonic() < self.end:
            return ""
        return f"the {self.seconds:g} seconds of `make test-servers` (SERVERS_SECONDS) are over"

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - start

    def serve(
        self, environment: Path, worker: str, folder: Path, jobs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Run jobs by a worker of this folder in an engine's environment, in a process of its own:
        a result for each, or {"error": why there is none}."""
        (folder / "jobs.json").write_text(json.dumps(jobs))
        words = [
            str(environment / "bin" / "python"),
            str(Path(__file__).parent / worker),
            str(folder / "jobs.json"),
            str(folder / "results.json"),
        ]
        log = folder / "log.txt"
        with self.stage(worker), log.open("wb") as output:
            process = subprocess.Popen(
                words, cwd=folder, env=_environment(), stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            code = self._ended(process)
        results = folder / "results.json"
        done = list(json.loads(results.read_text())) if results.exists() else []
        said = log.read_text(errors="replace")[-4000:]
        reason = self.over if code is None else f"{worker} ended with {code}:\n{said}"
        return done + [{"error": reason}] * (len(jobs) - len(done))

    def _ended(self, process: subprocess.Popen[bytes]) -> int | None:
        """The exit status, or None if the time was over first; the process and its children are
        gone."""
        try:
            return process.wait(timeout=max(0.0, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it leads the session that it started in
            process.wait()


def _environment() -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",  # threads that wait for each other on a busy core take long
        "CUDA_VISIBLE_DEVICES": "",
    }
