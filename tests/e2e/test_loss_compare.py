"""benchmarks/loss_compare.py: its verdict, and that the layouts agree in the whole trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import loss_compare

SMALL = [
    "--num-layers",
    "8",
    "--train-iters",
    "3",
    "--global-batch-size",
    "8",
    "--seq-length",
    "32",
]
DENSE = "tp1,tp2,tp2sp,tp4,pp2,pp4,tp2pp2,cp2,tp2spcp2,pp2cp2,dp2,dp2do,pp2dp2do"
EXPERTS = "tp1,ep2,tp2spep2,pp2ep2,etp1tp2spep2"


def compare(*words: str) -> int:
    return loss_compare.main(list(words))


@pytest.mark.slow
def test_two_layouts_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--layouts", "tp1,pp2", *SMALL) == 0
    out = capsys.readouterr().out
    assert "| tp1 | 1 | 0.0e+00 |" in out and "| pp2 | 2 |" in out


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("layouts", "words"), [(DENSE, []), (EXPERTS, ["--num-experts", "4"])], ids=["dense", "experts"]
)
def test_all_layouts_agree(layouts: str, words: list[str]) -> None:
    assert compare("--layouts", layouts, *SMALL, *words) == 0


def test_a_layout_that_differs_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss, gradient norm, accuracy and weights count each."""
    same = {"loss": 2.0, "grad_norm": 1.0, "accuracy_0": 0.5}
    given = {
        "tp1": (same, 1.0),
        "tp2": (same, 1.0),
        "pp2": ({**same, "loss": 2.0001}, 1.0),
        "cp2": ({**same, "grad_norm": 1.0001}, 1.0),
        "dp2": ({**same, "accuracy_0": 0.5001}, 1.0),
        "dp2do": (same, 1.0001),
    }

    def run(args: Any, layout: Any, base: Path, folder: Path, name: str, words: list[str]) -> Any:
        metrics, weight = given[layout.name]
        return loss_compare.Outcome(layout, [metrics], {"w": torch.tensor([weight])}, 0.0)

    monkeypatch.setattr(loss_compare, "run", run)
    monkeypatch.setattr(loss_compare, "make_base", lambda *_: tmp_path)
    monkeypatch.setattr(loss_compare, "write_answers", lambda *_: None)
    assert compare("--layouts", "tp1,tp2") == 0
    for layout in ("pp2", "cp2", "dp2", "dp2do"):
        assert compare("--layouts", f"tp1,{layout}") == 1
        assert compare("--layouts", f"tp1,{layout}", "--tolerance", "1e-3") == 0
    capsys.readouterr()


@pytest.mark.parametrize("name", ["tp", "xp2", "tp2,,pp2", "sp2"])
def test_a_mistyped_layout_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--layouts", name) == 2
    assert capsys.readouterr().err.startswith("error: --layouts ")
