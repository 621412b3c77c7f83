"""The parts of decoding: cache, ragged sequences, counts, prompts, and the tool's refusals."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import megatron_eagle.cli.evaluate as tool
from megatron_eagle.decode import speculative
from megatron_eagle.decode.cache import KeyValueCache
from megatron_eagle.decode.prompt_shards import PromptShard, connected_ranks
from megatron_eagle.decode.prompts import read_prompt_ids
from megatron_eagle.decode.sequences import Sequences
from megatron_eagle.decode.speculative import ChainCounts
from tests.helpers import chat_templates

CPU = torch.device("cpu")


def test_cached_rows_equal_dense_causal_attention_after_rejected_rows() -> None:
    """Two sequences at different positions; wrong rows are written first, then overwritten."""
    torch.manual_seed(0)
    heads, groups, length, size = 6, 2, 9, 4
    query = torch.randn(2, heads, length, size)
    key, value = torch.randn(2, 2, groups, length, size)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    cache = KeyValueCache(length + 3)
    starts = torch.tensor([2, 5])
    prompt = torch.arange(5).expand(2, 5)
    cache.place(prompt)
    cache.attend(1, query[:, :, :5], key[:, :, :5], value[:, :, :5], 0.3)
    for wrong in (True, False):
        positions = starts.unsqueeze(1) + torch.arange(4)
        cache.place(positions)
        picked = [
            torch.stack([x[b][:, positions[b]] for b in range(2)]) for x in (query, key, value)
        ]
        noise = 100.0 if wrong else 0.0
        out = cache.attend(1, picked[0], picked[1] + noise, picked[2] - noise, 0.3)
    expected = torch.stack([dense[b][:, positions[b]] for b in range(2)])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_sink", [False, True])
def test_windows_and_sinks_in_a_cache_equal_the_dense_softmax(
    window: int | None, with_sink: bool
) -> None:
    """Values narrower than keys, as MLA has them; the prompt first, then row by row."""
    torch.manual_seed(0)
    heads, groups, length = 6, 2, 9
    query, key = torch.randn(2, heads, length, 4), torch.randn(2, groups, length, 4)
    value = torch.randn(2, groups, length, 3)
    sink = torch.randn(heads) if with_sink else None
    scores = 0.3 * query @ key.repeat_interleave(3, 1).transpose(-1, -2)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    scores = scores.masked_fill(~seen, float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink.view(1, -1, 1, 1).expand(2, -1, length, 1)], dim=-1)
    expected = scores.softmax(-1)[..., :length] @ value.repeat_interleave(3, 1)
    cache, found = KeyValueCache(length), []
    for rows in (slice(0, 5), *(slice(row, row + 1) for row in range(5, length))):
        cache.place(torch.arange(length)[rows].expand(2, -1))
        parts = (x[:, :, rows] for x in (query, key, value))
        found.append(cache.attend(1, *parts, 0.3, window, sink))
    torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=1e-5, atol=1e-6)


def test_a_cache_keeps_the_sequences_it_is_told_to() -> None:
    torch.manual_seed(0)
    key = torch.randn(3, 1, 2, 4)
    whole, part = KeyValueCache(4), KeyValueCache(4)
    for cache in (whole, part):
        cache.place(torch.arange(2).expand(3, 2))
        cache.attend(1, key, key, key, 1.0)
    kept = torch.tensor([2, 0])
    part.keep(kept)
    row = torch.randn(3, 1, 1, 4)
    whole.place(torch.full((3, 1), 2))
    part.place(torch.full((2, 1), 2))
    expected = whole.attend(1, row, row, row, 1.0)[kept]
    assert part.attend(1, row[kept], row[kept], row[kept], 1.0).equal(expected)


def test_sequences_stop_at_the_limit_and_after_a_stop_id() -> None:
    sequences = Sequences([[1], [2, 3], [4]], 4, [9], CPU)
    sequences.append(torch.tensor([[5, 6, 7], [5, 9, 7], [9, 5, 5]]), torch.tensor([3, 3, 3]))
    assert sequences.growing.tolist() == [True, False, False]
    kept = sequences.compact()
    assert kept is not None and kept.tolist() == [0]
    sequences.append(torch.tensor([[8, 8, 8]]), torch.tensor([2]))
    assert sequences.finished
    assert sequences.answers() == [[5, 6, 7, 8], [5, 9], [9]]


def test_only_the_first_counts_tokens_are_appended() -> None:
    sequences = Sequences([[1], [1, 2]], 5, [], CPU)
    sequences.append(torch.tensor([[5, 6], [7, 8]]), torch.tensor([1, 2]))
    sequences.append(torch.tensor([[9] * 9] * 2), torch.tensor([9, 9]))
    assert sequences.answers() == [[5, 9, 9, 9, 9], [7, 8, 9, 9, 9]]


def test_chains_of_ended_sequences_stay_in_the_cache() -> None:
    """A draft that is always right leads beyond the first sequence's limit while the second, that
    accepts none, still grows."""
    chain, limit = 3, 3
    base: Any = SimpleNamespace(argmax=lambda said: said)
    sequences = Sequences([[1] * 5, [1]], limit, (), torch.device("cpu"), spare=chain)
    said, drafts = torch.full((2, chain + 1), 7), torch.tensor([[7] * chain, [8] * chain])
    counts, features = ChainCounts(chain), torch.empty(chain + 1, 2, 1)
    for _ in range(limit):
        verified = speculative._accept(base, sequences, drafts, counts, features, said.t())
        newest = verified.start + verified.last
        assert int(newest.max()) + chain - 1 < sequences.capacity
        assert int(newest[1]) == int(sequences.lengths[1]) - 2
    assert sequences.finished


def test_chain_counts_stop_at_a_miss_and_at_the_end_of_a_sequence() -> None:
    """Three drafts: all right; right, wrong, right; all right but the first ends the sequence;
    and a sequence that has ended."""
    counts = ChainCounts(3)
    hits = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]]).bool()
    stop = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]).bool()
    counts.add(hits, stop, torch.tensor([True, True, True, False]))
    assert (counts.verifications, counts.reached, counts.accepted) == (3, [3, 2, 1], [3, 1, 1])
    assert counts.server_accepted == [3, 2, 2]  # a server counts the whole chain


def test_counts_of_other_prompts_add_up() -> None:
    counts = ChainCounts(2)
    counts.add(torch.tensor([[1, 0]]).bool(), torch.zeros(1, 2).bool(), torch.tensor([True]))
    other = ChainCounts(2)
    other.add(torch.ones(3, 2).bool(), torch.zeros(3, 2).bool(), torch.ones(3).bool())
    counts.merge(other)
    assert (counts.verifications, counts.reached, counts.accepted) == (4, [4, 4], [4, 3])
    assert counts.server_accepted == [4, 3]


def test_ranks_that_a_group_links_share_prompts() -> None:
    """8 ranks: pairs, two of the pairs joined by another group."""
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert connected_ranks([*pairs, (3, 4)]) == [{0, 1}, {2, 3, 4, 5}, {6, 7}]
    shards = [PromptShard(i, 3).take("abcdefgh") for i in range(3)]
    assert shards == ["adg", "beh", "cf"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"p\.jsonl:1: not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "neither prompt_ids nor prompt"),
        ('{"prompt_ids": null, "messages": [{"role": "user", "content": "x"}]}', "needs tokenizer"),
        ('{"prompt": "x"}', "needs tokenizer"),
        ('{"prompt_ids": []}', "non-empty"),
        ('{"prompt_ids": [7]}', "token id 7 is outside the vocabulary's 0 to 6"),
        ("", "holds no prompt"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_prompt_ids(path, None, vocab_size=7)


def test_prompts_of_every_form_are_read_as_training_reads_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = chat_templates.make_tokenizer(tmp_path / "tok", chat_templates.QWEN25)
    plain = chat_templates.make_tokenizer(tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = {"role": "user", "content": "Hello there"}
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [
        {"prompt": "Hello there"},
        {"messages": [turn, {"role": "assistant", "content": "Hi"}], "prompt_ids": None},
        {"text": "Hello there"},
    ]))  # fmt: skip
    asked, chat, text = read_prompt_ids(path, str(folder), 600)
    assert asked == chat
    # As in training, a conversation goes before the text that somebody rendered it to.
    path.write_text(json.dumps({"prompt_ids": [], "messages": [turn], "text": "Hi"}) + "\n")
    assert read_prompt_ids(path, str(folder), 600) == [chat]
    path.write_text(json.dumps({"messages": [turn], "mood": "glad"}) + "\n")
    with caplog.at_level(logging.WARNING, logger="megatron_eagle"):
        read_prompt_ids(path, str(folder), 600)
    assert "reads: mood (1)" in caplog.text
    assert tokenizer.decode(asked).endswith(
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text == tokenizer("Hello there")["input_ids"]
    path.write_text(json.dumps({"prompt": "Hello there"}) + "\n")
    assert read_prompt_ids(path, str(plain), 600) == [text]
    path.write_text(json.dumps({"messages": [{**turn, "role": "narrator"}]}) + "\n")
    with pytest.raises(ValueError, match=r"p\.jsonl:1: message 1: unknown role 'narrator'"):
        read_prompt_ids(path, str(folder), 600)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--draft none --draft-tokens 0", "--draft-tokens must be at least 1, not 0"),
        ("--draft none --reinitialize", "--reinitialize needs --draft CKPT"),
        ("--draft none", "no such base checkpoint directory"),
        ("--draft none --context-parallel-size 0", "--context-parallel-size must be at least 1"),
    ],
)
def test_the_tool_refuses_in_one_line(
    flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("megatron_eagle.platform.enable", lambda: True)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt_ids": [1]}) + "\n")
    words = ["--base", str(tmp_path / "absent"), "--prompts", str(prompts), *flags.split()]
    assert tool.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
