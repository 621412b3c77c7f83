"""The directory of features: codecs, plan, resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_eagle.data.documents import AnswerDocuments, DocumentDataset, FittedDocuments
from megatron_eagle.data.features import extract as module
from megatron_eagle.data.features.base_rows import BaseRows
from megatron_eagle.data.features.codec import RowCodec
from megatron_eagle.data.features.extract import (
    Replica,
    begin,
    cut_into_shards,
    extract,
    finish,
    survey,
)
from megatron_eagle.data.features.store import FeatureDocuments, FeaturePlan, verify
from megatron_eagle.pipeline.exchange import StageExchange

HIDDEN, LAYERS = 6, (1, 2)


class CountingBase:
    """Hidden states that tell token and position, as a base without attention would give."""

    tp_group = cp_group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    embedding_weight = torch.zeros(1)
    capture = SimpleNamespace(layers=LAYERS, local_layers=LAYERS)

    def local_shape(self, tokens: Tensor) -> tuple[int, int]:
        return tokens.shape[1], 1

    def run_stage(self, tokens: Tensor, hidden: None, packing: Any) -> tuple[dict, Tensor]:
        length = tokens.shape[1]
        positions = torch.arange(length) if packing is None else packing.positions[0]
        final = (tokens[0] * 100 + positions).float().unsqueeze(-1).repeat(1, HIDDEN).unsqueeze(1)
        return {2: final + 0.5, 1: final + 0.25}, final


ROWS = BaseRows(StageExchange(CountingBase()))  # type: ignore[arg-type]


@pytest.fixture
def documents(tmp_path: Path) -> FittedDocuments:
    rng = np.random.default_rng(0)
    lines = [
        {"prompt_ids": rng.integers(0, 20, 3 + i % 4).tolist(),
         "answer_ids": rng.integers(0, 20, 1 + i % 5).tolist()}
        for i in range(17)
    ]  # fmt: skip
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return FittedDocuments(AnswerDocuments(str(file), 20), 10)


def plan_for(documents: FittedDocuments, stored: str = "float32") -> tuple[FeaturePlan, int]:
    codecs = [RowCodec(stored, blocks, HIDDEN) for blocks in (2, 1)]
    sizes, digest = survey(documents, (codecs[0].row_bytes, codecs[1].row_bytes))
    plan = FeaturePlan(
        base="tiny", fingerprint="abc", source="x", documents=digest, seq_length=10,
        aux_layers=LAYERS, hidden_size=HIDDEN, vocab_size=20, stored=stored, computed="float32",
        layer_sizes=(1.0, 2.0), shards=cut_into_shards(sizes, 900),
    )  # fmt: skip
    return plan, sum(sizes)


def write(documents: FittedDocuments, folder: Path, stored: str = "float32") -> FeaturePlan:
    plan, total = plan_for(documents, stored)
    begin(plan, folder, total, len)
    for replica in range(2):
        extract(ROWS, documents, plan, folder, Replica(replica, 2), len)
    finish(folder)
    return plan


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 0.004), ("float8", 0.07)]
)
def test_rows_come_back(dtype: str, tolerance: float) -> None:
    codec = RowCodec(dtype, 2, 8)
    rows = torch.randn(5, 16)
    rows[:, 8:] *= 1000  # layers of very different size
    rows[0] = 0
    stored = codec.encode(rows)
    assert stored.shape == (5, codec.row_bytes) and stored.dtype == np.uint8
    sizes = rows.unflatten(1, (2, 8)).abs().amax(-1, keepdim=True)
    error = (codec.decode(stored).float() - rows).unflatten(1, (2, 8)).abs()
    assert (error <= tolerance * sizes).all()


@pytest.mark.parametrize("packed", [False, True])
def test_samples_hold_the_hidden_states_that_training_needs(
    documents: FittedDocuments, tmp_path: Path, packed: bool
) -> None:
    plan = write(documents, tmp_path / "features")
    assert len(plan.shards) > 3 and sum(plan.shards) == 17
    stored = FeatureDocuments(str(tmp_path / "features"), "abc", 20)
    assert torch.equal(stored.counts(20), documents.documents.counts(20))
    samples = DocumentDataset(FittedDocuments(stored, 10), 17, seed=1, packed=packed)
    plain = DocumentDataset(documents, 17, seed=1, packed=packed)
    for index in range(samples.samples_per_epoch):
        sample = samples[index]
        for key, value in plain[index].items():
            assert torch.equal(sample[key], value)
        expected = sample["tokens"] * 100.0 + sample["positions"]
        supervised = torch.nn.functional.pad(sample["loss_mask"][:-1], (1, 0)) > 0
        assert torch.equal(sample["final_hidden"][supervised][:, 0], expected[supervised])
        rows = sample["aux_hidden"].any(-1)
        assert torch.equal(sample["aux_hidden"][rows][:, 0], expected[rows] + 0.25)
        assert torch.equal(sample["aux_hidden"][rows][:, HIDDEN], expected[rows] + 0.5)
        assert rows[torch.roll(supervised, -1)].all(), "the row before a target reads its own"


def test_a_killed_extraction_goes_on(
    documents: FittedDocuments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, total = plan_for(documents)
    begin(plan, tmp_path / "features", total, len)
    finished = module.ShardWriter.finish
    done = []

    def killed_after_two(writer: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(writer.shard)
        finished(writer)

    monkeypatch.setattr(module.ShardWriter, "finish", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        extract(ROWS, documents, plan, tmp_path / "features", Replica(), len)
    monkeypatch.setattr(module.ShardWriter, "finish", finished)
    with pytest.raises(ValueError, match="unfinished; run the extraction again"):
        FeatureDocuments(str(tmp_path / "features"), "abc", 20)
    said: list[str] = []
    begin(plan, tmp_path / "features", total, said.append)
    assert f"{len(plan.shards) - 2} shards to write" in said[0]
    extract(ROWS, documents, plan, tmp_path / "features", Replica(), len)
    finish(tmp_path / "features")
    write(documents, tmp_path / "whole")
    for file in (tmp_path / "whole").iterdir():
        if file.suffix != ".npz":
            other = tmp_path / "features" / file.name
            assert file.suffix == ".json" or other.read_bytes() == file.read_bytes()
    assert not list((tmp_path / "features").glob("*.part"))
    verify(tmp_path / "features")


def test_features_that_do_not_fit_are_refused(
    documents: FittedDocuments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "features"
    plan = write(documents, folder)
    with pytest.raises(ValueError, match="features of another base, tiny"):
        FeatureDocuments(str(folder), "other", 20)
    other, total = plan_for(documents, "bfloat16")
    with pytest.raises(ValueError, match="holds features of other options, data or base"):
        begin(other, folder, total, len)
    with pytest.raises(ValueError, match=r"no index\.json in it"):
        FeatureDocuments(str(tmp_path / "absent"), "abc", 20)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"GiB to write, 0\.00 GiB free"):
        begin(plan, tmp_path / "full", total, len)
    rows = folder / "shard_00001.captured.bin"
    content = rows.read_bytes()
    rows.write_bytes(b"x" + content[1:])
    with pytest.raises(ValueError, match=r"shard_00001\.captured\.bin: damaged"):
        verify(folder)
    rows.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"shard_00001\.captured\.bin has \d+ bytes instead of"):
        FeatureDocuments(str(folder), "abc", 20)
    rows.unlink()
    with pytest.raises(ValueError, match=r"shard_00001\.captured\.bin is missing"):
        FeatureDocuments(str(folder), "abc", 20)
