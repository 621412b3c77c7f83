"""The kernel of fp32 products is chosen by a measurement and kept for the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_eagle.platform.cpu import kernel_choice
from megatron_eagle.platform.cpu.kernel_choice import kept_choice, measure_speeds

SETTING = {"processor": "p", "torch": "2", "threads": 1}


def speeds(mkl: float, onednn: float) -> dict[str, float]:
    return {"mkl": mkl, "onednn": onednn}


@pytest.mark.parametrize(("onednn", "chosen"), [(90.0, False), (105.0, False), (130.0, True)])
def test_onednn_is_chosen_where_it_is_clearly_faster(
    tmp_path: Path, onednn: float, chosen: bool
) -> None:
    assert kept_choice(tmp_path / "cache", SETTING, lambda: speeds(100.0, onednn)) is chosen
    (kept,) = (tmp_path / "cache").iterdir()
    record = json.loads(kept.read_text())
    assert record["onednn"] is chosen and record["onednn_gflops"] == onednn


def test_a_choice_stands_for_its_setting_alone(tmp_path: Path) -> None:
    assert kept_choice(tmp_path, SETTING, lambda: speeds(1.0, 2.0))
    assert kept_choice(tmp_path, SETTING, lambda: speeds(2.0, 1.0)), "kept, not measured again"
    assert not kept_choice(tmp_path, {**SETTING, "threads": 2}, lambda: speeds(2.0, 1.0))


def test_the_first_of_two_processes_chooses(tmp_path: Path) -> None:
    def measure_second() -> dict[str, float]:
        assert kept_choice(tmp_path, SETTING, lambda: speeds(1.0, 2.0))  # the other one is faster
        return speeds(2.0, 1.0)

    assert kept_choice(tmp_path, SETTING, measure_second)
    assert len(list(tmp_path.iterdir())) == 1, "no temporary file stays"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"onednn": 3}'])
def test_a_damaged_file_is_replaced(tmp_path: Path, content: str) -> None:
    assert kept_choice(tmp_path, SETTING, lambda: speeds(1.0, 2.0))
    (kept,) = tmp_path.iterdir()
    kept.write_text(content)
    assert not kept_choice(tmp_path, SETTING, lambda: speeds(2.0, 1.0))
    assert json.loads(kept.read_text())["onednn"] is False


def test_a_directory_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert kept_choice(tmp_path / "file", SETTING, lambda: speeds(1.0, 2.0))


def test_both_kernels_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = measure_speeds()
    assert set(found) == {"mkl", "onednn"} and min(found.values()) > 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel_choice.onednn_is_faster.cache_clear()
    monkeypatch.setattr(kernel_choice, "measure_speeds", lambda: speeds(1.0, 2.0))
    assert kernel_choice.onednn_is_faster()
    kernel_choice.onednn_is_faster.cache_clear()
