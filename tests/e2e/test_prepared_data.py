"""From JSONL to a packed training run, as docs/guide/data.md has it."""

from __future__ import annotations

from pathlib import Path

from megatron_eagle.cli.prepare_data import main as prepare_data
from tests.e2e.conftest import Inputs
from tests.e2e.launch import train
from tests.helpers import chat_templates as templates


def prepared(inputs: Inputs, folder: Path) -> Path:
    tokenizer = templates.make_tokenizer(folder / "tokenizer")
    words = ["--input", inputs.answers, "--tokenizer", tokenizer, "--vocab-size", 61]
    assert prepare_data([*map(str, words), "--output-prefix", str(folder / "set")]) == 0
    return folder / "set"


def test_packed_training_reads_prepared_data_on_two_ranks(inputs: Inputs, tmp_path: Path) -> None:
    data = prepared(inputs, tmp_path)
    run = train(
        2, tmp_path / "log.jsonl", "--eagle-base-checkpoint", inputs.base, "--eagle-train-data",
        data, "--eagle-pack", "--eagle-draft-vocab-size", 40, "--tensor-model-parallel-size", 2,
        "--sequence-parallel", "--seq-length", 64,
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    assert "> 40 documents packed into " in run.output
    assert run.metrics[20]["loss_0"] < run.metrics[1]["loss_0"]
    # A sequence of 64 tokens holds two or three documents of 6 to 25 supervised tokens.
    assert run.metrics[1]["supervised_rows"] > 4 * 25
