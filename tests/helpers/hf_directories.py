"""Small Hugging Face directories: a byte-level tokenizer with a ChatML template, and a model."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.tiny_hf import make_base

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 258


def byte_tokenizer(directory: Path) -> Path:
    """Write a tokenizer of 256 bytes and two special tokens, and return its directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    specials = ["<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(directory / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return directory


def chat_model(directory: Path, seed: int = 7) -> Path:
    """Write a random model of ``VOCABULARY`` ids with that tokenizer, and return its directory."""
    make_base(directory, "llama", vocab_size=VOCABULARY, max_position_embeddings=512, seed=seed)
    return byte_tokenizer(directory)
