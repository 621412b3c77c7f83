"""Features written once, and training from them: the losses of training beside the base."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Inputs
from tests.e2e.launch import ROOT, Run, torchrun, train

TOOL = ROOT / "tools" / "extract_features.py"
SHORT = ("--train-iters", 6, "--eagle-draft-vocab-size", 40)


def extract(inputs: Inputs, output: Path, ranks: int, *words: object) -> Run:
    return torchrun(
        TOOL, ranks, "--base", inputs.base, "--data", inputs.answers, "--seq-length", 32,
        "--output", output, *words,
    )  # fmt: skip


@pytest.fixture(scope="module")
def features(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "fp32"
    run = extract(inputs, folder, 2, "--tensor-model-parallel-size", 2)
    assert run.returncode == 0, run.output[-3000:]
    return folder


def compare(inputs: Inputs, features: Path, folder: Path, tolerance: float, *words: object) -> None:
    base = ("--eagle-base-checkpoint", inputs.base)
    words = (*SHORT, *words, "--tensor-model-parallel-size", 2, "--sequence-parallel")
    online = train(2, folder / "online.jsonl", *inputs.flags, *words)
    offline = train(
        2, folder / "offline.jsonl", *base, "--eagle-offline-features", features, *words
    )
    assert offline.returncode == 0, offline.output[-3000:]
    assert len(online.metrics) == 6, online.output[-3000:]
    for iteration, line in online.metrics.items():
        same = offline.metrics[iteration]
        assert same["supervised_rows"] == line["supervised_rows"]
        assert same["loss"] == pytest.approx(line["loss"], rel=tolerance)


def test_training_equals_training_beside_the_base(
    inputs: Inputs, features: Path, tmp_path: Path
) -> None:
    compare(inputs, features, tmp_path, 1e-6)


@pytest.mark.slow
def test_packed_training_equals_packed_training_beside_the_base(
    inputs: Inputs, features: Path, tmp_path: Path
) -> None:
    compare(inputs, features, tmp_path, 1e-6, "--eagle-pack")


@pytest.mark.slow
def test_bf16_training_equals_bf16_training_beside_the_base(inputs: Inputs, tmp_path: Path) -> None:
    words = ("--tensor-model-parallel-size", 2, "--dtype", "bfloat16", "--shard-mib", 1)
    run = extract(inputs, tmp_path / "bf16", 2, *words)
    assert run.returncode == 0, run.output[-3000:]
    compare(inputs, tmp_path / "bf16", tmp_path, 1e-3, "--bf16")
