"""Packed and unpacked training, in every layout: equal losses for equal documents.

Eight documents of 16 tokens fill four sequences of 32, two each; a step reads them all.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_eagle.cli.prepare_data import main as prepare_data
from tests.e2e.conftest import Inputs
from tests.e2e.launch import Run, train
from tests.helpers import chat_templates as templates

pytestmark = pytest.mark.slow

ALONE = ["--global-batch-size", 8]
PACKED = ["--global-batch-size", 4, "--eagle-pack"]
LAYOUTS: dict[str, list] = {
    "data-parallel": [],
    "tensor-and-sequence": ["--tensor-model-parallel-size", 2, "--sequence-parallel"],
    "context": ["--context-parallel-size", 2],
    "pipeline": ["--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 3],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of a prepared data set of ids with a loss mask."""
    folder, rng = tmp_path_factory.mktemp("documents"), random.Random(5)
    ids = [[rng.randrange(61) for _ in range(16)] for _ in range(8)]
    lines = [{"prompt_ids": x[: 3 + i], "answer_ids": x[3 + i :]} for i, x in enumerate(ids)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = templates.make_tokenizer(folder / "tokenizer")
    words = ["--input", folder / "answers.jsonl", "--tokenizer", tokenizer, "--vocab-size", 61]
    assert prepare_data([*map(str, words), "--output-prefix", str(folder / "set")]) == 0
    return folder / "set"


def run(inputs: Inputs, data: Path, log: Path, ranks: int, *words: object) -> Run:
    found = train(
        ranks, log, "--eagle-base-checkpoint", inputs.base, "--eagle-train-data", data,
        "--eagle-draft-vocab-size", 40, "--train-iters", 5, "--micro-batch-size", 1, *words,
    )  # fmt: skip
    assert len(found.metrics) == 5, found.output[-3000:]
    return found


@pytest.fixture(scope="module")
def alone(
    inputs: Inputs, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, list[object]]:
    """One document a sequence, on one rank; and the flags that start another run as this one:
    random weights depend on the layout."""
    folder = tmp_path_factory.mktemp("alone")
    still = ["--lr", 0, "--min-lr", 0, "--weight-decay", 0, "--save-interval", 5]
    run(inputs, data, folder / "none.jsonl", 1, *ALONE, *still, "--save", folder / "start")
    start = ["--load", folder / "start", "--finetune"]
    return run(inputs, data, folder / "log.jsonl", 1, *ALONE, *start), start


@pytest.mark.parametrize("name", LAYOUTS)
def test_packing_changes_no_loss(
    name: str, inputs: Inputs, data: Path, alone: tuple[Run, list[object]], tmp_path: Path
) -> None:
    expected, start = alone
    packed = run(inputs, data, tmp_path / "log.jsonl", 2, *PACKED, *LAYOUTS[name], *start)
    assert "8 documents packed into 4 sequences, 100.0% full" in packed.output
    for iteration, line in expected.metrics.items():
        assert packed.metrics[iteration]["supervised_rows"] == line["supervised_rows"]
        for key in ("loss", "loss_2", "accuracy_0", "simulated_accepted_length"):
            assert packed.metrics[iteration][key] == pytest.approx(line[key], rel=1e-5), key
