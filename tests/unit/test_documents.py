"""Documents of either source as samples: masks, positions, cuts, packing, counts."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_eagle.data.bin_packing import pack
from megatron_eagle.data.chat.prepare import prepare
from megatron_eagle.data.chat.records import RecordOptions
from megatron_eagle.data.documents import (
    DocumentDataset,
    Documents,
    FittedDocuments,
    open_documents,
)
from tests.helpers import chat_templates as templates

VOCABULARY = 600
LINES = [
    {"prompt_ids": [1, 2, 3], "answer_ids": [10, 11]},
    {"prompt_ids": [4], "answer_ids": [12, 13, 14, 15]},
    {"prompt_ids": [5, 6], "answer_ids": [18]},
    {"prompt_ids": [7] * 9, "answer_ids": [19, 19]},
    {"prompt_ids": [8, 8, 8, 8], "answer_ids": [20] * 8},
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The same conversations as a JSONL and as an indexed data set."""
    folder = tmp_path_factory.mktemp("data")
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    tokenizer = templates.make_tokenizer(folder / "tokenizer")
    prepare([str(file)], str(folder / "set"), RecordOptions(str(tokenizer)), progress=len)
    return str(file), str(folder / "set")


def both(sources: tuple[str, str]) -> list[Documents]:
    return [open_documents(source, VOCABULARY) for source in sources]


def test_both_sources_give_the_same_samples_and_counts(sources: tuple[str, str]) -> None:
    answers, indexed = both(sources)
    assert torch.equal(answers.counts(30), indexed.counts(30))
    assert int(answers.counts(30).sum()) == sum(len(line["answer_ids"]) for line in LINES)
    for packed in (False, True):
        samples = [
            DocumentDataset(FittedDocuments(source, 12), 9, seed=3, packed=packed)
            for source in (answers, indexed)
        ]
        for index in range(9):
            for key, value in samples[0][index].items():
                assert torch.equal(value, samples[1][index][key])


def test_cutting_tells_what_is_lost(sources: tuple[str, str]) -> None:
    fitted = FittedDocuments(both(sources)[1], 8)
    assert (fitted.tokens_cut, fitted.left_out, len(fitted)) == (3 + 4, 1, 4)
    assert 3 not in fitted.chosen, "its answer begins behind the cut"
    assert sorted(fitted.lengths.tolist()) == [3, 5, 5, 8]
    with pytest.raises(ValueError, match="seq_length 1: no document has a supervised token"):
        FittedDocuments(both(sources)[1], 1)


def test_packed_samples_hold_every_document_once(sources: tuple[str, str]) -> None:
    fitted = FittedDocuments(both(sources)[0], 12)
    data = DocumentDataset(fitted, num_samples=8, seed=0, packed=True)
    assert data.samples_per_epoch == 4, "12, 11, 5 + 5 and 3 of 12"
    for epoch in range(2):
        found = []
        for index in range(4):
            sample = data[4 * epoch + index]
            starts = [*np.flatnonzero(sample["positions"] == 0).tolist(), 12]
            for start, end in pairwise(starts):
                assert sample["positions"][start:end].tolist() == list(range(end - start))
                assert sample["loss_mask"][end - 1] == 0, "its label is the next document's first"
                supervised = sample["loss_mask"][start : end - 1] > 0
                tokens = sample["tokens"][start:end]
                if supervised.any():
                    found.append((tokens.tolist(), tokens[1:][supervised].tolist()))
        expected = [(x["prompt_ids"] + x["answer_ids"], x["answer_ids"]) for x in LINES]
        assert sorted(found) == sorted(expected)


def test_packing_is_dense_and_reproducible() -> None:
    lengths = np.random.default_rng(0).integers(3, 400, 5000)
    groups = pack(lengths, 512, seed=1)
    assert sorted(np.concatenate(groups).tolist()) == list(range(5000))
    sums = np.asarray([lengths[group].sum() for group in groups])
    assert sums.max() <= 512
    assert sums.mean() > 0.99 * 512, "best fit leaves next to nothing empty"
    again = pack(lengths, 512, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(groups, again, strict=True))
    other = pack(lengths, 512, seed=2)
    assert any(not np.array_equal(a, b) for a, b in zip(groups, other, strict=False))


def test_what_cannot_be_opened_is_named(sources: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_data .*absent: no such file, and no"):
        open_documents(str(tmp_path / "absent"), VOCABULARY)
    for source in sources:
        with pytest.raises(ValueError, match=r"outside the vocabulary's 0 to 19"):
            open_documents(source, 20)


def test_data_path_refuses_a_mask_it_would_ignore(
    sources: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_eagle.training import data

    blend = SimpleNamespace(prefixes=[sources[1]])
    monkeypatch.setattr(data.TrainingBlend, "of", lambda args: blend)
    with pytest.raises(ValueError, match=r"--data-path .*set: .*; use --eagle-train-data .*set"):
        data._refuse_masks_that_would_be_ignored(SimpleNamespace(mock_data=False))
