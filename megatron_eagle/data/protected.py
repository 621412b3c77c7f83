"""Ids that every draft vocabulary keeps: special tokens and byte tokens.

Without them a draft could propose neither an end of turn nor a character that is missing from its
training data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatron_eagle.checkpoint.directory import token_ids

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def special_and_byte_ids(tokenizer: Any) -> set[int]:
    """Return the special and byte tokens of a Hugging Face or SentencePiece tokenizer.

    Megatron may have wrapped it, at any depth. A tokenizer without tokens (Megatron's
    NullTokenizer) gives the empty set.
    """
    for inner in _unwrap(tokenizer):
        if hasattr(inner, "IsByte"):
            return {i for i in range(inner.GetPieceSize()) if _is_kept_piece(inner, i)}
        if hasattr(inner, "convert_ids_to_tokens"):
            return _hugging_face_ids(inner)
    return set()


def config_token_ids(hf_config: dict[str, Any]) -> set[int]:
    """Return the ids of bos, eos and pad of a base's ``hf_config``."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {i for key in keys for i in token_ids(hf_config, key)}


def _unwrap(tokenizer: Any) -> Iterator[Any]:
    while tokenizer is not None:
        yield tokenizer
        names = [name for name in ("_tokenizer", "tokenizer") if name in vars(tokenizer)]
        tokenizer = getattr(tokenizer, names[0]) if names else None


def _is_kept_piece(processor: Any, piece: int) -> bool:
    return processor.IsByte(piece) or processor.IsControl(piece) or processor.IsUnknown(piece)


def _hugging_face_ids(tokenizer: Any) -> set[int]:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = set(ByteLevel.alphabet())
    vocabulary = tokenizer.get_vocab()
    byte_level = alphabet <= set(vocabulary)
    return {
        id
        for token, id in vocabulary.items()
        if _BYTE.fullmatch(token) or (byte_level and token in alphabet)
    } | set(tokenizer.all_special_ids)
