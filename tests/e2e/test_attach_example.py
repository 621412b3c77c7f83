"""The example of a trainer of one's own: both losses fall, and the saved draft converts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_eagle.cli.main import main
from tests.e2e.launch import ROOT, launch

EXAMPLE = ROOT / "examples" / "attach_to_your_trainer.py"
LINE = re.compile(
    r"iteration (\d+): model loss ([\d.]+), draft loss ([\d.]+), draft accuracy ([\d.]+)"
)


@pytest.mark.slow
def test_both_losses_fall_and_the_draft_converts(tmp_path: Path) -> None:
    run = launch(EXAMPLE, 2, "--tensor-parallel", 2, "--iterations", 60, "--save", tmp_path / "d")
    assert run.returncode == 0, run.output[-3000:]
    lines = {int(i): tuple(map(float, x)) for i, *x in LINE.findall(run.output)}
    first, last = lines[1], lines[60]
    assert last[0] < first[0] - 1.5, lines
    assert last[1] < first[1] - 1.5, lines
    assert last[2] > 0.2 > first[2], lines
    main(["convert", "--load", str(tmp_path / "d"), "--output", str(tmp_path / "hf")])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["hidden_size"] == 64
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as tensors:
        assert tuple(tensors.get_tensor("lm_head.weight").shape) == (256, 64)


def test_a_draft_adds_ten_lines() -> None:
    marked = [line for line in EXAMPLE.read_text().splitlines() if line.endswith("# draft")]
    assert len(marked) == 10
