"""Start vLLM's OpenAI server on loopback, wait until it answers, and end it by its process id."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

NAME = "base"
START_SECONDS = 900.0


class Server:
    """A server process of its own session; a context manager that ends it with all its children.

    Args:
        python: interpreter of the engine's environment.
        base: Hugging Face directory of the base.
        speculative: vLLM's speculative configuration; None serves the base alone.
        device: ``cpu`` or ``cuda``.
        dtype: of weights and activations.
        requests: how many are decoded together at most.
        log: file that gets what the server prints.
    """

    def __init__(
        self,
        *,
        python: Path,
        base: Path,
        speculative: dict[str, Any] | None,
        device: str,
        dtype: str,
        requests: int,
        log: Path,
    ) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        words = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--model", str(base), "--served-model-name", NAME, "--dtype", dtype),
            *("--max-model-len", "1024", "--max-num-seqs", str(requests), "--seed", "0"),
            *("--no-enable-prefix-caching", "--generation-config", "vllm"),
        ]
        if device == "cpu":
            words.append("--enforce-eager")
        if speculative is not None:
            words += ["--speculative-config", json.dumps(speculative)]
        self.words, self.environment = words, _environment(python, device)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.words,
                env=self.environment,
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

    def counters(self) -> dict[str, int]:
        """Return the server's counts since it started: ``verifications``, and ``accepted_0`` .. per
        position of the chain."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        counts: dict[str, int] = {}
        for line in lines:
            if not line.startswith("vllm:spec_decode_num_") or "_created" in line:
                continue
            key, value = line.rsplit(" ", 1)
            if "num_drafts" in key:
                counts["verifications"] = int(float(value))
            elif "accepted_tokens_per_pos" in key:
                position = key.split('position="')[1].split('"')[0]
                counts[f"accepted_{position}"] = int(float(value))
        return counts

    def _wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{tail}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
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


def _environment(python: Path, device: str) -> dict[str, str]:
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")},
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
    }
    if device != "cpu":
        return environment
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # By itself it leaves a core to the server's front end.
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    openmp = python.parents[1] / "lib" / "libiomp5.so"  # vLLM warns of slow threads without it
    return environment | ({"LD_PRELOAD": str(openmp)} if openmp.exists() else {})
