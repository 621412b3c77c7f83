"""Start an engine's server on loopback, wait until it answers, and end it by its process id."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

import psutil

from benchmarks.serving.engine import Engine

START_SECONDS, POLL_SECONDS = 900.0, 0.25


class Server:
    """A server process of its own session; a context manager that ends it with all its children.

    Args:
        engine: the engine with its setting.
        log: file that gets what the server prints.
    """

    def __init__(self, engine: Engine, log: Path) -> None:
        self.engine, self.log = engine, log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.words = engine.command(port)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.words,
                env=self.engine.environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def cpu_seconds(self) -> float:
        """Return user and system time of the server's processes so far."""
        assert self.process is not None
        parent = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
        return float(sum(t.user + t.system for t in times))

    def _wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{tail}")
            try:
                # SGLang answers after it has decoded a token, and 503 while it starts.
                with urllib.request.urlopen(f"{self.url}/health", timeout=20):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(POLL_SECONDS)
        raise TimeoutError(f"the server did not answer in {START_SECONDS:.0f} s: see {self.log}")

    def _end(self) -> None:
        process = self.process
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)  # it leads the session that it was started in
            except ProcessLookupError:
                break
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
