"""Features written once, and training from them: the losses of training beside the base."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_eagle.hf.base.import_base import import_base
from tests.e2e.conftest import Inputs
from tests.e2e.launch import ROOT, Run, launch, train
from tests.helpers.tiny_hf import make_base

TOOL = ROOT / "tools" / "extract_features.py"
SHORT = ("--train-iters", 6, "--eagle-draft-vocab-size", 40)


def extract(inputs: Inputs, output: Path, ranks: int, *words: object) -> Run:
    return launch(
        TOOL, ranks, "--base", inputs.base, "--data", inputs.answers, "--seq-length", 32,
        "--output", output, *words,
    )  # fmt: skip


@pytest.fixture(scope="module")
def features(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "fp32"
    run = extract(inputs, folder, 2, "--tensor-model-parallel-size", 2)
    assert run.returncode == 0, run.output[-3000:]
    return folder


TP2_SP = ("--tensor-model-parallel-size", 2, "--sequence-parallel")


def compare(
    inputs: Inputs, features: Path, folder: Path, tolerance: float, *words: object,
    layout: tuple = TP2_SP,
) -> None:  # fmt: skip
    """Two runs on two ranks, beside the base and from ``features``."""
    base = ("--eagle-base-checkpoint", inputs.base)
    words = (*SHORT, *words, *layout)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [(), ("--context-parallel-size", 2)], ids=["data-parallel", "context-parallel"]
)
def test_training_in_other_layouts_gives_the_same_losses(
    layout: tuple, inputs: Inputs, features: Path, tmp_path: Path
) -> None:
    """The features are of a base at TP 2, whose rounding is another."""
    compare(inputs, features, tmp_path, 1e-5, "--micro-batch-size", 1, layout=layout)


LAYOUTS: dict[str, tuple[int, tuple]] = {
    "data-parallel": (2, ()),
    "pipeline": (2, ("--pipeline-model-parallel-size", 2)),  # 7 layers: uneven
    "pipeline-and-context": (
        4, ("--pipeline-model-parallel-size", 2, "--context-parallel-size", 2)
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_extraction_in_other_layouts_writes_the_same_features(
    name: str, inputs: Inputs, features: Path, tmp_path: Path
) -> None:
    """The same rows as with tensor parallelism, and training accepts them."""
    ranks, words = LAYOUTS[name]
    run = extract(inputs, tmp_path / "features", ranks, *words)
    assert run.returncode == 0, run.output[-3000:]
    for kind in ("captured", "final"):
        files = [folder / f"shard_00000.{kind}.bin" for folder in (features, tmp_path / "features")]
        expected, found = (np.fromfile(file, np.float32) for file in files)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())
    base = ("--eagle-base-checkpoint", inputs.base)
    words = (*SHORT, "--eagle-offline-features", tmp_path / "features")
    assert train(1, tmp_path / "log.jsonl", *base, *words).metrics.keys() == {1, 2, 3, 4, 5, 6}


REFUSED = [
    (
        ("--pipeline-model-parallel-size", 2),
        "--pipeline-model-parallel-size 2: with --eagle-offline-features there are no base layers",
    ),
    (("--eagle-aux-layers", 0, 2), "of layers 1 2 3, this run reads 0 2 (--eagle-aux-layers)"),
    (("--eagle-algorithm", "eagle1"), "--eagle-algorithm eagle1 reads no aux layers"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_flags_that_features_cannot_serve_are_refused(
    words: tuple, message: str, inputs: Inputs, features: Path
) -> None:
    base = ("--eagle-base-checkpoint", inputs.base, "--eagle-offline-features", features)
    run = train(2, None, *base, *words)
    assert run.returncode != 0
    assert message in run.error_line


@pytest.mark.slow
def test_features_of_another_base_and_damaged_ones_are_refused(
    inputs: Inputs, features: Path, tmp_path: Path
) -> None:
    make_base(tmp_path / "hf", "llama", num_hidden_layers=7, seed=8)
    import_base(tmp_path / "hf", tmp_path / "base")
    other = ("--eagle-base-checkpoint", tmp_path / "base", "--eagle-offline-features", features)
    assert f"--eagle-offline-features {features}: features of another base" in (
        train(2, None, *other).error_line
    )
    shutil.copytree(features, tmp_path / "damaged")
    rows = tmp_path / "damaged" / "shard_00000.captured.bin"
    rows.write_bytes(rows.read_bytes()[:-100])
    own = ("--eagle-base-checkpoint", inputs.base, "--eagle-offline-features", rows.parent)
    assert "shard_00000.captured.bin has" in train(2, None, *own).error_line
