"""Megatron .bin/.idx data with SentencePiece and Hugging Face tokenizers, bf16, and the distributed
optimizer: what Megatron's own flags bring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eagle.checkpoint.reader import DraftCheckpoint
from megatron_eagle.hf.base.import_base import import_base
from tests.e2e.launch import ROOT, train
from tests.helpers.tiny_hf import make_base

VOCABULARY = 420


@dataclass(frozen=True)
class Corpus:
    """A base and a tokenized text for it."""

    base: Path
    data: Path
    flags: list[object]


def corpus(folder: Path, tokenizer: str) -> Corpus:
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("[dg]*/*.md")))
    text = text.encode("ascii", "ignore").decode()
    paragraphs = [p for p in text.split("\n\n") if len(p) > 40]
    (folder / "text.txt").write_text("\n".join(paragraphs))
    make = sentencepiece_tokenizer if tokenizer == "SentencePieceTokenizer" else bpe_tokenizer
    encode, model = make(folder)
    make_base(folder / "hf", "llama", num_hidden_layers=7, vocab_size=VOCABULARY)
    import_base(folder / "hf", folder / "base")
    write_indexed(folder / "data", [encode(p) for p in paragraphs])
    flags = ["--tokenizer-type", tokenizer, "--tokenizer-model", model, "--data-path",
             folder / "data", "--split", "90,5,5", "--data-cache-path", folder / "cache",
             "--eval-interval", 1000, "--eval-iters", 1]  # fmt: skip
    return Corpus(folder / "base", folder / "data", flags)


def sentencepiece_tokenizer(folder: Path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tok"), model_type="bpe",
        vocab_size=VOCABULARY, byte_fallback=True, pad_id=3, minloglevel=2,
        hard_vocab_limit=False, character_coverage=1.0,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tok.model"))
    assert processor.vocab_size() <= VOCABULARY
    return processor.encode, folder / "tok.model"


def bpe_tokenizer(folder: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train([str(folder / "text.txt")], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder / "tok")
    return (lambda text: inner.encode(text).ids), folder / "tok"


def write_indexed(prefix: Path, documents: list[list[int]]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("tokenizer", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_indexed_data_with_every_token_supervised(tokenizer: str, tmp_path: Path) -> None:
    made = corpus(tmp_path, tokenizer)
    run = train(
        1, tmp_path / "log.jsonl", "--eagle-base-checkpoint", made.base, *made.flags,
        "--eagle-draft-vocab-size", 380, "--save", tmp_path / "draft", "--save-interval", 20,
    )  # fmt: skip
    assert run.returncode == 0, run.output[-3000:]
    # 4 sequences of 32 tokens: positions 1 .. 31 are targets.
    assert run.metrics[1]["supervised_rows"] == 4 * 31
    assert run.metrics[20]["loss_0"] < run.metrics[1]["loss_0"]
    ids = DraftCheckpoint.open(tmp_path / "draft").load(["draft.vocab_ids"])["draft.vocab_ids"]
    kept = set(ids.tolist())
    assert len(kept) == 380
    special_and_bytes = range(0, 4 + 256) if tokenizer.startswith("Sent") else range(0, 2 + 256)
    assert set(special_and_bytes) <= kept


def test_bf16_with_the_distributed_optimizer_on_two_data_parallel_ranks(tmp_path: Path) -> None:
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
