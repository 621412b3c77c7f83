"""Checkpoints reshard between pipeline and tensor parallelism, optimizer included."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Inputs
from tests.e2e.launch import train

pytestmark = pytest.mark.slow
PP2 = ["--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 3]
TP2 = ["--tensor-model-parallel-size", 2]


@pytest.mark.parametrize(("saved", "loaded"), [(PP2, TP2), (TP2, PP2), (PP2, [])], ids=str)
def test_resuming_in_another_layout_goes_on_alike(
    saved: list, loaded: list, tmp_path: Path, inputs: Inputs
) -> None:
    """Optimizer state included, with the distributed optimizer's reshardable format."""
    flags = [*inputs.flags, "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable",
             "--adam-eps", "1e-5"]  # fmt: skip
    save = ["--save", tmp_path / "draft", "--save-interval", 10]
    whole = train(2, tmp_path / "whole.jsonl", *flags, *saved, *save)
    assert whole.returncode == 0, whole.output[-3000:]
    load = ["--load", tmp_path / "draft", "--ckpt-step", 10]
    rest = train(2 if loaded else 1, tmp_path / "rest.jsonl", *flags, *loaded, *load)
    assert rest.returncode == 0, rest.output[-3000:]
    assert sorted(rest.metrics) == list(range(11, 21))
    for iteration, line in rest.metrics.items():
        for key in ("loss", "grad_norm", "learning_rate"):
            assert line[key] == pytest.approx(whole.metrics[iteration][key], rel=1e-5), key
