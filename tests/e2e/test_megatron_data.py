"""Megatron .bin/.idx data with SentencePiece and Hugging Face tokenizers, bf16, and the distributed
optimizer: what Megatron's own flags bring."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_eagle.checkpoint.reader import CheckpointReader
from tests.e2e.conftest import Inputs
from tests.e2e.launch import train
from tests.helpers.corpus import VOCABULARY, corpus, write_indexed


@pytest.mark.parametrize("tokenizer", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_indexed_data_supervise_every_token(tokenizer: str, tmp_path: Path) -> None:
    made = corpus(tmp_path, tokenizer)
    run = train(
        1, tmp_path / "log.jsonl", "--eagle-base-checkpoint", made.base, *made.flags,
        "--eagle-draft-vocab-size", 380, "--save", tmp_path / "draft", "--save-interval", 20,
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    # 4 sequences of 32 tokens: positions 1 .. 31 are targets.
    assert run.metrics[1]["supervised_rows"] == 4 * 31
    assert run.metrics[20]["loss_0"] < run.metrics[1]["loss_0"]
    ids = CheckpointReader.open(tmp_path / "draft").load(["draft.vocab_ids"])["draft.vocab_ids"]
    kept = set(ids.tolist())
    assert len(kept) == 380
    special_and_bytes = range(0, 4 + 256) if tokenizer.startswith("Sent") else range(0, 2 + 256)
    assert set(special_and_bytes) <= kept


def test_bf16_with_the_distributed_optimizer_trains_and_resumes_on_two_data_parallel_ranks(
    tmp_path: Path,
) -> None:
    """With buckets so small that the head has one of its own, which must be waited for."""
    made = corpus(tmp_path, "SentencePieceTokenizer")
    plain = ["--eagle-base-checkpoint", made.base, *made.flags, "--eagle-draft-vocab-size", 380,
             "--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce",
             "--ddp-bucket-size", 1000]  # fmt: skip
    flags = [*plain, "--overlap-param-gather", "--save", tmp_path / "draft", "--save-interval", 10]
    whole = train(2, tmp_path / "whole.jsonl", *flags)
    assert whole.returncode == 0, whole.output[-3000:]
    assert whole.metrics[20]["loss_0"] < whole.metrics[1]["loss_0"]
    waiting = train(2, tmp_path / "waiting.jsonl", *plain, "--exit-interval", 6)
    for iteration, line in waiting.metrics.items():
        assert whole.metrics[iteration]["loss"] == line["loss"]
    (tmp_path / "draft" / "latest_checkpointed_iteration.txt").write_text("10")
    resumed = train(2, tmp_path / "resumed.jsonl", *flags, "--load", tmp_path / "draft")
    assert resumed.returncode == 0, resumed.output[-3000:]
    for iteration in range(11, 21):
        expected = whole.metrics[iteration]["loss"]
        assert resumed.metrics[iteration]["loss"] == pytest.approx(expected, rel=1e-6)


def test_ids_of_another_tokenizer_are_refused_at_any_layout(tmp_path: Path) -> None:
    made = corpus(tmp_path, "SentencePieceTokenizer")
    write_indexed(tmp_path / "wrong", [[5, VOCABULARY, 7] * 20] * 30)
    flags = [*made.flags, "--data-path", tmp_path / "wrong", "--data-cache-path", tmp_path / "new"]
    run = train(
        2, None, "--eagle-base-checkpoint", made.base, *flags, "--tensor-model-parallel-size", 2
    )
    assert run.returncode != 0
    assert f"--data-path: token id {VOCABULARY} is outside" in run.error_line


def test_a_tokenizer_of_another_vocabulary_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    made = corpus(tmp_path, "HuggingFaceTokenizer")
    run = train(1, None, "--eagle-base-checkpoint", inputs.base, *made.flags)
    assert run.returncode != 0
    assert run.error_line.startswith("error: --tokenizer-model ")
    assert run.error_line.endswith(
        f"has {VOCABULARY} token ids, the base 61; is it another model's tokenizer?"
    )
