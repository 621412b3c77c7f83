"""Special and byte tokens are found in every kind of tokenizer."""

from __future__ import annotations

from types import SimpleNamespace

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_eagle.data.protected import config_token_ids, special_and_byte_ids


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
