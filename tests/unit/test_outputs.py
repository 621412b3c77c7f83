"""Output places: one owner at a time, nothing of a killed run left, nothing half-written read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_eagle.checkpoint import atomic
from megatron_eagle.checkpoint.atomic import (
    atomic_dir,
    atomic_file,
    exchange,
    owned_output,
    replace_dir,
    take_back,
)
from megatron_eagle.checkpoint.lock import OutputLock, output_lock
from megatron_eagle.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from megatron_eagle.checkpoint.lock import output_lock
with output_lock(Path(sys.argv[1]), "output"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock on ``tmp_path/out``."""
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_told_who_holds_the_place(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught, output_lock(tmp_path / "out", "output"):
        pass
    expected = f"--output {tmp_path / 'out'}: in use by process {holder.pid} on "
    assert caught.value.named(lambda name: f"--{name}").startswith(expected)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with output_lock(tmp_path / "out", "output") as was_killed:
        assert was_killed and [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    assert not list(tmp_path.iterdir())
    with output_lock(tmp_path / "out", "output") as was_killed:
        assert not was_killed


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out", tmp_path / ("n" * 300)):
        with pytest.raises(UserError, match=r"^output .*: cannot be"), output_lock(place, "output"):
            pass


def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    OutputLock.take(tmp_path / ".lock", "save", tmp_path).release()
    assert "a second run is not noticed" in caplog.text


def test_what_killed_runs_left_is_cleared_up(tmp_path: Path) -> None:
    target = tmp_path / "hf"
    for name in (".hf.11.part", ".hf.partial-12", ".hf.13.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".hf.14.part").write_text("")
    (tmp_path / ".hf.11.old").mkdir()
    (tmp_path / ".hf.11.old" / "config.json").write_text("earlier")
    (tmp_path / ".other.15.part").mkdir()
    with owned_output(target, "output"):
        assert (target / "config.json").read_text() == "earlier", "taken back"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.15.part", "hf"]
    (tmp_path / ".hf.11.old").mkdir()
    take_back(target)
    assert (target / "config.json").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.15.part", "hf"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_is_replaced(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("")
    if not can_exchange:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    with atomic_dir(target, replace=True) as scratch:
        (scratch / "new").write_text("")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_directories_change_places(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "a").write_text("")
    if exchange(one, other):
        assert (other / "a").exists() and not list(one.iterdir())
    assert not exchange(one, tmp_path / "missing")


def test_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, replace = atomic.sync, Path.replace
    monkeypatch.setattr(
        atomic, "sync", lambda path: (steps.append(f"sync {path.name}"), sync(path))
    )
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (steps.append(f"rename {to.name}"), replace(self, to))[1]
    )
    with atomic_file(tmp_path / "a") as scratch:
        scratch.write_text("x")
    assert steps == [f"sync {scratch.name}", "rename a", f"sync {tmp_path.name}"]
    steps.clear()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("x")
    replace_dir(tmp_path / "d", tmp_path / "e")
    assert steps == ["sync f", "sync d", f"sync {tmp_path.name}"]
