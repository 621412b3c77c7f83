"""The time limit of `make test-servers`: what an engine had done counts, the rest fails by name."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.servers.session import Session

HEAD = f"""
import json, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1] / "servers")!r})
from jobs import work
"""


def serve(folder: Path, session: Session, source: str, jobs: list[Any]) -> list[dict[str, Any]]:
    (folder / "worker.py").write_text(HEAD + source)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    return session.serve(folder, str(folder / "worker.py"), folder, jobs)


def runs(number: int) -> bool:
    try:
        return bool(psutil.Process(number).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_an_engine_is_ended_with_its_children(tmp_path: Path) -> None:
    source = f"""
def run(job, folder):
    if job["sleep"]:
        child = subprocess.Popen(["sleep", "300"])
        Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
        time.sleep(300)
    return {{"answer": job["name"]}}

raise SystemExit(work(run))
"""
    session = Session(3.0)
    jobs = [{"name": name, "sleep": name == "b"} for name in "abc"]
    start = time.monotonic()
    first, *rest = serve(tmp_path, session, source, jobs)
    assert time.monotonic() - start < 20
    assert first == {"answer": "a"}
    over = "the 3 seconds of `make test-servers` (SERVERS_SECONDS) are over"
    assert rest == [{"error": over}, {"error": over}] and session.over == over
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while runs(child):  # a signal arrives when it arrives
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(session.spent.values()) == [pytest.approx(3.0, abs=2.0)]


def test_an_engine_that_dies_leaves_what_it_had(tmp_path: Path) -> None:
    source = """
def run(job, folder):
    if job == 2:
        print("no such kernel", flush=True)
        import os
        os._exit(7)
    if job == 1:
        raise ValueError("this one alone")
    return {"answer": job}

raise SystemExit(work(run))
"""
    session = Session(60.0)
    results = serve(tmp_path, session, source, [0, 1, 2, 3])
    assert results[0] == {"answer": 0} and "this one alone" in results[1]["error"]
    assert results[2] == results[3] and "ended with 7:\nno such kernel" in results[2]["error"]
    assert not session.over


def test_a_test_that_has_not_begun_fails_by_name() -> None:
    """It is not skipped."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/servers"],
        cwd=root, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "COLUMNS": "300", "SERVERS_SECONDS": "0", "SERVERS_VLLM": sys.prefix},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "test_vllm_serves_the_draft[qk-norm] - Failed: not run: the 0 seconds" in done.stdout
