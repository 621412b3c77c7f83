"""``megatron-eagle verify``: what is whole passes, and every kind of damage is named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_eagle.checkpoint.directory import BASE_JSON_NAME
from megatron_eagle.checkpoint.reader import CheckpointReader
from megatron_eagle.cli.prepare_data import main as prepare_data
from megatron_eagle.cli.verify import main
from megatron_eagle.hf.base.import_base import import_base
from tests.helpers.hf_directories import byte_tokenizer
from tests.helpers.native_files import namespace, save
from tests.helpers.tiny_hf import make_base
from tests.helpers.trained_draft import TrainedDraft


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a draft and a data set."""
    folder = tmp_path_factory.mktemp("verify")
    make_base(folder / "hf", "llama", num_hidden_layers=2)
    import_base(folder / "hf", folder / "base")
    TrainedDraft.make().save(folder / "draft")
    (folder / "texts.jsonl").write_text('{"text": "one two three"}\n' * 5)
    words = ["--input", folder / "texts.jsonl", "--tokenizer", byte_tokenizer(folder / "tokenizer")]
    assert prepare_data([*map(str, words), "--output-prefix", str(folder / "data")]) == 0
    return {"base": folder / "base", "draft": folder / "draft", "data": folder / "data"}


def test_whole_files_pass(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path) for path in places.values()]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1][:10] for line in shown[-3:]] == [
        "a base, 0.",
        "a draft, 0",
        "a data set",
    ]


def test_a_base_that_megatron_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what it is; a flipped bit in any entry, the optimizer's too, is named."""
    root = save(tmp_path / "model", namespace(), old=False)
    for place in (root, root / "iter_0000010"):
        assert main([str(place)]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert "a base (Megatron-LM checkpoint, iteration 10), 2 layers of width 8" in line
    checkpoint = CheckpointReader.open(root)
    keys = checkpoint.keys()
    for key in keys:
        chunk = checkpoint.first_chunk(key)
        file = checkpoint.directory / chunk.file
        whole = file.read_bytes()
        damaged = bytearray(whole)
        at = whole.index(data_of(checkpoint, key), chunk.start)
        damaged[at] ^= 1
        file.write_bytes(bytes(damaged))
        assert f"{file.name}: corrupted shard: {key}" in failure(root, capsys)
        file.write_bytes(whole)
    (root / "iter_0000010" / "metadata.json").unlink()
    assert "metadata.json" in failure(root, capsys)


def data_of(checkpoint: CheckpointReader, key: str) -> bytes:
    return checkpoint.load([key])[key].numpy().tobytes()


def failure(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("base", "**/*.distcp"),
        ("draft", "**/*.distcp"),
        ("data", "data.bin"),
        ("data", "data_loss_mask.bin"),
    ],
)
def test_damage_is_named(
    kind: str, pattern: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = places[kind]
    (file,) = (place.parent if kind == "data" else place).glob(pattern)
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-3])
        assert file.name in failure(place, capsys)
        rng, noticed = random.Random(2), 0
        for _ in range(8):  # what lies between the tensors has no checksum
            content = bytearray(whole)
            content[rng.randrange(len(content))] ^= 1
            file.write_bytes(bytes(content))
            noticed += main([str(place)]) == 2
        assert noticed >= 2 and file.name in capsys.readouterr().err
    finally:
        file.write_bytes(whole)
    assert main([str(place)]) == 0


def test_other_weights_under_an_old_description_are_told(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_base(tmp_path / "hf", "llama", num_hidden_layers=2, seed=8)
    import_base(tmp_path / "hf", tmp_path / "base")
    assert main([str(tmp_path / "base")]) == 0
    old = (places["base"] / BASE_JSON_NAME).read_text()
    (tmp_path / "base" / BASE_JSON_NAME).write_text(old)
    assert "not the weights that were imported" in failure(tmp_path / "base", capsys)


def test_a_summary_of_other_data_is_told(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = places["data"].with_name("data.json")
    text = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(text), "documents": 4}))
        assert "5 documents, its summary" in failure(places["data"], capsys)
    finally:
        file.write_text(text)


def test_anything_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / ("n" * 300)):
        assert str(path)[:40] in failure(path, capsys)
