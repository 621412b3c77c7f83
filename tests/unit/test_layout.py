"""Layouts that cannot work are refused in one line, before anything is built."""

from __future__ import annotations

import re

import pytest

from megatron_eagle.checkpoint_dir import BaseInfo
from megatron_eagle.config import EagleConfig
from megatron_eagle.training.layout import check_layout

BASE = BaseInfo(
    family="llama",
    name="tiny",
    fingerprint="",
    vocab_size=61,
    hf_config={},
    megatron_args={
        "num_layers": 7,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 6,
        "ffn_hidden_size": 80,
        "hidden_size": 48,
    },
)
LAYOUTS = [
    (["--context-parallel-size", 2], "--context-parallel-size 2 does not divide the 3 processes"),
    (["--context-parallel-size", 3], "--seq-length 32 is not a multiple of 6"),
    (
        ["--context-parallel-size", 3, "--seq-length", 12],
        "pieces of 2 tokens, fewer than --eagle-ttt-steps 3",
    ),
]


@pytest.mark.parametrize(("words", "message"), LAYOUTS, ids=lambda value: str(value)[:60])
def test_bad_layouts(words: list, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=re.escape(message)):
        check_layout(["--seq-length", "32", *map(str, words)], BASE, EagleConfig())
