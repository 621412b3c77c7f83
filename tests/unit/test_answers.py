"""Answers as a dataset: what is supervised, in which order, and how bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_eagle.data.answers import AnswerDocuments, read_answers
from megatron_eagle.data.documents import DocumentDataset, FittedDocuments

LINES = [
    {"prompt_ids": [1, 2, 3], "answer_ids": [10, 11]},
    {"prompt_ids": [4], "answer_ids": [12, 13, 14, 15, 16, 17]},
    {"prompt_ids": [5, 6], "answer_ids": [18]},
]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES) + "\n")
    return str(path)


def dataset(file: str, seq_length: int, num_samples: int, seed: int) -> DocumentDataset:
    documents = FittedDocuments(AnswerDocuments(file, vocab_size=20), seq_length)
    return DocumentDataset(documents, num_samples, seed)


def test_answers_are_supervised_and_prompts_are_not(file: str) -> None:
    data = dataset(file, seq_length=6, num_samples=3, seed=0)
    seen = []
    for index in range(3):
        sample = data[index]
        supervised = sample["tokens"][1:][sample["loss_mask"][:-1] > 0].tolist()
        assert sample["loss_mask"][-1] == 0
        seen.append(supervised)
    assert sorted(seen) == [[10, 11], [12, 13, 14, 15, 16], [18]], "the second is cut at 6 tokens"


def test_every_epoch_has_every_answer_in_an_order_of_its_own(file: str) -> None:
    data = dataset(file, seq_length=8, num_samples=30, seed=1)
    firsts = [int(data[i]["tokens"][0]) for i in range(30)]
    epochs = [firsts[i : i + 3] for i in range(0, 30, 3)]
    assert all(sorted(epoch) == [1, 4, 5] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = dataset(file, seq_length=8, num_samples=30, seed=1)
    assert [int(again[i]["tokens"][0]) for i in reversed(range(30))] == firsts[::-1]


def test_counts_are_of_answers_only(file: str) -> None:
    counts = AnswerDocuments(file, 20).counts(20)
    assert counts[10:19].tolist() == [1] * 9 and int(counts[:10].sum()) == 0
    assert counts.dtype == torch.int64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the data set is empty"),
        ('{"prompt_ids": [1], "answ', r":1: not JSON \("),
        ('{"prompt_ids": [1], "answer_ids": [2]}\n"\udcff"', r":2: not JSON \('utf-8' codec"),
        ("[" * 100_000, ":1: not JSON .*recursion"),
        ("[1, 2]", ":1: not a JSON object"),
        ('{"prompt_ids": [1]}', ":1: answer_ids must be a non-empty list of token ids"),
        ('{"prompt_ids": [], "answer_ids": [2]}', ":1: prompt_ids must be a non-empty list"),
        ('{"prompt_ids": [1], "answer_ids": [2.5]}', ":1: answer_ids must be a non-empty list"),
        (
            '{"prompt_ids": [1], "answer_ids": [20]}',
            ":1: answer_ids: token id 20 is outside the vocabulary's 0 to 19",
        ),
        ('{"prompt_ids": [-1], "answer_ids": [2]}', ":1: prompt_ids: token id -1 is outside"),
    ],
)
def test_bad_lines_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as raised:
        read_answers(str(path), 20)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_data .*absent: no such file"):
        read_answers(str(tmp_path / "absent"), 20)
