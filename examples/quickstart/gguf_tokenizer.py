"""Rebuild a Hugging Face tokenizer from the metadata of a GGUF file.

Covers byte-level BPE with the `smollm` pre-tokenizer: digits split one by one, then GPT-2's regex.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def field_value(reader: gguf.GGUFReader, key: str) -> Any:
    """Return the content of a metadata field; raises ValueError when the file lacks it."""
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file has no field {key}")
    return field.contents()


def build_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """Return the byte-level BPE tokenizer; raises ValueError for another kind of tokenizer."""
    kind = (field_value(reader, "tokenizer.ggml.model"), field_value(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the GGUF file's tokenizer is {kind}, expected ('gpt2', 'smollm')")
    tokens = field_value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field_value(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = field_value(reader, "tokenizer.ggml.token_type")
    control = [t for t, k in zip(tokens, types, strict=True) if k == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    return tokenizer


def write_tokenizer(reader: gguf.GGUFReader, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) into `folder`."""
    build_tokenizer(reader).save(str(folder / "tokenizer.json"))
    tokens = field_value(reader, "tokenizer.ggml.tokens")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field_value(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field_value(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[field_value(reader, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[field_value(reader, "tokenizer.ggml.unknown_token_id")],
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(field_value(reader, "llama.context_length")),
        "chat_template": field_value(reader, "tokenizer.chat_template"),
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
