"""Special and byte tokens are found in every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_eagle.data.protected import config_token_ids, special_and_byte_ids
from megatron_eagle.hf.files.generation_config import with_all_ends


class Wrapper:
    """As Megatron wraps a tokenizer: attribute over attribute."""

    def __init__(self, inner: object) -> None:
        self._tokenizer = SimpleNamespace(tokenizer=inner)


def fast(vocabulary: list[str], special: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=special)


def test_a_byte_level_tokenizer_keeps_every_byte() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = fast(["word", *alphabet, "other", "<end>"], "<end>")
    assert special_and_byte_ids(Wrapper(tokenizer)) == set(range(1, 257)) | {258}


def test_byte_fallback_tokenizer_does_not_keep_every_single_character() -> None:
    tokenizer = fast(["<0x00>", "<0xFF>", "a", "字", "<end>"], "<end>")
    assert special_and_byte_ids(Wrapper(tokenizer)) == {0, 1, 4}


def test_a_tokenizer_may_lack_tokens_and_the_config_names_some() -> None:
    assert special_and_byte_ids(Wrapper(None)) == set()
    config = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None}
    assert config_token_ids(config) == {1, 2, 7}


def test_end_tokens_of_generation_config_are_the_base_s_too(tmp_path: Path) -> None:
    config = {"eos_token_id": 2, "bos_token_id": 1}
    assert with_all_ends(config, tmp_path, 9) == config
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [7, 2], "repetition_penalty": 1.1}')
    united = with_all_ends(config, tmp_path, 9)
    assert united == {"eos_token_id": [2, 7], "bos_token_id": 1}
    assert config_token_ids(united) == {1, 2, 7}
    for text, reason in (
        ('{"eos_token_id": 9}', r"generation_config.json: eos_token_id 9 is outside"),
        ('{"eos_token_id": ["x"]}', r"generation_config.json: eos_token_id must be a token id"),
        ("[]", r"generation_config.json: expected a JSON object"),
    ):
        generation.write_text(text)
        with pytest.raises(ValueError, match=reason):
            with_all_ends(config, tmp_path, 9)
