"""Text of this repository as Megatron's .bin/.idx data, with a tokenizer and a base for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_eagle.hf.base.import_base import import_base
from tests.helpers.tiny_hf import make_base

ROOT = Path(__file__).parents[2]
VOCABULARY = 420
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Corpus:
    """A base and a tokenized text for it."""

    base: Path
    data: Path
    flags: list[object]


def corpus(folder: Path, tokenizer: str) -> Corpus:
    """Train a tokenizer on the documents and write them, its files and a base into ``folder``."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))
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


def sentencepiece_tokenizer(folder: Path) -> tuple[Encode, Path]:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tok"), model_type="bpe",
        vocab_size=VOCABULARY, byte_fallback=True, pad_id=3, minloglevel=2,
        hard_vocab_limit=False, character_coverage=1.0,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tok.model"))
    assert processor.vocab_size() <= VOCABULARY
    return processor.encode, folder / "tok.model"


def bpe_tokenizer(folder: Path) -> tuple[Encode, Path]:
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
    """Write token ids as ``prefix``.bin and .idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
